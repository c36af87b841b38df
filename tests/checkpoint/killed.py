"""Script of test_write: kill a process that saves a checkpoint before its first file operation, before its second, and
so on; after each kill the folder must have a complete checkpoint, and the next attempt must be able to save."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from shodh_moe.checkpoint import CheckpointReader, damage, find_checkpoint, list_checkpoints
from tests.checkpoint.ranks import Ranks

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
KILLED = 9
folder, existing = Path(sys.argv[1]), sys.argv[2]


def content(step: int) -> dict[str, torch.Tensor]:
    return {"model/a": torch.full((64,), float(step))}


def die_at(number: int) -> None:
    """End this process, as a kill would, before its ``number``-th change on the disk."""
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if done == number:
            os._exit(KILLED)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]):
            count()

    def counted_sync(descriptor: int) -> None:
        count()  # no real sync: a kill does not lose the page cache

    os.fsync = counted_sync
    sys.addaudithook(hook)


def save_in_child(checkpoints: Path, number: int) -> int:
    """Return the exit code of a process that saves step 3 and is killed at its ``number``-th change."""
    child = os.fork()
    if child == 0:
        die_at(number)
        ranks = Ranks(checkpoints, keep_last=1, attempt="killed")
        ranks.save(3, content(3))
        os._exit(0 if ranks.errors() == [None, None] else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check(checkpoints: Path) -> None:
    for step in list_checkpoints(checkpoints):
        assert damage(checkpoints / str(step)) is None, (step, damage(checkpoints / str(step)))
    found = find_checkpoint(checkpoints)
    assert found is not None
    step = found[1]["step"]
    assert step in (2, 3)
    stored = CheckpointReader(found[0]).tensor("model/a")
    assert stored[0] in ((2,) if step == 2 else (3, 30)), stored
    assert torch.equal(stored, stored[0].expand(64))


os.fsync = lambda descriptor: None
before = folder / "before"
earlier = Ranks(before).saved(2, content(2))
if existing == "same":
    earlier.saved(3, content(30))
number = 0
while True:
    number += 1
    checkpoints = shutil.copytree(before, folder / str(number))
    code = save_in_child(checkpoints, number)
    if code == 0:
        break
    assert code == KILLED, code
    check(checkpoints)
    Ranks(checkpoints, keep_last=1, attempt="next").saved(3, content(3))
    assert sorted(os.listdir(checkpoints)) == ["3", "latest"], os.listdir(checkpoints)
    assert torch.equal(CheckpointReader(checkpoints / "3").tensor("model/a"), content(3)["model/a"])
    shutil.rmtree(checkpoints)
print(number - 1)
