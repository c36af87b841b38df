"""Read a user's own geometry from a NumPy, raw, HDF5 or TIFF file.

A scan is not periodic, but the flow is. Therefore a block of half the grid's size is cut out at a random position and
mirrored along all three axes, so that opposite sides have the same pores and no seam closes a pore. A volume that is
already periodic is used unchanged.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import sha256
from shodh_moe.base.section import PathText, Positive, Section
from shodh_moe.solvers.domains.domain import Grid

_SUFFIXES = (".npy", ".raw", ".h5", ".hdf5", ".tif", ".tiff")


class GeometryFile(Section, changes="data"):
    """A volume [X, Y, Z]: .npy, .raw (with shape and dtype), .h5 or .hdf5 (with dataset), or a TIFF stack.

    The pages, rows and columns of a TIFF stack are z, y and x.
    """

    path: PathText
    shape: list[Positive] | None = Field(None, description="[X, Y, Z] of a .raw file")
    dtype: Literal["uint8", "int8", "uint16", "int16", "int32", "float32"] | None = Field(
        None, description="number type of a .raw file, little-endian"
    )
    order: Literal["C", "F"] = Field("C", description="fastest axis of a .raw file: z (C) or x (F)")
    dataset: str | None = Field(None, description="name of the dataset in an HDF5 file")
    solid_value: int | list[int] | None = Field(
        None, description="value of solid cells, or a list of labels; null: every value except zero is solid"
    )
    periodic: bool = Field(False, description="the volume is periodic and has the grid's size; use it unchanged")

    @model_validator(mode="after")
    def _kind(self) -> GeometryFile:
        suffix = Path(self.path).suffix.lower()
        if suffix not in _SUFFIXES:
            raise ValueError(f"path must end in {', '.join(_SUFFIXES)}, not {self.path}")
        if suffix == ".raw" and (self.shape is None or len(self.shape) != 3 or self.dtype is None):
            raise ValueError("a .raw file needs its shape [X, Y, Z] and its dtype")
        if suffix in (".h5", ".hdf5") and self.dataset is None:
            raise ValueError("an HDF5 file needs the name of its dataset")
        return self

    def sha256(self) -> str:
        """SHA-256 of the file, cached until the file changes. Raises `UserError` if it cannot be read."""
        try:
            status = os.stat(self.path)
            return _sha256(self.path, status.st_size, status.st_mtime_ns)
        except OSError as error:
            raise UserError(f"cannot read geometry_file.path {self.path}: {error.strerror or error}") from None

    def read(self, grid: Grid, rng: np.random.Generator) -> tuple[NDArray[np.bool_], tuple[int, ...]]:
        """Draw a block of the file and make a solid mask from it.

        Returns:
            The mask [X, Y, Z], bool, and the index of the block's first cell in the file.

        Raises:
            UserError: the file is missing, damaged, of the wrong shape or size, or not binary.
        """
        wanted = grid if self.periodic else tuple((size + 1) // 2 for size in grid)
        try:
            values, corner_3 = self._draw_block(wanted, rng)
        except FileNotFoundError:
            raise UserError(f"geometry_file.path: there is no file {self.path}") from None
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UserError(f"geometry_file {self.path} cannot be read: {' '.join(str(error).split())}") from None
        solid = self._solid(values)
        if not self.periodic:
            for axis, size in enumerate(grid):
                solid = np.concatenate([solid, np.flip(solid, axis)], axis)
                solid = solid.take(range(size), axis)
        return np.ascontiguousarray(solid), corner_3

    def _draw_block(self, wanted: tuple[int, ...], rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, ...]]:
        """Open the file and `_cut` a block of shape ``wanted`` from its volume."""
        suffix = Path(self.path).suffix.lower()
        if suffix == ".npy":
            return self._cut(np.load(self.path, mmap_mode="r", allow_pickle=False), wanted, rng)
        if suffix == ".raw":
            dtype, shape = np.dtype(self.dtype).newbyteorder("<"), tuple(self.shape or ())
            size, needed = os.path.getsize(self.path), int(np.prod(shape)) * dtype.itemsize
            if size != needed:
                raise UserError(
                    f"geometry_file {self.path} has {size} bytes, but {self.dtype} of shape {list(shape)} needs "
                    f"{needed}: correct geometry_file.shape or dtype"
                )
            volume = np.memmap(self.path, dtype, "r", shape=shape, order=self.order)
            return self._cut(volume, wanted, rng)
        if suffix in (".tif", ".tiff"):
            return self._cut(_tiff(self.path), wanted, rng)
        import h5py

        from shodh_moe.base.hdf5_filters import require_filters

        with h5py.File(self.path, "r") as file:
            dataset = file.get(self.dataset or "")
            # Links and external storage could make a config read any file on this machine.
            inside = isinstance(dataset, h5py.Dataset) and dataset.file.filename == file.filename
            if not inside or dataset.external or dataset.is_virtual:
                raise UserError(
                    f"geometry_file {self.path} holds no dataset {self.dataset!r} of its own: set geometry_file.dataset"
                )
            require_filters(f"geometry_file {self.path}", self.dataset or "", dataset)
            return self._cut(dataset, wanted, rng)

    def _cut(self, volume, wanted: tuple[int, ...], rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, ...]]:  # type: ignore[no-untyped-def]  # an array or an h5py dataset
        """Cut a block of shape ``wanted`` from a random position; return its values and the index of its first cell."""
        if volume.ndim != 3 or volume.dtype.kind not in "biuf":
            raise UserError(
                f"geometry_file {self.path} must hold numbers of shape [X, Y, Z], not {volume.dtype} of shape "
                f"{list(volume.shape or [])}"
            )
        shape = tuple(volume.shape)
        if self.periodic:
            fits, why = shape == wanted, "a periodic volume must be as large as data.grid"
        else:
            fits, why = all(n >= w for n, w in zip(shape, wanted, strict=True)), "half of data.grid must fit in it"
        if not fits:
            raise UserError(f"geometry_file {self.path} has shape {list(shape)}, but {list(wanted)} is needed: {why}")
        corner_3 = tuple(int(rng.integers(n - w + 1)) for n, w in zip(shape, wanted, strict=True))
        part = tuple(slice(first, first + size) for first, size in zip(corner_3, wanted, strict=True))
        return np.asarray(volume[part]), corner_3

    def _solid(self, values: np.ndarray) -> NDArray[np.bool_]:
        """Return the solid mask of a block; raise `UserError` if it has more than two values and no list of labels."""
        if isinstance(self.solid_value, list):
            if not np.isfinite(values).all():
                raise UserError(f"geometry_file {self.path} has values that are not finite: expected labels")
            return np.isin(values, self.solid_value)
        low, high = values.min(), values.max()
        if not ((values == low) | (values == high)).all():
            raise UserError(
                f"geometry_file {self.path} is not binary: it has more than two values, from {low} to {high}; "
                "write one value for solid and one for fluid, or list the labels of solids: `solid_value: [1, 3]`"
            )
        return values != 0 if self.solid_value is None else values == self.solid_value


def _tiff(path: str) -> np.ndarray:
    """Return the volume [X, Y, Z] of the first series of a TIFF file."""
    try:
        from shodh_moe.base.tiff import open_tiff
    except ImportError:
        raise UserError(f"geometry_file {path} needs the package tifffile: `pip install tifffile`") from None
    with open_tiff(path) as file:
        return np.asarray(file.series[0].asarray()).T


@functools.lru_cache(maxsize=8)
def _sha256(path: str, size: int, changed_ns: int) -> str:
    """Hash a file; ``size`` and ``changed_ns`` only make the cache miss when the file has changed."""
    return sha256(Path(path))
