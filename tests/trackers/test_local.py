"""Trackers that need no server: names, the CSV file, and the state in the run folder."""

from __future__ import annotations

import csv
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shodh_moe.base.errors import UserError
from shodh_moe.cli import main
from shodh_moe.config import TelemetryConfig
from shodh_moe.config.load import load_config
from shodh_moe.trackers import tracker
from shodh_moe.trackers.scalars import results_of
from shodh_moe.trackers.state import load_state
from shodh_moe.trackers.tracker import TrackedRun, require_library
from shodh_moe.training.log import Log
from tests.tiny import refused, write_config
from tests.trackers.runs import make_run, record


def rows(path: Path) -> list[tuple[int, str, float]]:
    with open(path, newline="") as file:
        return [(int(row["step"]), row["name"], float(row["value"])) for row in csv.DictReader(file)]


def test_the_csv_file_has_a_row_per_number_and_forgets_what_a_resumed_run_repeats(tmp_path: Path) -> None:
    telemetry = TelemetryConfig(trackers=["csv"])
    with Log(tmp_path, 0, telemetry) as log:
        for step in (1, 2, 4):
            log.write(record(step))
    with Log(tmp_path, 2, telemetry) as log:
        log.write(record(3))
        log.write(record(3, "valid"))
    found = rows(tmp_path / "metrics.csv")
    assert [(step, value) for step, name, value in found if name == "train/loss"] == [(1, 1), (2, 0.5), (3, 1 / 3)]
    assert (3, "valid/latent_mse/calm", 3.5) in found
    assert (1, "routing_load/layer_0/calm/expert_1", 0.75) in found
    assert not (tmp_path / "tensorboard").exists()


def test_no_tracker_leaves_only_the_records(tmp_path: Path) -> None:
    with Log(tmp_path, 0, TelemetryConfig(trackers=[])) as log:
        log.write(record(1))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_local_trackers_are_written_anew_from_the_records(tmp_path: Path) -> None:
    run = make_run(tmp_path / "small")
    with Log(run, 0) as log:
        for step in (1, 2):
            log.write(record(step))
    for _ in range(2):
        assert main(["track", str(run), "--to", "csv", "tensorboard"]) == 0
        assert [step for step, name, _ in rows(run / "metrics.csv") if name == "train/loss"] == [1, 2]
        events = EventAccumulator(str(run / "tensorboard")).Reload()
        assert [event.step for event in events.Scalars("train/loss")] == [1, 2]


def test_what_cannot_be_tracked_is_refused_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path)
    with pytest.raises(UserError, match=r"telemetry\.trackers.* 'csv', 'mlflow', 'tensorboard' or 'wandb'"):
        load_config(config, ["telemetry.trackers=[mlflw]"])
    refused(capfd, "track", str(tmp_path), says=("metrics.jsonl", "training has started"))
    run = make_run(tmp_path / "small")
    (run / "metrics.jsonl").write_text(json.dumps(record(1)) + "\n")
    with pytest.raises(SystemExit) as ended:
        main(["track", str(run), "--to", "aim"])
    assert ended.value.code == 2
    assert "invalid choice: 'aim'" in capfd.readouterr().err
    monkeypatch.setattr(tracker, "LIBRARIES", {"aim": "Aim"})
    monkeypatch.setitem(tracker.TRACKERS, "aim", "none")
    with pytest.raises(UserError, match=r"aim needs Aim: pip install 'shodh_moe\[aim\]', or leave it out"):
        require_library("aim")


def test_a_missing_library_is_found_before_any_work(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else find_spec(name))
    says = ("telemetry.trackers: wandb needs W&B's library", "pip install 'shodh_moe[wandb]'")
    refused(capfd, "run", "--config", str(config), "telemetry.trackers=[wandb]", says=says)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_a_step_is_sent_once_for_each_kind(tmp_path: Path) -> None:
    run = TrackedRun(tmp_path, TelemetryConfig())
    state = load_state(run, "mlflow")
    state.begin("somewhere", "7")
    state.mark_sent([record(3), record(6)])
    state = load_state(run, "mlflow")
    assert (state.where, state.id) == ("somewhere", "7")
    assert [step for step in (3, 6, 9) if state.is_new(record(step))] == [9]
    assert state.is_new(record(6, "valid"))
    state.path.write_text("{")
    with pytest.raises(UserError, match=r"mlflow\.json is damaged: remove it"):
        load_state(run, "mlflow")


def test_results_are_numbers_by_domain() -> None:
    metrics = {"domains": {"calm": {"latent_mse": 0.5, "rollout_nrmse": [1.0], "ensemble": {"spread": 1.0}}}}
    assert results_of(metrics) == {"evaluation/calm/latent_mse": 0.5}
