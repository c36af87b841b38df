"""How the fields of our HDF5 files are laid out, and whether the disk has room.

Measured by benchmarks/studies/storage.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from shodh_moe.config import DataConfig

CONCENTRATION = "concentration"  # the passive scalar's name among the fields
# Of the size without compression; what room a dataset needs is reckoned with it, so rather too much.
SIZE_SHARE = {None: 1.0, "lzf": 0.95, "gzip": 0.9}
_FILTERS: dict[str, dict[str, Any]] = {
    # The bytes of neighbouring numbers that are alike stand together: without it hardly anything is saved.
    "lzf": {"shuffle": True, "compression": "lzf"},
    "gzip": {"shuffle": True, "compression": "gzip", "compression_opts": 1},
}
_HEADERS = 2**17  # bytes of a file that are no fields
_LARGEST_CHUNK = 2**22  # bytes: what is unpacked stays in the processor's cache


def layout(shape: tuple[int, ...], leading: int, compression: str | None = None) -> dict[str, Any]:
    """Arguments of `h5py.Group.create_dataset` for a float32 field.

    One block without a filter, which is read where it lies; compressed, a chunk a snapshot or a slab of one, as
    training reads snapshots, with a checksum that costs little beside the rest.

    Args:
        shape: of the whole field.
        leading: axes before those of space: trajectories, and time if the field varies with it.

    Raises:
        KeyError: there is no such compression.
    """
    if compression is None:
        return {}
    x, *rest = shape[leading:]
    pieces = min(x, -(-4 * x * int(np.prod(rest)) // _LARGEST_CHUNK))
    return {"chunks": (*(1,) * leading, -(-x // pieces), *rest), "fletcher32": True, **_FILTERS[compression]}


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk on which ``folder`` is, or will be."""
    return shutil.disk_usage(existing_parent(folder)).free


def existing_parent(folder: Path) -> Path:
    """``folder`` or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def needed_bytes(count: int, config: DataConfig) -> int:
    """Room on the disk for ``count`` trajectories and their statistics."""
    scalar = any(getattr(domain, "scalar", None) is not None for _, domain in config.domains.items())
    cells = int(np.prod(config.grid))
    # Velocity, pressure and concentration per snapshot, the mask once, float32.
    fields = 4 * cells * ((5 if scalar else 4) * config.snapshots + 1)
    return int(count * (fields * SIZE_SHARE[config.compression] + _HEADERS) + 2**20)
