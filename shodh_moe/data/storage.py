"""Storage layout of fields in our HDF5 files (measured by benchmarks/studies/storage.py), and disk space."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from shodh_moe.config import DataConfig

CONCENTRATION = "concentration"  # the passive scalar's name among the fields
# Ratio of compressed to uncompressed size, rounded up, for estimates of disk space.
SIZE_SHARE = {None: 1.0, "lzf": 0.95, "gzip": 0.9}
_FILTERS: dict[str, dict[str, Any]] = {
    # Without shuffling the bytes, compression saves hardly anything.
    "lzf": {"shuffle": True, "compression": "lzf"},
    "gzip": {"shuffle": True, "compression": "gzip", "compression_opts": 1},
}
_HEADERS = 2**17  # bytes per file besides the fields
_LARGEST_CHUNK = 2**22  # bytes; an unpacked chunk stays in the processor's cache


def layout(shape: tuple[int, ...], leading: int, compression: str | None = None) -> dict[str, Any]:
    """Return the arguments of `h5py.Group.create_dataset` for a float32 field.

    Without compression the field is one unfiltered block that can be read in place. With compression, each chunk is one
    snapshot or a slab of one, because training reads single snapshots; its checksum costs little extra.

    Args:
        shape: shape of the whole field.
        leading: number of axes before the three of space: trajectories, and time if the field varies with it.

    Raises:
        KeyError: unknown compression.
    """
    if compression is None:
        return {}
    x, *rest = shape[leading:]
    pieces = min(x, -(-4 * x * int(np.prod(rest)) // _LARGEST_CHUNK))
    return {"chunks": (*(1,) * leading, -(-x // pieces), *rest), "fletcher32": True, **_FILTERS[compression]}


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of ``folder``, which need not exist yet."""
    return shutil.disk_usage(existing_parent(folder)).free


def existing_parent(folder: Path) -> Path:
    """Return ``folder`` or its nearest existing parent."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def needed_bytes(count: int, config: DataConfig) -> int:
    """Estimate the bytes on disk of ``count`` trajectories and their statistics."""
    scalar = any(getattr(domain, "scalar", None) is not None for _, domain in config.domains.items())
    cells = int(np.prod(config.grid))
    # Velocity, pressure and concentration per snapshot, the mask once, float32.
    fields = 4 * cells * ((5 if scalar else 4) * config.snapshots + 1)
    return int(count * (fields * SIZE_SHARE[config.compression] + _HEADERS) + 2**20)
