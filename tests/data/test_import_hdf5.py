"""HDF5 files that cannot be imported as they are: filters, links, empty datasets. The message says the way out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from shodh_moe.formats import worker
from tests.data.test_import import GRID, cutouts, flow, imported, mapping_file  # noqa: F401  (a fixture)
from tests.tiny import refused

MANY: dict[str, Any] = {"axes": ["c", "x", "y", "z"], "velocity": "sims/{n}/u_*", "pressure": "zero"}


@pytest.mark.parametrize(
    ("store", "changes", "messages"),
    [
        ("soft", {}, ("Velocity_0002 is a link to /elsewhere/v", "name its target")),
        ("external", {}, ("Velocity_0002 is a link to v in other.h5",)),
        ("soft group", {"velocity": "linked/v"}, ("linked is a link to /elsewhere",)),
        ("null", {"velocity": "empty"}, ("train.h5: empty is empty (a null dataspace)",)),
        ("null", {"spacing": None, "coordinates": {"x": "empty", "y": "ycoor", "z": "zcoor"}}, ("empty is empty",)),
        ("none", {"velocity": "none", "axes": ["t", "z", "y", "x", "c"]}, ("none holds no snapshot",)),
        ("endless", {"velocity": "endless", "axes": ["t", "z", "y", "x", "c"]}, ("endless claims 1099511627776",)),
        ("many", MANY, ("train.h5: sims/2 is a link to /sims/1",)),
        ("many", {**MANY, "velocity": "sims/{n}/w"}, ("train.h5: sims/2/w is a link to /sims/1/u_1",)),
    ],
)
def test_what_holds_no_values_is_named(
    cutouts: Path,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
    store: str,
    changes: dict[str, Any],
    messages: tuple[str, ...],
) -> None:
    with h5py.File(cutouts / "train.h5", "a") as file:
        file["elsewhere/v"] = file["Velocity_0002"][:]
        file["empty"] = h5py.Empty("f4")
        file["none"] = np.zeros((0, *GRID[::-1], 3))
        if store == "endless":
            file.create_dataset("endless", (2**40, *GRID[::-1], 3), "f4", chunks=(1, *GRID[::-1], 3))
        if store in ("soft", "external"):
            del file["Velocity_0002"]
            soft = h5py.SoftLink("/elsewhere/v")
            file["Velocity_0002"] = soft if store == "soft" else h5py.ExternalLink("other.h5", "v")
        if store == "soft group":
            file["linked"] = h5py.SoftLink("/elsewhere")
        if store == "many":
            file["sims/1/u_1"] = np.zeros((3, *GRID))
            if changes["velocity"].endswith("w"):
                file["sims/2/w"] = h5py.SoftLink("/sims/1/u_1")
            else:
                file["sims/2"] = h5py.SoftLink("/sims/1")
    mapping = mapping_file(cutouts, **{"pressure": "zero", **changes})
    refused(capfd, "data", "import", str(mapping), "--output", "out", says=messages)


def write_blosc(path: Path, patch: pytest.MonkeyPatch) -> np.ndarray:
    """Write the flow of `write_cutout` compressed with Blosc, a filter that HDF5 itself does not have."""
    pytest.importorskip("hdf5plugin")
    velocity, _ = flow(0)
    np.save(path.with_suffix(".npy"), velocity)
    # Importing netCDF4 sets this variable to its own filters, which are for another version of HDF5.
    patch.delenv("HDF5_PLUGIN_PATH", raising=False)
    worker.stop()  # it may have the variable
    program = """
import sys, h5py, hdf5plugin, numpy
with h5py.File(sys.argv[1], "w") as file:
    for number, values in enumerate(numpy.load(sys.argv[2])):
        file.create_dataset(f"Velocity_{number}", data=values.transpose(3, 2, 1, 0), **hdf5plugin.Blosc())
"""
    subprocess.run([sys.executable, "-c", program, str(path), str(path.with_suffix(".npy"))], check=True)
    return velocity


def test_a_filter_of_hdf5plugin_is_loaded(cutouts: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    from shodh_moe.data import list_trajectories, read_trajectory

    velocity = write_blosc(cutouts / "train.h5", monkeypatch)
    out = imported(cutouts, files={"train": ["train.h5"]}, pressure="zero")
    np.testing.assert_array_equal(read_trajectory(list_trajectories(out, "train")[0]).velocity_T3XYZ, velocity)


def test_a_filter_that_is_not_there_is_named(
    cutouts: Path,  # noqa: F811
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_blosc(cutouts / "train.h5", monkeypatch)
    (cutouts / "hdf5plugin.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(str(cutouts))
    says = ("Velocity_0 is compressed with filter 32001 (", "pip install hdf5plugin", "h5repack -f GZIP=4")
    refused(capfd, "data", "import", str(mapping_file(cutouts, pressure="zero")), "--output", "out", says=says)
    worker.stop()
