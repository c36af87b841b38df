"""A model of several time strides predicts and is evaluated with each of them, and refuses others."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.cli import main
from shodh_moe.config.load import load_config
from shodh_moe.config.paths import resolve_paths
from shodh_moe.data import open_dataset, read_provenance
from shodh_moe.inference import load_model
from shodh_moe.inference.export import export
from shodh_moe.runs import pipeline
from shodh_moe.tokenizer.latents import load_latents
from tests.tiny import refused
from tests.trained import SNAPSHOTS, make_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models of one tokenizer: ``model`` with the strides 1 and 2, ``plain/runs/trained`` without."""
    folder = tmp_path_factory.mktemp("stride")
    export(make_run(folder, {"strides": [1, 2]}), folder / "model")
    (folder / "plain").mkdir()
    make_run(folder / "plain", seed=4)
    return folder


def words(folder: Path, output: Path, *more: str, steps: int = 2) -> list[str]:
    given = ["--checkpoint", str(folder / "model"), "--input", str(folder / "theirs/data/test/calm.hdf5")]
    return ["predict", *given, "--steps", str(steps), "--output", str(output), "--no-paraview", *more]


def test_the_command_and_python_predict_with_the_stride(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.hdf5"
    assert main(words(folder, output, "--stride", "2", "--dtype", "float64")) == 0
    shown = capsys.readouterr().out
    dataset, model = open_dataset(folder / "theirs", "test"), load_model(folder / "model")
    flow = dataset[0]
    predicted = model.forecast(dataset[0, :3], steps=2, stride=2)  # snapshots 0 and 2
    with h5py.File(output) as file:
        np.testing.assert_array_equal(np.moveaxis(file["t1_fields/velocity"][0], -1, 1), predicted["velocity"])
        assert file["dimensions/time"][:].tolist() == predicted["time"].tolist() == [4, 6]
    assert read_provenance(output)["stride"] == 2
    error = (predicted["velocity"][0] - flow["velocity"][4]).norm() / flow["velocity"][4].double().norm()
    (row,) = [line.split() for line in shown.splitlines() if line.strip().startswith("1 ")]
    assert float(row[2]) == pytest.approx(float(error), abs=1e-4)
    two = {name: flow[name][:3:2] for name in ("velocity", "pressure")} | {"solid": flow["solid"]}
    # The stride is told to the network, beside the snapshots that it chooses.
    assert torch.equal(model.forecast(two, 1, stride=1)["velocity"], predicted["velocity"][:1])
    assert model.transformer.stride is not None
    torch.nn.init.normal_(model.transformer.stride.weight_SD, generator=torch.Generator().manual_seed(0))
    first, second = model.forecast(two, 1, stride=1), model.forecast(dataset[0, :3], 1, stride=2)
    assert not torch.isclose(first["velocity"], second["velocity"]).all()


def test_the_first_stride_is_the_default(folder: Path) -> None:
    model, flow = load_model(folder / "model"), open_dataset(folder / "theirs", "test")[0]
    assert torch.equal(model.forecast(flow, 1)["velocity"], model.forecast(flow, 1, stride=1)["velocity"])
    assert "| time strides, in snapshots of the training data | 1, 2 |" in (folder / "model/README.md").read_text()


def test_strides_that_do_not_fit_are_refused(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.hdf5"
    for more, says in (
        (("--stride", "3"), ("stride 3", "trained with the time stride 1, 2", "choose one of these")),
        (("--stride", "0"), ("stride 0", "choose one of these")),
        (("--stride", "2", "--start", "3"), ("the model needs 2, each 2 after the one before", "--start or --stride")),
        (
            ("--stride", "2", "--members", str(folder / "plain/runs/trained")),
            ("was trained with the time stride 1, not with 2", "another --stride"),
        ),
    ):
        refused(capfd, *words(folder, output, *more), says=says)
    assert not output.exists()
    model, dataset = load_model(folder / "model"), open_dataset(folder / "theirs", "test")
    with pytest.raises(UserError, match="2 snapshots given and 1 asked for: give at least 3"):
        model.forecast(dataset[0, :2], 1, stride=2)
    with pytest.raises(UserError, match="stride 4: the model was trained with the time stride 1: choose that"):
        load_model(folder / "plain/runs/trained").forecast(dataset[0], 1, stride=4)


def test_evaluation_measures_one_stride(folder: Path) -> None:
    config = load_config(folder / "runs/trained/config.yaml", ["evaluation.stride=2"])
    paths = resolve_paths(config)
    pipeline.make_latents(config, paths)
    metrics = pipeline.evaluate(config, paths)
    for latent in load_latents(paths.latents, "test"):
        z_TCxyz, found = latent.read(), metrics["domains"][latent.domain]
        still = float((z_TCxyz[2:-2] - z_TCxyz[4:]).square().mean())
        assert found["latent_mse_persistence"] == pytest.approx(still, rel=1e-5)
        # After snapshots 0 and 2, a rollout has room for one prediction.
        assert len(found["rollout_nrmse"]) == 1
        assert found["n_tokens"] == (SNAPSHOTS - 4) * z_TCxyz[0, 0].numel()
    with pytest.raises(UserError, match=r"evaluation\.stride 3 is not among model\.strides \[1, 2\]"):
        load_config(folder / "runs/trained/config.yaml", ["evaluation.stride=3"])
