"""Files by URL (``s3://``, ``gs://``, ``hf://``, ``https://``, ``memory://``, ...), through fsspec.

A file is read through a copy in a local cache: `local_copy` transfers it in blocks, goes on where a broken transfer
ended, and transfers it again only if it has changed. `upload_folder` transfers a folder file by file, and skips those
that an earlier try has transferred. Access is set up as each fsspec file system documents it: environment variables,
files such as ~/.aws/credentials, or ~/.config/fsspec/*.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import disk_trouble, sha256, sync, write_text
from shodh_moe.base.lock import making

BLOCK = 16 << 20  # bytes of one request
TRIES = 3
FIRST_PAUSE_S = 0.5  # doubled after every try
# What file systems tell about a file that differs after a change; each tells some of these.
VERSION = {
    *("ETag", "etag", "VersionId", "generation", "md5Hash", "Content-MD5", "Digest", "checksum", "blob_id", "sha"),
    *("mtime", "LastModified", "Last-Modified", "last_modified", "updated", "modificationTime", "created"),
}

_checked: set[tuple[int, str]] = set()  # process ids, and files whose version that process has compared


def is_url(path: str) -> bool:
    """Whether a path is the URL of a file system, such as ``s3://bucket/model``."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def cache_folder() -> Path:
    """Return the folder of downloaded files: ``SHODH_CACHE``, else ``shodh_moe`` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("SHODH_CACHE") or Path(home, "shodh_moe")).expanduser()


def list_folder(url: str) -> list[str] | None:
    """Return the sorted names of the files in a remote folder, without those in folders of it; None for a file.

    Raises:
        UserError: there is nothing at the URL, or it cannot be reached.
    """
    with _explained(url):
        fs, path = _open(url)
        if _tried(fs.isfile, path):
            return None
        return sorted(Path(one["name"]).name for one in _tried(fs.ls, path, detail=True) if one["type"] == "file")


def local_copy(url: str) -> Path:
    """Return a copy of a remote file in the cache, with the same name; do not change it.

    Files of one remote folder are in one local folder. Several processes may ask for one file at the same time. If the
    transfer breaks, the next call goes on where it ended, unless the remote file has changed.

    Raises:
        UserError: there is no file at the URL, it cannot be reached, the transfer broke, or the disk is full.
    """
    parent, _, name = url.rstrip("/").rpartition("/")
    target = cache_folder() / "files" / key_of(parent) / name
    with _explained(url):
        fs, path = _open(url)
        with making(target, "download", run=""):
            found = _tried(fs.info, path)
            if found["type"] != "file":
                raise UserError(f"{url} is not a file: name one in it")
            if found.get("size") is None:
                raise UserError(f"the server of {url} does not tell its size: download it yourself")
            version = _version(found)
            part, record = target.with_name(f".{name}.part"), target.with_name(f".{name}.json")
            if _read_record(record) != {"url": url, **version} or not tells_version(version):
                for old in (target, part):
                    old.unlink(missing_ok=True)
                write_text(record, json.dumps({"url": url, **version}))
            if not target.exists():
                _transfer(fs, path, part, found["size"], url)
                if _version(_tried(fs.info, path)) != version:
                    part.unlink()
                    raise UserError(f"{url} was changed while it was read: run the same command again")
                sync(part)
                os.replace(part, target)
    return target


def upload_folder(folder: Path, url: str, last: str) -> None:
    """Copy a folder to a remote one, the file ``last`` at the end, so that it marks the copy as complete.

    After a broken transfer, call it again with the same files: those that were transferred whole are skipped.

    Raises:
        UserError: the remote folder has other files or the file ``last``, it cannot be reached, or the transfer broke.
    """
    record = _upload_record(url)
    done: dict[str, Any] = _read_record(record)
    with _explained(url):
        fs, root = _open(url)
        root = root.rstrip("/")
        there = _remote_files(fs, root)
        _require_free(url, last, there)
        names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        if foreign := sorted(there.keys() - done.keys() - set(names)):
            raise UserError(f"{url} has other files, such as {foreign[0]}: choose a new folder")
        for name in sorted(names, key=lambda name: (name == last, name)):
            file, digest = folder / name, sha256(folder / name)
            if name in there and name in done and _same(done[name], {"sha256": digest, **there[name]}):
                print(f"[upload] {url}/{name} is there", flush=True)
                continue
            _tried(fs.put_file, str(file), f"{root}/{name}")
            fs.invalidate_cache()
            found = _version(_tried(fs.info, f"{root}/{name}"))
            if found["bytes"] != file.stat().st_size:
                raise UserError(
                    f"{url}/{name} has {found['bytes']} bytes after the transfer: run the same command again"
                )
            done[name] = {"sha256": digest, **found}
            write_text(record, json.dumps(done))
    record.unlink(missing_ok=True)


def require_free(url: str, last: str) -> None:
    """Check that no complete folder is at a URL. Raises: UserError: its file ``last`` exists, or it is unreachable."""
    with _explained(url):
        fs, root = _open(url)
        _require_free(url, last, _remote_files(fs, root.rstrip("/")))


def _require_free(url: str, last: str, there: dict[str, Any]) -> None:
    # After a broken transfer, `last` may be there although the server's answer was lost.
    if last in there and not _read_record(_upload_record(url)):
        raise UserError(f"{url} exists: choose a new folder, or remove it")


def _upload_record(url: str) -> Path:
    return cache_folder() / "uploads" / f"{key_of(url.rstrip('/'))}.json"


def list_versions(url: str) -> dict[str, dict[str, Any]]:
    """Return the size and version of every file in a remote folder and its folders, by its path in there.

    Raises:
        UserError: it cannot be reached.
    """
    with _explained(url):
        fs, root = _open(url)
        found = _remote_files(fs, root.rstrip("/"))
    return {name: found[name] for name in sorted(found) if name}


def read_range(found: dict[str, Any], start: int, end: int) -> bytes:
    """Read bytes ``start`` to ``end`` - 1 of a remote file.

    Args:
        found: its ``url``, and its version as in `list_versions`.

    Raises:
        UserError: it has changed, it cannot be reached, or the transfer broke.
    """
    url = found["url"]
    with _explained(url):
        fs, path = _open(url)
        if (os.getpid(), url) not in _checked:
            if not _same(_version(_tried(fs.info, path)), found):
                raise UserError(f"{url} has changed since its folder was listed: start the command again")
            _checked.add((os.getpid(), url))
        pieces = []
        while start < end:
            stop = min(start + BLOCK, end)
            data = _tried(fs.cat_file, path, start=start, end=stop)
            if len(data) != stop - start:
                raise UserError(f"the server of {url} sends {len(data)} bytes instead of {stop - start}: copy the file")
            pieces.append(data)
            start = stop
    return b"".join(pieces)


def _open(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs  # slow

    fs, path = url_to_fs(url)
    fs.invalidate_cache()  # file systems remember what folders hold
    return fs, path


def _remote_files(fs: Any, root: str) -> dict[str, dict[str, Any]]:
    """The version of every file in a remote folder, by its path in there; {} if there is no folder."""
    try:
        found = _tried(fs.find, root, detail=True)
    except FileNotFoundError:
        return {}
    return {name[len(root) + 1 :]: _version(info) for name, info in found.items()}


def tells_version(version: dict[str, Any]) -> bool:
    """Whether a change of the file would show; a server may tell nothing but the size."""
    return version.keys() != {"bytes"}


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two versions agree in all that both tell; the list of a folder may tell less than a file does."""
    return all(a[key] == b[key] for key in a.keys() & b.keys())


def _transfer(fs: Any, path: str, part: Path, size: int, url: str) -> None:
    with open(part, "ab") as out:
        done = out.tell()
        free = shutil.disk_usage(part.parent).free
        if free < size - done:
            raise UserError(
                f"{url} has {(size - done) / 1e9:.2f} GB to read, and {cache_folder()} has {free / 1e9:.2f} GB free: "
                "free some, or set SHODH_CACHE to a folder on another disk"
            )
        if done:
            print(f"[download] {url}: {done} of {size} bytes are there", flush=True)
        while done < size:
            end = min(done + BLOCK, size)
            data = _tried(fs.cat_file, path, start=done, end=end)
            if len(data) == size:  # a server that sends whole files only
                data = data[done:]
            if len(data) < end - done:
                raise UserError(f"{url} became shorter while it was read: run the same command again")
            out.write(data)
            out.flush()
            done += len(data)


def _tried(call: Callable[..., Any], *arguments: Any, **words: Any) -> Any:
    """Return the result of a call to a server, repeated after errors that may pass."""
    for attempt in range(TRIES):
        try:
            return call(*arguments, **words)
        except (FileNotFoundError, PermissionError, NotImplementedError, ImportError, IsADirectoryError):
            raise
        except Exception as error:  # each file system raises the errors of its own library
            if attempt == TRIES - 1 or disk_trouble(error):
                raise
            print(f"[transfer] {arguments[-1]}: {_reason(error)}; trying again", file=sys.stderr, flush=True)
            time.sleep(FIRST_PAUSE_S * 2**attempt)
    raise AssertionError("not reached")


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn the errors of a file system into one line."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{url} does not exist: check the address") from None
    except ImportError as error:  # fsspec names the package
        raise UserError(f"{url} needs another package: {_reason(error)}") from None
    except PermissionError as error:
        raise UserError(f"{url} may not be read or written ({_reason(error)}): check your credentials") from None
    except Exception as error:
        if reason := disk_trouble(error):
            raise UserError(f"cannot write to {cache_folder()}: {reason}") from error
        raise UserError(
            f"the transfer of {url} broke ({_reason(error)}): "
            "check the connection and your credentials, and run the same command again to go on"
        ) from error


def _reason(error: BaseException) -> str:
    return " ".join(f"{error or type(error).__name__}".split())[:150]


def _version(found: dict[str, Any]) -> dict[str, Any]:
    """What tells a version of a file from another: its size, and whatever else the file system knows."""
    return {"bytes": found["size"], **{key: str(found[key]) for key in sorted(VERSION) if found.get(key) is not None}}


def _read_record(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def key_of(text: str) -> str:
    """A name for files in the cache that depends on all of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
