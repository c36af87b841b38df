"""The batch scripts in launch/slurm on a real SLURM of two nodes: normal ends, time limits, cancelling and failures."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from shodh_moe.base.errors import EXIT_REQUEUE, EXIT_USER_ERROR
from shodh_moe.checkpoint import CheckpointReader, find_checkpoint, list_checkpoints
from shodh_moe.config.load import load_config
from shodh_moe.config.paths import resolve_paths
from tests.cluster import slurm
from tests.cluster.slurm import Slurm
from tests.tiny import write_config
from tests.training.synthetic import CONFIG, write_latents

pytestmark = [pytest.mark.cluster, pytest.mark.distributed, pytest.mark.timeout(240)]

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "launch" / "slurm"
STEPS = 150
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")
SETTINGS = (
    f"training.steps={STEPS}",
    "training.log_every=5",
    "training.validate_every=50",
    "training.checkpoint_every=1000",
)
MEASURED = {"step_ms", "tokens_per_second", "peak_memory_bytes", "all_to_all"}  # differ from run to run


@dataclass(frozen=True)
class Cluster:
    slurm: Slurm
    folder: Path

    def pretrain(self, name: str, *options: str, settings: tuple[str, ...] = SETTINGS) -> str:
        return self.slurm.submit(
            SCRIPTS / "pretrain.sbatch", *TWO_NODES, *options, "--", *settings, cwd=self.folder, NAME=name
        )

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def ranks(self, name: str) -> dict[int, psutil.Process]:
        """Return the processes of a run by rank."""
        found = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                command = process.cmdline()
                if command[:1] == [sys.executable] and name in command and process.status() != psutil.STATUS_ZOMBIE:
                    found.setdefault(int(process.environ()["SLURM_PROCID"]), process)
        return found

    def once_training(self, job: str, name: str) -> dict[int, psutil.Process]:
        """Return the ranks as soon as the run has logged a step."""
        deadline = time.monotonic() + 90
        log = self.run(name) / "metrics.jsonl"
        while not (log.exists() and log.stat().st_size):
            state = self.slurm.job(job)["JobState"]
            assert state in ("PENDING", "RUNNING", "CONFIGURING"), self.slurm.output(job)
            assert time.monotonic() < deadline, self.slurm.output(job)
            time.sleep(0.1)
        ranks = self.ranks(name)
        assert sorted(ranks) == [0, 1]
        return ranks


@dataclass(frozen=True)
class Jobs:
    """Two jobs of the same training. ``limited`` gets SLURM's signal before its time limit, ``whole`` does not."""

    limited: str
    whole: str


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := slurm.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm") / "a folder"
    folder.mkdir()
    config = folder / "a config.yaml"
    config.write_text(CONFIG + "parallel: {processes: 2}\n")
    variables = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "CONFIG": str(config)}
    with slurm.running(folder.parent / "state", **variables, REPOSITORY=str(REPOSITORY)) as running:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            write_latents(resolve_paths(load_config(str(config), [], None)).latents)
        yield Cluster(running, folder)


@pytest.fixture(scope="module", autouse=True)
def jobs(cluster: Cluster) -> Jobs:
    """Submit both jobs before the first test, since SLURM checks time limits only every 30 s.

    The limited job is suspended until then, so that it cannot finish before the signal comes; SLURM first wakes it
    with SIGCONT.
    """
    # SLURM sends the signal at its first check from 20 s after the start on.
    limited = cluster.pretrain("limited", "--time=2", "--signal=USR1@70")
    ranks = cluster.once_training(limited, "limited")
    for rank in ranks.values():
        rank.suspend()
    return Jobs(limited, cluster.pretrain("whole"))


def check_completed(cluster: Cluster, job: str) -> dict[str, str]:
    ended = cluster.slurm.wait(job, 120)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), cluster.slurm.output(job)
    return ended


def records(run: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl without the measurements of time and memory."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: kept(part) for key, part in value.items() if key not in MEASURED}
        return [kept(part) for part in value] if isinstance(value, list) else value

    return [kept(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.sbatch")))
def test_a_job_without_a_usable_config_or_interpreter_is_refused(cluster, script):
    cases = (
        ({"CONFIG": ""}, "CONFIG is not set"),
        ({"CONFIG": "no such.yaml"}, "there is no file no such.yaml"),
        ({"PYTHON": "/no such/python"}, "there is no interpreter /no such/python"),
        ({"REPOSITORY": "/no such"}, "/no such is not this project's"),
    )
    submitted = [cluster.slurm.submit(SCRIPTS / script, cwd=cluster.folder, **variables) for variables, _ in cases]
    for job, (_, message) in zip(submitted, cases, strict=True):
        job = f"{job}_0" if "data" in script else job
        assert cluster.slurm.wait(job, 60)["ExitCode"] == f"{EXIT_USER_ERROR}:0"
        output = cluster.slurm.output(job)
        assert message in output
        assert output.startswith("error: ")
        assert output.count("\n") == 1, output
    outside = subprocess.run(["bash", SCRIPTS / script], cwd=REPOSITORY, capture_output=True, text=True)
    assert outside.returncode == EXIT_USER_ERROR
    assert outside.stderr == "error: this is not a SLURM job: submit the script with sbatch\n"


def test_restarts_are_limited_and_arguments_may_contain_spaces(cluster):
    """The interpreter always exits at once with the requeue code."""
    python = cluster.folder / "a python"
    python.write_text('#!/bin/bash\n[ "$1" = -c ] || printf "[%s]" "$@"\nexit 75\n')
    python.chmod(0o755)
    arguments = ("--resume", "a checkpoint")
    job = cluster.slurm.submit(
        SCRIPTS / "pretrain.sbatch",
        *("--nodes=1", "--ntasks-per-node=1", "--", *arguments),
        PYTHON=str(python),
        NAME="trial",
        MAX_RESTARTS="1",
        cwd=cluster.folder,
    )
    ended = cluster.slurm.wait(job, 60)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", f"{EXIT_REQUEUE}:0", "1")
    output = cluster.slurm.output(job)
    assert "error: stopped by a signal after 1 restarts, MAX_RESTARTS is 1: submit again to go on\n" in output
    first = f"[--config][{cluster.folder}/a config.yaml][--name][trial][--resume][a checkpoint]"
    assert output.count(first) == 2
    assert output.count(f"{first}[--resume][auto]") == 1


def test_two_nodes_finish_training(cluster, jobs):
    ended = check_completed(cluster, jobs.whole)
    assert (ended["NumNodes"], ended["Restarts"]) == ("2", "0")
    assert "2 ranks, EP 2" in cluster.slurm.output(jobs.whole)
    assert list_checkpoints(cluster.run("whole") / "checkpoints") == [STEPS]


def test_scancel_ends_a_job_for_good_and_a_killed_rank_fails_its_job(cluster):
    endless = ("training.steps=100000", *SETTINGS[1:])
    cancelled, killed = (cluster.pretrain(name, settings=endless) for name in ("cancelled", "killed"))
    cluster.once_training(cancelled, "cancelled")
    cluster.slurm.command("scancel", cancelled)
    cluster.once_training(killed, "killed")[1].kill()
    began = time.monotonic()

    assert cluster.slurm.wait(killed, 60)["JobState"] == "FAILED"
    assert time.monotonic() - began < 30
    ended = cluster.slurm.job(killed)
    assert (ended["ExitCode"], ended["Restarts"]) == ("137:0", "0"), cluster.slurm.output(killed)

    # The script prints its last line after the ranks have written their checkpoint and it has decided not to requeue.
    output = wait_for_output(cluster, cancelled, "does not requeue itself")
    assert "stopped by a signal after step" in output
    assert find_checkpoint(cluster.run("cancelled") / "checkpoints") is not None
    ended = cluster.slurm.wait(cancelled, 30)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), output
    for name in ("cancelled", "killed"):
        assert cluster.ranks(name) == {}


def wait_for_output(cluster: Cluster, job: str, words: str) -> str:
    deadline = time.monotonic() + 60
    while words not in (output := cluster.slurm.output(job)):
        assert time.monotonic() < deadline, output
        time.sleep(0.1)
    return output


def test_a_job_at_its_time_limit_is_requeued_and_loses_nothing(cluster, jobs):
    assert int(check_completed(cluster, jobs.limited)["Restarts"]) > 0
    output = cluster.slurm.output(jobs.limited)
    stopped = re.search(r"stopped by a signal after step (\d+)", output)
    assert stopped, output
    assert f"from step {stopped[1]} of" in output
    assert "the job is in the queue again" in output
    check_completed(cluster, jobs.whole)
    limited, whole = cluster.run("limited"), cluster.run("whole")
    assert {record["kind"] for record in records(whole)} >= {"train", "valid"}
    assert records(limited) == records(whole)
    resumed, reference = (CheckpointReader(run / "checkpoints" / str(STEPS)) for run in (limited, whole))
    assert all(torch.equal(resumed.tensor(name), reference.tensor(name)) for name in reference.names())


def test_the_nodes_share_the_outputs_of_a_merge(cluster):
    for number, name in enumerate(("anchor", "low", "high")):
        save_file({"weight": torch.full((8,), float(number))}, cluster.folder / f"{name}.safetensors")
    config = cluster.folder / "merge.yaml"
    config.write_text((REPOSITORY / "configs/merge/example.yaml").read_text())
    options = ("--nodes=2", "--ntasks=2", "--ntasks-per-node=1")
    job = cluster.slurm.submit(SCRIPTS / "ccm_merge.sbatch", *options, cwd=cluster.folder, CONFIG=str(config))
    check_completed(cluster, job)
    assert len(list((cluster.folder / "merged_models").glob("*/*.safetensors"))) == 5, cluster.slurm.output(job)


def test_an_array_job_shares_the_alphas_of_a_merge(cluster):
    for name, number in (("low", -1.0), ("high", 1.0)):
        save_file({"weight": torch.full((8,), number)}, cluster.folder / f"{name}.safetensors")
    config = cluster.folder / "line.yaml"
    config.write_text("merge_method: ccm\nmodels: [{model: low.safetensors}, {model: high.safetensors}]\n")
    options = ("--array=3-4", "--nodes=1", "--ntasks=2", "--", "--alpha=-1:1:9", "--output", "swept")
    array = cluster.slurm.submit(SCRIPTS / "ccm_merge.sbatch", *options, cwd=cluster.folder, CONFIG=str(config))
    for part in (3, 4):
        check_completed(cluster, f"{array}_{part}")
    # Of four processes, the first one of the first task makes three targets.
    assert "[sweep] share 1 of 4: 3 of 9 targets" in cluster.slurm.output(f"{array}_3")
    assert "[sweep] share 4 of 4: 2 of 9 targets" in cluster.slurm.output(f"{array}_4")
    made = {path.parent.name: load_file(path)["weight"][0].item() for path in cluster.folder.glob("swept/*/*tensors")}
    assert made == {f"alpha={alpha}": alpha for alpha in (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0)}


def test_an_array_job_generates_the_dataset_and_one_job_makes_tokenizer_and_latents(cluster):
    config = str(write_config(cluster.folder))
    paths = resolve_paths(load_config(config, [], None))
    array = cluster.slurm.submit(SCRIPTS / "generate_data.sbatch", "--array=1-2", cwd=cluster.folder, CONFIG=config)
    then = f"--dependency=afterok:{array}"
    latents = cluster.slurm.submit(
        SCRIPTS / "tokenizer.sbatch", then, *TWO_NODES, "--", "tokenizer.steps=2", cwd=cluster.folder, CONFIG=config
    )
    for part in (1, 2):
        check_completed(cluster, f"{array}_{part}")
    assert (cluster.folder / paths.dataset / "stats.yaml").is_file()
    check_completed(cluster, latents)
    paths = resolve_paths(load_config(config, ["tokenizer.steps=2"], None))
    assert (cluster.folder / paths.latents / "train.hdf5").is_file()
