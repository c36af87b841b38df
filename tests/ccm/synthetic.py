"""Untrained experts on disk, and trajectories with a known position on the line between the experts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shodh_moe.base.files import atomic_file
from shodh_moe.ccm import data
from shodh_moe.ccm.config import ExpertConfig
from shodh_moe.ccm.data import Trajectories
from shodh_moe.ccm.expert import Expert, compose, expert_inputs, facts_of, make_network
from shodh_moe.ccm.windows import Scale
from shodh_moe.checkpoint import CheckpointWriter, Fragment
from shodh_moe.data.hdf5 import new_hdf5

SCALE = Scale((0.1, -0.2), (0.5, 0.8))
CHANNELS = ("activator", "inhibitor")
GRID = 20  # the coarsest grid for an FNO of the size tiny
SNAPSHOTS = 7


def expert_config(root: Path | str = "data", **words: Any) -> ExpertConfig:
    """Config of a small reaction-diffusion family and a tiny FNO."""
    family = {"name": "reaction_diffusion", "root": str(root), "grid": GRID, "snapshots": SNAPSHOTS}
    sections = {"family": {**family, **words.pop("family", {})}, "training": {"steps": 1}, "rollout": [1], **words}
    return ExpertConfig.model_validate(sections)


def make_expert(config: ExpertConfig, seed: int, near: Expert | None = None, scale: Scale = SCALE) -> Expert:
    """Make an expert with random weights near zero or ``near``, small enough that rollouts stay bounded."""
    network = make_network(config.network, len(scale.mean), config.seed)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if near is not None:
                parameter.copy_(near.weights()[name] + 0.3 * noise * near.weights()[name].std())
            elif name == "out.weight":  # zero in a new network, which predicts no change
                parameter.copy_(0.5 * noise / parameter.shape[1] ** 0.5)
    return Expert(Path("nowhere"), config, scale, network.eval())


def make_ends(root: Path | str = "data", **words: Any) -> tuple[Expert, Expert]:
    """Make a low and a high expert of one anchor."""
    anchor = make_expert(expert_config(root, **words), 0)
    low, high = (
        make_expert(expert_config(root, **{"splits": [split], **words}), seed, near=anchor)
        for seed, split in ((1, "endpoint_low"), (2, "endpoint_high"))
    )
    return low, high


def save_expert(
    path: Path, config: ExpertConfig, network: nn.Module, scale: Scale, channels: tuple[str, ...], **more: Any
) -> str:
    """Write the checkpoint ``path``, a folder named after the step, and return it; ``more`` facts go into its state."""
    tensors = {f"model/{name}": parameter.detach() for name, parameter in network.named_parameters()}
    writer = CheckpointWriter(path.parent, 0, 1, 9, 0, "synthetic")
    fragments = [Fragment(name, 0, tensor.flatten()) for name, tensor in tensors.items()]
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    facts = {
        "config": config.model_dump(),
        "tokenizer_sha256": "",
        "inputs": expert_inputs(config),
        **facts_of(scale, channels, config.family.folder().name),
        **more,
    }
    writer.save(int(path.name), fragments, shapes, {"rng/cpu": torch.zeros(5, dtype=torch.uint8)}, facts)
    writer.finish()
    return str(path)


def save_ends(folder: Path, ends: Iterable[Expert], names: tuple[str, ...] = ("low", "high")) -> list[str]:
    """Write checkpoints of experts, ``<folder>/<name>/checkpoints/1``."""
    return [
        save_expert(folder / name / "checkpoints" / "1", one.config, one.network, one.scale, CHANNELS)
        for name, one in zip(names, ends, strict=True)
    ]


def initial(seed: int, count: int = 2, grid: int = GRID) -> Tensor:
    """Return smooth random states, [count, 1, 2, grid, grid]."""
    noise = torch.randn(count, 1, 2, grid, grid, generator=torch.Generator().manual_seed(seed))
    spectrum = torch.fft.rfft2(noise)
    spectrum[..., 4:-3, :] = 0
    spectrum[..., 4:] = 0
    return 3 * torch.fft.irfft2(spectrum, s=(grid, grid))


def truth(low: Expert, high: Expert, alpha: float, frames: int = SNAPSHOTS, seed: int = 0, grid: int = GRID) -> Tensor:
    """Return trajectories [2, frames, 2, grid, grid] that the expert at ``alpha`` predicts."""
    first = initial(seed, grid=grid)
    return torch.cat([first, compose(low, high, alpha).predict(first, frames - 1, 0.0)], dim=1)


def regime(fields: Tensor, coordinate: float) -> Trajectories:
    return Trajectories(fields, coordinate, 0.003, 0.25, CHANNELS)


def write_split(config: ExpertConfig, split: str, fields: dict[float, Tensor]) -> list[Path]:
    """Write files of the config's family that contain ``fields``, by coordinate; return their paths."""
    family, written = config.family.family(), []
    for one in data.regimes(family, config.family.folder()):
        if one.split == split and one.coordinate in fields:
            with atomic_file(one.path) as temporary, new_hdf5(temporary) as file:
                data._write(file, family, one, fields[one.coordinate].numpy())
            written.append(one.path)
    return written


def write_validation(low: Expert, high: Expert, gamma: float) -> list[Path]:
    """Write validation data that the experts themselves predict at alpha = gamma s."""
    family = low.config.family.family()
    places = family.coordinates["validation"]
    fields = {s: truth(low, high, gamma * s, seed=number) for number, s in enumerate(places)}
    return write_split(low.config, "validation", fields)
