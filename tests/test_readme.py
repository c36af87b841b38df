"""README.md: its Python code runs, the paths that it and the main docs name exist, and it stays short."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.data import list_trajectories, read_snapshots
from shodh_moe.inference import forecast, load_model
from shodh_moe.inference.export import export
from shodh_moe.inference.predict import Request, predict
from tests.trained import GRID, make_run

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FOLDERS = "benchmarks|configs|docs|kernels|launch|shodh_moe|tests"
FILES = "|".join(re.escape(path.name) for path in ROOT.iterdir() if path.is_file() and path.suffix in (".py", ".md"))


def named_paths(text: str) -> set[str]:
    """Return the paths in this repository that a page names, relative to the root."""
    return {
        path.rstrip("./")
        for path in re.findall(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./*-]*|{FILES})(?![\w<])", text)
        if "*" not in path
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an exported model and its dataset."""
    folder = tmp_path_factory.mktemp("readme")
    export(make_run(folder), folder / "quickstart_model")
    return folder


def test_the_python_example_runs(folder: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    assert "path/to/dataset" in blocks[0]
    code = blocks[0].replace("path/to/dataset", "theirs") + "print(predicted_N4XYZ.shape)\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str((3, 4, *GRID))


def test_forecast_returns_what_predict_writes(folder: Path) -> None:
    trajectory = list_trajectories(folder / "theirs", "test")[0]
    fields_T4XYZ, solid_1XYZ = read_snapshots(trajectory)
    output = folder / "prediction.hdf5"
    predict(folder / "quickstart_model", Request(trajectory.path, output, 2, paraview=False, dtype="float64"))
    predicted_N4XYZ = forecast(load_model(folder / "quickstart_model"), fields_T4XYZ[:2], solid_1XYZ, 2)
    with h5py.File(output) as file:
        velocity_N3XYZ = np.moveaxis(file["t1_fields/velocity"][0], -1, 1)
        pressure_NXYZ = file["t0_fields/pressure"][0]
    np.testing.assert_array_equal(predicted_N4XYZ[:, :3], velocity_N3XYZ)
    np.testing.assert_array_equal(predicted_N4XYZ[:, 3], pressure_NXYZ)


def test_forecast_refuses_invalid_fields(folder: Path) -> None:
    model = load_model(folder / "quickstart_model")
    solid_1XYZ = np.zeros((1, *GRID), np.float32)
    with pytest.raises(UserError, match="do not fit the model"):
        forecast(model, np.zeros((2, 4, 8, 8, 8), np.float32), solid_1XYZ, 1)
    with pytest.raises(UserError, match="give at least 2"):
        forecast(model, np.zeros((1, 4, *GRID), np.float32), solid_1XYZ, 1)
    with pytest.raises(UserError, match="given fields have values that are not finite"):
        forecast(model, np.full((2, 4, *GRID), np.nan, np.float32), solid_1XYZ, 1)
    with pytest.raises(UserError, match="there is no folder"):
        load_model(folder / "nowhere")


def test_forecast_refuses_a_prediction_that_is_not_finite(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverging(transformer: object, history: torch.Tensor, geometry: torch.Tensor) -> Iterator[torch.Tensor]:
        yield history[:, -1]
        yield history[:, -1] * float("nan")

    monkeypatch.setattr("shodh_moe.inference.forecasting.rollout", diverging)
    fields_H4XYZ, solid_1XYZ = np.ones((2, 4, *GRID), np.float32), np.zeros((1, *GRID), np.float32)
    with pytest.raises(UserError, match="not finite at step 2"):
        forecast(load_model(folder / "quickstart_model"), fields_H4XYZ, solid_1XYZ, 2)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/design.md", "docs/promises.md"])
def test_every_named_path_exists(page: str) -> None:
    named = named_paths((ROOT / page).read_text(encoding="utf-8"))
    assert len(named) > 5
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", [*sorted(path.name for path in (ROOT / "docs").glob("*.md")), "../README.md"])
def test_every_link_has_a_target(page: str) -> None:
    path = ROOT / "docs" / page
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) < 900
