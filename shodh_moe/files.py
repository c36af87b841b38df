"""Files that are either whole or absent, and hashes that tell whether they still are."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shodh_moe.errors import UserError


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a small text file in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    sync(temporary)
    os.replace(temporary, path)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``target`` when the block ends well, and vanishes otherwise.

    Raises:
        UserError: the disk is full, or writing is not permitted.
    """
    temporary = target.with_name(f".writing-{target.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        sync(target.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if reason := disk_trouble(error):
            raise UserError(f"cannot write {target}: {reason}") from None
        raise


def disk_trouble(error: BaseException) -> str | None:
    """What the user can do about an error of writing, or None if it is no such error."""
    text = str(error)
    # HDF5 and safetensors report a full disk as exceptions of their own that only the text tells apart.
    if getattr(error, "errno", None) in (28, 122) or "No space left" in text or "quota exceeded" in text:
        return "no space left on the disk; free some and run the same command again"
    if isinstance(error, PermissionError) or "Permission denied" in text or "Read-only file system" in text:
        return "no permission to write there; choose another folder or fix its permissions"
    return None
