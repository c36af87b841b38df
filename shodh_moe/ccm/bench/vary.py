"""Measure the variants of a family's benchmark for one seed, and summarise them: one row each.

As in measure.py, choices are made on validation regimes. Only out-of-distribution regimes are measured, since a row
counts their errors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import finite_json, write_text
from shodh_moe.ccm.bench.aims import OOD
from shodh_moe.ccm.bench.baselines import mean_error, oracle
from shodh_moe.ccm.bench.config import BenchConfig, FamilyBench, checkpoint_of_last_step
from shodh_moe.ccm.bench.summary import summarise
from shodh_moe.ccm.bench.variants import THROUGH_ANCHOR, Variant
from shodh_moe.ccm.curve import (
    Curve,
    by_group,
    by_layer,
    direction_of_twins,
    distance,
    fit_groups,
    line,
    quadratic,
    random_direction,
    require_one_anchor,
)
from shodh_moe.ccm.data import Trajectories, read_split
from shodh_moe.ccm.expert import Expert, compose, load_expert, require_same_network
from shodh_moe.ccm.jacobian import extrapolated, straightened_middle
from shodh_moe.ccm.readout import clip, finite_error, fit_prefix_on, probes, rollout_errors
from shodh_moe.checkpoint.read import CheckpointReader
from shodh_moe.config.compare import fingerprint

VERSION = 2  # increase it when the same experts would give different numbers
UNCHANGED = "unchanged"  # the row of the family's own CCM
ROWS = ("anchor", "ccm_coordinate", "ccm_prefix", "oracle")
PROBED = 5  # trajectories of each validation regime whose frames the Jacobian sees
BOWS = (0.0, 0.25, 0.5, 0.75, 1.0)


def variants_of(one: FamilyBench) -> dict[str, Variant]:
    """The variants of a family, the unchanged one first; none if the config has none."""
    if not one.variants:
        return {}
    return {UNCHANGED: Variant(oracle=any(other.oracle for other in one.variants.values())), **one.variants}


def variant_path(config: BenchConfig, key: str, seed: int, name: str) -> Path:
    return config.folder / "results" / "variants" / f"{key}-{seed}-{name}.json"


def unmeasured(config: BenchConfig, key: str, seed: int) -> list[str]:
    """The names of the variants that have no result for the current experts and settings."""
    return [name for name in variants_of(config.families[key]) if not _is_measured(config, key, seed, name)]


def _is_measured(config: BenchConfig, key: str, seed: int, name: str) -> bool:
    try:
        found = json.loads(variant_path(config, key, seed, name).read_text())
        return bool(found["key"] == _key(config, key, seed, name))
    except (OSError, ValueError, KeyError):
        return False


def _key(config: BenchConfig, key: str, seed: int, name: str) -> str:
    one = config.families[key]
    variant = variants_of(one)[name]
    last = {role: checkpoint_of_last_step(one) for role, one in config.experts_of_variant(key, seed, variant).items()}
    hashes = {role: CheckpointReader(path).state["sha256"] for role, path in last.items()}
    settings = (one.family.folder().name, one.frames, _given(one, variant), variant.model_dump())
    return fingerprint(VERSION, hashes, *settings)


def _given(one: FamilyBench, variant: Variant) -> int:
    """Frames that are given. Variants of the prefix's length all get as many as the longest, to be comparable."""
    if variant.frames is None:
        return one.frames
    return max(one.frames, *(other.frames or 0 for other in one.variants.values()))


def vary(config: BenchConfig, key: str, seed: int) -> None:
    """Measure all variants of one family and seed that have no current result, and write a file for each.

    Raises:
        UserError: an expert or a file of the family is missing or damaged, or experts do not fit together.
    """
    one = config.families[key]
    family, folder = one.family.family(), one.family.folder()
    validation = read_split(family, folder, "validation")
    tested = [split for split in OOD if family.coordinates.get(split)]
    regimes = [(split, regime) for split in tested for regime in read_split(family, folder, split)]
    for name in unmeasured(config, key, seed):
        result = {
            "key": _key(config, key, seed, name),
            "family": key,
            "seed": seed,
            "variant": name,
            "parameter": family.parameter,
            **_measure(config, key, seed, variants_of(one)[name], validation, regimes),
        }
        path = variant_path(config, key, seed, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(finite_json(result), indent=1) + "\n")


def _measure(
    config: BenchConfig,
    key: str,
    seed: int,
    variant: Variant,
    validation: list[Trajectories],
    regimes: list[tuple[str, Trajectories]],
) -> dict[str, Any]:
    one = config.families[key]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    needed = config.experts_of_variant(key, seed, variant)
    experts = {role: load_expert(checkpoint_of_last_step(expert), device) for role, expert in needed.items()}
    base = experts["base_anchor"]
    low, high = ends_of(variant, experts, seed)
    curve, chosen = _path(one, variant, low, high, experts, validation)
    given = _given(one, variant)

    def readouts(regime: Trajectories) -> dict[str, Any]:
        alpha = clip(regime.coordinate)
        return {
            "ccm_coordinate": {"alpha": alpha, "errors": _errors(curve(alpha), regime, given)},
            "ccm_prefix": _prefix(one, variant, curve, (low, high), regime, given),
        }

    if variant.is_path:
        chosen["validation_error"] = _mean_errors([readouts(regime) for regime in validation])
    found = []
    for split, regime in regimes:
        rows: dict[str, Any] = {"anchor": {"errors": _errors(base, regime, given)}, **readouts(regime)}
        if variant.oracle:
            known = [rows[row]["alpha"] for row in ("ccm_coordinate", "ccm_prefix")]
            best, errors = oracle(curve, regime, given, known)
            rows["oracle"] = {"alpha": best, "errors": errors.mean(1).tolist()}
        found.append({"split": split, "coordinate": regime.coordinate, "value": regime.value, "rows": rows})
    return {"frames": given, "distance": distance(low, high, base), "chosen": chosen, "regimes": found}


def ends_of(variant: Variant, experts: dict[str, Expert], seed: int) -> tuple[Expert, Expert]:
    """The ends of a variant's line at s = -1 and 1. Raises `UserError` if its experts do not fit together."""
    low, high = experts["low"], experts["high"]
    require_same_network([low, high])
    require_one_anchor([low, high, *(experts[role] for role in ("twin", "middle") if role in experts)])
    if variant.ends:
        # On the same line, alpha is again the coordinate.
        low, high = compose(low, high, -1 / variant.ends), compose(low, high, 1 / variant.ends)
    if variant.layers:
        low, high = (by_layer(low, high, dict.fromkeys(variant.layers, sign)) for sign in (-1.0, 1.0))
    elif variant.direction == "random":
        low, high = random_direction(low, high, seed)
    elif variant.direction == "twins":
        low, high = direction_of_twins(low, high, low, experts["twin"])
    elif variant.direction == "none":
        low = high = compose(low, high, 0.0)
    return low, high


def _path(
    one: FamilyBench,
    variant: Variant,
    low: Expert,
    high: Expert,
    experts: dict[str, Expert],
    validation: list[Trajectories],
) -> tuple[Curve, dict[str, Any]]:
    """The path of a variant, and what was chosen for it on the validation regimes."""
    if not variant.curve:
        return line(low, high), {}
    if variant.curve == "outputs":
        return lambda alpha: extrapolated(low, high, alpha), {}
    anchor = experts["base_anchor"]
    if variant.curve in THROUGH_ANCHOR:
        require_one_anchor([low, high], anchor)
    if variant.curve in ("jacobian", "anchor_jacobian"):
        frames = probes(validation, one.network.history, PROBED)
        middle = straightened_middle(low, high, frames, anchor if variant.curve == "anchor_jacobian" else None)
    else:
        middle = anchor if variant.curve == "anchor" else experts["middle"]
    if variant.bow == "full":
        return quadratic(low, middle, high), {}

    def error(bow: float) -> float:
        curve = quadratic(low, middle, high, bow=bow)
        return sum(mean_error(curve(clip(r.coordinate)), [r], one.frames) for r in validation) / len(validation)

    errors = {bow: error(bow) for bow in BOWS}
    best = min(errors, key=lambda bow: errors[bow])
    return quadratic(low, middle, high, bow=best), {
        "bow": best,
        "validation_errors": {str(k): v for k, v in errors.items()},
    }


def _prefix(
    one: FamilyBench,
    variant: Variant,
    curve: Curve,
    ends: tuple[Expert, Expert],
    regime: Trajectories,
    given: int,
) -> dict[str, Any]:
    frames, seen = variant.frames or one.frames, regime.fields
    if variant.noise:
        random = torch.Generator().manual_seed(0)
        std = torch.tensor(ends[0].scale.std)[:, None, None]
        seen = seen[:, :frames]
        seen = seen + variant.noise * std * torch.randn(seen.shape, generator=random)
    prefix = fit_prefix_on(curve, ends[0].config.network.history, seen, frames)
    if not variant.groups:
        return {"alpha": prefix.alpha, "errors": _errors(curve(prefix.alpha), regime, given)}
    alphas, _ = fit_groups(*ends, seen, prefix.alpha, frames)
    mean = sum(alphas.values()) / len(alphas)
    return {"alpha": mean, "alphas": alphas, "errors": _errors(by_group(*ends, alphas), regime, given)}


def _mean_errors(regimes: list[dict[str, Any]]) -> dict[str, float]:
    """The mean error of each row over regimes; infinite if a rollout blew up."""
    means = {row: torch.tensor([regime[row]["errors"] for regime in regimes]).mean() for row in regimes[0]}
    return {row: finite_error(mean) for row, mean in means.items()}


def _errors(expert: Expert, regime: Trajectories, given: int) -> list[float]:
    found: list[float] = rollout_errors(expert, regime.fields, regime.coordinate, given).mean(1).tolist()
    return found


def summarise_variants(config: BenchConfig) -> dict[str, dict[str, Any]]:
    """For each family with variants and each of these: the estimates of its rows, and the experts' distance.

    Raises:
        UserError: a result is missing.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, one in config.families.items():
        for name in variants_of(one):
            results = list(_results(config, key, name))
            family = summarise(results)["families"][key]
            distances = [result["distance"] for result in results]
            found.setdefault(key, {})[name] = {
                "rows": family["rows"],
                "regimes": family["regimes"],
                "frames": family["frames"],
                "distance": sum(distances) / len(distances),
                "chosen": family["chosen"],
                "validation": _mean_validation(results),
            }
    return found


def _mean_validation(results: list[dict[str, Any]]) -> dict[str, float]:
    """The mean validation error over seeds by row, if it was measured; infinite if a rollout blew up."""
    errors = [result["chosen"].get("validation_error", {}) for result in results]
    return {row: sum(math.inf if one[row] is None else one[row] for one in errors) / len(errors) for row in errors[0]}


def _results(config: BenchConfig, key: str, name: str) -> Iterator[dict[str, Any]]:
    for seed in config.seeds:
        path = variant_path(config, key, seed, name)
        if not path.exists():
            raise UserError(f"{path} is missing: run `shodh bench ccm` with this config until it finishes")
        yield json.loads(path.read_text())
