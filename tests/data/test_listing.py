"""The index of a dataset folder: bad files are left out, links to files outside are refused."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.cli import main
from shodh_moe.data import list_trajectories, listing
from tests.tiny import write_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", grid=(4, 4, 4), snapshots=2, domains=("a", "b", "c"))


def names(dataset: Path, **options: bool) -> list[str]:
    return [record.path.name for record in list_trajectories(dataset, "train", **options)]


def test_bad_files_are_left_out_and_listed(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert names(dataset, skip_bad=True) == ["a.hdf5", "b.hdf5", "c.hdf5"]
    assert capsys.readouterr().err == ""
    (dataset / "data/train/a.hdf5").write_bytes(b"no HDF5")
    with h5py.File(dataset / "data/train/b.hdf5", "r+") as file:
        file["t0_fields/pressure"][0, 1, 0, 0, 0] = np.nan
    assert names(dataset, skip_bad=True) == ["c.hdf5"]
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("left out data/train/a.hdf5: ")
    assert "is not an HDF5 file" in first
    assert second.startswith("left out data/train/b.hdf5: ")
    assert "pressure of snapshot 1 has values that are not finite" in second
    with pytest.raises(UserError, match=r"a\.hdf5 is not an HDF5 file"):
        names(dataset)
    (dataset / "data/train/c.hdf5").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 3 files in .*train can be used"):
        names(dataset, skip_bad=True)


def test_a_bad_first_file_does_not_set_the_grid(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (dataset / "data/train/a.hdf5").write_bytes(b"")
    write_dataset(dataset / "other", grid=(8, 4, 4), snapshots=2, domains=("z",))
    (dataset / "other/data/train/z.hdf5").rename(dataset / "data/train/z.hdf5")
    monkeypatch.setattr(listing, "READ_BYTES", 0)
    assert names(dataset, skip_bad=True) == ["b.hdf5", "c.hdf5"]


def test_values_of_large_datasets_are_not_read(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "READ_BYTES", 0)
    with h5py.File(dataset / "data/train/b.hdf5", "r+") as file:
        file["t0_fields/pressure"][0, 1, 0, 0, 0] = np.nan
    assert names(dataset, skip_bad=True) == ["a.hdf5", "b.hdf5", "c.hdf5"]


def test_symbolic_links_that_leave_the_folder_are_refused(dataset: Path, tmp_path: Path) -> None:
    path = dataset / "data/train/a.hdf5"
    path.rename(tmp_path / "a.hdf5")
    path.symlink_to(tmp_path / "a.hdf5")
    with pytest.raises(UserError, match=r"train/a\.hdf5 is a symbolic link to .*/a\.hdf5, outside .*: copy"):
        names(dataset)
    assert names(dataset, skip_bad=True) == ["b.hdf5", "c.hdf5"]
    path.unlink()
    path.symlink_to("b.hdf5")
    assert names(dataset) == ["a.hdf5", "b.hdf5", "c.hdf5"]
    (tmp_path / "alias").symlink_to(dataset)  # a link to the folder itself stays inside it
    assert len(list_trajectories(tmp_path / "alias", "train")) == 3


@pytest.mark.parametrize("command", ["check", "info", "preview"])
def test_every_command_refuses_links_that_training_refuses(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    path = dataset / "data/train/a.hdf5"
    path.rename(tmp_path / "a.hdf5")
    with h5py.File(tmp_path / "a.hdf5", "r+") as file:
        file["t0_fields/secret"] = np.zeros(3)
    path.symlink_to(tmp_path / "a.hdf5")
    (dataset / "data/train/b.hdf5").unlink()
    (dataset / "data/train/b.hdf5").symlink_to("b.hdf5")  # to itself
    output = ("--output", str(tmp_path / "pictures")) if command == "preview" else ()
    assert main(["data", command, str(dataset), *output]) == 2
    shown = "".join(capsys.readouterr())
    assert "is a symbolic link to " in shown
    assert "secret" not in shown
    assert command == "preview" or "b.hdf5" in shown
    # A file that the user names is the user's choice.
    main(["data", command, str(path), *output])
    assert "symbolic link" not in "".join(capsys.readouterr())
