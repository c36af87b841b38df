"""Training that starts again after a failure: with real ranks on this host, and with hosts that are only names.

tests/cluster/test_many_hosts.py loses real hosts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from shodh_moe.base.errors import EXIT_FAILED, EXIT_REQUEUE, EXIT_USER_ERROR, UserError
from shodh_moe.base.lock import RUN_LOCK, take_lock
from shodh_moe.checkpoint import list_checkpoints
from shodh_moe.config import Config
from shodh_moe.launching.hostfile import count_ranks
from shodh_moe.launching.launcher import HostsUnusable, TrainingFailed
from shodh_moe.runs import elastic
from shodh_moe.runs.elastic import HOSTS_LEFT, train_elastic
from shodh_moe.training.deepspeed_config import fit_layout
from tests.training.launch import launch
from tests.training.synthetic import write_job
from tests.training.weights import check_same_weights

SCRIPT = Path(__file__).parents[2] / "launch/pretrain.py"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\nc slots=2\n")
    return tmp_path


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of hosts that do not answer."""
    names: set[str] = set()

    def probe(hosts: list[str], seconds: float, brief: bool) -> dict[str, dict[str, str]]:
        return {name: {"error": "no route"} if name in names else {} for name in hosts}

    monkeypatch.setattr(elastic, "probe_hosts", probe)
    monkeypatch.setattr(elastic, "PAUSE_S", 0.0)
    return names


class Ranks:
    """Stands for the launcher: each start takes the next of the outcomes, and records what it was started with."""

    def __init__(self, run: Path, *outcomes: Callable[[], int] | int):
        self.run, self.outcomes = run, list(outcomes)
        self.starts: list[tuple[int, int | str, str]] = []

    def start(self, config: Config, resume: str) -> int:
        self.starts.append((count_ranks(config), config.parallel.ep_size, resume))
        outcome = self.outcomes.pop(0)
        return outcome if isinstance(outcome, int) else outcome()

    def train(self, *, resume: str = "auto", **parallel: object) -> None:
        config = Config.model_validate(
            {"model": {"moe": {"num_experts": 4}}, "parallel": {"elastic": True, **parallel}}
        )
        train_elastic(config, self.run, resume, self.start, fit_layout)

    def written(self, step: int, code: int = EXIT_FAILED) -> Callable[[], int]:
        """An outcome: write the checkpoint of a step, then end with a code."""

        def outcome() -> int:
            (self.run / "checkpoints" / str(step)).mkdir(parents=True)
            return code

        return outcome


def test_without_the_key_a_failure_ends_the_command(folder: Path) -> None:
    ranks = Ranks(folder / "run")
    ranks.outcomes = [ranks.written(3, code=9)]
    with pytest.raises(TrainingFailed) as failed:
        ranks.train(elastic=False)
    assert failed.value.exit_code == EXIT_FAILED
    assert len(ranks.starts) == 1


def test_lost_hosts_are_left_out_one_after_the_other(folder, silent, capsys) -> None:
    ranks = Ranks(folder / "run")

    def lose(name: str) -> Callable[[], int]:
        return lambda: silent.add(name) or 1

    ranks.outcomes = [lose("b"), lose("a"), 0]
    ranks.train(hostfile="hosts", ep_size=4 // 2)
    assert ranks.starts == [(6, 2, "auto"), (4, 2, "auto"), (2, 2, "auto")]
    assert (folder / "run" / HOSTS_LEFT).read_text() == "c slots=2\n"
    first, second = capsys.readouterr().out.splitlines()
    assert first == (
        "[elastic] training ended with exit code 1, and b cannot be reached: going on with 4 ranks on a, c"
    )
    assert second.endswith("a cannot be reached: going on with 2 ranks on c")


def test_experts_move_to_fewer_ranks_where_their_number_does_not_fit(folder, silent) -> None:
    (folder / "hosts").write_text("a slots=2\nb slots=1\nc slots=1\n")
    ranks = Ranks(folder / "run", lambda: silent.add("c") or 1, lambda: silent.add("b") or 1, 0)
    ranks.train(hostfile="hosts", ep_size=4)
    assert ranks.starts == [(4, 4, "auto"), (3, 1, "auto"), (2, 2, "auto")]


def test_hosts_that_cannot_share_the_work_stay_idle(folder, silent) -> None:
    def even(config: Config, ranks: int) -> Config:
        if ranks % 4:
            raise UserError("not a multiple of 4")
        return config

    (folder / "hosts").write_text("a slots=2\nb slots=2\nc slots=2\nd slots=2\n")
    ranks = Ranks(folder / "run", lambda: silent.add("a") or 1, lambda: silent.update("bc") or 1)
    config = Config.model_validate({"parallel": {"elastic": True, "hostfile": "hosts"}})
    with pytest.raises(UserError, match="not a multiple of 4"):
        train_elastic(config, ranks.run, "auto", ranks.start, even)
    assert [start[0] for start in ranks.starts] == [8, 4]


def test_a_failure_with_all_hosts_there_is_repeated_only_after_a_new_checkpoint(folder, silent, capsys) -> None:
    for hostfile in (None, "hosts"):
        ranks = Ranks(folder / f"run_{hostfile}")
        ranks.outcomes = [ranks.written(3), ranks.written(6), 1, 0]
        with pytest.raises(TrainingFailed):
            ranks.train(hostfile=hostfile)
        assert len(ranks.starts) == 3
        assert "before it wrote a checkpoint, so it is not started again" in capsys.readouterr().out


@pytest.mark.parametrize("code", [EXIT_REQUEUE, EXIT_USER_ERROR])
def test_a_stop_and_wrong_input_are_no_failures(folder, silent, code) -> None:
    silent.add("b")
    ranks = Ranks(folder / "run", code)
    with pytest.raises(TrainingFailed) as failed:
        ranks.train(hostfile="hosts")
    assert failed.value.exit_code == code


def test_a_checkpoint_that_was_asked_for_is_resumed_until_there_is_a_newer_one(folder, silent) -> None:
    ranks = Ranks(folder / "run")
    (folder / "run/checkpoints/90").mkdir(parents=True)  # of the history that the user goes back behind
    ranks.outcomes = [lambda: silent.add("b") or 1, ranks.written(6), 0]
    ranks.train(resume="run/checkpoints/3", hostfile="hosts")
    assert [start[2] for start in ranks.starts] == ["run/checkpoints/3"] * 2 + [str(folder / "run/checkpoints/6")]


def test_a_host_that_is_lost_between_two_questions_is_left_out(folder, silent) -> None:
    def lose() -> int:
        silent.add("c")
        raise HostsUnusable("c: no route")

    ranks = Ranks(folder / "run", lambda: silent.add("a") or 1, lose, 0)
    ranks.train(hostfile="hosts")
    assert [start[0] for start in ranks.starts] == [6, 4, 2]
    with pytest.raises(HostsUnusable):  # at the first start it may be misspelt
        Ranks(folder / "run", lose).train(hostfile="hosts")


def test_hosts_get_three_chances_and_all_silent_hosts_much_time(folder, silent, monkeypatch) -> None:
    asked: list[list[str]] = []
    late = iter([{"a", "b", "c"}, {"a", "b", "c"}, {"a", "b", "c"}, {"a", "b", "c"}, {"a"}, set()])

    def probe(hosts: list[str], seconds: float, brief: bool) -> dict[str, dict[str, str]]:
        asked.append(hosts)
        down = next(late)
        return {name: {"error": "no route"} if name in down else {} for name in hosts}

    monkeypatch.setattr(elastic, "probe_hosts", probe)
    ranks = Ranks(folder / "run")
    ranks.outcomes = [ranks.written(3), 0]
    ranks.train(hostfile="hosts")
    assert [start[0] for start in ranks.starts] == [6, 4], (
        "b and c answer at the fifth question, the first that is heard"
    )
    assert asked == [["a", "b", "c"]] * 5
    monkeypatch.setattr(elastic, "PATIENCE_S", 0.2)
    silent.update("abc")
    late = iter(lambda: {"a", "b", "c"}, None)
    with pytest.raises(UserError, match="no host of the hostfile answers"):
        Ranks(folder / "run2", 1).train(hostfile="hosts")


def test_a_start_waits_until_the_ranks_on_lost_hosts_have_ended(folder, silent, monkeypatch) -> None:
    monkeypatch.setattr(elastic, "PATIENCE_S", 0.5)
    ranks = Ranks(folder / "run", lambda: silent.add("a") or 1, 0)
    with take_lock(folder / "run" / RUN_LOCK):
        began = time.monotonic()
        ranks.train(hostfile="hosts")
    assert time.monotonic() - began >= 0.5


def test_a_stop_while_hosts_are_asked_ends_the_command(folder, silent, monkeypatch) -> None:
    def probe(hosts: list[str], seconds: float, brief: bool) -> dict[str, dict[str, str]]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {name: {"error": "no route"} for name in hosts}

    monkeypatch.setattr(elastic, "probe_hosts", probe)
    ranks = Ranks(folder / "run", 1)
    with pytest.raises(TrainingFailed) as failed:
        ranks.train(hostfile="hosts")
    assert failed.value.exit_code == EXIT_REQUEUE


@pytest.fixture
def case(folder: Path) -> Path:
    return write_job(folder, steps=60, checkpoint_every=5, validate_every=60)


def _pretrain(name: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "shodh_moe.cli", "pretrain", "--config", "config.yaml", "--name", name, *arguments]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_a_rank_that_stops_while_it_starts_ends_the_job(case: Path) -> None:
    stacks = case / "runs/stopped/stacks"
    with _pretrain("stopped", "training.stall_seconds=15") as process:
        while not (registered := list(stacks.glob("rank_00001-*.json"))):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        rank = psutil.Process(json.loads(registered[0].read_text())["process"])
        rank.suspend()
        _, error = process.communicate(timeout=150)
    assert process.returncode == EXIT_FAILED, error
    assert "error on rank 0: no progress for 15 s" in error
    assert not rank.is_running()
    for number in (0, 1):
        assert "most recent call first" in (stacks / f"rank_{number:05d}.txt").read_text()
    assert not (case / "runs/stopped/checkpoints").exists()


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_a_stop_while_ranks_start_makes_them_write_a_checkpoint(case: Path) -> None:
    stacks = case / "runs/early/stacks"
    with _pretrain("early") as process:
        while not list(stacks.glob("rank_00001-*.json")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=150)
    assert process.returncode == EXIT_REQUEUE, out
    assert len(list_checkpoints(case / "runs/early/checkpoints")) == 1


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(case: Path) -> None:
    done = launch(2, SCRIPT, "--config", "config.yaml", "--name", "unbroken", "parallel.elastic=true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning: parallel.elastic has no effect under this launcher" in done.stdout
    checkpoints = case / "runs/killed/checkpoints"
    with _pretrain("killed", "--elastic") as process:
        while not list_checkpoints(checkpoints):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if "--local_rank=1" in child.cmdline():
                    child.kill()
        out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    assert out.count(": starting again") == 1
    assert "from step" in out
    check_same_weights(case / "runs/killed", case / "runs/unbroken", 60)
