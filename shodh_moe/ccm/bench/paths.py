"""Compare the paths between experts (the line, parabolas, alphas by group), and judge the aims of curved paths.

For each readout, one path is chosen by its error on validation regimes, so that no test regime decides.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from shodh_moe.ccm.bench.aims import OOD, REDUCTIONS
from shodh_moe.ccm.bench.vary import UNCHANGED

READOUTS = ("ccm_coordinate", "ccm_prefix")
TWO_NETWORKS = "outputs"  # it costs twice as much as one merged network

ORACLE = "error relative to the oracle alpha on the line, mean over OOD regimes"
COORDINATE = "reduction of the OOD error relative to the anchor, readout coordinate"
GAP = "share of the gap between the line and the conditioned network that is closed"
TARGETS = {ORACLE: 1.05, GAP: 0.5}
GAPS = ("navier_stokes", "shallow_water")  # families for which the gap is an aim


def compare_paths(
    key: str, family: dict[str, Any], variants: dict[str, dict[str, Any]], paths: dict[str, str | None]
) -> dict[str, Any]:
    """The numbers of each path of a family, the chosen path of each readout, and the aims.

    Args:
        key: the family's key in the benchmark.
        family: its entry in `summarise`; all errors count after the same frames as those of ``variants``.
        variants: its entry in `summarise_variants`.
        paths: the names of the variants that are paths, the line first, and their ``curve``.

    Returns:
        ``rows``: for each path and readout ``validation`` and ``ood`` (mean errors), ``reduction`` (relative to the
        anchor), ``oracle`` and ``gap`` (the aims' numbers) and ``chosen``; ``aims``: records with ``readout``,
        ``aim``, ``target``, ``value`` and ``held``, for the chosen paths. Numbers that cannot be computed are NaN.
    """
    conditioned = _ood(family, "conditioned")
    rows = []
    for readout in READOUTS:
        line = _ood(variants[UNCHANGED], readout)
        for name in paths:
            found = variants[name]
            error = _ood(found, readout)
            rows.append(
                {
                    "path": name,
                    "readout": readout,
                    "validation": found["validation"][readout],
                    "ood": error,
                    "reduction": 1 - _ratio(error, _ood(found, "anchor")),
                    "oracle": _to_oracle(found, variants[UNCHANGED], readout),
                    "gap": _ratio(line - error, line - conditioned),
                    "chosen": False,
                }
            )
        candidates = [row for row in rows if row["readout"] == readout and paths[row["path"]] != TWO_NETWORKS]
        min(candidates, key=lambda row: row["validation"])["chosen"] = True
    return {"rows": rows, "aims": _judge(family.get("name", key), [row for row in rows if row["chosen"]])}


def _judge(name: str, chosen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for row in chosen:
        wanted = {ORACLE: row["oracle"]}
        if name in GAPS:
            wanted[GAP] = row["gap"]
        if row["readout"] == "ccm_coordinate" and name in REDUCTIONS:
            wanted[COORDINATE] = row["reduction"]
        for aim, value in wanted.items():
            target = TARGETS.get(aim, REDUCTIONS.get(name, math.nan))
            held = value <= target if aim == ORACLE else value >= target  # NaN: not met
            where = {"readout": row["readout"], "path": row["path"]}
            found.append({**where, "aim": aim, "target": target, "value": value, "held": held})
    return found


def _ood(found: dict[str, Any], row: str) -> float:
    return _number(found["rows"].get(row, {}).get("ood", {}).get("value"))


def _to_oracle(found: dict[str, Any], line: dict[str, Any], readout: str) -> float:
    """Mean over OOD regimes of the error divided by that of the best alpha on the line."""
    ratios = [
        _ratio(_number(here["errors"].get(readout)), _number(there["errors"].get("oracle")))
        for here, there in zip(found["regimes"], line["regimes"], strict=True)
        if here["split"] in OOD
    ]
    return float(np.mean(ratios))


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _ratio(value: float, base: float) -> float:
    return value / base if base else math.nan
