"""`shodh data preview`: which pictures it writes, and the correct vorticity in them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from shodh_moe.cli import main
from shodh_moe.data.derivatives import vorticity
from shodh_moe.data.reading import TrajectoryRecord
from tests.tiny import refused, write_dataset


def test_pictures_of_a_folder_and_of_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # A long z axis: planes are turned so that the long side is horizontal.
    dataset = write_dataset(tmp_path / "theirs", grid=(8, 8, 16), snapshots=1, domains=("calm",))
    for split in ("valid", "test"):
        shutil.rmtree(dataset / "data" / split)
    assert main(["data", "preview", str(dataset), "--output", str(tmp_path / "pictures")]) == 0
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["overview.png", "train_calm.png"]
    assert main(["data", "preview", str(dataset / "data/train/calm.hdf5"), "--output", str(tmp_path / "one")]) == 0
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["calm.png"]
    assert (tmp_path / "one/calm.png").read_bytes()[:4] == b"\x89PNG"
    (dataset / "data/train/calm.hdf5").write_bytes(b"x")
    refused(capfd, "data", "preview", str(dataset), "--output", str(tmp_path / "bad"), says=("calm.hdf5", "HDF5"))


def test_vorticity_of_a_shear_and_of_a_wave() -> None:
    record = TrajectoryRecord(Path("x"), 0, "d", 1, (16, 8, 8), (True, False, False), spacing=(0.5, 0.5, 0.5))
    x, y, _ = np.meshgrid(*[0.5 * np.arange(n) for n in record.grid], indexing="ij")
    zero, fluid = np.zeros_like(x), np.zeros(record.grid, dtype=bool)
    shear = vorticity(np.stack([3 * y, zero, zero]).astype(np.float32), fluid, record)
    np.testing.assert_allclose(shear, 3, rtol=1e-6)
    k = 2 * np.pi / 8
    wave = vorticity(np.stack([zero, np.sin(k * x), zero]).astype(np.float32), fluid, record)
    np.testing.assert_allclose(wave, np.abs(np.sin(k * 0.5) / 0.5 * np.cos(k * x)), atol=1e-6)
