"""The rows that the benchmark compares, and the aims that it judges them by.

Each readout is judged separately: picking the one with the smallest test error would be a choice made on test data.
"""

from __future__ import annotations

from typing import Any

import numpy as np

ROWS = {
    "anchor": "anchor",
    "low": "low expert",
    "high": "high expert",
    "best_endpoint": "best endpoint by validation",
    "average": "endpoint average",
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "dare": "DARE",
    "ccm_coordinate": "CCM, coordinate",
    "ccm_scale": "CCM, scale",
    "ccm_prefix": "CCM, prefix",
    "oracle": "CCM, oracle alpha",
    "wrong_sign": "CCM, wrong sign",
    "conditioned": "conditioned network",
    "fine_tuned": "fine-tuned on K frames",
}
READOUTS = ("ccm_coordinate", "ccm_scale", "ccm_prefix")
OOD = ("ood_low", "ood_high")

_FAMILIES = {
    "reaction_diffusion": "reaction-diffusion",
    "navier_stokes": "Navier-Stokes",
    "shallow_water": "shallow water",
}

REDUCTIONS = {"reaction_diffusion": 0.60, "navier_stokes": 0.50, "shallow_water": 0.25}
PAPER = {  # arXiv 2605.14546: reduction, and the readout that reached it
    "reaction_diffusion": (0.542, "ccm_coordinate"),
    "navier_stokes": (0.428, "ccm_scale"),
    "shallow_water": (0.138, "ccm_prefix"),
}
WORSE_THAN_ENDPOINT = 1.02
WORSE_THAN_ORACLE = 1.10

REDUCTION = "reduction of the OOD error relative to the anchor"
BETTER_ENDPOINT = "error relative to the better endpoint expert in the same regime, worst regime"
CHOSEN_ENDPOINT = "error relative to the best endpoint expert by validation, worst regime"
ORACLE_WORST = "error relative to the oracle alpha, worst OOD regime"
ORACLE_MEAN = "error relative to the oracle alpha, mean over OOD regimes"


def family_title(name: str) -> str:
    """Spell out the name of a family."""
    return _FAMILIES.get(name, name.replace("_", " "))


def judge(name: str, family: dict[str, Any]) -> list[dict[str, Any]]:
    """Judge each aim for each readout whose rows were measured.

    Args:
        name: the family's key in the benchmark.
        family: its ``name``, ``rows`` and ``regimes``, as `summarise` makes them; errors of rollouts that blew up are
            infinite.

    Returns:
        records with ``family``, ``readout``, ``aim``, ``target``, ``value``, ``held`` (whether the aim is met) and
        ``where`` (the worst regime, or what the value is a mean over). A reduction must be at least its target, a ratio
        at most.
    """
    regimes = family["regimes"]
    ood = [regime for regime in regimes if regime["split"] in OOD]
    found = []
    for readout in READOUTS:

        def record(aim: str, target: float, value: float, where: str, readout: str = readout) -> None:
            held = value >= target if aim == REDUCTION else value <= target  # NaN: not met
            found.append(
                {
                    "family": name,
                    "readout": readout,
                    "aim": aim,
                    "target": target,
                    "value": value,
                    "held": bool(held),
                    "where": where,
                }
            )

        reduced = family["rows"].get(readout, {}).get("reduction", {}).get("anchor")
        if reduced and (target := REDUCTIONS.get(family.get("name", name))):
            record(REDUCTION, target, reduced["value"], f"mean over {len(ood)} OOD regimes")
        for aim, base in ((BETTER_ENDPOINT, ("low", "high")), (CHOSEN_ENDPOINT, ("best_endpoint",))):
            if ratios := _ratios(regimes, readout, base):
                where, worst = max(ratios, key=lambda one: one[1])
                record(aim, WORSE_THAN_ENDPOINT, worst, where)
        if ratios := _ratios(ood, readout, ("oracle",)):
            where, worst = max(ratios, key=lambda one: one[1])
            record(ORACLE_WORST, WORSE_THAN_ORACLE, worst, where)
            mean = float(np.mean([ratio for _, ratio in ratios]))
            record(ORACLE_MEAN, WORSE_THAN_ORACLE, mean, f"mean over {len(ratios)} OOD regimes")
    return found


def _ratios(regimes: list[dict[str, Any]], row: str, base: tuple[str, ...]) -> list[tuple[str, float]]:
    """The row's error over the smallest error of the base rows, by regime; infinite where the row blew up."""
    found = []
    for regime in regimes:
        errors = regime["errors"]
        if row not in errors or any(one not in errors for one in base):
            continue
        error, smallest = errors[row], min(errors[one] for one in base)
        if np.isinf(error) or smallest == 0:
            ratio = 1.0 if error == smallest == 0 else np.inf
        else:
            ratio = error / smallest
        found.append((f"s = {regime['coordinate']:+g}", float(ratio)))
    return found
