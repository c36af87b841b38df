"""Small files in the schema of The Well and in PDEBench's layout, at given values of a parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from shodh_moe.data.well_parts import mark_varying

T, X, Y = 7, 24, 20


def smooth(count: int, channels: int, seed: float, shape: tuple[int, int] = (Y, X)) -> np.ndarray:
    """Return smooth fields that move, [N, T, C, Y, X] float32."""
    random = np.random.default_rng(round(1e6 * seed))
    y, x = (2 * np.pi * np.arange(size) / size for size in shape)
    t = np.arange(T)[:, None, None, None]
    phases = random.uniform(0, 6, (count, 1, channels, 1, 1))
    return np.sin(x + y[:, None] + 0.3 * t * (1 + seed) + phases).astype(np.float32) + np.float32(0.1)


def write_well(
    path: Path, values: float | list[float], fields: np.ndarray, parameter: str = "viscosity", step: float = 0.5
) -> None:
    """Write pressure and velocity [N, T, 3, Y, X] with a parameter of the file or of each trajectory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = fields.transpose(0, 1, 4, 3, 2)  # [N, T, X, Y, C]
    with h5py.File(path, "w") as file:
        file.attrs.update(dataset_name="mine", grid_type="cartesian", n_spatial_dims=2, n_trajectories=len(fields))
        file.attrs["simulation_parameters"] = [parameter]
        scalars = file.create_group("scalars")
        scalars.attrs["field_names"] = [parameter]
        mark_varying(scalars.create_dataset(parameter, data=np.float32(values)), sample_varying=np.ndim(values) > 0)
        dimensions = file.create_group("dimensions")
        dimensions.attrs["spatial_dims"] = ["x", "y"]
        dimensions["time"] = np.arange(fields.shape[1], dtype="f") * np.float32(step)
        dimensions["x"], dimensions["y"] = np.arange(stored.shape[2], dtype="f"), np.arange(stored.shape[3], dtype="f")
        _field(file, "t0_fields", "pressure", stored[..., 0])
        _field(file, "t1_fields", "velocity", stored[..., 1:3])
        file.create_group("t2_fields").attrs["field_names"] = np.array([], dtype=h5py.string_dtype())


def _field(file: h5py.File, group: str, name: str, data: np.ndarray) -> None:
    made = file.create_group(group)
    made.attrs["field_names"] = [name]
    item = made.create_dataset(name, data=data)
    item.attrs["dim_varying"] = np.ones(2, dtype=bool)
    mark_varying(item, sample_varying=True, time_varying=True)


def write_pdebench(path: Path, config: dict[str, Any], fields: np.ndarray, step: float = 0.5) -> None:
    """Write reaction-diffusion groups [N, T, 2, Y, X] with the generator's settings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for index, trajectory in enumerate(fields):
            group = file.create_group(f"{index:04d}")
            group["data"] = trajectory.transpose(0, 2, 3, 1)
            group["grid/t"] = np.arange(len(trajectory), dtype="f") * np.float32(step)
            group.attrs["config"] = "sim:\n" + "".join(f"  {key}: {value}\n" for key, value in config.items())
