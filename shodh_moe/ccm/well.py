"""Read two-dimensional files in the HDF5 schema of The Well (Ohana et al. 2024).

Fields of ``t0_fields``, ``t1_fields`` and ``t2_fields`` become channels, named ``pressure``, ``velocity_x``,
``stress_xy`` after the axes in ``dimensions``. A field that does not vary by trajectory, with time or along an axis is
repeated there.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.ccm.pdebench import require_even, require_own

_GROUPS = ("t0_fields", "t1_fields", "t2_fields")
_REMEDY = "give a file in the schema of The Well"


@dataclass(frozen=True)
class WellFile:
    """Trajectories of one file.

    Attributes:
        fields: [N, T, C, H, W] float32, rows (H) along the second axis of space, columns (W) along the first.
        interval: time between snapshots.
        channels: names of the C channels.
        scalars: the file's constants by name: one number, or one for each trajectory of the file.
        total: number of trajectories in the file.
    """

    fields: torch.Tensor
    interval: float
    channels: tuple[str, ...]
    scalars: dict[str, np.ndarray]
    total: int


def read(path: Path, start: int = 0, stop: int | None = None) -> WellFile:
    """Read trajectories ``start`` to ``stop`` (default: all) of a file.

    Raises:
        UserError: the file is missing, damaged or not in the schema, is not two-dimensional, has no trajectories in
            the range, snapshots that are not evenly spaced, or values that are not finite.
    """
    try:
        with h5py.File(path, "r") as file:
            found = _read(path, file, slice(start, stop))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: {_REMEDY}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): {_REMEDY}") from error
    except KeyError as error:
        raise UserError(f"{path} is not complete ({error.args[0]}): {_REMEDY}") from error
    if not len(found.fields):
        raise UserError(f"{path} has no trajectories {start} to {stop}: give a range within the file")
    for index, trajectory in enumerate(found.fields):
        if not bool(torch.isfinite(trajectory).all()):
            raise UserError(f"{path}: trajectory {start + index} has values that are not finite: remove or repair it")
    return found


def _read(path: Path, file: h5py.File, part: slice) -> WellFile:
    axes = [str(axis) for axis in np.atleast_1d(file["dimensions"].attrs["spatial_dims"])]
    if len(axes) != 2:
        raise UserError(f"{path} has {len(axes)} axes of space, expected two: CCM's experts are two-dimensional")
    total = int(file.attrs["n_trajectories"])
    times = np.asarray(file["dimensions/time"], dtype=np.float64)
    if times.ndim == 2:  # one row per trajectory
        if not np.allclose(times, times[:1]):
            raise UserError(f"{path}: dimensions/time differs between trajectories: keep those that agree in a file")
        times = times[0]
    require_even(path, "dimensions/time", times)
    shape = (len(range(total)[part]), len(times), *(len(file["dimensions"][axis]) for axis in axes))
    channels: list[str] = []
    fields = []
    for order, group in enumerate(_GROUPS):
        for name in _names(file, group):
            if not name.isprintable():
                raise UserError(f"{path}: {group} has a field {name!r}: give it a name of printable characters")
            require_own(path, file, file[group][name])
            values = _field(path, file[group][name], order, shape, part)
            for place in itertools.product(range(2), repeat=order):
                channels.append(name + ("_" if order else "") + "".join(axes[one] for one in place))
                fields.append(values[(slice(None),) * 4 + place])
    if not channels:
        raise UserError(f"{path} has no fields in {', '.join(_GROUPS)}: {_REMEDY}")
    stacked = np.stack(fields, 2).swapaxes(-1, -2)  # the first axis of space, x, becomes the columns
    interval = float((times[-1] - times[0]) / (len(times) - 1)) if len(times) > 1 else 0.0
    return WellFile(torch.from_numpy(np.ascontiguousarray(stacked)), interval, tuple(channels), _scalars(file), total)


def _names(file: h5py.File, group: str) -> list[str]:
    if group not in file:
        return []
    return [str(name) for name in np.atleast_1d(file[group].attrs.get("field_names", sorted(file[group])))]


def _field(path: Path, item: h5py.Dataset, order: int, shape: tuple[int, ...], part: slice) -> np.ndarray:
    """One field as [N, T, X, Y, 2, ...] with ``order`` axes of components."""
    varies = [_flag(item, "sample_varying"), _flag(item, "time_varying"), *map(bool, item.attrs["dim_varying"])]
    expected = tuple(size for size, there in zip(shape, varies, strict=True) if there) + (2,) * order
    values = np.asarray(item[part] if varies[0] else item[()], dtype=np.float32)
    if values.shape != expected:
        raise UserError(f"{path}: {item.name.lstrip('/')} has shape {values.shape}, expected {expected}; {_REMEDY}")
    index = tuple(slice(None) if there else None for there in varies)
    return np.broadcast_to(values[index], shape + (2,) * order)


def _flag(item: h5py.Dataset, name: str) -> bool:
    return bool(item.attrs[name])


def _scalars(file: h5py.File) -> dict[str, np.ndarray]:
    found: dict[str, Any] = {}
    for name in file.attrs.get("simulation_parameters", ()):
        if str(name) in file.attrs:
            found[str(name)] = np.asarray(file.attrs[str(name)])
    for name, item in file.get("scalars", {}).items():
        if isinstance(item, h5py.Dataset) and not item.attrs.get("time_varying", False):
            found[name] = np.asarray(item[()])
    return {name: value.astype(np.float64) for name, value in found.items() if value.dtype.kind in "iuf"}
