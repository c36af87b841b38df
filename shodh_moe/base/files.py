"""Writing files and folders atomically, hashing them, and explaining disk errors."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from shodh_moe.base.errors import UserError


def finite_json(tree: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, with None, also inside dictionaries and lists."""
    if isinstance(tree, dict):
        return {key: finite_json(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [finite_json(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# Errors of disks that cannot flush a folder, such as CIFS and the shared folders of VirtualBox.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk.

    On a disk that cannot flush a folder, files are still complete or absent when a process is killed. Only after a
    power cut may the folder lack the newest ones.

    Raises:
        OSError: any other error, such as a full disk.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; if the block succeeds, it is synced and renamed to ``path``.

    On any failure the temporary file is removed and ``path`` is unchanged.

    Raises:
        UserError: the disk is full, or the folder cannot be made or written to.
    """
    # The leading dot and the suffix keep a leftover of a killed run from being mistaken for data. A process ID would
    # not be unique among the hosts or containers that write the same file.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except Exception as error:
        if reason := disk_trouble(error):
            raise UserError(f"cannot write {path}: {reason}") from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


def remove_leftovers(folder: Path, older_than_seconds: float = 3600.0) -> None:
    """Remove temporary files of killed runs from ``folder``; a recent one may belong to a run in progress."""
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > older_than_seconds:
                path.unlink()


def write_text(path: Path, text: str) -> None:
    """Replace a small text file atomically. Raises `UserError` like `atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append(path: Path, data: bytes) -> None:
    """Append ``data`` to a file. If that fails, the file is unchanged.

    Raises:
        UserError: the disk is full or not writable.
    """
    try:
        with open(path, "ab", buffering=0) as file:
            size, left = file.tell(), memoryview(data)
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                with suppress(OSError):
                    file.truncate(size)
                raise
    except OSError as error:
        if reason := disk_trouble(error):
            raise UserError(f"cannot write {path}: {reason}") from error
        raise


def copy_files(files: Iterable[Path], folder: Path) -> None:
    """Copy files into a folder, which is made if it does not exist; files of the same name are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)


@contextmanager
def whole_folder(target: Path, keep_first: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``target`` if the block succeeds, and is removed otherwise.

    An existing ``target`` is replaced. Several processes may write the same ``target`` at once: if it did not exist at
    the start, the first one to finish creates it.

    Args:
        keep_first: all processes write the same content, so later ones keep the ``target`` that the first one wrote.

    Raises:
        UserError: the disk is full, writing is not permitted, or another process was first and not ``keep_first``.
    """
    workshop = target.with_name(f".writing-{target.name}-{uuid.uuid4().hex}")
    temporary, replaces, lock = workshop / target.name, target.exists(), None
    try:
        workshop.mkdir(parents=True)
        lock = _lock_file(workshop)
        _remove_abandoned(target)
        temporary.mkdir()
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        _move_into_place(temporary, target, replaces, keep_first)
    except BaseException as error:
        if reason := disk_trouble(error):
            raise UserError(f"cannot write {target}: {reason}") from error
        if type(error) is UserError and str(temporary) in str(error):
            raise UserError(str(error).replace(str(temporary), str(target))) from error
        raise
    finally:
        if target.exists() or not (workshop / "old").exists():  # otherwise the old target could not be put back
            shutil.rmtree(workshop, ignore_errors=True)
        if lock:
            lock.close()


def _move_into_place(temporary: Path, target: Path, replaces: bool, keep_first: bool) -> None:
    try:
        if replaces:
            replace_folder(temporary, target, temporary.parent / "old")
        else:
            os.rename(temporary, target)
            sync(target.parent)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not target.is_dir():
            raise
        if not keep_first:
            raise UserError(
                f"{target} was written by another process meanwhile and is kept: use it, or remove it and run again"
            ) from error


def _lock_file(workshop: Path) -> IO[str]:
    """Open a file in ``workshop`` that stays locked until it is closed or this process ends."""
    file = open(workshop / "lock.new", "w", encoding="utf-8")  # noqa: SIM115 - the lock lives as long as it is open
    with suppress(OSError):  # some network disks have no locks
        fcntl.flock(file, fcntl.LOCK_EX)
        # Renamed only now, so that other processes never see it unlocked.
        os.rename(workshop / "lock.new", workshop / "lock")
    return file


def _remove_abandoned(target: Path) -> None:
    """Remove the temporary folders of `whole_folder` calls for ``target`` whose process was killed.

    A process that was killed while it replaced ``target`` may have left the old one in there, which is restored.
    """
    prefix = f".writing-{target.name}-"
    for workshop in target.parent.iterdir():
        if workshop.name.startswith(prefix):
            with suppress(OSError), open(workshop / "lock", "r+", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with suppress(OSError):  # there is none, or there is a new target
                    os.rename(workshop / "old", target)
                shutil.rmtree(workshop, ignore_errors=True)


def replace_folder(temporary: Path, target: Path, old: Path) -> None:
    """Rename the synced folder ``temporary`` to ``target``, and remove the old ``target``, if any.

    Args:
        old: name of the old folder in between, on the same disk and used by no other process. If this process is killed
            half-way, the old folder remains there.

    Raises:
        OSError: ``target`` could not be replaced; the old folder is restored unless another process has put one there.
    """
    # Two renames instead of a slow removal first, so that ``target`` is missing only for a moment.
    shutil.rmtree(old, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.replace(target, old)
    try:
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.replace(old, target)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def require_writable(folder: Path) -> None:
    """Check that a folder can be created or written to, before any work is done for it.

    Raises:
        UserError: a file or a link to nothing stands where a folder is needed, or permission is missing.
    """
    try:
        # A link to nothing exists as well: no folder can be created in its place.
        existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
        if existing.is_symlink() and not existing.exists():
            raise UserError(
                f"cannot write to {folder}: {existing} is a link to {os.readlink(existing)}, which does not exist: "
                "create that folder, or remove the link"
            )
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(existing))
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(existing))
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {disk_trouble(error) or error.strerror}") from error


# Error numbers and their explanations. HDF5 and safetensors raise their own exceptions, without a number: these are
# recognised by the system's error text in their message.
_DISK_TROUBLES = (
    ((errno.ENOSPC, errno.EDQUOT), "no space left on the disk; free some and run the same command again"),
    ((errno.EFBIG,), "the file is too large for this disk or for your limit (ulimit -f); raise it or use another disk"),
    ((errno.EACCES, errno.EPERM), "permission denied; choose another folder or fix its permissions"),
    ((errno.EROFS,), "the disk is read-only; choose another folder"),
    ((errno.ENOTDIR, errno.EEXIST), "a file stands where a folder is needed; remove it or choose another folder"),
    ((errno.ENAMETOOLONG,), "the name is too long; choose a shorter one"),
)


def disk_trouble(error: BaseException) -> str | None:
    """Explain a disk error and what to do about it; None if ``error`` is not a disk error."""
    if isinstance(error, UserError):
        return None
    number, text = getattr(error, "errno", None), str(error)
    for numbers, reason in _DISK_TROUBLES:
        if number in numbers or (number is None and any(os.strerror(known) in text for known in numbers)):
            return reason
    return None


def require_made(path: Path, command: str) -> None:
    """Raise `UserError`, which names ``command``, unless that command has written ``path``."""
    if not path.exists():
        raise UserError(f"{path} is missing: run `{command}` with this config first")
