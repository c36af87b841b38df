"""The kind of each face of a box, as files in the_well's schema state it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from shodh_moe.base.boundaries import UNKNOWN_BOUNDARIES, UNKNOWN_CODE, codes_of
from shodh_moe.data import open_dataset, open_trajectories, write_trajectory
from shodh_moe.solvers import Simulation

GRID = (8, 8, 16)
PERIODIC = ("periodic", "periodic")


def _file(path: Path, lid: bool = False) -> Path:
    simulation = Simulation(
        velocity_T3XYZ=np.zeros((2, 3, *GRID), np.float32),
        pressure_TXYZ=np.zeros((2, *GRID), np.float32),
        solid_XYZ=np.zeros(GRID, dtype=bool),
        lid=lid,
        time_T=np.arange(2, dtype=np.float32),
        parameters={"viscosity": 0.1, "target_speed": 0.1, "reynolds": 1.0, "mach": 0.1},
    )
    write_trajectory(path, simulation, dataset_name="theirs", domain="calm", provenance={})
    return path


@pytest.mark.parametrize(("lid", "z"), [(False, PERIODIC), (True, ("wall", "wall"))])
def test_our_own_files_state_every_face(tmp_path, lid, z):
    path = _file(tmp_path / "flow.hdf5", lid)
    assert open_trajectories(path)[0].boundaries == (PERIODIC, PERIODIC, z)
    assert open_dataset(path)[0].source.boundaries == (PERIODIC, PERIODIC, z)


def _condition(file: h5py.File, name: str, kind: str, axes: list[str], mask: Any) -> None:
    group = file.create_group(f"boundary_conditions/{name}")
    group.attrs.update(bc_type=kind, associated_dims=axes)
    if mask is not None:
        group["mask"] = np.asarray(mask, dtype=bool)


def test_files_of_others(tmp_path):
    """Kinds in lower case, one face alone, masks by trajectory, and what says nothing of a face."""
    ends = np.zeros(8, dtype=bool)
    ends[[0, -1]] = True
    low, inside = np.arange(16) == 0, np.arange(16) == 5
    for conditions, expected in (
        ([], UNKNOWN_BOUNDARIES),
        ([("a", "periodic", ["x"], ends), ("b", "wall", ["y"], ends)],
         (PERIODIC, ("wall", "wall"), ("unknown", "unknown"))),
        ([("bed", "WALL", ["z"], low), ("top", "OPEN", ["z"], low[::-1])], (*UNKNOWN_BOUNDARIES[:2], ("wall", "open"))),
        ([("bed", "WALL", ["z"], [low])], (*UNKNOWN_BOUNDARIES[:2], ("wall", "unknown"))),
        ([("inside", "WALL", ["z"], inside), ("corner", "WALL", ["x", "y"], np.ones((8, 8))),
          ("no mask", "OPEN", ["x"], None), ("new", "MOVING", ["x"], ends)], UNKNOWN_BOUNDARIES),
    ):  # fmt: skip
        path = _file(tmp_path / "flow.hdf5")
        with h5py.File(path, "a") as file:
            del file["boundary_conditions"]
            for one in conditions:
                _condition(file, *one)
        assert open_trajectories(path)[0].boundaries == expected, conditions
        path.unlink()


def test_codes_are_places_in_the_list_of_kinds():
    assert codes_of((("wall", "open"), PERIODIC, ("unknown", "wall"))) == [[0, 1], [2, 2], [UNKNOWN_CODE, 0]]
