"""Training that starts again by itself after a failure, on the hosts that are left (``parallel.elastic``).

After a failure, all hosts of the hostfile are asked to answer. Hosts that do not are left out from then on, and the
others train on from the newest checkpoint, which fits any number of ranks. Each rank keeps its batch size, so the
global batch shrinks. If all hosts answer, or there is no hostfile, training starts again only if it has written a
checkpoint since the last start: an error that occurs again at the same step ends the command.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from shodh_moe.base.errors import EXIT_FAILED, EXIT_REQUEUE, EXIT_USER_ERROR, UserError
from shodh_moe.base.lock import RUN_LOCK, holder_of
from shodh_moe.base.polling import wait_until
from shodh_moe.base.section import Section
from shodh_moe.checkpoint import list_checkpoints
from shodh_moe.config import RunConfig
from shodh_moe.launching.hostfile import Host, read_hostfile, write_hostfile
from shodh_moe.launching.launcher import REACH_S, HostsUnusable, TrainingFailed
from shodh_moe.launching.probe import probe_hosts
from shodh_moe.launching.ssh import some, time_limit
from shodh_moe.launching.stop_signals import stop_request

HOSTS_LEFT = "hosts_left"  # a hostfile in the run folder
TRIES = 3  # number of times that a host must be silent to be left out
PATIENCE_S = 600.0  # how long to wait for the ranks on lost hosts to end, and for any host to answer
PAUSE_S = 5.0

C = TypeVar("C", bound=RunConfig)


def train_elastic(
    config: C, run: Path, resume: str, start: Callable[[C, str], int], for_ranks: Callable[[C, int], C]
) -> None:
    """Train until the end, or until a failure after which training does not start again.

    Args:
        run: folder of the training, which holds its checkpoints.
        resume: ``auto``, or the folder of the checkpoint to resume.
        start: starts ranks with a config and a ``resume``, and returns the launcher's exit code.
        for_ranks: returns the config for a number of ranks; raises `UserError` if they cannot share the work.

    Raises:
        TrainingFailed: training ended with an error, or was asked to stop.
        UserError: a host cannot be used at the first start, or the hosts that are left cannot share the work.
    """
    current = config
    hosts = read_hostfile(Path(config.parallel.hostfile)) if config.parallel.hostfile else []
    while True:
        before = _checkpoints(run)
        try:
            code = start(current, resume)
        except HostsUnusable as error:  # lost since they answered
            if current is config:
                raise
            code = EXIT_FAILED
            print(f"[elastic] {error}", flush=True)
        if not code:
            return
        if not config.parallel.elastic or code in (EXIT_REQUEUE, EXIT_USER_ERROR):
            raise TrainingFailed(code)
        with stop_request() as stop:
            left = _answering(hosts, stop)
            # A host that is cut off from the others may still run ranks, until they notice that they stall.
            wait_until(lambda: bool(stop) or holder_of(run / RUN_LOCK) is None, PATIENCE_S)
        if stop:
            raise TrainingFailed(EXIT_REQUEUE)
        written = [step for step, stamp in _checkpoints(run).items() if before.get(step) != stamp]
        what = f"training ended with exit code {code}"
        if left == hosts and not written:
            print(f"[elastic] {what} before it wrote a checkpoint, so it is not started again", flush=True)
            raise TrainingFailed(code)
        if left != hosts:
            what += f", and {some([host.name for host in hosts if host not in left])} cannot be reached"
        if written and resume != "auto":
            resume = str(run / "checkpoints" / str(max(written)))
        if hosts:
            hosts = left
            used, current = _on_hosts(left, config, run, for_ranks)
            what += f": going on with {sum(host.slots for host in used)} ranks on {some([host.name for host in used])}"
        else:
            what += ": starting again"
        print(f"[elastic] {what}", flush=True)


def _checkpoints(run: Path) -> dict[int, tuple[int, int]]:
    """Return, for each checkpoint, what changes if it is written again."""
    folder = run / "checkpoints"
    stats = {step: (folder / str(step)).stat() for step in list_checkpoints(folder)}
    return {step: (stat.st_ino, stat.st_mtime_ns) for step, stat in stats.items()}


def _answering(hosts: list[Host], stop: list[bool]) -> list[Host]:
    """Return the hosts that answer, in order. If none does, ask again for a while: this host may be cut off."""
    deadline = time.monotonic() + PATIENCE_S
    answered: set[str] = set()
    tries = 0
    while hosts and not stop and len(answered) < len(hosts) and time.monotonic() < deadline:
        silent = [host.name for host in hosts if host.name not in answered]
        facts = probe_hosts(silent, time_limit(REACH_S), brief=True)
        answered |= {name for name, found in facts.items() if "error" not in found}
        tries += 1
        if answered and tries >= TRIES:
            break
        if len(answered) < len(hosts):
            time.sleep(PAUSE_S)
    return [host for host in hosts if host.name in answered]


def _on_hosts(left: list[Host], config: C, run: Path, for_ranks: Callable[[C, int], C]) -> tuple[list[Host], C]:
    """Return as many of the hosts, from the first, as can share the work, and the config for them.

    Raises:
        UserError: no number of them can.
    """
    for count in range(len(left), 0, -1):
        hosts = left[:count]
        try:
            changed = for_ranks(config, sum(host.slots for host in hosts))
        except UserError:
            if count == 1:
                raise
            continue
        hostfile = run / HOSTS_LEFT
        write_hostfile(hostfile, hosts)
        parallel = changed.parallel.model_copy(update={"hostfile": str(hostfile)})
        return hosts, cast(C, cast(Section, changed).model_copy(update={"parallel": parallel}))
    raise UserError("no host of the hostfile answers: see `shodh doctor --hostfile`")
