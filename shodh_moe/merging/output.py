"""Write an output atomically, and resumably file by file.

Work in progress is in ``.merging-<name>/`` next to the output: ``plan.json`` (identifies the merge), ``content/``
(becomes the output) and ``records/`` (one JSON file for each file that is complete and synced).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import sync, write_text
from shodh_moe.merging.hashing import FileHash
from shodh_moe.merging.layout import OutputFile


def unfinished(folder: Path) -> Path:
    """Working folder of an output that is being made."""
    return folder.with_name(f".merging-{folder.name}")


class Output:
    """The files of one output. Call `write` in the order of the files and of the tensors in them.

    Args:
        folder: the output, which must not exist.
        files: the files to write.
        plan: hash of everything that the bytes depend on. An unfinished output of another plan is deleted.

    Raises:
        UserError: another process is making this output.
    """

    def __init__(self, folder: Path, files: list[OutputFile], plan: str):
        self.folder, self.files = folder, files
        self._work = unfinished(folder)
        self._content, self._records = self._work / "content", self._work / "records"
        self._work.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self._work)
        plan_file = self._work / "plan.json"
        if not plan_file.exists() or json.loads(plan_file.read_text())["plan"] != plan:
            if self._records.exists():
                print(
                    f"[merge] {folder}: an unfinished merge has other inputs or another config; starting over",
                    flush=True,
                )
            shutil.rmtree(self._content, ignore_errors=True)
            shutil.rmtree(self._records, ignore_errors=True)
            write_text(plan_file, json.dumps({"plan": plan}))
        self._content.mkdir(exist_ok=True)
        self._records.mkdir(exist_ok=True)
        self.done = {file.name: record for file in files if (record := self._record(file))}
        self._file_of = {name: file for file in files for name in file.tensors}
        self._open: OutputFile | None = None
        self._facts: dict[str, Any] = {}
        self._syncs: list[Future[None]] = []
        # One thread writes in order, one hashes the written bytes, one waits for the disk.
        self._writer, self._hasher, self._syncer = (ThreadPoolExecutor(1) for _ in range(3))

    def has(self, tensor: str) -> bool:
        """Whether the file of this tensor is already complete."""
        return self._file_of[tensor].name in self.done

    def add_fact(self, tensor: str, fact: Any) -> None:
        """Store a JSON value about a tensor in its file's record. Call it before the tensor's last `write`."""
        self._facts.setdefault(tensor, {}).update(fact)

    def write(self, tensor: str, offset: int, data: memoryview) -> Future[None]:
        """Write bytes of a tensor asynchronously, from byte ``offset`` on; keep ``data`` unchanged until it is done."""
        return self._writer.submit(self._write, tensor, offset, data)

    def _write(self, tensor: str, offset: int, data: memoryview) -> None:
        file = self._file_of[tensor]
        if self._open is not file:
            self._begin(file)
        place = self._places[tensor] + offset
        hashed = self._hasher.submit(self._hash.feed, place, data)
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], place + done)
        hashed.result()
        self._left -= len(data)
        if not self._left:
            self._complete(file)

    def _begin(self, file: OutputFile) -> None:
        path = self._content / file.name
        self._places = file.begin(path)
        self._descriptor = os.open(path, os.O_RDWR)
        self._hash = FileHash(self._descriptor)
        self._left = file.payload
        self._open = file

    def _complete(self, file: OutputFile) -> None:
        digest = self._hash.finish()
        facts = {name: self._facts.pop(name) for name in file.tensors if name in self._facts}
        record = {"bytes": os.fstat(self._descriptor).st_size, "sha256": digest, "facts": facts}
        self._open = None
        # Sync each file once, in a separate thread: syncing during writing made it four times slower.
        self._syncs.append(self._syncer.submit(self._keep, file, self._descriptor, record))

    def _keep(self, file: OutputFile, descriptor: int, record: dict[str, Any]) -> None:
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        write_text(self._records / f"{file.name}.json", json.dumps(record))
        self.done[file.name] = record

    def _record(self, file: OutputFile) -> dict[str, Any] | None:
        try:
            record = json.loads((self._records / f"{file.name}.json").read_text())
            size = (self._content / file.name).stat().st_size
        except (OSError, ValueError):
            return None
        return record if size == record["bytes"] else None

    def finish(self) -> dict[str, dict[str, Any]]:
        """Wait for all writes; returns size, hash and facts of every file."""
        for file in self.files:
            if file.payload == 0:  # no `write` has created it
                self._writer.submit(self._empty, file).result()
        self._writer.submit(lambda: None).result()
        for one in self._syncs:
            one.result()
        return {file.name: self.done[file.name] for file in self.files}

    def _empty(self, file: OutputFile) -> None:
        self._begin(file)
        self._complete(file)

    def publish(self, texts: dict[str, str]) -> None:
        """Add text files {name: content} and move the output to its final place."""
        for name, text in texts.items():
            write_text(self._content / name, text)
        sync(self._content)
        if self.folder.exists():
            raise UserError(f"{self.folder} was created by another process: remove it, or choose another output")
        os.rename(self._content, self.folder)
        sync(self.folder.parent)
        self.close()
        shutil.rmtree(self._work, ignore_errors=True)

    def discard(self) -> None:
        """Delete all work in progress."""
        self.close()
        shutil.rmtree(self._work, ignore_errors=True)

    def close(self) -> None:
        """Stop writing; complete files are kept for the next try."""
        self._writer.shutdown(cancel_futures=True)
        self._hasher.shutdown(cancel_futures=True)
        self._syncer.shutdown()
        if self._open:
            os.close(self._descriptor)
            self._open = None
        self._lock.close()


def _lock(folder: Path) -> Any:
    file = open(folder / "lock", "a")  # noqa: SIM115 - the lock lives as long as the file is open
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(f"another process is writing {folder}: wait for it, or choose another output") from error
    except OSError:  # the file system does not support locks
        return file
    return file
