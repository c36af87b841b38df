"""`shodh merge calibrate`: fit gamma for the readout ``scale`` and measure how far the path is straight.

Only the family's ``validation`` files are read.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import require_writable, write_text
from shodh_moe.ccm import data
from shodh_moe.ccm.data import Trajectories
from shodh_moe.ccm.expert import Expert, load_ends
from shodh_moe.ccm.readout import BEND_TOLERANCE, FRAMES, GAMMAS, bend, fit_scale, json_number, probes, straight_to
from shodh_moe.checkpoint.state import load_state
from shodh_moe.merging.config import Target, load_targets
from shodh_moe.merging.manifest import versions
from shodh_moe.merging.settings import singles

SPLIT = "validation"


def calibrate(config: Path, output: Path | None = None) -> dict[str, Any]:
    """Fit gamma for the two experts of a ccm config, print the result, and return it.

    Args:
        config: a config of `shodh merge`; its models may also be run folders. Its alpha or coordinate is ignored.
        output: a new JSON file for the result.

    Raises:
        UserError: the config is not a ccm config with two models, or has a sweep; experts or validation data are
            missing, damaged or do not fit each other; no gamma gives finite rollouts; or ``output`` exists.
    """
    target = load_targets(config, config, {"found": "scale", "value": 0.0})[0]
    if output is not None:
        if output.exists():
            raise UserError(f"{output} exists: remove it, or choose another --output")
        require_writable(output.parent)
    low, high = load_ends(target)
    _require_ends(target, low, high)
    validation = _validation(low, high)
    given = max(FRAMES, low.config.network.history)
    if low.config.family.snapshots <= given:
        raise UserError(
            f"the validation data have {low.config.family.snapshots} snapshots, and the first {given} are given: "
            "train the experts with more family.snapshots"
        )
    fitted = fit_scale(low, high, validation, given)
    if not math.isfinite(fitted["errors"][str(fitted["gamma"])]):
        raise UserError(f"rollouts of {low.path} and {high.path} on the validation data are not finite at any gamma")
    bends = bend(low, high, probes(validation, low.config.network.history))
    found = {
        "gamma": fitted["gamma"],
        "errors": {gamma: json_number(error) for gamma, error in fitted["errors"].items()},
        "straight": straight_to(bends),
        "bend": {f"{alpha + 0.0:+.2f}": json_number(value) for alpha, value in bends.items()},
        "family": low.config.family.name,
        "split": SPLIT,
        "regimes": [{"coordinate": r.coordinate, "value": r.value, "trajectories": len(r.fields)} for r in validation],
        "given_frames": given,
        "experts": {"low": _state_record(low), "high": _state_record(high)},
        "versions": versions(),
    }
    if output is not None:
        write_text(output, json.dumps(found, indent=2) + "\n")
    print("\n".join(_lines(found)), flush=True)
    return found


def _require_ends(target: Target, low: Expert, high: Expert) -> None:
    """Refuse experts at the wrong ends, and coordinates for which gamma would mean something else than for s."""
    for expert, other in ((low, "endpoint_high"), (high, "endpoint_low")):
        if expert.config.splits == [other]:
            raise UserError(f"{expert.path} was trained on {other} and belongs at the other end: swap the two models")
    assert target.composition
    family, power = low.config.family.family(), singles(target.config.parameters.get("power", 1))[0]
    for ends in target.composition.layout.ends.values():
        as_parameter = all(map(math.isclose, ends, (family.low, family.high))) and power == family.power
        if not as_parameter and (ends != (-1, 1) or power != 1):
            raise UserError(
                f"{target.output}: gamma is fitted for {family.low:g} and {family.high:g} as the models' coordinates, "
                f"with `power: {family.power:g}` under parameters: use these"
            )


def _validation(low: Expert, high: Expert) -> list[Trajectories]:
    family, folder = low.config.family.family(), low.config.family.folder()
    regimes, high_regimes = (
        [regime for regime in data.regimes(one.config.family.family(), folder) if regime.split == SPLIT]
        for one in (low, high)
    )
    if [regime.request for regime in regimes] != [regime.request for regime in high_regimes]:
        raise UserError(
            f"{low.path} and {high.path} have different validation data of the family {family.name}: "
            "train them with the same grid, snapshots and seed of the family"
        )
    for regime in regimes:
        if not regime.path.exists():
            raise UserError(
                f"the validation data {regime.path} do not exist: make them with `shodh expert data --config CONFIG`, "
                f"and the config that {low.path} was trained with"
            )
    return data.read_split(family, folder, SPLIT)


def _lines(found: dict[str, Any]) -> list[str]:
    gamma, errors = found["gamma"], found["errors"]
    places = ", ".join(f"{regime['coordinate']:+g}" for regime in found["regimes"])
    shown = {float(key): math.inf if error is None else error for key, error in errors.items()}
    more = shown[1.0] / shown[gamma] - 1 if shown[gamma] else 0.0
    lines = [
        f"{found['family']}, validation regimes at s = {places}; nRMSE after the first {found['given_frames']} frames"
    ]
    lines += ["", "gamma   error"]
    lines += [f"{key:5.1f}   {error:.4g}{'   smallest' if key == gamma else ''}" for key, error in shown.items()]
    lines += ["", f"gamma = 1: error {shown[1.0]:.4g}, {more:.1%} more than at {gamma:g}"]
    if gamma in (GAMMAS[0], GAMMAS[-1]):
        lines.append(f"gamma {gamma:g} is at the end of the range: the coordinates say little about these experts")
    lines += ["", "alpha    bend"]
    lines += [f"{alpha}   {math.nan if value is None else value:.3f}" for alpha, value in found["bend"].items()]
    lines += ["", f"straight (bend at most {BEND_TOLERANCE:g}) up to |alpha| = {found['straight']:g}"]
    return [*lines, "", "under parameters:", f"gamma: {gamma:g}", f"straight: {found['straight']:g}"]


def _state_record(expert: Expert) -> dict[str, Any]:
    """Identify the checkpoint of an expert by its path and the hash recorded in its ``state.json``."""
    return {"path": str(expert.path), "state_sha256": load_state(expert.path)["sha256"]}
