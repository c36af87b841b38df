"""A small latent cache and config for testing training without flow data."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import yaml

from shodh_moe.config.load import load_config
from shodh_moe.config.paths import resolve_paths

CONFIG = """\
name: small
model:
  dim: 24
  depth: 2
  heads: 2
  norms: pre
  moe: {scope: layer, shared_experts: 1, dropless: false, expert_hidden: 16, capacity_factor: 1.0}
training: {loss: mse, steps: 6, batch_size: 4, warmup_steps: 2, checkpoint_every: 3, log_every: 3, validate_every: 3}
telemetry: {every: 1}
evaluation: {batch_size: 3}
"""


def write_latents(
    folder: Path, channels: int = 6, grid: int = 2, snapshots: int = 7, nan_in: str = "", wall_axis: int = 2
) -> None:
    """Write rotating random latents of two domains at different rates, in the format of tokenizer.latents.

    Args:
        nan_in: name of a training trajectory that gets a NaN in its fourth snapshot.
        wall_axis: axis between the walls of the open channel; all others are periodic.
    """
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    shape = (channels, grid, grid, grid)
    for split, count in (("train", 3), ("valid", 1), ("test", 1)):
        with h5py.File(folder / f"{split}.hdf5", "w") as file:
            for domain, rate, faces in (("open_channel", 0.3, [0, 0]), ("porous_media", 0.6, [2, 2])):
                for number in range(count):
                    a, b = rng.standard_normal((2, *shape))
                    t = np.arange(snapshots).reshape(-1, 1, 1, 1, 1)
                    group = file.create_group(f"{domain}_{number}")
                    group.attrs.update(domain=domain, source=f"{domain}_{number}.hdf5", sample=0)
                    group.attrs["boundaries"] = [faces if axis == wall_axis else [2, 2] for axis in range(3)]
                    z = (a * np.cos(rate * t) + b * np.sin(rate * t)).astype(np.float32)
                    if split == "train" and f"{domain}_{number}" == nan_in:
                        z[3, 0] = np.nan
                    group["z"] = z
                    group["geometry"] = rng.standard_normal(shape).astype(np.float32)
                    group["solid_fraction"] = rng.random((grid,) * 3).astype(np.float32)


def write_case(folder: Path, nan_in: str = "") -> Path:
    """Write ``config.yaml`` and ``latents`` to a new folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    write_latents(folder / "latents", nan_in=nan_in)
    return folder


def write_job(folder: Path, **training: int) -> Path:
    """Write ``config.yaml`` and its latents to a folder in which `shodh pretrain` can run, and return it.

    Args:
        training: keys of the section ``training`` that differ from `CONFIG`.
    """
    settings = yaml.safe_load(CONFIG) | {"data": {"root": "data"}, "tokenizer": {"root": "tokenizers"}}
    settings["training"] |= training
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    latents = folder / resolve_paths(load_config(folder / "config.yaml")).latents
    write_latents(latents)
    latents.parents[1].joinpath("tokenizer.safetensors").write_bytes(b"none is needed here")
    return folder
