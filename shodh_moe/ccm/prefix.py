"""`shodh merge prefix`: find alpha from the first frames of a user's trajectories, and merge at that alpha."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import h5py
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import sha256
from shodh_moe.ccm import data
from shodh_moe.ccm.curve import fit_groups, group_names
from shodh_moe.ccm.expert import Expert, load_ends
from shodh_moe.ccm.family_config import every_snapshot
from shodh_moe.ccm.readout import BANK, FLAT, FRAMES, Prefix, fit_prefix, json_number
from shodh_moe.ccm.regime_folder import Stored, read_stored
from shodh_moe.merging import merge
from shodh_moe.merging.checks import require_apart
from shodh_moe.merging.config import load_targets
from shodh_moe.merging.inputs import open_input
from shodh_moe.merging.merge import parse_size

TRAJECTORIES = 16  # number read from a file; published files have a thousand, but more of them add little


def merge_by_prefix(
    config: Path,
    file: Path,
    frames: int = FRAMES,
    output: Path | None = None,
    memory_limit: str = "1GiB",
    out_shard_size: str = "5GB",
    by_group: bool = False,
) -> Path:
    """Merge the two experts of a ccm config at the alpha that predicts the first frames of ``file`` best.

    Args:
        config, output, memory_limit, out_shard_size: as in `merge`; the config's alpha or coordinate is ignored. The
            memory limit applies to the merge, after the networks have been freed.
        file: trajectories of one regime, in a file of a family, of The Well or of PDEBench.
        frames: number of frames used, K.
        by_group: find an alpha for each of `curve.GROUPS` instead of one for all layers.

    Returns:
        the new folder.

    Raises:
        UserError: as in `merge`; or the models are not experts of one network and family; or the file is missing,
            damaged, too short or has other channels or another time step, or no prediction is finite.
    """
    for size in (memory_limit, out_shard_size):
        parse_size(size)
    target = load_targets(config, output, {"found": "prefix", "value": 0.0})[0]
    require_apart(target.output, target.paths)
    for path in target.paths:
        open_input(path)  # refuse models that cannot be merged before loading networks
    low, high = load_ends(target)
    fields, facts = _input_for(low, file, frames)
    prefix, fitted = _fit(low, high, fields, file, frames)
    value: float | list[dict[str, Any]] = prefix.alpha
    print("\n".join(_lines(prefix, file)), flush=True)
    if by_group:
        alphas, error = fit_groups(low, high, fields, prefix.alpha, frames)
        value = [{"regex": group_names(group), "value": alpha} for group, alpha in alphas.items()]
        fitted |= {"groups": alphas, "error": json_number(error, 4)}
        print(f"by group: {', '.join(f'{name} {alpha:+.3f}' for name, alpha in alphas.items())}: error {error:.4g}")
    for warning in _warnings(prefix):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    del low, high  # the memory limit applies to the merge alone
    found = {"found": "prefix", "value": value, **facts, **fitted}
    return merge(config, output, memory_limit, out_shard_size, found=found)[0]


def read_input(path: Path) -> Stored:
    """Read the first trajectories of a file of a family, The Well or PDEBench.

    Raises:
        UserError: the file is missing, damaged or of neither kind, or has values that are not finite.
    """
    remedy = "give a file of a family (`shodh expert data`), The Well or PDEBench"
    try:
        with h5py.File(path, "r") as file:
            ours = "tensor" in file
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {remedy}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read as HDF5 ({error}): {remedy}") from None
    found: Any = (data.read if ours else read_stored)(path, 0, TRAJECTORIES)
    if found.fields.ndim != 5 or not len(found.fields) or found.fields.shape[2] != len(found.channels):
        shape = list(found.fields.shape)
        raise UserError(f"{path}: tensor has shape {shape}, with names for {len(found.channels)} channels: {remedy}")
    return Stored(found.fields, found.interval, found.channels)


def _input_for(expert: Expert, path: Path, frames: int) -> tuple[Tensor, dict[str, Any]]:
    """The first frames of a file's trajectories, [N, K, C, H, W], and their record for the manifest."""
    found = read_input(path)
    family, network = expert.config.family.family(), expert.config.network
    if set(family.channels) < set(found.channels):  # the experts use only some of the file's
        fields = found.fields[:, :, [found.channels.index(name) for name in family.channels]]
        found = Stored(fields, found.interval, family.channels)
    if found.channels != family.channels:
        raise UserError(
            f"{path} has the channels {', '.join(found.channels)}, but the experts of {family.name} have "
            f"{', '.join(family.channels)}: give trajectories of the same equation"
        )
    if found.fields.shape[1] < 2:
        raise UserError(f"{path} has 1 frame, but {frames} are needed: give a longer file")
    every = every_snapshot(family.interval, found.interval)
    if not every:
        raise UserError(
            f"{path} has a frame every {found.interval:g}, but the experts predict {family.interval:g} ahead: "
            "give a file with that interval, or an integer fraction of it"
        )
    fields = found.fields[:, ::every]
    if fields.shape[1] < frames:
        steps = f" {family.interval:g} apart" if every > 1 else ""
        raise UserError(
            f"{path} has {fields.shape[1]} frames{steps}, but {frames} are needed: "
            "give a longer file, or fewer --frames"
        )
    if frames <= network.history:
        raise UserError(f"--frames {frames}: the network sees {network.history}; give at least {network.history + 1}")
    record = {"file": str(path), "sha256": sha256(path), "trajectories": len(fields), "every": every, "frames": frames}
    return fields[:, :frames], record


def _fit(low: Expert, high: Expert, fields: Tensor, path: Path, frames: int) -> tuple[Prefix, dict[str, Any]]:
    """Fit the prefix to the frames of a file. Returns it and its record for the manifest."""
    prefix = fit_prefix(low, high, fields, frames)
    if not math.isfinite(prefix.error):
        raise UserError(
            f"{path}: the error of its first {frames} frames is not finite at any alpha: a frame is zero everywhere, "
            "or values are far from the training data of the experts"
        )
    # Four digits, because the last bits depend on device and threads, and a repeated merge must be recognised.
    record = {
        "error": json_number(prefix.error, 4),
        "sharpness": json_number(prefix.sharpness, 4),
        "flat": prefix.flat,
        "bank": {alpha: json_number(error, 4) for alpha, error in prefix.bank.items()},
    }
    return prefix, record


def _lines(prefix: Prefix, path: Path) -> list[str]:
    lines = [f"nRMSE on the first {prefix.frames} frames of {path}", "", "alpha   error"]
    lines += [f"{alpha}   {error:.4g}" for alpha, error in prefix.bank.items()]
    return [*lines, "", f"alpha {prefix.alpha:+.3f}: error {prefix.error:.4g}, {_sharpness(prefix)}"]


def _sharpness(prefix: Prefix) -> str:
    rise = "infinitely more" if math.isinf(prefix.sharpness) else f"{prefix.sharpness:+.1%}"
    return f"{rise} at {BANK[1] - BANK[0]:g} away from it"


def _warnings(prefix: Prefix) -> list[str]:
    warnings = []
    at_end = abs(prefix.alpha) >= BANK[-1]
    if at_end:
        warnings.append(
            f"alpha {prefix.alpha:+g} is at the end of the bank, and the best one may lie beyond it: expect a larger "
            "error than between the experts"
        )
    # At the end of the bank the error may still fall further out; such an optimum is not flat.
    if prefix.flat and not (at_end and prefix.sharpness < -FLAT):
        warnings.append(
            f"the optimum is flat: {_sharpness(prefix)}, less than {FLAT:.0%}, so these frames hardly distinguish one "
            "alpha from another: give more frames or trajectories, or use the coordinate"
        )
    return warnings
