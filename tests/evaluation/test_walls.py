"""A model whose tokenizer has a staggered operator and exact walls: its predictions, metrics and model card."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from shodh_moe.cli import main
from shodh_moe.config.load import load_config
from shodh_moe.config.paths import resolve_paths
from shodh_moe.inference.export import export
from shodh_moe.kernels import divergence
from shodh_moe.runs import pipeline
from shodh_moe.tokenizer.walls import to_centres
from tests.trained import GRID, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("walls"), operator="staggered", walls="exact")


def relative_divergence(velocity: np.ndarray) -> float:
    """Return h rms(div u) / rms(u) of a velocity [T, X, Y, Z, 3] on faces."""
    u = torch.from_numpy(np.moveaxis(velocity, -1, 1).copy()).double()
    return float(divergence(u, "staggered").square().mean().sqrt() / u.square().sum(1).mean().sqrt())


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("float64", 1e-13)])
def test_a_prediction_also_has_the_velocity_on_faces(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str, limit: float
) -> None:
    flow, output = run.parent.parent / "theirs/data/test/calm.hdf5", tmp_path / "out.hdf5"
    arguments = ["--checkpoint", str(run), "--input", str(flow), "--output", str(output), "--dtype", dtype]
    assert main(["predict", *arguments, "--steps", "2"]) == 0
    with h5py.File(output) as file:
        vectors = file["t1_fields"]
        assert list(vectors.attrs["field_names"]) == ["velocity", "velocity_face"]
        assert dict(vectors["velocity"].attrs).keys() < dict(vectors["velocity_face"].attrs).keys()
        velocity, faces, solid = vectors["velocity"][0], vectors["velocity_face"][0], file["t0_fields/solid"][0] == 1
        assert velocity.dtype == faces.dtype == dtype
    assert velocity.shape == faces.shape == (2, *GRID, 3)
    assert relative_divergence(faces) < limit
    assert relative_divergence(velocity) > 1e-3  # the average of the faces is not itself divergence-free
    assert 0 < solid.sum() < solid.size
    assert not velocity[:, solid].any()
    assert not faces[:, solid].any()
    assert velocity[:, ~solid].any()
    centres = to_centres(torch.from_numpy(np.moveaxis(faces, -1, 1).copy()))
    np.testing.assert_allclose(np.moveaxis(velocity, -1, 1), centres, rtol=1e-6, atol=1e-6)
    with h5py.File(output.with_suffix(".vtkhdf")) as file:
        np.testing.assert_array_equal(
            file["VTKHDF/PointData/velocity"][0].transpose(2, 1, 0, 3), np.float32(velocity[0])
        )
    assert "divergence of the velocity on faces, staggered operator" in capsys.readouterr().out


def test_evaluation_reports_the_divergence_on_faces(run: Path, tmp_path: Path) -> None:
    config = load_config(run / "config.yaml")
    paths = resolve_paths(config)
    pipeline.make_latents(config, paths)
    metrics = pipeline.evaluate(config, paths)
    exact, single, *data = metrics["divergence_table"]
    assert (exact["dtype"], single["dtype"]) == ("float64", "float32")
    assert exact["what"] == "decoded prediction in float64, on faces"
    assert exact["rms_relative"] < 1e-13
    assert single["rms_relative"] < 1e-5
    assert metrics["divergence"]["rms_relative"] == exact["rms_relative"]
    assert all("averaged to faces" in row["what"] and row["rms_relative"] > 1e-3 for row in data)
    arrays = np.load(run / "evaluation.npz")
    # Comparisons and pictures use the velocity at the centres, where the data are.
    assert not arrays["calm/pred"][:3, arrays["calm/solid"] == 1].any()
    card = (export(run, tmp_path / "model") / "README.md").read_text()
    assert "Velocity in solid voxels is exactly zero." in card
    assert "on the cells' faces" in " ".join(card.split())
    assert json.loads((tmp_path / "model/tokenizer/tokenizer.json").read_text())["config"]["walls"] == "exact"
