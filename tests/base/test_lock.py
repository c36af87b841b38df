"""One process at a time makes an artefact; others wait, say for whom, and take over from one that died."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shodh_moe.base.lock import RUN_LOCK, Held, holder_of, making, take_lock, wait_for_maker

# Makes the file sys.argv[1] unless it is there, for the run sys.argv[2]; takes as long as it gets no line.
MAKER = """
import sys
from pathlib import Path
from shodh_moe.base.lock import making, wait_for_first_rank, wait_for_maker

target, run, mode = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
if mode == "other rank":
    wait_for_first_rank(target, "job of " + run, target.exists)
elif mode == "user":
    wait_for_maker(target, "stage")
else:
    with making(target, "stage", run, mode == "part", "job of " + run):
        if not target.exists():
            print("making", flush=True)
            sys.stdin.readline()
            target.write_text(run)
print("done", flush=True)
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    processes = []

    def begin(run: str, mode: str = "maker") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", MAKER, str(tmp_path / "artefact"), run, mode]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    return process.stdout.readline().rstrip()


def test_the_second_waits_for_the_first_and_uses_what_it_has_made(tmp_path: Path, start: Start) -> None:
    first = start("one")
    assert line(first) == "making"
    second = start("two")
    host = re.escape(os.uname().nodename)
    assert re.fullmatch(
        rf"\[stage\] waiting for run one \(process {first.pid} on host {host} since \S+\), which makes \S+/artefact",
        line(second),
    )
    assert not (tmp_path / "artefact").exists()
    assert first.communicate("\n", timeout=60)[0] == "done\n"
    said = second.communicate(timeout=60)[0].splitlines()
    assert said[0].startswith("[stage] the wait is over: run one (")
    assert said[1:] == ["done"]
    assert (tmp_path / "artefact").read_text() == "one"
    assert os.listdir(tmp_path) == ["artefact"]


def test_a_waiter_takes_over_from_a_maker_that_died(tmp_path: Path, start: Start) -> None:
    first = start("one")
    assert line(first) == "making"
    second = start("two")
    assert "waiting for run one" in line(second)
    first.kill()
    assert "the wait is over: run one" in line(second)
    assert line(second) == "making"
    third = start("three")
    assert f"waiting for run two (process {second.pid}" in line(third)
    assert second.communicate("\n", timeout=60)[0] == "done\n"
    assert third.communicate(timeout=60)[0].endswith("\ndone\n")
    assert (tmp_path / "artefact").read_text() == "two"


def test_only_one_of_many_makes_it(tmp_path: Path, start: Start) -> None:
    processes = [start(str(number)) for number in range(4)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    output = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert sum("making" in said for said in output) == 1
    assert all(said[-1] == "done" for said in output)
    assert os.listdir(tmp_path) == ["artefact"]


def test_a_waiter_also_waits_for_ranks_whose_command_has_died(tmp_path: Path, start: Start) -> None:
    ranks = take_lock(tmp_path / "artefact" / RUN_LOCK)
    second = start("two")
    assert f"[stage] waiting for process {os.getpid()} on host" in line(second)
    ranks.close()
    assert "the wait is over" in line(second)
    assert line(second) == "done"


def test_parts_work_together_and_the_whole_waits_for_them(tmp_path: Path, start: Start) -> None:
    parts = [start("part a", "part"), start("part b", "part")]
    assert [line(part) for part in parts] == ["making"] * 2
    whole = start("whole")
    assert "waiting for run part" in line(whole)
    for part in parts:
        assert part.communicate("\n", timeout=60)[0] == "done\n"
    assert whole.communicate(timeout=60)[0].endswith("\ndone\n")
    assert (tmp_path / "artefact").read_text().startswith("part")
    assert os.listdir(tmp_path) == ["artefact"]


def test_those_who_only_use_it_wait_too(start: Start) -> None:
    first = start("one")
    assert line(first) == "making"
    user = start("user", "user")
    assert "waiting for run one" in line(user)
    first.communicate("\n", timeout=60)
    assert user.communicate(timeout=60)[0].endswith("\ndone\n")


def test_other_ranks_wait_until_the_first_of_their_job_is_the_maker(start: Start) -> None:
    another = start("another job")
    assert line(another) == "making"
    other_rank = start("job", "other rank")
    time.sleep(1)
    assert other_rank.poll() is None
    first_rank = start("job")
    assert "waiting for run another job" in line(first_rank)
    another.kill()
    assert "the wait is over" in line(first_rank)
    assert line(first_rank) == "making"
    assert other_rank.communicate(timeout=60)[0] == "done\n"


def test_a_lock_is_refused_while_another_holds_it(tmp_path: Path) -> None:
    with take_lock(tmp_path / "lock", run="one"):
        with pytest.raises(Held, match='"run": "one"'):
            take_lock(tmp_path / "lock")
        assert '"run": "one"' in (holder_of(tmp_path / "lock") or "")
    assert holder_of(tmp_path / "lock") is None
    assert holder_of(tmp_path / "none") is None
    take_lock(tmp_path / "lock").close()


def test_the_file_of_a_shared_lock_names_all_who_hold_it(tmp_path: Path, start: Start) -> None:
    first = start("one", "part")
    assert line(first) == "making"
    second = start("two", "part")
    assert line(second) == "making"
    said = [json.loads(text)["process"] for text in (holder_of(tmp_path / ".artefact.making") or "").splitlines()]
    assert said == [first.pid, second.pid]
    other_rank = start("one", "other rank")
    assert other_rank.communicate(timeout=60)[0] == "done\n", "the first rank of its job is a maker"
    for waiting in (start("whole"), start("user", "user")):
        assert f"waiting for run two (process {second.pid} on host" in line(waiting)


def test_a_disk_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(file: object, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with making(tmp_path / "artefact", "stage", "one"):
        wait_for_maker(tmp_path / "artefact", "stage")
    assert "cannot be locked (No locks available): make sure" in capsys.readouterr().out
