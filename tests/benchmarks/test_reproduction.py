"""The table of the 20,000-step run and its trend, on made-up run folders; nothing is trained here."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from shodh_moe.base.errors import EXIT_REQUEUE, UserError
from shodh_moe.config import Config
from shodh_moe.config.load import load_config
from shodh_moe.solvers import Simulation
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
ERRORS = {
    "latent_mse": 0.05,
    "latent_mse_persistence": 0.2,
    "latent_mse_mean": 0.4,
    "physical_mse": 0.012,
    "physical_mse_persistence": 0.04,
    "physical_mse_mean": 0.2,
    "physical_mse_reconstruction": 0.001,
}


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def script() -> ModuleType:
    return importlib.import_module("studies.reproduction")


@pytest.fixture
def trend() -> ModuleType:
    return importlib.import_module("studies.reproduction_trend")


@pytest.fixture
def laws() -> ModuleType:
    return importlib.import_module("studies.reproduction_laws")


def layer(number: int, pure: float) -> dict[str, Any]:
    return {
        "layer": number,
        "load": {"open_channel": [pure, 1 - pure], "porous_media": [0.0, 1.0]},
        "purity": {"open_channel": pure, "porous_media": 1.0},
        "majority_expert": {"open_channel": 0, "porous_media": 1},
        "bifurcated": pure >= 0.99,
        "mutual_information": {"domain": 0.65},
    }


METRICS: dict[str, Any] = {
    "run": "tiny",
    "step": 4,
    "world_size": 2,
    "ep_size": 2,
    "domains": {"open_channel": ERRORS, "porous_media": {**ERRORS, "latent_mse": 0.1}},
    "routing": {"layers": [layer(0, 0.9), layer(1, 1.0)], "bifurcated": False},
    "divergence": {"operator": "staggered", "dtype": "float64", "rms_relative": 3.7e-15},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Make a finished run folder with only the files and values that are read."""
    folder = tmp_path / "runs" / "tiny"
    (folder / "report").mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    (folder / "environment.json").write_text(json.dumps({"cores": 2, "processor": "a processor", "devices": []}))
    (folder / "config.yaml").write_text(yaml.safe_dump(tiny.CONFIG))
    records: list[dict[str, Any]] = [
        {"kind": "train", "step": step, "step_ms": 10.0 * step, "routing": [layer(0, pure), layer(1, pure)]}
        for step, pure in ((1, 0.6), (2, 1.0), (3, 0.9), (4, 1.0))
    ]
    records.append({"kind": "valid", "step": 4, "latent_mse": {"open_channel": 0.06, "porous_media": 0.11}})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    for picture in ("losses", "routing_map_open_channel", "fields_open_channel"):
        (folder / "report" / f"{picture}.png").write_bytes(b"picture")
    return folder


def row(text: str, first: str) -> list[str]:
    return next(
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith(f"| {first}")
    )


def test_table_and_copies(script, run, tmp_path):
    found = script.collect(run, tiny.config(), [{"data": 40.0, "pretrain": 10.0}, {"pretrain": 10.0}])
    assert found["run"]["bifurcation_step"] == 4, "at step 2 it was not for good"
    assert found["run"]["step_ms"]["median"] == 25.0
    script.write(run, found, tmp_path / "docs")
    text = (tmp_path / "docs" / "table.md").read_text()
    assert row(text, "latent MSE, validation, open_channel")[1:3] == ["2.46e-05", "0.06"]
    assert row(text, "latent MSE, test, porous_media")[2] == "0.1"
    assert row(text, "over persistence's, porous_media")[1:3] == ["not stated", "0.5"]
    assert row(text, "decoded physical MSE, porous_media")[1:3] == ["1.76e-06", "0.012"]
    assert row(text, "tokens at the domain's own expert")[1:3] == ["1", "0.9"]
    assert row(text, "bifurcated layers")[2] == "1 of 2"
    assert row(text, "bifurcated for good from step")[2] == "4"
    assert row(text, "divergence in FP64")[1:3] == ["2.8e-10", "3.7e-15"]
    assert row(text, "optimizer steps")[1:] == ["20,000", "4"]
    assert "data 40 s, pretrain 20 s; together 1.0 minutes, in 2 calls" in text
    names = {path.name for path in (tmp_path / "docs").iterdir()}
    assert names == {
        *("metrics.json", "config.yaml", "environment.json", "run.json", "table.md"),
        *("losses.png", "routing_map_open_channel.png"),
    }


def test_missing_bifurcation_and_nonfinite_values_are_reported(script, run, tmp_path):
    metrics = {**METRICS, "domains": {"open_channel": {**ERRORS, "latent_mse": None}}}
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "metrics.jsonl").write_text(
        json.dumps({"kind": "train", "step": 4, "step_ms": 9.0, "routing": [layer(0, 0.5)]})
    )
    script.write(run, script.collect(run, tiny.config(), []), tmp_path / "docs")
    text = (tmp_path / "docs" / "table.md").read_text()
    assert row(text, "bifurcated for good")[2] == "never"
    assert row(text, "latent MSE, test, open_channel")[2] == "-"
    assert row(text, "latent MSE, validation, open_channel")[2] == "-"
    assert row(text, "over persistence's, open_channel")[2] == "-"


@pytest.mark.parametrize("name", ["metrics.json", "metrics.jsonl", "environment.json"])
def test_an_incomplete_run_gives_one_clear_line(script, run, name):
    (run / name).write_text('{"half')
    with pytest.raises(UserError, match=f"{name} is missing or damaged: repeat the command without --collect-only"):
        script.collect(run, tiny.config(), [])


def test_a_missing_run_folder_is_named(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = tiny.write_config(tmp_path)
    code = script.main(["--config", str(config), "--collect-only", "--output", str(tmp_path / "docs")])
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: runs/tiny/metrics.json is missing")
    assert error.count("\n") == 1
    assert not (tmp_path / "docs").exists()


def test_stage_times(script, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(script.time, "perf_counter", lambda: now[0])
    clock = script.StageClock()
    for second, line in (
        (5, "[data] unchanged, data/x"),
        (6, "[tokenizer] step 20 of 240"),
        (36, "[tokenizer] tokenizers/x in 29 s"),
        (50, "[latents] /a b/x in 14 s"),
    ):
        now[0] = float(second)
        clock.hear(line)
    now[0] = 80.0
    assert clock.seconds(finished=False) == {"tokenizer": 31.0, "latents": 14.0, "pretrain": 30.0}
    assert clock.seconds(finished=True) == {"tokenizer": 31.0, "latents": 14.0}


def test_a_signal_ends_the_stages_with_the_requeue_code(script, monkeypatch, tmp_path):
    """The exit code does not depend on the stage: this stage, like data generation, is ended by the signal itself."""
    child = tmp_path / "child"
    child.write_text(f"#!{sys.executable}\nimport time\nprint('[data] d in 1 s', flush=True)\ntime.sleep(60)\n")
    child.chmod(0o755)
    monkeypatch.setattr(script.sys, "executable", str(child))
    times = tmp_path / "times.json"

    def stop() -> None:
        time.sleep(1.0)
        for _ in range(2):  # as `timeout` does
            os.kill(os.getpid(), signal.SIGUSR1)

    # If the child has not started yet, the signal still finds a handler.
    threading.Thread(target=stop).start()
    options = argparse.Namespace(config="none.yaml", overrides=[])
    assert script.run_stages(options, times) == EXIT_REQUEUE
    (seconds,) = script.read_times(times)
    assert set(seconds) == {"data", "tokenizer"}


def test_the_long_run_has_the_flows_and_the_network_of_the_quickstart():
    ours, theirs = (load_config(ROOT / "configs" / f"{name}.yaml") for name in ("reproduce", "quickstart"))
    assert ours.model == theirs.model
    for (name, domain), (other, quick) in zip(ours.data.domains.items(), theirs.data.domains.items(), strict=True):
        assert name == other
        assert domain.model_dump(exclude={"trajectories"}) == quick.model_dump(exclude={"trajectories"})


@pytest.mark.parametrize("name", ["reproduce", "pretrain_1gpu"])
def test_the_long_runs(name):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert config.training.steps == 20_000
    assert config.model.moe.num_experts == len(config.data.domains.items()) == 2


def test_each_axis_of_the_trend_varies_one_quantity(trend):
    axes = trend.axes(trend.Point(64, 32, 500), [32, 64, 32], [32, 8], [250, 1000])
    found = {axis: [(point.dim, point.trajectories, point.steps) for point in points] for axis, points in axes.items()}
    assert found == {
        "dim": [(32, 32, 500), (64, 32, 500)],
        "trajectories": [(64, 8, 500), (64, 32, 500)],
        "steps": [(64, 32, 250), (64, 32, 1000)],
    }


def test_power_law(laws):
    law = laws.power_law([1, 2, 4, 8], [3.0, 1.5, 0.75, 0.375])
    assert law.exponent == pytest.approx(1)
    assert law.standard_error == pytest.approx(0, abs=1e-6)
    noisy = laws.power_law([1, math.e, math.e**2], [1.0, 1.0, math.exp(-3)])
    assert noisy.exponent == pytest.approx(1.5)  # least squares by hand: slope -1.5, residuals 0.5, -1, 0.5
    assert noisy.standard_error == pytest.approx(math.sqrt(1.5 / 1 / 2))
    assert math.isnan(laws.power_law([1, 2], [2.0, 1.0]).standard_error)
    assert laws.power_law([1], [2.0]) is None
    assert laws.power_law([1, 2], [2.0, 0.0]) is None


def test_power_laws_use_the_runs_that_exist(trend):
    def run(dim: int, steps: int, error: float) -> dict[str, Any]:
        return {"dim": dim, "trajectories": 8, "steps": steps, "errors": {"open_channel": {"latent_mse": error}}}

    axes = trend.axes(trend.Point(64, 8, 100), [32, 64, 128], [8], [100, 200])
    found = trend.scaling(axes, [run(32, 100, 0.4), run(64, 100, 0.1), run(64, 200, 0.1)])
    assert [(law["axis"], law["values"]) for law in found] == [("dim", [32, 64]), ("steps", [100, 200])]
    assert [law["exponent"] for law in found] == pytest.approx([2, 0])


def test_a_point_is_a_valid_config_with_the_same_samples_per_step(trend, tmp_path):
    path, tokenizer = tiny.write_config(tmp_path), tmp_path / "tokenizer"
    tokenizer.mkdir()
    base = tiny.config()
    words = trend.Point(48, 1, 100).settings(tokenizer, ["open_channel", "porous_media"], 8)
    config: Config = load_config(path, words, "point")
    assert config.training.batch_size * 1 == base.training.batch_size * 2
    assert config.data.domains.porous_media.trajectories.train == 1
    assert config.data.domains.porous_media.trajectories.test == 1
    assert config.model.moe.expert_hidden == 96


class Encoder:
    """A stand-in for encoding: latents are the mean velocity along x."""

    def encode(self, fields_B5XYZ):
        return fields_B5XYZ[:, :1].mean((2, 3, 4), keepdim=True)


def test_persistence_of_a_steady_change(trend):
    def flow(count: int, rate: float) -> Simulation:
        velocity = np.zeros((count, 3, 8, 8, 8), np.float32)
        velocity[:, 0] = rate * np.arange(count, dtype=np.float32)[:, None, None, None]
        velocity[0] = 99.0  # before the first prediction: history 2
        solid = np.zeros((8, 8, 8), bool)
        return Simulation(velocity, velocity[:, 0], solid, False, np.arange(count, dtype=np.float32), {})

    assert trend.persistence_error(Encoder(), flow(5, 0.5), 2, 1) == pytest.approx(0.25)
    assert trend.persistence_error(Encoder(), flow(9, 0.25), 2, 2) == pytest.approx(0.0625)


def test_trend_table(laws):
    run = {
        "dim": 32,
        "trajectories": 8,
        "steps": 2000,
        "parameters": {"active": 1234},
        "errors": {"porous_media": {"latent_mse": 0.1, "latent_mse_persistence": 0.4}},
    }
    still = [{"domain": "porous_media", "steps_per_snapshot": 30, "latent_mse_persistence": 0.05}]
    law = {"axis": "dim", "domain": "open_channel", "values": [32, 64], "exponent": 1.0, "standard_error": math.nan}
    text = laws.markdown([run], [law], still)
    assert row(text, "open_channel") == ["open_channel", "width", "32, 64", "1.00", "", "-50 %"]
    assert row(text, "32") == ["32", "1,234", "8", "2,000", "0.1 (0.25)"]
    assert row(text, "porous_media") == ["porous_media", "30", "0.05", "9.76e-06"]
    assert "|" not in laws.markdown([], [], [])


def test_results_of_another_tokenizer_are_measured_again(trend, tmp_path):
    path = tmp_path / "trend.json"
    path.write_text(json.dumps({"tokenizer_sha256": "a", "persistence": [1]}))
    assert trend.kept_persistence(path, "a") == [1]
    assert trend.kept_persistence(path, "b") is None
    assert trend.kept_persistence(tmp_path / "none.json", "a") is None
