"""The summary of the benchmark in three dimensions, and its tables as GitHub Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from shodh_moe.report import page
from shodh_moe.report.page import Block, Section, Text
from shodh_moe.report.table import Table

ROWS = {
    "mixture": "mixture",
    "continued": "mixture, path trained further",
    "low": "low expert",
    "high": "high expert",
    "average": "average of the experts",
    "ccm_coordinate": "CCM, coordinate",
    "ccm_scale": "CCM, scale",
    "ccm_prefix": "CCM, prefix",
    "oracle": "CCM, oracle alpha",
    "wrong_sign": "CCM, wrong sign",
}
MEASURES = ("latent_mse", "physical_mse")


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds of each domain's errors, and their changes.

    Args:
        results: the benchmark's results, one for each domain and seed.

    Returns:
        for each of ``domains``: ``parameter``, ``ends``, ``middle``, ``seeds``; ``regimes``, for each held-out value
        ``coordinate``, errors of ``persistence``, and ``rows``: for each row its errors (means over seeds) and, if it
        is merged, ``alpha`` by seed; ``ood_change``: for each row and measure the change of the error, mean over the
        held-out values, against the ``mixture`` and the control ``continued``, as [mean, smallest, largest] over seeds;
        ``gamma`` and ``own_path`` by seed; ``others``: predictions of other domains, and how many kept their bits.
    """
    domains: dict[str, list[dict[str, Any]]] = {}
    for result in sorted(results, key=lambda one: one["seed"]):
        domains.setdefault(result["domain"], []).append(result)
    return {"domains": {name: _domain(found) for name, found in domains.items()}}


def _domain(results: list[dict[str, Any]]) -> dict[str, Any]:
    first = results[0]
    others: dict[str, dict[str, int]] = {}
    for result in results:
        for name, counts in result["others"].items():
            total = others.setdefault(name, {"predictions": 0, "identical": 0})
            for key in total:
                total[key] += counts[key]
    return {
        **{key: first[key] for key in ("parameter", "ends", "middle")},
        "seeds": [result["seed"] for result in results],
        "gamma": [result["gamma"] for result in results],
        "own_path": {value: [one["own_path"][value] for one in results] for value in first["own_path"]},
        "others": others,
        "regimes": [_regime([one["regimes"][n] for one in results]) for n in range(len(first["regimes"]))],
        "ood_change": {
            row: {
                measure: {
                    base: _spread([_mean(one, row, measure) / _mean(one, base, measure) - 1 for one in results])
                    for base in ("mixture", "continued")
                }
                for measure in MEASURES
            }
            for row in ROWS
        },
    }


def _mean(result: dict[str, Any], row: str, measure: str) -> float:
    return fmean(regime["rows"][row]["errors"][measure] for regime in result["regimes"])


def _regime(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    rows: dict[str, dict[str, Any]] = {}
    for row in ROWS:
        own = [seed["rows"][row] for seed in seeds]
        rows[row] = {measure: fmean(one["errors"][measure] for one in own) for measure in MEASURES}
        if "alpha" in own[0]:
            rows[row]["alpha"] = [one["alpha"] for one in own]
    still = seeds[0]["rows"]["mixture"]["errors"]
    return {
        "value": seeds[0]["value"],
        "coordinate": seeds[0]["coordinate"],
        "persistence": {measure: still[f"{measure}_persistence"] for measure in MEASURES},
        "rows": rows,
    }


def _spread(values: list[float]) -> list[float]:
    return [fmean(values), min(values), max(values)]


def markdown(summary: dict[str, Any]) -> str:
    """Format what `summarise` returns, with ``cpu_seconds``."""
    sections = [
        Section(name[0].upper() + name[1:].replace("_", " "), list(_section(found)))
        for name, found in summary["domains"].items()
    ]
    cost = f"Training and measurements took {summary['cpu_seconds'] / 60:.0f} CPU minutes."
    return page.markdown([*sections, Section("Cost", [Text(cost)])])


def _section(found: dict[str, Any]) -> Iterator[Block]:
    seeds = ", ".join(map(str, found["seeds"]))
    parameter, (low, high) = found["parameter"].replace("_", " "), found["ends"]
    yield Text(
        f"Experts at {parameter} {low:g} and {high:g}, mixture at {found['middle']:g}. Seeds: {seeds}. Change of the "
        "error one snapshot ahead, mean over the held-out values, all outside of the range; mean over seeds, and in "
        "brackets the smallest and largest."
    )
    lines = []
    for row, changes in found["ood_change"].items():
        cells = [_change(changes[measure][base]) for measure in MEASURES for base in ("mixture", "continued")]
        lines.append([ROWS[row], *cells])
    head = [
        f"{measure.replace('_', ' ')}, against the {base}" for measure in MEASURES for base in ("mixture", "control")
    ]
    yield _table(["row", *head], lines)
    yield Text("Each held-out value: latent MSE, physical MSE (in brackets alpha, mean over seeds).")
    head = [f"{one['value']:g} (s = {one['coordinate']:+.2f})" for one in found["regimes"]]
    still = [_cell(one["persistence"]) for one in found["regimes"]]
    lines = [[ROWS[row], *(_cell(one["rows"][row]) for one in found["regimes"])] for row in ROWS]
    yield _table(["row", *head], [["persistence", *still], *lines])
    kept = ", ".join(
        f"{one['identical']} of {one['predictions']} predictions of {name.replace('_', ' ')}"
        for name, one in found["others"].items()
    )
    yield Text(f"Bit for bit as before the merge: {kept}." if kept else "There are no other domains.")
    least = min(share for shares in found["own_path"].values() for share in shares)
    gammas = " / ".join(f"{gamma:g}" for gamma in found["gamma"])
    yield Text(f"At least {100 * least:.1f} % of the held-out windows take the domain's path. gamma = {gammas}.")


def _change(values: list[float]) -> str:
    mean, low, high = (100 * value for value in values)
    return f"{mean:+.1f} % [{low:+.1f}, {high:+.1f}]"


def _cell(row: dict[str, Any]) -> str:
    alpha = f" ({fmean(row['alpha']):+.2f})" if "alpha" in row else ""
    return ", ".join(f"{row[measure]:.4g}" for measure in MEASURES) + alpha


def _table(head: list[str], lines: list[list[str]]) -> Table:
    return Table(head, lines, frozenset(range(1, len(head))))
