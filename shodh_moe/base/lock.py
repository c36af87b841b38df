"""Locks between processes: one process at a time makes an artefact, and others wait for it and then use it.

They are flock locks on small files, which the system releases when their process ends, however it ends. On network
disks they hold between hosts if those support flock, as NFS 4 and Lustre (mounted with flock) do. The file says who
holds the lock: a line of JSON for each process, of which the last took it last.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import disk_trouble

RUN_LOCK = ".lock"  # in a run folder, held by the training itself
POLL_S = 0.5
NO_LOCK_S = 60.0
TRIES = 3  # to lock, 0.02 s apart, since `holder_of` holds a lock for an instant


class Held(Exception):
    """Another process holds the lock; the message is the text of the file, which may be empty."""


def take_lock(path: Path, shared: bool = False, **facts: str) -> IO[str]:
    """Lock a file until the returned object is closed or this process ends, and add a line of host, process and time.

    Where the disk has no locks, a warning is printed and the file is not locked.

    Args:
        shared: allow other processes to take the lock as well if they share it.
        facts: further values to write.

    Raises:
        Held: another process holds the lock.
        UserError: the file cannot be written.
    """
    tries = 0
    while True:
        file = _open(path)
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            text = file.read().strip()
            file.close()
            tries += 1
            if tries == TRIES:
                raise Held(text) from None
            time.sleep(0.02)
            continue
        except OSError as error:
            print(
                f"warning: {path} cannot be locked ({error.strerror}): make sure that no other process makes the same",
                flush=True,
            )
            return file
        if _is_at(file, path):
            break
        file.close()  # the process that held it has removed it meanwhile
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    try:
        if not shared:
            file.truncate(0)  # those who share a lock may write at the same moment, so that each only appends
        file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": now, **facts}) + "\n")
        file.flush()
    except OSError as error:
        with suppress(OSError):
            path.unlink()
        with suppress(OSError):
            file.close()
        raise UserError(f"cannot write {path}: {disk_trouble(error) or error.strerror}") from error
    with suppress(OSError):
        os.fsync(file.fileno())  # other hosts read it while it is open
    return file


@contextmanager
def making(target: Path, stage: str, run: str, shared: bool = False, job: str = "") -> Iterator[None]:
    """Within the block, no other process makes ``target``. Waits for one that does, and prints for which.

    After a wait the target may be there, so check within the block whether it still has to be made. A process that dies
    releases the lock, and one that waits takes over.

    Args:
        stage: name of the stage, for the printed lines.
        run: name of the run for which this process makes the target; others print it while they wait.
        shared: allow other processes that make a part of the target and share the lock too.
        job: identifies a job of several ranks, see `wait_for_first_rank`.

    Raises:
        UserError: the folder of ``target`` cannot be written.
    """
    path = _beside(target)
    waiting = _Waiting(stage, target)
    while True:
        try:
            lock = take_lock(path, shared, run=run, job=job)
            break
        except Held as holder:
            waiting.for_(str(holder))
    # The ranks of a command that was killed may still be training.
    waiting.until_free(target / RUN_LOCK)
    waiting.over()
    with lock:
        try:
            yield
        finally:
            with suppress(OSError):  # other processes may share it
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def wait_for_maker(target: Path, stage: str) -> None:
    """Return once no process makes ``target`` or trains in it; print for which one this waits."""
    waiting = _Waiting(stage, target)
    for path in (_beside(target), target / RUN_LOCK):
        waiting.until_free(path)
    waiting.over()


def wait_for_first_rank(target: Path, job: str, is_made: Callable[[], bool]) -> None:
    """On the other ranks of a job: return once the first rank is `making` the target for this job, or it is made.

    The first rank may wait for hours, longer than a rendezvous of ranks does. Where the disk has no locks, or the first
    rank has not started, this returns after `NO_LOCK_S`.
    """
    free_since = time.monotonic()
    while not is_made() and time.monotonic() - free_since < NO_LOCK_S:
        holder = holder_of(_beside(target))
        if holder and f'"job": {json.dumps(job)}' in holder:
            return
        if holder is not None:
            free_since = time.monotonic()
        time.sleep(POLL_S)


def holder_of(path: Path) -> str | None:
    """Return what a lock's file says about the processes that hold it; None if none does or it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            for _ in range(TRIES):
                try:
                    _flock_to_test(file)
                    return None
                except BlockingIOError:
                    time.sleep(0.02)
            return file.read().strip()
    except OSError:
        return None


def _flock_to_test(file: IO[str]) -> None:
    """Lock a file opened for reading, exclusively where possible, so that it also fails if others share the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # NFS locks exclusively only files opened for writing
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


class _Waiting:
    """Prints a line when a wait begins, when it is for another process than before, and when it ends."""

    def __init__(self, stage: str, target: Path):
        self._stage, self._target = stage, target
        self._told: str | None = None

    def for_(self, holder: str) -> None:
        time.sleep(POLL_S)
        if holder and holder != self._told:  # a process writes about itself just after it has taken the lock
            print(f"[{self._stage}] waiting for {_named(holder)}, which makes {self._target}", flush=True)
            self._told = holder

    def until_free(self, path: Path) -> None:
        while (holder := holder_of(path)) is not None:
            self.for_(holder)

    def over(self) -> None:
        if self._told is not None:
            print(f"[{self._stage}] the wait is over: {_named(self._told)} has finished or died", flush=True)


def _named(text: str) -> str:
    """``run NAME (process P on host H since T)`` of the process that took a lock last, from the text in its file."""
    try:
        found: dict[str, Any] = json.loads(text.splitlines()[-1])
        where = f"process {found['process']} on host {found['host']} since {found['since']}"
        return f"run {found['run']} ({where})" if found.get("run") else where
    except (IndexError, ValueError, KeyError, TypeError):
        return f"another process ({text[:200]!r})"


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.making")


def _open(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {disk_trouble(error) or error.strerror}") from error


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
