"""PDEBench's layouts, as its generators write them, and files that do not match."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.ccm import pdebench

T, X, Y = 5, 6, 8


def write_groups(path: Path, channels: int, count: int = 3) -> np.ndarray:
    """Write ``2D_diff-react`` (2 channels, y first) or ``2D_rdb`` (1 channel, x first); return [N, T, C, Y, X]."""
    fields = np.random.default_rng(0).standard_normal((count, T, channels, Y, X)).astype(np.float32)
    with h5py.File(path, "w") as file:
        for index, trajectory in enumerate(fields):
            stored = trajectory.transpose(0, 2, 3, 1) if channels == 2 else trajectory.transpose(0, 3, 2, 1)
            group = file.create_group(f"{index:04d}")
            group.create_dataset("data", data=stored, compression="lzf" if channels == 2 else None)
            group["grid/x"], group["grid/y"] = np.linspace(-1, 1, X, dtype="f"), np.linspace(-1, 1, Y, dtype="f")
            group["grid/t"] = np.linspace(0, 0.2, T, dtype="f")
            group.attrs["config"] = "sim:\n  Du: 0.001\n  Dv: 0.005\n"
    return fields


def write_flow(path: Path, latest: int = T - 1) -> np.ndarray:
    """Write ``ns_incom_inhom_2d``; return [N, T, C, Y, X]."""
    fields = np.random.default_rng(0).standard_normal((2, T, 3, Y, X)).astype(np.float32)
    stored = fields.transpose(0, 1, 4, 3, 2)
    with h5py.File(path, "w") as file:
        file["velocity"], file["particles"] = stored[..., :2], stored[..., 2:]
        file["force"] = np.zeros((2, X, Y, 2), dtype="f")
        file["t"] = np.tile(np.arange(T, dtype="f") * np.float32(0.005), (2, 1))
        file.attrs["config"], file.attrs["latestIndex"] = "NU: 0.01\nn_batch: 2\n", latest
    return fields


@pytest.mark.parametrize(("channels", "names"), [(2, ("activator", "inhibitor")), (1, ("depth",))])
def test_groups_are_read(channels: int, names: tuple[str, ...], tmp_path: Path) -> None:
    fields = write_groups(tmp_path / "a.h5", channels)
    found = pdebench.read(tmp_path / "a.h5")
    torch.testing.assert_close(found.fields, torch.from_numpy(fields), rtol=0, atol=0)
    assert found.channels == names
    assert found.interval == pytest.approx(0.05)
    torch.testing.assert_close(found.times, torch.linspace(0, 0.2, T, dtype=torch.float64), rtol=0, atol=1e-7)
    assert found.config == {"sim": {"Du": 0.001, "Dv": 0.005}}
    part = pdebench.read(tmp_path / "a.h5", 1, 2)
    torch.testing.assert_close(part.fields, torch.from_numpy(fields[1:2]), rtol=0, atol=0)


def test_incompressible_flow_is_read_up_to_the_last_written_frame(tmp_path: Path) -> None:
    fields = write_flow(tmp_path / "a.h5")
    found = pdebench.read(tmp_path / "a.h5")
    torch.testing.assert_close(found.fields, torch.from_numpy(fields), rtol=0, atol=0)
    assert found.channels == ("velocity_x", "velocity_y", "particles")
    assert found.interval == pytest.approx(0.005)
    assert found.config["NU"] == 0.01
    write_flow(tmp_path / "b.h5", latest=2)
    unfinished = pdebench.read(tmp_path / "b.h5", 1)
    torch.testing.assert_close(unfinished.fields, torch.from_numpy(fields[1:, :3]), rtol=0, atol=0)
    assert len(unfinished.times) == 3


def replaced(file: h5py.File, name: str, value: np.ndarray) -> None:
    del file[name]
    file[name] = value


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.__delitem__("0001/data"), "no dataset 0001/data"),
        (lambda f: f.__delitem__("0000/grid/t"), "no dataset 0000/grid/t"),
        (lambda f: replaced(f, "0002/data", np.zeros((T, Y, X + 1, 2))), "0002/data has shape .* one by one"),
        (lambda f: replaced(f, "0000/data", np.zeros((T, Y, X))), "expected 4 axes"),
        (lambda f: replaced(f, "0000/data", np.zeros((T, Y, X, 3))), "has 3 channels, expected 1 or 2"),
        (lambda f: replaced(f, "0000/grid/t", np.zeros(T + 1)), "6 times for 5 snapshots"),
        (lambda f: replaced(f, "0000/grid/t", np.array([0.0, 1, 2, 3, 5])), "not evenly spaced"),
        (lambda f: replaced(f, "0001/grid/t", np.arange(T) * 2.0), "0001/grid/t differs"),
        (lambda f: replaced(f, "0001/data", np.full((T, Y, X, 2), np.inf)), "trajectory 1 has values"),
    ],
)
def test_invalid_groups_are_refused(spoil: Callable[[h5py.File], None], message: str, tmp_path: Path) -> None:
    write_groups(tmp_path / "a.h5", 2)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        spoil(file)
    with pytest.raises(UserError, match=message) as raised:
        pdebench.read(tmp_path / "a.h5")
    assert "\n" not in str(raised.value)
    assert "a.h5" in str(raised.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.__delitem__("particles"), "no dataset particles"),
        (lambda f: f.__delitem__("t"), "no dataset t"),
        (lambda f: replaced(f, "velocity", np.zeros((2, T, X, Y, 3))), r"velocity has shape \(2, 5, 6, 8, 3\)"),
        (lambda f: replaced(f, "t", np.zeros((2, T))), "not evenly spaced"),
        (lambda f: f.attrs.__setitem__("latestIndex", -1), "counts 0 of 5 snapshots"),
    ],
)
def test_invalid_flows_are_refused(spoil: Callable[[h5py.File], None], message: str, tmp_path: Path) -> None:
    write_flow(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        spoil(file)
    with pytest.raises(UserError, match=message):
        pdebench.read(tmp_path / "a.h5")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        pdebench.read(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("text")
    with pytest.raises(UserError, match="cannot be read"):
        pdebench.read(tmp_path / "text.h5")
    with h5py.File(tmp_path / "cfd.h5", "w") as file:
        file["density"] = np.zeros((1, 2, 3, 3))
    with pytest.raises(UserError, match="contains density: neither"):
        pdebench.read(tmp_path / "cfd.h5")
    write_groups(tmp_path / "a.h5", 1)
    with pytest.raises(UserError, match="no trajectories 7 to 9"):
        pdebench.read(tmp_path / "a.h5", 7, 9)
