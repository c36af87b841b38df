"""Means, intervals and aims from the benchmark's result files (one for each family and seed).

Errors depend on the training seed and on the trajectory. The intervals come from a paired, crossed bootstrap: each
resample draws seeds, and trajectories of each regime, with replacement, and uses the same draw for all rows, so that
a seed or trajectory that is hard for every row does not widen the interval of a difference. All seeds see the same
trajectories, so one draw of trajectories serves all seeds of a resample. `scipy.stats.bootstrap` does not replace it:
it resamples a single axis, and its interpolated percentiles are NaN where resamples are infinite.

Shapes: S seeds, N trajectories, B = 1 + resamples (index 0 is the original data).
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import finite_json
from shodh_moe.ccm.bench.aims import OOD, READOUTS, ROWS, judge

Array = NDArray[np.float64]

RESAMPLES = 2000
COVERAGE = 0.95
GROUPS = {"interpolation": ("interpolation",), "ood": OOD, "ood_low": ("ood_low",), "ood_high": ("ood_high",)}


def summarise(results: list[dict[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Compute the numbers of the tables and figures, ready for JSON. The error of a rollout that blew up is None.

    Means weight regimes equally. A regime includes a row only if every seed has it there, and a group of regimes only
    if all of its regimes include it.

    Args:
        results: the benchmark's results, one per family and seed, in any order. An error of None or NaN means that the
            rollout blew up.
        seed: seed of the bootstrap.

    Returns:
        ``aims`` (see `judge`), total ``cpu_seconds``, ``resamples``, and for each of ``families``: ``name`` (that of
        its data, which several may share), ``parameter``, ``frames``, ``seeds``; ``rows``: for each row an estimate
        (``value``, ``low``, ``high``: 95 % interval) by group (`GROUPS`), ``reduction``, the estimates relative to
        ``anchor`` and ``best_endpoint`` (OOD), and ``blew_up``, the number of ``rollouts`` that did; ``regimes``: for
        each regime the mean ``errors`` by row and ``alpha`` by CCM row; ``incomplete``: rows that some seeds lack;
        ``chosen`` and ``straight_to`` by seed; ``sharpness`` by coordinate; ``cpu_seconds`` and ``wall_seconds`` by
        stage; ``seconds`` for one regime of prefix, merge and fine_tuned.

    Raises:
        UserError: there are no results, two with the same family and seed, or results of a family do not fit together.
    """
    if not results:
        raise UserError("there are no results of the CCM benchmark to summarise: run it first")
    by_family: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in sorted(results, key=lambda one: one["seed"]):
        by_family[result["family"]].append(result)
    order = dict.fromkeys(result["family"] for result in results)
    families = {name: _family(by_family[name], np.random.default_rng(seed)) for name in order}
    summary = {
        "families": families,
        "aims": [record for key, family in families.items() for record in judge(key, family)],
        "cpu_seconds": sum(sum(family["cpu_seconds"].values()) for family in families.values()),
        "resamples": RESAMPLES,
    }
    return finite_json(summary)


def _family(results: list[dict[str, Any]], rng: np.random.Generator) -> dict[str, Any]:
    _require_same(results)
    first = results[0]
    seeds_BS = resampling_weights(len(results), rng)
    regimes, means = [], []  # for each regime: its record, and the mean errors [B] by row
    blew_up, rollouts = dict.fromkeys(ROWS, 0), dict.fromkeys(ROWS, 0)
    incomplete: set[str] = set()
    for number, regime in enumerate(first["regimes"]):
        seed_rows = [result["regimes"][number]["rows"] for result in results]
        trajectories_BN = resampling_weights(len(next(iter(seed_rows[0].values()))["errors"]), rng)
        here: dict[str, Array] = {}
        for row in ROWS:
            if not all(row in one for one in seed_rows):
                incomplete.update({row} if any(row in one for one in seed_rows) else ())
                continue
            errors_SN = np.array([[_error(value) for value in one[row]["errors"]] for one in seed_rows])
            here[row] = resampled_means(errors_SN, seeds_BS, trajectories_BN)
            blew_up[row] += int(np.isinf(errors_SN).sum())
            rollouts[row] += errors_SN.size
        means.append(here)
        alpha = {
            row: [one[row]["alpha"] for one in seed_rows if "alpha" in one.get(row, {})]
            for row in (*READOUTS, "oracle")
        }
        regimes.append(
            {key: regime[key] for key in ("split", "coordinate", "value")}
            | {"errors": {row: float(values[0]) for row, values in here.items()}}
            | {"alpha": {row: float(np.mean(values)) for row, values in alpha.items() if values}}
        )
    splits = [regime["split"] for regime in regimes]
    rows = {
        row: _row(row, splits, means) | {"blew_up": blew_up[row], "rollouts": rollouts[row]}
        for row in ROWS
        if rollouts[row]
    }
    return {
        "name": first.get("name", first["family"]),
        "parameter": first["parameter"],
        "frames": first["frames"],
        "seeds": [result["seed"] for result in results],
        "rows": rows,
        "regimes": regimes,
        "incomplete": [row for row in ROWS if row in incomplete],
        **_other_entries(results),
    }


def _other_entries(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The entries of a family's summary other than errors."""
    sharpness = defaultdict(list)
    stages: dict[str, float] = defaultdict(float)
    wall: dict[str, float] = defaultdict(float)
    seconds: dict[str, list[float]] = defaultdict(list)
    for result in results:
        for stage, value in result.get("wall_seconds", {}).items():
            wall[stage] += value
        for what, value in result.get("seconds", {}).items():
            seconds[what].append(value)
        for entry in result.get("prefix", []):
            sharpness[entry["coordinate"]].append(_error(entry["sharpness"]))
        for stage, value in result.get("cpu_seconds", {}).items():
            stages[stage] += value
    return {
        "chosen": {str(result["seed"]): result.get("chosen", {}) for result in results},
        "straight_to": {str(r["seed"]): r["straightness"]["straight_to"] for r in results if "straightness" in r},
        "sharpness": {f"{s:+g}": float(np.mean(values)) for s, values in sorted(sharpness.items())},
        "cpu_seconds": dict(stages),
        "wall_seconds": dict(wall),
        "seconds": {what: float(np.mean(values)) for what, values in seconds.items()},
    }


def _row(row: str, splits: list[str], means: list[dict[str, Array]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for group, members in GROUPS.items():
        mean_B = _group(row, members, splits, means)
        if mean_B is not None:
            found[group] = estimate(mean_B)
    found["reduction"] = {}
    error_B = _group(row, OOD, splits, means)
    for base in ("anchor", "best_endpoint"):
        base_B = _group(base, OOD, splits, means)
        if error_B is not None and base_B is not None:
            found["reduction"][base] = estimate(reduction(error_B, base_B))
    return found


def _group(row: str, members: tuple[str, ...], splits: list[str], means: list[dict[str, Array]]) -> Array | None:
    """The row's mean over the regimes of the splits: [B]; None unless it was measured in all of them."""
    values = [here.get(row) for split, here in zip(splits, means, strict=True) if split in members]
    measured = [value for value in values if value is not None]
    return np.mean(measured, axis=0) if measured and len(measured) == len(values) else None


def _require_same(results: list[dict[str, Any]]) -> None:
    """Check that the results of one family have the same regimes, trajectories and frames. Raises `UserError`."""
    first = results[0]
    for number, result in enumerate(results):
        name = f"the results of {result['family']} for seed {result['seed']}"
        if number and result["seed"] == results[number - 1]["seed"]:
            raise UserError(f"{name} are given twice: leave one out")
        places = [[(one["split"], one["coordinate"]) for one in each["regimes"]] for each in (first, result)]
        if places[0] != places[1] or result["frames"] != first["frames"]:
            raise UserError(f"{name} have different regimes or frames from seed {first['seed']}: run one of them again")
        for regime, expected in zip(result["regimes"], first["regimes"], strict=True):
            where = f"{name}, {regime['split']} at s = {regime['coordinate']:+g},"
            if unknown := sorted(set(regime["rows"]) - set(ROWS)):
                raise UserError(f"{where} have an unknown row {unknown[0]}: rows are {', '.join(ROWS)}")
            counts = {len(row["errors"]) for rows in (regime["rows"], expected["rows"]) for row in rows.values()}
            if len(counts) != 1 or 0 in counts or not regime["rows"]:
                raise UserError(
                    f"{where} have rows with different numbers of trajectories, or none: run that seed again"
                )


def _error(value: float | None) -> float:
    """An error from a result file; infinite if the rollout blew up."""
    return float("inf") if value is None or np.isnan(value) else float(value)


def resampling_weights(count: int, rng: np.random.Generator, resamples: int = RESAMPLES) -> Array:
    """Weights of ``count`` items in each resample, [B, count]. Each row sums to 1; row 0 weights all items equally."""
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
    return np.concatenate([np.ones((1, count)), drawn]) / count


def resampled_means(errors_SN: Array, seeds_BS: Array, trajectories_BN: Array) -> Array:
    """Mean error of each resample, [B]; infinite if the resample drew an infinite error."""
    finite = np.isfinite(errors_SN)
    # 0 * inf is NaN: an infinite error that a resample did not draw must not count.
    mean_B = np.einsum("bs,sn,bn->b", seeds_BS, np.where(finite, errors_SN, 0.0), trajectories_BN, optimize=True)
    drew_B = np.einsum("bs,sn,bn->b", seeds_BS, (~finite).astype(float), trajectories_BN, optimize=True) > 0
    return np.where(drew_B, np.inf, mean_B)


def reduction(errors_B: Array, base_B: Array) -> Array:
    """1 - error / error of the base, [B]; NaN where the base is infinite or 0."""
    usable = np.isfinite(base_B) & (base_B > 0)
    return np.where(usable, 1 - errors_B / np.where(usable, base_B, 1.0), np.nan)


def estimate(values_B: Array) -> dict[str, Any]:
    """The ``value`` of the original data, and the ends ``low`` and ``high`` of its 95 % percentile interval."""
    # Use order statistics: one cannot interpolate between an infinite value and its neighbour.
    resampled = np.sort(values_B[1:])
    outside = (1 - COVERAGE) / 2 * len(resampled)
    low, high = resampled[math.floor(outside)], resampled[len(resampled) - 1 - math.floor(outside)]
    return {"value": float(values_B[0]), "low": float(low), "high": float(high)}
