"""Commands that need the same data, tokenizer, latents or expert at once: one makes it, the others wait and use it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from shodh_moe.base.lock import RUN_LOCK, holder_of
from shodh_moe.checkpoint import CheckpointReader, list_checkpoints
from tests.ccm.tiny import tree as expert_tree
from tests.tiny import write_config

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

# Runs the command of each line that it gets, and prints the exit code.
SHELL = """
import json, sys
from shodh_moe.cli import main
for line in sys.stdin:
    print("exit", main(json.loads(line)), flush=True)
"""


class Shell:
    """A process that runs `shodh` commands; its stdout and stderr are in a file."""

    def __init__(self, folder: Path, name: str):
        self.name, self._output = name, folder / f"{name}.txt"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(self._output, "w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-uc", SHELL],
                cwd=folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                text=True,
                start_new_session=True,
            )

    def begin(self, *command: str) -> None:
        self._output.open("r+").truncate(0)
        words = ", ".join(f'"{word}"' for word in command)
        self.process.stdin.write(f"[{words}]\n")
        self.process.stdin.flush()

    def said(self) -> str:
        return self._output.read_text().replace("\0", "")

    def until(self, words: str, seconds: float = 120) -> str:
        deadline = time.monotonic() + seconds
        while words not in self.said():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.1)
        return self.said()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Shell]]:
    shells: list[Shell] = []

    def begin(name: str) -> Shell:
        shells.append(Shell(tmp_path, name))
        return shells[-1]

    yield begin
    for shell in shells:
        shell.process.kill()
        shell.process.communicate()
    for rank in ranks(tmp_path):
        os.kill(rank, signal.SIGKILL)


def at_once(shells: list[Shell], *command: str) -> list[str]:
    """Run a command in both shells at once, which must succeed; return the output of the maker and of the other."""
    for shell in shells:
        shell.begin(*command, "--name", shell.name)
    output = [shell.until("exit") for shell in shells]
    assert all("exit 0" in said for said in output), output
    return sorted(output, key=lambda said: "waiting for" in said)


def test_two_runs_of_a_sweep_share_data_tokenizer_and_latents(tmp_path: Path, start: Callable[[str], Shell]) -> None:
    write_config(tmp_path)
    shells = [start("one"), start("two")]
    settings = ("--config", "tiny.yaml", "parallel.processes=1")
    for stage, command in (
        ("data", ("data", "generate")),
        ("tokenizer", ("tokenizer", "train")),
        ("latents", ("tokenizer", "encode")),
    ):
        maker, other = at_once(shells, *command, *settings)
        assert f"[{stage}] unchanged" not in maker, maker
        assert "waiting for run" not in maker, maker
        assert f"[{stage}] waiting for run " in other, other
        assert f"[{stage}] the wait is over: run " in other, other
        assert f"[{stage}] unchanged, " in other, other
    assert len(list((tmp_path / "tokenizers").glob("[!.]*"))) == 1
    assert not list(tmp_path.rglob(".*.making"))


def test_two_commands_train_one_expert_once(tmp_path: Path, start: Callable[[str], Shell]) -> None:
    tree = expert_tree(tmp_path, parallel={"processes": 1})
    (tmp_path / "expert.yaml").write_text(yaml.safe_dump(tree))
    shells = [start("one"), start("two")]
    for shell in shells:
        shell.begin("expert", "train", "--config", "expert.yaml")
    output = sorted((shell.until("exit") for shell in shells), key=lambda said: "[expert] waiting for" in said)
    assert all("exit 0" in said for said in output), output
    assert "[expert] unchanged" not in output[0], output
    assert "[expert] waiting for run anchor (process" in output[1], output
    assert "[expert] unchanged, " in output[1], output


def test_a_waiter_takes_over_when_the_maker_and_its_ranks_are_killed(
    tmp_path: Path, start: Callable[[str], Shell]
) -> None:
    write_config(tmp_path)
    settings = ("--config", "tiny.yaml", "parallel.processes=1", "tokenizer.steps=1000000")
    one, two = start("one"), start("two")
    one.begin("data", "generate", *settings)
    one.until("exit 0")
    one.begin("tokenizer", "train", *settings, "--name", "one")
    deadline = time.monotonic() + 120
    while not (found := list(tmp_path.glob("tokenizers/*/checkpoints/latest"))):
        assert time.monotonic() < deadline, one.said()
        time.sleep(0.1)
    folder = found[0].parents[1]
    two.begin("tokenizer", "train", *settings, "--name", "two")
    two.until("[tokenizer] waiting for run one (process")
    assert holder_of(folder / RUN_LOCK), "the ranks train"
    one.process.kill()
    one.process.wait()
    for rank in ranks(tmp_path):
        os.kill(rank, signal.SIGKILL)
    said = two.until("train tokenizer from step ")
    assert "[tokenizer] the wait is over: " in said, said
    two.process.send_signal(signal.SIGTERM)
    two.until("exit 75")

    # Not on other data, though: the ranks record and compare what the tokenizer is trained on.
    newest = max(list_checkpoints(folder / "checkpoints"))
    recorded = CheckpointReader(folder / "checkpoints" / str(newest)).state["inputs"]
    assert recorded.keys() == {"data", "data_version", "grid", "stats_sha256", "tokenizer_version"}
    (stats,) = tmp_path.glob("data/*/stats.yaml")
    stats.write_text(stats.read_text() + "# changed\n")
    two.begin("tokenizer", "train", *settings, "--name", "two")
    said = two.until("exit 2")
    assert f"checkpoints/{newest} is refused: it was trained on something else" in said, said
    assert "the statistics of the data (" in said, said


def ranks(folder: Path) -> list[int]:
    """Return the process ids of launchers and ranks in ``folder``, which are in other sessions than their command."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                inside = (entry / "cwd").readlink() == folder
                if inside and b"shodh_moe.runs.tokenizer_rank" in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found
