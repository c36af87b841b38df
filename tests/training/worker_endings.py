"""One rank of test_trainer: run several trainings in this process, each with a different ending.

Arguments: a folder from `write_case`, then one rendezvous port for each training. Writes the outcome of each training
and anything it left behind to ``endings_<rank>.json``.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from shodh_moe.base.command import end_rank
from shodh_moe.config.load import load_config
from shodh_moe.launching.stop_signals import stop_signals
from shodh_moe.training import log, pretrain, trainer

folder, ports = Path(sys.argv[1]), sys.argv[2:]
rank, run = int(os.environ["RANK"]), folder / "run"
end_of_step = pretrain.LatentTask.end
SIGNALS = stop_signals()
handlers = [signal.getsignal(number) for number in SIGNALS]
logs: list[log.Log] = []


class Log(log.Log):
    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        logs.append(self)


def run_is_locked() -> bool:
    with open(run / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def at_step(number: int, act: Callable[[], None]) -> None:
    def end(task: Any, step: int, applied: bool) -> None:
        if step == number:
            assert run_is_locked()
            assert rank or not logs[-1].closed
            dist.barrier()  # rank 0 holds the lock, and must not end before the other rank has looked
            act()
        end_of_step(task, step, applied)

    pretrain.LatentTask.end = end  # type: ignore[method-assign]


def fail(error: BaseException) -> None:
    raise error


def terminate_rank_1() -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def outcome(resume: str) -> str:
    config = load_config(folder / "config.yaml", ["training.checkpoint_every=1", "training.log_every=1"])
    try:
        pretrain.pretrain(config, run, folder / "latents", resume)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


ENDINGS: dict[str, tuple[int, Callable[[], None], str]] = {
    "a step raises": (2, lambda: fail(RuntimeError("of a step")), "auto"),
    "a step exits": (3, lambda: fail(SystemExit(7)), "auto"),
    "rank 0 refuses": (-1, terminate_rank_1, str(folder / "nowhere")),
    "a signal": (4, terminate_rank_1, "auto"),
    "to the end": (-1, terminate_rank_1, "auto"),
}


def main() -> int:
    run.mkdir(exist_ok=True)
    trainer.Log = Log  # type: ignore[misc]
    found: dict[str, dict[str, Any]] = {}
    for (name, (step, act, resume)), port in zip(ENDINGS.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = port
        at_step(step, act)
        result = outcome(resume)
        found[name] = {
            "outcome": result,
            "in a group": dist.is_initialized(),
            "logs": len(logs),
            "open logs": sum(not one.closed for one in logs),
            "sentinels": len(psutil.Process().children()),
            "handlers restored": [signal.getsignal(number) for number in SIGNALS] == handlers,
        }
        if rank == 0:
            found[name]["locked"] = run_is_locked()
            with pytest.raises(ValueError, match="is closed"):
                logs[-1].write({"kind": "train", "step": 99})
    (folder / f"endings_{rank}.json").write_text(json.dumps(found))
    return 0


end_rank(main)
