"""Datasets from Python: indices, values, units, labelled arrays, and what is refused."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import xarray
from torch.utils.data import DataLoader

from shodh_moe.base.errors import UserError
from shodh_moe.data import Fields, open_dataset, read_trajectory
from tests.tiny import GRID, write_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "theirs")


def test_a_trajectory_has_named_tensors(folder: Path) -> None:
    dataset = open_dataset(folder, "valid")
    assert len(dataset) == 2
    assert dataset.domains == ["calm", "wild"]
    fields = dataset[1]
    expected = read_trajectory(dataset.records[1])
    assert {name: (tuple(one.shape), one.dtype) for name, one in fields.items()} == {
        "velocity": ((5, 3, *GRID), torch.float32),
        "pressure": ((5, 1, *GRID), torch.float32),
        "solid": ((1, *GRID), torch.float32),
        "time": ((5,), torch.float64),
    }
    np.testing.assert_array_equal(fields["velocity"], expected.velocity_T3XYZ)
    np.testing.assert_array_equal(fields["pressure"], expected.pressure_T1XYZ)
    np.testing.assert_array_equal(fields["solid"], expected.solid_1XYZ)
    assert fields["time"].tolist() == [0, 1, 2, 3, 4]
    assert fields.source.domain == "wild"


@pytest.mark.parametrize(
    ("index", "snapshots"),
    [
        (slice(2), [0, 1]),
        (slice(-2, None), [3, 4]),
        (slice(0, 5, 2), [0, 2, 4]),
        (slice(None, None, -1), [4, 3, 2, 1, 0]),
        (3, [3]),
        (-1, [4]),
    ],
)
def test_indices_choose_snapshots(folder: Path, index: int | slice, snapshots: list[int]) -> None:
    dataset = open_dataset(folder)
    whole, part = dataset[0], dataset[0, index]
    assert part["time"].tolist() == snapshots
    torch.testing.assert_close(part["velocity"], whole["velocity"][snapshots], rtol=0, atol=0)
    torch.testing.assert_close(part["pressure"], whole["pressure"][snapshots], rtol=0, atol=0)
    torch.testing.assert_close(part["solid"], whole["solid"], rtol=0, atol=0)


def test_indices_out_of_range(folder: Path) -> None:
    dataset = open_dataset(folder)
    for index in (2, (0, 5), (0, slice(5, None))):
        with pytest.raises(IndexError):
            dataset[index]
    assert len(list(dataset)) == 2  # a loop ends at the last trajectory


def test_a_torch_loader_takes_it(folder: Path) -> None:
    (batch,) = DataLoader(open_dataset(folder), batch_size=2)
    assert batch["velocity"].shape == (2, 5, 3, *GRID)


def test_channels_are_the_input_of_a_tokenizer(folder: Path) -> None:
    fields = open_dataset(folder)[0]
    channels_T5XYZ = fields.channels()
    assert channels_T5XYZ.shape == (5, 5, *GRID)
    torch.testing.assert_close(channels_T5XYZ[:, :3], fields["velocity"], rtol=0, atol=0)
    torch.testing.assert_close(channels_T5XYZ[2, 4], fields["solid"][0], rtol=0, atol=0)


def test_xarray_has_axes_and_units(folder: Path) -> None:
    fields = open_dataset(folder)[0]
    labelled = fields.to_xarray()
    assert isinstance(labelled, xarray.Dataset)
    assert labelled.velocity.dims == ("time", "component", "x", "y", "z")
    assert labelled.pressure.dims == ("time", "x", "y", "z")
    assert labelled.solid.dims == ("x", "y", "z")
    assert labelled.velocity.attrs["units"] == "cells / time step"
    assert labelled.x.attrs["units"] == "cells"
    assert labelled.x.values[:2].tolist() == [0.5, 1.5]
    assert labelled.attrs["domain"] == "calm"
    at = labelled.velocity.sel(component="y", time=3, x=2.5)
    np.testing.assert_array_equal(at, fields["velocity"][3, 1, 2])


def test_units_of_an_imported_file(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "flow.hdf5"
    path.write_bytes((folder / "data/test/calm.hdf5").read_bytes())
    with h5py.File(path, "r+") as file:
        file["provenance"].attrs.update(units="SI", unit_velocity="m/s", unit_length="m")
    labelled = open_dataset(path)[0].to_xarray()
    assert labelled.velocity.attrs == {"units": "m/s"}
    assert labelled.y.attrs == {"units": "m"}
    assert labelled.pressure.attrs == {}
    assert labelled.time.attrs == {}


def test_a_file_without_times(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "flow.hdf5"
    path.write_bytes((folder / "data/test/calm.hdf5").read_bytes())
    with h5py.File(path, "r+") as file:
        del file["dimensions/time"]
    fields = open_dataset(path)[0]
    assert "time" not in fields
    assert "time" not in fields.to_xarray().coords


def test_a_dataset_at_a_url(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHODH_CACHE", str(tmp_path / "cache"))
    remote, local = open_dataset(folder.as_uri()), open_dataset(folder)
    torch.testing.assert_close(remote[0, :2]["velocity"], local[0, :2]["velocity"], rtol=0, atol=0)


def test_refusals(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no HDF5 files"):
        open_dataset(tmp_path)
    with pytest.raises(UserError, match="no split named 'all'"):
        open_dataset(folder, "all")
    monkeypatch.setitem(__import__("sys").modules, "xarray", None)
    with pytest.raises(UserError, match=r"pip install 'shodh_moe\[analysis\]'"):
        Fields({}).to_xarray()
