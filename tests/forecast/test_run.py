"""The benchmark from data to report at a size that shows nothing, and what happens when it is interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from shodh_moe.base.results import write_result
from shodh_moe.cli import main as shodh
from shodh_moe.config.load import load_config_of
from shodh_moe.forecast.config import ForecastConfig
from shodh_moe.forecast.ours import calibration, tokenizer_outcome, transformer_config
from shodh_moe.forecast.plan import Training, base_key, finished
from shodh_moe.forecast.run import run
from shodh_moe.launching import jobs
from tests.forecast.tiny import PEERS, STEPS, tree
from tests.tiny import write_dataset

# Given, so that the numbers of steps do not depend on how busy the machine is.
TIMES = {"tokenizer": {"step": 0.4, "rest": 0.1}, "encoding": 0.1, "pretraining": {"step": 0.3, "rest": 0.1}}


def write(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "trial.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.distributed
def test_the_benchmark_from_data_to_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    peers = {**PEERS, "unet": None}
    path = write(tmp_path, tree(tmp_path, seconds=4.0, peers=peers))
    bench = load_config_of(ForecastConfig, path)
    write_result(bench.folder / "calibration.json", base_key(bench), TIMES)
    interrupted = bench.folder / "runs" / "ours-3"  # what an interrupted training has left starts again
    interrupted.mkdir(parents=True)
    (interrupted / "config.yaml").write_text("name: ours-3\nseed: 99\n")

    assert shodh(["bench", "forecast", "--config", str(path), "--output", str(tmp_path / "docs")]) == 0
    assert "## Verdict" in capfd.readouterr().out
    names = {one.name for one in (tmp_path / "docs").iterdir()}
    pictures = {"error.png", "fields_open_channel.png", "fields_porous_media.png"}
    assert names == {"summary.json", "summary.md", "index.html", *pictures}
    summary = json.loads((tmp_path / "docs" / "summary.json").read_text())
    models = summary["models"]
    assert list(models) == ["ours", "dpot", "persistence", "linear extrapolation", "phase mean"]
    for name, model in models.items():
        for domain in ("open_channel", "porous_media"):
            found = model["domains"][domain]
            assert len(found["nrmse"]["velocity"]["mean"]) == len(found["vrmse"]["pressure"]["mean"]) == STEPS
            assert (name == "ours") == (found["divergence"] < 1e-9)  # the tokenizer conserves mass
            if name != "dpot":
                assert found["solid_velocity"] == [0.0] * STEPS
    own, stages = models["ours"], models["ours"]["stages"][0]
    tokenizer = tokenizer_outcome(bench, 3)
    assert tokenizer
    assert stages["tokenizer"] == tokenizer["tokenizer_seconds"]
    assert own["seconds"] == [pytest.approx(sum(stages.values()))]
    assert set(stages) == {"tokenizer", "encoding", "transformer"}
    assert tokenizer["steps"] == 4  # (0.97 * 0.55 * 4 - 0.1 - 0.1) / 0.4
    config = transformer_config(bench, Training("ours", 1e-3, 3))
    assert own["steps"] == [config.training.steps]
    assert own["parameters"]["total"] == own["parameters"]["tokenizer"] + own["parameters"]["transformer"]
    assert models["dpot"]["seconds"][0] >= 4.0
    assert summary["periods"]["porous_media"] == 3.0

    monkeypatch.setattr(jobs, "_run", lambda *arguments: pytest.fail("a process was started"))
    assert run(bench)["models"]["dpot"] == models["dpot"]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.distributed
def test_the_times_of_our_stages_are_measured(tmp_path: Path) -> None:
    """A process of its own trains both networks and encodes; nothing but the times is left."""
    content = tree(tmp_path)
    content["base"]["data"] = given_data(tmp_path)
    path = write(tmp_path, content)
    bench = load_config_of(ForecastConfig, path)
    assert calibration(bench) is None
    arguments = ["-m", "shodh_moe.forecast", str(path), "calibrate"]
    jobs.run_jobs([jobs.ProcessJob("calibrate", arguments, tmp_path / "log", tmp_path / "cost.json")], 1)
    found = calibration(bench)
    assert found
    assert found["tokenizer"]["step"] > 0 < found["pretraining"]["step"]
    assert found["tokenizer"]["rest"] > 0 < found["encoding"]
    assert not (bench.folder / "calibration").exists()


def given_data(folder: Path) -> dict[str, Any]:
    """A data section with a small dataset of other people."""
    write_dataset(folder / "given", snapshots=6)
    return {"name": "given", "path": str(folder / "given"), "grid": [16, 16, 16]}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_interrupted_training_has_not_finished(tmp_path: Path) -> None:
    content = tree(tmp_path, seconds=200.0)
    content["base"]["data"] = given_data(tmp_path)
    content["base"]["tokenizer"]["root"] = str(tmp_path / "tokenizers")
    path = write(tmp_path, content)
    command = [sys.executable, "-m", "shodh_moe.forecast", str(path), "final", "dpot", "3", "0.001"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "training dpot-3 for 200 s\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
    assert not finished(load_config_of(ForecastConfig, path), Training("dpot", 1e-3, 3))
    assert not (tmp_path / "runs" / "trial" / "runs" / "dpot-3").exists()
