"""A disk that fills up during any HDF5 write raises an exception, and nothing crashes afterwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from shodh_moe.data.hdf5 import new_hdf5


def test_written_data_is_read_back(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((3, 50_000))
    with new_hdf5(tmp_path / "a.hdf5") as file:
        file["group/values"] = values
        file.attrs["name"] = "x"
    with h5py.File(tmp_path / "a.hdf5") as file:
        np.testing.assert_array_equal(file["group/values"][()], values)
        assert file.attrs["name"] == "x"


def test_other_exceptions_pass_through(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="ours"), new_hdf5(tmp_path / "a.hdf5"):
        raise KeyError("ours")
    with pytest.raises(FileNotFoundError), new_hdf5(tmp_path / "nowhere" / "a.hdf5"):
        pass


SCRIPT = """
import errno, io, sys, numpy as np
from pathlib import Path
from shodh_moe.data import hdf5

class Full(io.FileIO):
    left = 0
    def write(self, data):
        Full.left -= 1
        if Full.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)

hdf5.open = lambda path, mode, buffering: Full(path, mode)
outcomes = []
for allowed in range(200):
    Full.left = allowed
    try:
        with hdf5.new_hdf5(Path(sys.argv[1])) as file:
            for number in range(5):
                group = file.create_group(f"trajectory {number}")
                group.attrs.update(domain="d", sample=number)
                group["small"], group["large"] = np.ones(100), np.ones(20_000)
        outcomes.append("written")
    except OSError as error:
        outcomes.append(error.errno)
    if outcomes[-1] == "written":
        break
assert len(outcomes) > 10 and set(outcomes[:-1]) == {errno.ENOSPC} and outcomes[-1] == "written", outcomes
"""


def test_a_full_disk_at_any_write_raises_an_exception(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "a.hdf5")], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stderr) == (0, "")
