"""Files and folders are complete or absent after any failure during writing."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import atomic_file, disk_trouble, require_writable, sha256, whole_folder, write_text

TROUBLES = [
    (OSError(errno.ENOSPC, "No space left on device"), "no space left on the disk"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left on the disk"),
    (OSError(errno.EFBIG, "File too large"), "ulimit -f"),
    (PermissionError(errno.EACCES, "Permission denied"), "permission denied; choose another folder"),
    (OSError(errno.EROFS, "Read-only file system"), "read-only; choose another folder"),
    (NotADirectoryError(errno.ENOTDIR, "Not a directory"), "a file stands where a folder is needed"),
    # Messages of HDF5 on closing a file and of safetensors.
    (RuntimeError("Can't decrement id ref count (errno = 28, error message = 'No space left on device')"), "no space"),
    (ValueError("Error while serializing: I/O error: No space left on device (os error 28)"), "no space"),
]


@pytest.mark.parametrize(("error", "reason"), TROUBLES)
def test_a_failed_write_keeps_the_old_content(tmp_path: Path, error: Exception, reason: str) -> None:
    assert reason in str(disk_trouble(error))
    file, folder = tmp_path / "a.txt", tmp_path / "b"
    write_text(file, "old")
    with whole_folder(folder) as temporary:
        (temporary / "x").write_text("old")

    def write_file() -> None:
        with atomic_file(file) as temporary:
            temporary.write_text("half")
            raise error

    def write_folder() -> None:
        with whole_folder(folder) as temporary:
            (temporary / "x").write_text("half")
            raise error

    with pytest.raises(UserError, match=f"cannot write {file}: .*{reason}"):
        write_file()
    with pytest.raises(UserError, match=f"cannot write {folder}: .*{reason}"):
        write_folder()
    assert file.read_text() == (folder / "x").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b"]
    assert os.listdir(folder) == ["x"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a fault of ours"), UserError("no permission")])
def test_other_exceptions_pass_through(tmp_path: Path, error: BaseException) -> None:
    assert disk_trouble(error) is None
    for writing in (atomic_file, whole_folder):
        with pytest.raises(type(error)) as raised, writing(tmp_path / "x"):
            raise error
        assert raised.value is error
    assert os.listdir(tmp_path) == []


def test_a_finished_write_replaces_the_old_content_completely(tmp_path: Path) -> None:
    for text in ("one", "two"):
        write_text(tmp_path / "deep" / "a.txt", text)
        with whole_folder(tmp_path / "deep" / "b") as temporary:
            (temporary / text).write_text(text)
            assert not (tmp_path / "deep" / "b" / text).exists()
    assert (tmp_path / "deep" / "a.txt").read_text() == "two"
    assert os.listdir(tmp_path / "deep" / "b") == ["two"]
    assert sorted(os.listdir(tmp_path / "deep")) == ["a.txt", "b"]


WRITER = """
import sys
from pathlib import Path
from shodh_moe.base.errors import UserError
from shodh_moe.base.files import whole_folder

try:
    with whole_folder(Path(sys.argv[1]), keep_first=sys.argv[2] == "first") as temporary:
        (temporary / sys.argv[3]).write_text("")
        print("writing", flush=True)
        sys.stdin.readline()
    print("done", flush=True)
except UserError as error:
    print(error, flush=True)
"""


@contextmanager
def writers(target: Path, *modes: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Start processes that write files 0, 1, ... to ``target`` at once; each finishes when it receives a line."""
    command = [sys.executable, "-c", WRITER, str(target)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, mode, str(number)], **pipes) for number, mode in enumerate(modes)]
    try:
        for process in processes:
            assert process.stdout.readline() == "writing\n"
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_the_first_of_several_processes_creates_the_folder(tmp_path: Path) -> None:
    target = tmp_path / "b"
    with writers(target, "first", "alone", "first") as processes:
        outputs = []
        for process in (processes[2], processes[0], processes[1]):
            outputs.append(process.communicate("\n", timeout=60)[0])
            assert os.listdir(target) == ["2"]
    assert outputs[:2] == ["done\n", "done\n"]
    assert f"{target} was written by another process meanwhile" in outputs[2]
    assert os.listdir(tmp_path) == ["b"]


def test_only_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    target = tmp_path / "b"
    with writers(target, "alone", "alone") as (killed, alive):
        killed.kill()
        killed.wait()
        assert len(os.listdir(tmp_path)) == 2
        with whole_folder(tmp_path / "b") as temporary:
            (temporary / "x").write_text("")
            assert len(os.listdir(tmp_path)) == 2, "its own one, and that of the process that goes on"
        assert os.listdir(target) == ["x"]
        assert "meanwhile" in alive.communicate("\n", timeout=60)[0]
    assert os.listdir(tmp_path) == ["b"]


REPLACER = """
import os, sys
from pathlib import Path
from shodh_moe.base import files

replace = os.replace
def replaced(source, target):
    replace(source, target)
    print(Path(source).name, flush=True)
    sys.stdin.readline()
os.replace = replaced
with files.whole_folder(Path(sys.argv[1])) as temporary:
    (temporary / "new").write_text("")
"""


@contextmanager
def replacer(target: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that replaces ``target`` and has just moved the old one away, but not put the new one there."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", REPLACER, str(target)], **pipes)
    try:
        assert process.stdout.readline() == f"{target.name}\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_two_processes_that_replace_a_folder_keep_out_of_each_others_way(tmp_path: Path) -> None:
    write_text(tmp_path / "b" / "original", "")
    with ExitStack() as stack:
        with whole_folder(tmp_path / "b") as temporary:
            (temporary / "mine").write_text("")
            process = stack.enter_context(replacer(tmp_path / "b"))
        assert os.listdir(tmp_path / "b") == ["mine"]
        assert list(tmp_path.rglob("original")), "it belongs to the other process until that has put the new one there"
        assert "was written by another process meanwhile" in process.communicate("\n\n", timeout=60)[1]
    assert os.listdir(tmp_path / "b") == ["mine"]
    assert os.listdir(tmp_path) == ["b"]


def test_a_folder_whose_replacement_was_killed_half_way_comes_back(tmp_path: Path) -> None:
    write_text(tmp_path / "b" / "original", "")
    with replacer(tmp_path / "b"):
        pass
    assert not (tmp_path / "b").exists()

    def fail() -> None:
        with whole_folder(tmp_path / "b"):
            assert os.listdir(tmp_path / "b") == ["original"]
            raise ValueError("no new content")

    with pytest.raises(ValueError, match="no new content"):
        fail()
    assert os.listdir(tmp_path / "b") == ["original"]
    assert os.listdir(tmp_path) == ["b"]


def test_messages_name_the_final_folder(tmp_path: Path) -> None:
    def write() -> None:
        with whole_folder(tmp_path / "b") as temporary, atomic_file(temporary / "x"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=f"cannot write {tmp_path}/b/x: no space"):
        write()


def test_require_writable_refuses_files_and_missing_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_writable(tmp_path / "not" / "there" / "yet")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        require_writable(tmp_path / "file" / "run")
    (tmp_path / "link").symlink_to("nowhere")
    for folder in (tmp_path / "link", tmp_path / "link" / "run"):
        with pytest.raises(UserError, match="link is a link to nowhere, which does not exist: create that folder"):
            require_writable(folder)
    (tmp_path / "nowhere").mkdir()
    require_writable(tmp_path / "link" / "run")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match="permission denied"):
        require_writable(tmp_path / "run")


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x").startswith("ba7816bf8f01cfea")


@pytest.fixture
def folder_sync_fails(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bool], list[int]]:
    """Let fsync of every folder, or of every file, fail with an error number; return the descriptors that failed."""

    def fail(number: int, of_folders: bool) -> list[int]:
        fsync, failed = os.fsync, []

        def one(descriptor: int) -> None:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode) == of_folders:
                failed.append(descriptor)
                raise OSError(number, os.strerror(number))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", one)
        return failed

    return fail


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_disk_that_cannot_flush_folders_is_used(
    tmp_path: Path, folder_sync_fails: Callable[[int, bool], list[int]], number: int
) -> None:
    failed = folder_sync_fails(number, True)
    for text in ("first", "second"):
        write_text(tmp_path / "a.txt", text)
        with whole_folder(tmp_path / "b") as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner/x").write_text(text)
        assert (tmp_path / "a.txt").read_text() == (tmp_path / "b/inner/x").read_text() == text
    assert failed


@pytest.mark.parametrize(("number", "of_folders"), [(errno.EIO, True), (errno.ENOSPC, True), (errno.EINVAL, False)])
def test_other_errors_of_flushing_are_not_ignored(
    tmp_path: Path, folder_sync_fails: Callable[[int, bool], list[int]], number: int, of_folders: bool
) -> None:
    folder_sync_fails(number, of_folders)
    with pytest.raises((OSError, UserError)):
        write_text(tmp_path / "a.txt", "x")
