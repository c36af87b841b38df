"""Forecasts from Python: equal to those of the command, mass conserved, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import h5py
import numpy as np
import pytest
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.data import open_dataset
from shodh_moe.inference import load_model
from shodh_moe.inference.export import export
from shodh_moe.inference.predict import Request, predict
from shodh_moe.kernels import divergence
from tests.trained import GRID, make_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an exported model and its dataset."""
    folder = tmp_path_factory.mktemp("forecast")
    export(make_run(folder, operator="staggered", walls="exact"), folder / "model")
    return folder


def given(snapshots: int = 2, value: float = 0.0) -> dict[str, torch.Tensor]:
    return {
        "velocity": torch.full((snapshots, 3, *GRID), value),
        "pressure": torch.zeros(snapshots, 1, *GRID),
        "solid": torch.zeros(1, *GRID),
    }


def test_it_is_what_the_command_writes(folder: Path) -> None:
    dataset = open_dataset(folder / "theirs", "test")
    output = folder / "prediction.hdf5"
    predict(folder / "model", Request(dataset.records[0].path, output, 2, paraview=False, dtype="float64"))
    predicted = load_model(folder / "model").forecast(dataset[0, :2], steps=2)
    with h5py.File(output) as file:
        np.testing.assert_array_equal(predicted["velocity"], np.moveaxis(file["t1_fields/velocity"][0], -1, 1))
        np.testing.assert_array_equal(
            predicted["velocity_face"], np.moveaxis(file["t1_fields/velocity_face"][0], -1, 1)
        )
        np.testing.assert_array_equal(predicted["pressure"][:, 0], file["t0_fields/pressure"][0])
        np.testing.assert_array_equal(predicted["solid"], file["t0_fields/solid"][:])
        np.testing.assert_array_equal(predicted["time"], file["dimensions/time"][:])
    assert predicted.source.domain == "calm"


def test_mass_is_conserved_and_solids_are_at_rest(folder: Path) -> None:
    model = load_model(folder / "model")
    predicted = model.forecast(open_dataset(folder / "theirs", "test")[1], steps=3)
    face_N3XYZ = predicted["velocity_face"]
    assert face_N3XYZ.dtype == torch.float64
    assert face_N3XYZ.square().mean().sqrt() > 1e-3
    assert divergence(face_N3XYZ, model.operator).abs().max() < 1e-12
    assert (predicted["velocity"] * predicted["solid"]).abs().max() == 0


def test_another_operator_conserves_the_velocity_itself(tmp_path: Path) -> None:
    model = load_model(make_run(tmp_path, operator="spectral", walls="none"))
    predicted = model.forecast(open_dataset(tmp_path / "theirs", "test")[0], steps=1)
    assert "velocity_face" not in predicted
    assert divergence(predicted["velocity"], model.operator).abs().max() < 1e-12


def test_a_forecast_can_be_continued(folder: Path) -> None:
    """Continued from its own decoded fields, not from its latents: the first step differs, and time goes on."""
    model = load_model(folder / "model")
    first = model.forecast(open_dataset(folder / "theirs", "test")[0], steps=2)
    second = model.forecast(first, steps=2)
    assert second["time"].tolist() == [7, 8]


def test_a_model_at_a_url(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHODH_CACHE", str(tmp_path))
    files = fsspec.filesystem("memory")
    files.put(str(folder / "model"), "/hub/model", recursive=True)
    try:
        assert load_model("memory://hub/model").weights_sha256 == load_model(folder / "model").weights_sha256
    finally:
        files.rm("/hub", recursive=True)


def test_refusals(folder: Path) -> None:
    model = load_model(folder / "model")
    with pytest.raises(UserError, match="do not fit the model"):
        model.forecast({**given(), "velocity": torch.zeros(2, 3, 8, 8, 8)}, 1)
    with pytest.raises(UserError, match="no pressure"):
        model.forecast({"velocity": given()["velocity"]}, 1)
    with pytest.raises(UserError, match="give at least 2"):
        model.forecast(given(1), 1)
    with pytest.raises(UserError, match="ask for at least 1"):
        model.forecast(given(), 0)
    with pytest.raises(UserError, match="given fields have values that are not finite"):
        model.forecast(given(value=float("nan")), 1)
    with pytest.raises(UserError, match="there is no folder"):
        load_model(folder / "nowhere")


def test_a_prediction_that_is_not_finite_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverging(_: object, history: torch.Tensor, *more: object) -> Iterator[torch.Tensor]:
        yield history[:, -1]
        yield history[:, -1] * float("nan")

    monkeypatch.setattr("shodh_moe.inference.model.rollout", diverging)
    with pytest.raises(UserError, match="not finite at step 2"):
        load_model(folder / "model").forecast(given(value=1.0), 2)
