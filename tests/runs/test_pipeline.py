"""Run the whole main job with a tiny config under the real launcher, then check what later runs reuse."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shodh_moe
from shodh_moe.base.errors import EXIT_FAILED
from shodh_moe.checkpoint import find_checkpoint, list_checkpoints
from shodh_moe.cli import main
from shodh_moe.config import Config
from shodh_moe.config.load import load_config
from shodh_moe.runs import pipeline
from shodh_moe.runs.pretrain_rank import main as train_rank
from tests.tiny import refused, tree, write_config, write_dataset
from tests.training.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

DOMAINS = {"open_channel", "porous_media"}
# DESIGN 5: a public interface.
DOMAIN_KEYS = {
    "latent_mse",
    "latent_mse_persistence",
    "latent_mse_mean",
    "physical_mse",
    "physical_mse_persistence",
    "velocity_vrmse",
    "pressure_vrmse",
    "n_tokens",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the main job has run once. Tests must not change it."""
    folder = tmp_path_factory.mktemp("main_job")
    write_config(folder)
    done = shodh(folder, "run")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `finished`, including file times, that a test may change; the test runs in it."""
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    monkeypatch.chdir(copy)
    return copy


def shodh(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shodh_moe.cli", arguments[0], "--config", "tiny.yaml", *arguments[1:]]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs/tiny/metrics.json").read_text())


def numbers(value: Any) -> list[float]:
    """Every number in a JSON value."""
    if isinstance(value, dict):
        return [n for part in value.values() for n in numbers(part)]
    if isinstance(value, list):
        return [n for part in value for n in numbers(part)]
    return [value] if isinstance(value, (int, float)) else []


def test_training_from_python(here: Path) -> None:
    """It reuses what is up to date, trains, evaluates, and returns the run."""
    run = shodh_moe.train(load_config("tiny.yaml", ["training.steps=6"], name="longer"))
    assert run.folder == Path("runs/longer")
    assert run.metrics["step"] == 6
    assert run.records().index.tolist() == [1, 2, 3, 4, 5, 6]
    assert set(run.routing().domain.values) == DOMAINS
    assert [path.name for path in Path("data").iterdir()] == [path.name for path in (here / "data").iterdir()]
    forecast = shodh_moe.load_model(run.folder).forecast(shodh_moe.open_dataset(next(Path("data").iterdir()))[0], 1)
    assert forecast["velocity"].shape == (1, 3, 16, 16, 16)
    with pytest.raises(shodh_moe.UserError, match="belongs to another config"):
        shodh_moe.train(load_config("tiny.yaml", ["training.steps=6"]))


def test_every_artefact_exists(finished: Path) -> None:
    run = finished / "runs/tiny"
    files = ["config.yaml", "environment.json", "metrics.jsonl", "metrics.json", "report/index.html"]
    assert [name for name in files if not (run / name).stat().st_size] == []
    assert list(run.glob("tensorboard/events*"))
    assert len(list(run.glob("report/*.png"))) >= 6
    assert list_checkpoints(run / "checkpoints") == [2, 4]
    assert (run / "checkpoints/latest").read_text().strip() == "4"
    assert not [name for name in tree(finished) if "tmp" in name or ".writing" in name or ".old" in name]
    assert load_config(run / "config.yaml") == load_config(finished / "tiny.yaml")


def test_metrics_have_every_public_key_and_only_finite_numbers(finished: Path) -> None:
    metrics = metrics_of(finished)
    assert (metrics["run"], metrics["step"], metrics["world_size"], metrics["ep_size"]) == ("tiny", 4, 2, 2)
    assert metrics["seed"] == 0
    assert set(metrics["domains"]) == DOMAINS
    for values in metrics["domains"].values():
        assert values.keys() >= DOMAIN_KEYS
        assert values["n_tokens"] == 8 * (5 - 2)
    assert len(metrics["routing"]["layers"]) == 2
    for number, layer in enumerate(metrics["routing"]["layers"]):
        assert layer.keys() >= {"layer", "load", "dropped_fraction", "purity", "bifurcated"}
        assert layer["layer"] == number
        for name in ("load", "dropped_fraction", "purity"):
            assert set(layer[name]) == DOMAINS
        assert all(sum(load) == pytest.approx(1) for load in layer["load"].values())
    assert isinstance(metrics["routing"]["bifurcated"], bool)
    divergence = metrics["divergence"]
    assert divergence.keys() >= {"operator", "dtype", "rms_relative", "rms", "max"}
    assert divergence["dtype"] == "float64"
    assert 0 < divergence["rms_relative"] <= 1e-12
    assert metrics["throughput"].keys() >= {"tokens_per_second", "step_ms_median"}
    assert metrics["peak_memory_bytes"] > 0
    found = numbers(metrics)
    assert len(found) > 50
    assert all(math.isfinite(number) for number in found)


def test_telemetry_has_one_line_per_step_from_two_ranks(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == [1, 2, 3, 4]
    assert all(line["ep_size"] == 2 for line in train)
    assert all(math.isfinite(number) for number in numbers(lines))


def test_the_output_ends_with_the_table_and_the_path_of_the_report(finished: Path) -> None:
    lines = (finished / "stdout.txt").read_text().splitlines()
    assert lines[-1] == "report: runs/tiny/report/index.html"
    assert [line for line in lines if line.startswith("open_channel") and "latent MSE" in line]


# A module on PYTHONPATH that makes every process record each time it lists the files of a dataset at data.path.
COUNT_LISTINGS = """
import os, pathlib
glob = pathlib.Path.glob
def counted(self, pattern, *arguments, **options):
    if pattern == "data/*/*":
        with open(os.environ["LISTINGS"], "a") as file:
            file.write(f"{os.getpid()}\\n")
    return glob(self, pattern, *arguments, **options)
pathlib.Path.glob = counted
"""


def test_every_process_lists_the_dataset_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tmp_path)
    write_dataset(tmp_path / "theirs")
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(COUNT_LISTINGS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hook"), prepend=":")
    monkeypatch.setenv("LISTINGS", str(tmp_path / "listings.txt"))
    done = shodh(tmp_path, "run", "data.path=theirs")
    assert done.returncode == 0, done.stdout + done.stderr
    processes = (tmp_path / "listings.txt").read_text().split()
    assert len(processes) == 5  # the command, two ranks that train the tokenizer, and two that pretrain
    assert len(set(processes)) == 5


def test_a_second_run_changes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(here)
    started_at = time.monotonic()
    assert main(["run", "--config", "tiny.yaml"]) == 0
    assert time.monotonic() - started_at < 20
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    stages = ["data", "tokenizer", "latents", "pretrain", "evaluate", "report"]
    assert [line.partition(",")[0] for line in said] == [f"[{stage}] unchanged" for stage in stages]
    assert tree(here) == before


def test_another_name_reuses_everything_but_the_run(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []

    def launch(config: Config, run: Path, resume: str, module: str, finished: Callable[[], bool]) -> int:
        launched.append(run)
        return EXIT_FAILED

    monkeypatch.setattr(pipeline, "launch_ranks", launch)
    before = tree(here)
    assert main(["run", "--config", "tiny.yaml", "--name", "other"]) == 1
    assert launched == [Path("runs/other")]
    said = capsys.readouterr().out
    assert [f"[{stage}] unchanged" in said for stage in ("data", "tokenizer", "latents")] == [True] * 3
    after = tree(here)
    assert {name for name in after if name not in before} == {
        "runs/other",
        *(f"runs/other/{name}" for name in ("config.yaml", "environment.json", "tokenizer_metrics.jsonl")),
    }
    assert before.items() <= after.items()


def test_a_training_key_under_the_same_name_is_refused(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = tree(here)
    for override, says in (
        ("training.learning_rate=0.5", "training.learning_rate (0.001 there, 0.5 here)"),
        ("data.seed=3", "data.seed (0 there, 3 here)"),
        ("tokenizer.steps=4", "tokenizer.steps (3 there, 4 here)"),
    ):
        refused(capfd, "run", "--config", "tiny.yaml", override, says=("runs/tiny", says, "--name"))
    assert tree(here) == before


def test_changed_evaluation_keys_repeat_evaluation_and_report(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, run = tree(here), here / "runs/tiny"
    assert np.load(run / "evaluation.npz")["open_channel/rollout_error"].shape == (2,)
    assert main(["run", "--config", "tiny.yaml", "evaluation.rollout_steps=1"]) == 0
    assert "[pretrain] unchanged" in capsys.readouterr().out
    assert np.load(run / "evaluation.npz")["open_channel/rollout_error"].shape == (1,)
    after = tree(here)
    changed = {name for name in after if before.get(name) != after[name]}
    assert {"runs/tiny/metrics.json", "runs/tiny/evaluation.npz", "runs/tiny/report/index.html"} <= changed
    assert not [name for name in changed if "checkpoints" in name or not name.startswith("runs/tiny")]


def test_an_evaluation_that_fails_half_way_is_repeated(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *arguments: Any, **arrays: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("numpy.savez_compressed", full)
        assert main(["evaluate", "--config", "tiny.yaml", "evaluation.rollout_steps=1"]) == 2
    assert main(["evaluate", "--config", "tiny.yaml"]) == 0
    assert np.load(here / "runs/tiny/evaluation.npz")["open_channel/rollout_error"].shape == (2,)


def test_stages_name_a_missing_input(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    at = ("--config", "tiny.yaml", "--name", "none")
    refused(capfd, "evaluate", *at, says=("runs/none/checkpoints", "shodh pretrain"))
    refused(capfd, "report", *at, says=("runs/none",))
    shutil.rmtree(next(here.glob("tokenizers/*/latents")))
    refused(capfd, "pretrain", *at, says=("latents", "shodh tokenizer encode"))
    shutil.rmtree(here / "tokenizers")
    refused(capfd, "tokenizer", "encode", *at, says=("holds no finished tokenizer", "shodh tokenizer train"))
    shutil.rmtree(here / "data")
    refused(capfd, "tokenizer", "train", *at, says=("stats.yaml is missing", "shodh data generate"))
    assert not (here / "runs/none").exists()


def test_a_disk_that_fills_up_at_a_checkpoint(here: Path) -> None:
    """The kernel refuses files over 60 KB; only the checkpoint's files are larger."""
    command = f"ulimit -f 60; exec {sys.executable} -m shodh_moe.cli pretrain --config tiny.yaml --name full"
    done = subprocess.run(["bash", "-c", command], cwd=here, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: cannot write runs/full/checkpoints/2: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert find_checkpoint(here / "runs/full/checkpoints") is None
    assert list((here / "runs/full/checkpoints").iterdir()) == []


def test_terminating_the_command_ends_its_ranks(here: Path) -> None:
    """On SIGTERM, which schedulers send, the ranks write a checkpoint and exit with the requeue code."""
    settings = ["--name", "long", "training.steps=1000000", "training.checkpoint_every=5", "training.log_every=1000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "shodh_moe.cli", "pretrain", "--config", "tiny.yaml", *settings],
        cwd=here,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    latest = here / "runs/long/checkpoints/latest"
    try:
        deadline = time.monotonic() + 120
        while not latest.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert len(ranks(here)) == 2
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, error
    assert ranks(here) == []
    found = find_checkpoint(here / "runs/long/checkpoints")
    assert found is not None
    # The checkpoint is of the step at which it was stopped, not of the next scheduled one.
    assert f"stopped by a signal after step {found[1]['step']}: the same command resumes from there" in out


def ranks(folder: Path) -> list[int]:
    """Return the process ids of the ranks that run in ``folder``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                in_folder = (entry / "cwd").readlink() == folder
                if in_folder and b"shodh_moe.runs.pretrain_rank\0--local_rank" in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def test_a_run_started_by_another_launcher_can_be_evaluated_and_reported(here: Path) -> None:
    """The ranks are started directly, without the pipeline, as the README does on a cluster."""
    script = Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"
    started = launch(2, script, "--config", "tiny.yaml", "--name", "by_hand")
    assert started.returncode == 0, started.stdout + started.stderr
    for stage in ("evaluate", "report"):
        assert main([stage, "--config", "tiny.yaml", "--name", "by_hand"]) == 0
    by_hand, by_pipeline = (here / "runs" / name for name in ("by_hand", "tiny"))
    for name in ("environment.json", "tokenizer_metrics.jsonl", "report/index.html"):
        assert (by_hand / name).is_file()
    scores = [json.loads((run / "metrics.json").read_text())["domains"] for run in (by_hand, by_pipeline)]
    assert scores[0] == scores[1]


def test_ranks_started_without_latents_leave_no_run_folder(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("tokenizers")
    assert train_rank(["--config", "tiny.yaml", "--name", "early"]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "run `shodh tokenizer encode`" in error
    assert not (here / "runs" / "early").exists()
