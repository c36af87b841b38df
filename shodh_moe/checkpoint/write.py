"""Write a checkpoint from all ranks while training continues (DESIGN 8).

Every rank copies its fragments to host memory and continues training; a thread writes them. The threads communicate
only through the file system, because collectives would mix with those of training:

1. Each rank writes its file into ``.writing-<step>-<attempt>-<count>``, then a report of its success or failure.
2. When all ranks have reported, rank 0 checks that the pieces cover every tensor, writes ``state.json`` and renames the
   folder to ``<step>``. If anything failed, it removes the folder instead.
3. The other ranks wait until the folder is gone, then look for the new checkpoint in its place.

A checkpoint is therefore either complete or absent. Leftovers of a killed run are never mistaken for a part of it,
because each start of a run has a new attempt name.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from shodh_moe.base.errors import ReportedByRank0, UserError
from shodh_moe.base.files import disk_trouble, remove_leftovers, replace_folder, sync, write_text
from shodh_moe.base.polling import wait_until
from shodh_moe.checkpoint.fragments import Fragment
from shodh_moe.checkpoint.rank_file import HostCopy
from shodh_moe.checkpoint.read import list_checkpoints
from shodh_moe.checkpoint.state import (
    FORMAT,
    RANK_STATE,
    RESERVED,
    STATE,
    Damaged,
    join,
    load_state,
    piece_key,
    rank_file,
    seal,
)

PATIENCE_S = 1800.0  # how long a rank that has written its part waits for the others
GRACE_S = 2.0  # how long a network disk may take to show a rename to other hosts


class _Save(NamedTuple):
    """A checkpoint that is being written; its fragments are in the writer's `HostCopy`."""

    step: int
    temporary: Path
    final: Path
    mark: str  # attempt and count, different for every save of the same step
    shapes: dict[str, list[int]]
    pieces: dict[str, list[list[int]]]  # tensor -> [start, count] of this rank's fragments
    dtypes: dict[str, str]
    facts: dict[str, Any]


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time.

    Args:
        folder: the run's ``checkpoints``.
        rank, world_size: this process's rank, and the number of ranks.
        keep_last: number of newest checkpoints to keep.
        keep_every: also keep checkpoints whose step is a multiple of this; 0: none.
        attempt: letters and digits, equal on all ranks and different at each start of the run.

    Raises:
        ValueError: ``attempt`` has other characters, or ``keep_last`` is below 1.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, keep_last: int, keep_every: int, attempt: str):
        if not attempt.isalnum() or keep_last < 1:
            raise ValueError(f"attempt {attempt!r} must be letters and digits, keep_last {keep_last} at least 1")
        self._folder, self._rank, self._world_size = folder, rank, world_size
        self._keep_last, self._keep_every, self._attempt = keep_last, keep_every, attempt
        self._host_copy = HostCopy()
        self._count = 0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if rank == 0:
            _remove_leftovers(folder, attempt)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self._folder / str(step)

    def save(
        self,
        step: int,
        fragments: list[Fragment],
        shapes: dict[str, list[int]],
        rank_state: dict[str, Tensor],
        facts: dict[str, Any],
    ) -> None:
        """Copy the fragments to host memory and return; a thread writes them.

        All ranks call it in the same order. It first waits for the previous checkpoint.

        Args:
            step: number of finished optimizer steps; becomes the checkpoint's name.
            fragments: this rank's; over all ranks they hold each element of every logical tensor once.
            shapes: shapes of all logical tensors.
            rank_state: this rank's own state, 1-D tensors with names such as ``rng/cpu`` (see `RANK_STATE`).
            facts: JSON values to add to ``state.json``; only those of rank 0 are used.

        Raises:
            UserError: the previous checkpoint could not be written: disk full, no permission.
            ValueError: a fragment cannot be stored, a fact has a reserved name, or rank state has a wrong name.
        """
        self.finish()
        if taken := RESERVED & set(facts):
            raise ValueError(f"facts of a checkpoint may not be called {sorted(taken)}")
        if unknown := [name for name in rank_state if not name.startswith(RANK_STATE)]:
            raise ValueError(f"rank state {unknown[0]} must begin with one of {RANK_STATE}")
        fragments = [fragment for fragment in fragments if fragment.values.numel()]
        tensors = {piece_key(name, start): values for name, start, values in fragments}
        if len(tensors) != len(fragments):
            raise ValueError(f"rank {self._rank} has two fragments of the same tensor and first element")
        tensors.update(rank_state)
        self._host_copy.take(tensors)
        self._count += 1
        mark = f"{self._attempt}-{self._count}"
        pieces: dict[str, list[list[int]]] = {}
        dtypes: dict[str, str] = {}
        for name, start, values in fragments:
            pieces.setdefault(name, []).append([start, values.numel()])
            dtypes[name] = str(values.dtype).removeprefix("torch.")
        temporary, final = self._folder / f".writing-{step}-{mark}", self._folder / str(step)
        facts = json.loads(json.dumps(facts)) if self._rank == 0 else {}  # a copy, which later changes do not affect
        save = _Save(step, temporary, final, mark, {**shapes}, pieces, dtypes, facts)
        # A daemon thread, so that after an error in training the process does not wait for dead ranks before it exits.
        self._thread = threading.Thread(target=self._run, args=(save,), name=f"checkpoint {step}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the error of the background write if it has ended with one; never wait."""
        if self._thread is None or not self._thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait until the last checkpoint is complete on all ranks.

        Raises:
            UserError: it could not be written: disk full, no permission, or a rank did not report.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, save: _Save) -> None:
        cause: Exception | None = None
        try:
            report, cause = self._write_own_file(save)
            if self._rank == 0:
                self._commit(save, report)
            else:
                _write_report(save, self._rank, report)
                self._await_commit(save, report)
        except BaseException as error:
            reason = disk_trouble(error)
            self._error = UserError(f"cannot write {save.final}: {reason}") if reason else error
            if reason or cause:
                self._error.__cause__ = error if reason else cause
            if self._rank == 0:
                _remove(save.temporary)
            elif isinstance(self._error, UserError):
                self._error = ReportedByRank0(str(self._error))
                self._error.__cause__ = error

    def _write_own_file(self, save: _Save) -> tuple[dict[str, Any], Exception | None]:
        """Write this rank's file. Returns a report (size, hash and pieces, or the error) and any exception."""
        path = save.temporary / rank_file(self._rank)
        try:
            save.temporary.mkdir(parents=True, exist_ok=True)
            return {"file": self._host_copy.write(path), "pieces": save.pieces, "dtypes": save.dtypes}, None
        except Exception as error:
            with suppress(OSError):
                path.unlink()  # make room for the report
            reason = disk_trouble(error)
            return {"error": reason or f"{type(error).__name__}: {error}", "user": bool(reason)}, error

    def _commit(self, save: _Save, own: dict[str, Any]) -> None:
        """On rank 0: wait for every report, then turn the folder into a checkpoint."""
        reports = {0: own}

        def all_reported() -> bool:
            names = set(os.listdir(save.temporary))
            for rank in range(self._world_size):
                if rank not in reports and _report_name(rank) in names:
                    reports[rank] = json.loads((save.temporary / _report_name(rank)).read_text(encoding="utf-8"))
            return len(reports) == self._world_size

        # Wait even after a failure: a late rank would recreate the folder.
        if not wait_until(all_reported, PATIENCE_S):
            late = [rank for rank in range(self._world_size) if rank not in reports]
            raise UserError(
                f"cannot write {save.final}: {_ranks(late)} did not report in {PATIENCE_S:.0f} s: "
                "check their messages, and that all ranks share this folder"
            )
        _raise_failures(save, reports, self._world_size)
        state = {
            "format": FORMAT,
            "step": save.step,
            "world_size": self._world_size,
            "attempt": save.mark,
            "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **save.facts,
            "tensors": join(save.shapes, reports),
            "files": {rank_file(rank): reports[rank]["file"] for rank in sorted(reports)},
        }
        for rank in range(1, self._world_size):
            (save.temporary / _report_name(rank)).unlink()
        (save.temporary / STATE).write_text(seal(state), encoding="utf-8")
        sync(save.temporary / STATE)
        sync(save.temporary)
        self._set_aside_later(save.step)
        replace_folder(save.temporary, save.final, self._folder / f".old-{save.final.name}")
        write_text(self._folder / "latest", f"{save.step}\n")
        self._remove_old()

    def _await_commit(self, save: _Save, own: dict[str, Any]) -> None:
        """On other ranks: wait for rank 0's decision."""

        def decided() -> bool:
            # Network disks may cache the lookup of a single name, but not the listing of a folder.
            return save.temporary.name not in os.listdir(self._folder)

        def committed() -> bool:
            try:
                return load_state(save.final)["attempt"] == save.mark
            except Damaged:
                return False

        if not wait_until(decided, PATIENCE_S):
            raise UserError(f"cannot write {save.final}: rank 0 did not finish it in {PATIENCE_S:.0f} s")
        _raise_failures(save, {self._rank: own}, self._world_size)
        if not wait_until(committed, GRACE_S):
            raise UserError(f"cannot write {save.final}: rank 0 gave it up: see its message")

    def _set_aside_later(self, step: int) -> None:
        """Rename the checkpoints of later steps: this run resumed from an earlier one and must not use them."""
        for later in list_checkpoints(self._folder):
            if later > step:
                path, aside = self._folder / str(later), self._folder / f"abandoned-{later}"
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
                print(f"checkpoint {path} is now {aside.name}: the run resumed from an earlier step", flush=True)

    def _remove_old(self) -> None:
        for old in list_checkpoints(self._folder)[: -self._keep_last]:
            if not (self._keep_every and old % self._keep_every == 0):
                _remove(self._folder / str(old))


def _remove(folder: Path) -> None:
    # Rename first: a half-removed checkpoint must not look damaged, and waiting ranks notice it at once.
    renamed = folder.with_name(f".removing-{folder.name.lstrip('.')}")
    try:
        os.replace(folder, renamed)
    except FileNotFoundError:
        return
    except OSError as error:
        print(f"{folder} cannot be removed: {error.strerror}", flush=True)
    shutil.rmtree(renamed, ignore_errors=True)


def _report_name(rank: int) -> str:
    return f"rank_{rank:05d}.json"


def _write_report(save: _Save, rank: int, report: dict[str, Any]) -> None:
    path = save.temporary / _report_name(rank)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report), encoding="utf-8")
    os.replace(part, path)  # rank 0 must never read a partial report


def _ranks(ranks: list[int]) -> str:
    few = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {few}"


def _raise_failures(save: _Save, reports: dict[int, dict[str, Any]], world_size: int) -> None:
    """Raise one error for all ranks that reported a failure."""
    failed = sorted(rank for rank, report in reports.items() if "error" in report)
    if failed:
        where = f" ({_ranks(failed)})" if world_size > 1 else ""
        text = f"cannot write {save.final}: {reports[failed[0]]['error']}{where}"
        raise UserError(text) if reports[failed[0]]["user"] else RuntimeError(text)


def _remove_leftovers(folder: Path, attempt: str) -> None:
    """Remove the leftovers of earlier attempts that were killed."""
    remove_leftovers(folder, older_than_seconds=0.0)
    for path in folder.glob(".writing-*"):
        if f"-{attempt}-" not in path.name:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".removing-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".old-*"):
        target = folder / path.name.removeprefix(".old-")
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:  # killed between the two renames of `replace_folder`
            os.replace(path, target)
