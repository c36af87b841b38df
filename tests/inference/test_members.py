"""Ensembles: their mean, spread and coverage, by `shodh predict --members` and `shodh evaluate --members`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from shodh_moe.cli import main
from shodh_moe.data import open_trajectories, read_provenance, read_snapshots
from shodh_moe.inference import Model, load_model
from shodh_moe.kernels import divergence
from shodh_moe.metrics.ensemble import coverage, half_width, mean_and_spread
from shodh_moe.metrics.fields import nrmse
from tests.tiny import refused, tree
from tests.trained import HISTORY, SNAPSHOTS, make_run, two_trajectories


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models ``one`` and ``two`` of one tokenizer, ``other`` of another one, and a flow."""
    folder = tmp_path_factory.mktemp("members")
    for name, model, settings in (
        ("one", {}, {"seed": 3}),
        ("two", {}, {"seed": 4}),
        ("longer", {"history": 3}, {}),
        ("other", {}, {"widths": [8, 8, 16]}),
    ):
        (folder / name).mkdir()
        make_run(folder / name, model, **settings)
    two_trajectories(folder / "flow.hdf5", folder / "one" / "theirs")
    return folder


def forecast(model: Model, fields: np.ndarray, solid: np.ndarray, steps: int) -> np.ndarray:
    """Velocity and pressure of a forecast, [N, 4, X, Y, Z]."""
    given = {"velocity": fields[:, :3], "pressure": fields[:, 3:], "solid": solid}
    found = model.forecast({name: torch.from_numpy(values) for name, values in given.items()}, steps)
    return torch.cat([found["velocity"], found["pressure"]], dim=1).numpy()


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(made: Path, *members: str, steps: int = 3) -> list[str]:
    given = ["predict", "--checkpoint", str(made / "one/runs/trained"), "--input", str(made / "flow.hdf5")]
    return [*given, "--steps", str(steps), "--output", "out.hdf5", "--members", *(str(made / m) for m in members)]


def test_the_prediction_is_the_members_mean_with_their_spread(
    made: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words(made, "two/runs/trained"), "--dtype", "float64"]) == 0
    models = [load_model(made / name / "runs/trained") for name in ("one", "two")]
    truth = []
    for row, record in enumerate(open_trajectories(made / "flow.hdf5")):
        fields, solid = read_snapshots(record)
        own = np.stack([forecast(one, fields[:HISTORY], solid, 3) for one in models])
        assert np.abs(own[0] - own[1]).max() > 1e-3
        with h5py.File("out.hdf5") as file:
            velocity, spread = (
                np.moveaxis(file[f"t1_fields/{n}"][row], -1, 1) for n in ("velocity", "velocity_spread")
            )
            pressure, around = (file[f"t0_fields/{name}"][row] for name in ("pressure", "pressure_spread"))
        np.testing.assert_allclose(velocity, own.mean(0)[:, :3], rtol=0, atol=1e-12)
        np.testing.assert_allclose(pressure, own.mean(0)[:, 3], rtol=0, atol=1e-12)
        np.testing.assert_allclose(spread, own.std(0, ddof=1)[:, :3], rtol=0, atol=1e-12)
        np.testing.assert_allclose(around, own.std(0, ddof=1)[:, 3], rtol=0, atol=1e-12)
        with h5py.File(f"out.trajectory{row}.vtkhdf") as file:
            shown = file["VTKHDF/PointData/velocity_spread"][:].transpose(0, 4, 3, 2, 1)
            assert file["VTKHDF/Steps/PointDataOffsets/pressure_spread"][:].tolist() == [0, 1, 2]
        np.testing.assert_allclose(shown, spread, rtol=1e-6)
        found = divergence(torch.from_numpy(velocity), "spectral")
        assert float(found.abs().max()) < 1e-12
        truth.append(
            (torch.from_numpy(velocity[0]), torch.from_numpy(spread[0]), torch.from_numpy(fields[HISTORY, :3]))
        )
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line[:6].strip().isdigit()]
    spreads = [float(s.square().mean().sqrt() / t.double().square().mean().sqrt()) for _, s, t in truth]
    inside = [coverage(m, s, t.double(), 0.9, 2) for m, s, t in truth]
    assert [float(word) for word in rows[0][-2:]] == pytest.approx([np.mean(spreads), np.mean(inside)], abs=6e-4)
    assert read_provenance(Path("out.hdf5"))["members_weights_sha256"] == [one.weights_sha256 for one in models]


def test_a_single_model_has_no_spread(made: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words(made)[:-1], "--no-paraview"]) == 0
    with h5py.File("out.hdf5") as file:
        assert "velocity_spread" not in file["t1_fields"]
        assert "pressure_spread" not in file["t0_fields"]
    assert "spread" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("members", "messages"),
    [
        (["other/runs/trained"], ("--members", "other/runs/trained has another tokenizer than", "share one")),
        (["longer/runs/trained"], ("sees 3 snapshots", "sees 2", "model.history")),
        (["one/runs/trained/checkpoints/7"], ("has the weights of another member", "name each model once")),
        (["nowhere"], ("no folder", "nowhere")),
    ],
)
def test_members_that_do_not_fit_are_refused(
    members: list[str], messages: tuple[str, ...], made: Path, here: Path, capfd: Any
) -> None:
    refused(capfd, *words(made, *members), says=messages)
    assert tree(here) == {}


def test_evaluation_measures_the_ensemble(
    made: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = str(made / "one/runs/trained/config.yaml"), made / "one/runs/trained"
    member = str(made / "two/runs/trained")
    assert main(["evaluate", "--config", config, "--checkpoint", str(run), "--output", "e", "--members", member]) == 0
    said = capsys.readouterr().out
    domains = json.loads(Path("e/metrics.json").read_text())["domains"]
    models = [load_model(run), load_model(member)]
    for domain, record in (("calm", 0), ("wild", 1)):
        entry = domains[domain]["ensemble"]
        assert entry["members"] == 2
        assert f"{domain}, ensemble of 2, first and last step" in said
        fields, solid = read_snapshots(open_trajectories(made / "flow.hdf5")[record])
        own = torch.from_numpy(np.stack([forecast(one, fields[:HISTORY], solid, 2)[:, :3] for one in models]))
        fluid = torch.from_numpy(solid < 0.5).expand(3, -1, -1, -1)
        for step in range(2):
            true = torch.from_numpy(fields[HISTORY + step, :3]).double()
            mean, spread = mean_and_spread(list(own[:, step]))
            # Latents are cached in float32 in batches, so a forecast differs by rounding.
            assert entry["nrmse_mean"][step] == pytest.approx(float(nrmse(mean, true)), rel=1e-4)
            singles = [float(nrmse(one, true)) for one in own[:, step]]
            assert entry["nrmse_members"][step] == pytest.approx(np.mean(singles), rel=1e-4)
            for level in (0.5, 0.9):
                inside = coverage(mean[fluid], spread[fluid], true[fluid], level, 2)
                assert entry[f"coverage_{100 * level:.0f}"][step] == pytest.approx(inside, abs=1e-3)
        # The factor holds the level's share of the validation values, and the test coverage uses it.
        for level in (0.5, 0.9):
            name = f"{100 * level:.0f}"
            assert all(factor > 0 for factor in entry[f"factor_{name}"])
            error, around = (true - mean).abs()[fluid], spread[fluid]
            inside = float((error <= entry[f"factor_{name}"][1] * around).double().mean())
            assert entry[f"coverage_{name}_calibrated"][1] == pytest.approx(inside, abs=1e-3)
        assert entry["factor_90"][0] > entry["factor_50"][0]
    assert SNAPSHOTS - HISTORY >= 2


@pytest.mark.parametrize("members", [2, 3, 8])
@pytest.mark.parametrize("level", [0.5, 0.9])
def test_the_interval_holds_a_further_draw_as_often_as_it_says(members: int, level: float) -> None:
    draws = torch.randn(members + 1, 200_000, generator=torch.Generator().manual_seed(members), dtype=torch.float64)
    mean, spread = mean_and_spread(list(draws[:-1]))
    assert coverage(mean, spread, draws[-1], level, members) == pytest.approx(level, abs=0.005)
    assert half_width(level, members) > half_width(level, members + 1)
