"""Read the two-dimensional HDF5 files that PDEBench publishes (Takamoto et al. 2022), in its generators' layouts.

- ``2D_diff-react_*.h5``: a group for each trajectory ("0000", "0001", ...) with ``data`` [T, Y, X, 2] (activator,
  inhibitor) and ``grid/x``, ``grid/y``, ``grid/t``.
- ``2D_rdb_*.h5`` (radial dam breaks): the same groups with ``data`` [T, X, Y, 1] (depth).
- ``ns_incom_inhom_2d_*.h5``: ``velocity`` [N, T, X, Y, 2], ``particles`` [N, T, X, Y, 1], ``t`` [N, T]. The attribute
  ``latestIndex`` is the last snapshot that was written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.base.yaml_text import parse_yaml

_GROUP_CHANNELS = {2: ("activator", "inhibitor"), 1: ("depth",)}
_FLOW_CHANNELS = ("velocity_x", "velocity_y", "particles")
_DOWNLOAD = "download it again, or convert it to one of the layouts in shodh_moe/ccm/pdebench.py"


@dataclass(frozen=True)
class PDEBenchFile:
    """Trajectories of one file.

    Attributes:
        fields: [N, T, C, H, W] float32, rows (H) along y, columns (W) along x.
        times: times of the snapshots, [T] float64.
        interval: time between snapshots.
        channels: names of the C channels.
        config: the generator's settings; empty if the file has none.
        total: number of trajectories in the file.
    """

    fields: torch.Tensor
    times: torch.Tensor
    interval: float
    channels: tuple[str, ...]
    config: dict[str, Any]
    total: int


def read(path: Path, start: int = 0, stop: int | None = None) -> PDEBenchFile:
    """Read trajectories ``start`` to ``stop`` (default: all) of a file. Published files are large, so give a range.

    Raises:
        UserError: the file is missing or damaged, its keys or shapes are not those of a layout above, snapshots are
            not evenly spaced, or values are not finite.
    """
    path = Path(path)
    try:
        with h5py.File(path, "r") as file:
            names = sorted((name for name in file if name.isdecimal()), key=int)
            if names:
                found = _read_groups(path, file, names[start:stop], names)
            elif "velocity" in file:
                found = _read_flow(path, file, start, stop)
            else:
                keys = ", ".join(sorted(file)[:5]) or "nothing"
                raise UserError(f"{path} contains {keys}: neither numbered groups nor velocity; {_DOWNLOAD}")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: give the path of a PDEBench file") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): {_DOWNLOAD}") from error
    if not len(found.fields):
        raise UserError(f"{path} has no trajectories {start} to {stop}: give a range within the file")
    for index, trajectory in enumerate(found.fields):
        if not bool(torch.isfinite(trajectory).all()):
            raise UserError(f"{path}: trajectory {start + index} has values that are not finite: {_DOWNLOAD}")
    return found


def _read_groups(path: Path, file: h5py.File, wanted: list[str], names: list[str]) -> PDEBenchFile:
    first = _dataset(path, file, f"{names[0]}/data", 4)
    snapshots, _, _, channels = first.shape
    if channels not in _GROUP_CHANNELS:
        raise UserError(
            f"{path}: {names[0]}/data has {channels} channels, expected 1 or 2 in the last axis; {_DOWNLOAD}"
        )
    times, fields = _times(path, file, f"{names[0]}/grid/t", snapshots), []
    for name in wanted:
        data = _dataset(path, file, f"{name}/data", 4)
        if data.shape != first.shape:
            raise UserError(
                f"{path}: {name}/data has shape {data.shape}, {names[0]}/data {first.shape}: read them one by one"
            )
        if not np.allclose(_times(path, file, f"{name}/grid/t", snapshots), times):
            raise UserError(f"{path}: {name}/grid/t differs from {names[0]}/grid/t: read them one by one")
        fields.append(np.asarray(data, dtype=np.float32))
    # The dam breaks are stored with x first, the reactions with y first.
    order = (0, 1, 4, 2, 3) if channels == 2 else (0, 1, 4, 3, 2)
    stacked = np.stack(fields) if fields else np.zeros((0, *first.shape), dtype=np.float32)
    return _found(stacked.transpose(order), times, _GROUP_CHANNELS[channels], _config(file[names[0]]), len(names))


def _read_flow(path: Path, file: h5py.File, start: int, stop: int | None) -> PDEBenchFile:
    velocity, particles = (_dataset(path, file, name, 5) for name in ("velocity", "particles"))
    if velocity.shape[:-1] != particles.shape[:-1] or velocity.shape[-1] != 2 or particles.shape[-1] != 1:
        raise UserError(
            f"{path}: velocity has shape {velocity.shape} and particles {particles.shape}, expected equal shapes "
            f"except for 2 and 1 channels in the last axis; {_DOWNLOAD}"
        )
    written = int(file.attrs.get("latestIndex", velocity.shape[1] - 1)) + 1
    if not 1 <= written <= velocity.shape[1]:
        raise UserError(f"{path}: latestIndex counts {written} of {velocity.shape[1]} snapshots; {_DOWNLOAD}")
    all_times = np.asarray(_dataset(path, file, "t", 2)[start:stop, :written], dtype=np.float64)
    if all_times.size and not np.allclose(all_times, all_times[:1]):
        raise UserError(f"{path}: t differs between trajectories: read them one by one")
    times = require_even(path, "t", all_times[0]) if all_times.size else np.zeros(0)
    parts = [np.asarray(part[start:stop, :written], dtype=np.float32) for part in (velocity, particles)]
    return _found(
        np.concatenate(parts, -1).transpose(0, 1, 4, 3, 2), times, _FLOW_CHANNELS, _config(file), len(velocity)
    )


def _found(
    fields_NTCHW: np.ndarray, times: np.ndarray, channels: tuple[str, ...], config: dict[str, Any], total: int
) -> PDEBenchFile:
    interval = float((times[-1] - times[0]) / (len(times) - 1)) if len(times) > 1 else 0.0
    fields = torch.from_numpy(np.ascontiguousarray(fields_NTCHW))
    return PDEBenchFile(fields, torch.from_numpy(times), interval, channels, config, total)


def _dataset(path: Path, file: h5py.File, name: str, ndim: int) -> h5py.Dataset:
    if name not in file or not isinstance(file[name], h5py.Dataset):
        raise UserError(f"{path} has no dataset {name}: {_DOWNLOAD}")
    if file[name].ndim != ndim:
        raise UserError(f"{path}: {name} has shape {file[name].shape}, expected {ndim} axes; {_DOWNLOAD}")
    require_own(path, file, file[name])
    return file[name]


def require_own(path: Path, file: h5py.File, item: h5py.HLObject) -> None:
    """Refuse an object of ``file`` whose values lie in another one. Raises `UserError`."""
    elsewhere = item.file.filename != file.filename
    if elsewhere or (isinstance(item, h5py.Dataset) and (item.external or item.is_virtual)):
        name = item.name.lstrip("/")
        raise UserError(f"{path}: {name} keeps its values in other files: copy them into one with h5repack")


def _times(path: Path, file: h5py.File, name: str, snapshots: int) -> np.ndarray:
    times = np.asarray(_dataset(path, file, name, 1), dtype=np.float64)
    if len(times) != snapshots:
        raise UserError(f"{path}: {name} has {len(times)} times for {snapshots} snapshots; {_DOWNLOAD}")
    return require_even(path, name, times)


def require_even(path: Path, name: str, times: np.ndarray) -> np.ndarray:
    """Return ``times`` if they are evenly spaced. Raises `UserError` otherwise."""
    steps = np.diff(times)
    # The tolerance allows for times that were stored in float32.
    if not np.isfinite(times).all() or (len(steps) and (steps.min() <= 0 or np.ptp(steps) > 1e-2 * steps.mean())):
        raise UserError(f"{path}: the times in {name} are not evenly spaced: keep a range of snapshots that are")
    return times


def configs(path: Path) -> list[dict[str, Any]]:
    """The generator's settings of each trajectory of a file that `read` accepts, without reading the fields."""
    with h5py.File(path, "r") as file:
        names = sorted((name for name in file if name.isdecimal()), key=int)
        return [_config(file[name]) for name in names] or [_config(file)] * len(file["velocity"])


def _config(item: h5py.HLObject) -> dict[str, Any]:
    try:
        content = parse_yaml(str(item.attrs.get("config", "")))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
