"""Files by URL: transfers from and to a real object server that go on where they broke, and the local cache."""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest

from shodh_moe.base import remote
from shodh_moe.base.errors import UserError
from shodh_moe.base.remote import is_url, list_folder, local_copy, upload_folder
from shodh_moe.base.remote_file import mirror
from tests.object_server import ObjectServer, fresh_bucket

BLOCK = 1 << 16
SIZE = 10 * BLOCK + 123
DATA = np.random.default_rng(1).bytes(SIZE)


@pytest.fixture
def server(store: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectServer:
    """The server with an empty bucket of this test, ``s3://bucket``, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    fresh_bucket(store, tmp_path, monkeypatch)
    monkeypatch.setattr(remote, "BLOCK", BLOCK)
    store.reset()
    return store


def put(data: bytes, path: str) -> str:
    fsspec.filesystem("s3", skip_instance_cache=True).pipe(path, data)
    return f"s3://{path}"


def test_what_a_url_is() -> None:
    for text in ("s3://a/b", "hf://datasets/x", "memory://a", "gs://x", "https://x/y", "S3://a"):
        assert is_url(text)
    for text in ("a/b", "/a", "s3:/a", "a b://c", "://", "1x", ""):
        assert not is_url(text)


def test_a_file_is_transferred_once_until_it_changes(server: ObjectServer) -> None:
    url = put(DATA, "bucket/a/x.bin")
    server.reset()
    copy = local_copy(url)
    assert copy.read_bytes() == DATA
    assert copy.name == "x.bin"
    assert server.sent["/bucket/a/x.bin"] == SIZE
    assert local_copy(url) == copy
    assert server.sent["/bucket/a/x.bin"] == SIZE
    put(DATA[::-1], "bucket/a/x.bin")
    assert local_copy(url).read_bytes() == DATA[::-1]
    beside = local_copy(put(b"", "bucket/a/empty"))
    assert beside.parent == copy.parent
    assert beside.read_bytes() == b""
    assert local_copy(put(b"1", "bucket/b/x.bin")).parent != copy.parent
    assert list_folder("s3://bucket/a") == ["empty", "x.bin"]
    assert list_folder("s3://bucket/a/x.bin") is None


def test_a_broken_transfer_goes_on_where_it_ended(server: ObjectServer, capsys: pytest.CaptureFixture[str]) -> None:
    url = put(DATA, "bucket/x.bin")
    server.reset()
    server.fail_after = 4
    with pytest.raises(UserError, match=r"the transfer of s3://bucket/x.bin broke .*same command again") as caught:
        local_copy(url)
    assert "\n" not in str(caught.value)
    assert server.sent["/bucket/x.bin"] == 4 * BLOCK
    server.fail_after = None
    assert local_copy(url).read_bytes() == DATA
    assert server.sent["/bucket/x.bin"] == SIZE
    assert f"{4 * BLOCK} of {SIZE} bytes are there" in capsys.readouterr().out


def test_a_part_of_an_older_version_is_not_used(server: ObjectServer) -> None:
    url = put(DATA, "bucket/x.bin")
    server.reset()
    server.fail_after = 4
    with pytest.raises(UserError):
        local_copy(url)
    server.reset()
    put(DATA[::-1], "bucket/x.bin")
    assert local_copy(url).read_bytes() == DATA[::-1]


def test_a_file_that_changes_meanwhile_is_refused(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    url = put(DATA, "bucket/x.bin")
    real = remote._transfer

    def changed(*arguments: object) -> None:
        real(*arguments)  # type: ignore[arg-type]
        put(DATA[::-1], "bucket/x.bin")

    with monkeypatch.context() as patch:
        patch.setattr(remote, "_transfer", changed)
        with pytest.raises(UserError, match="was changed while it was read"):
            local_copy(url)
    assert local_copy(url).read_bytes() == DATA[::-1]


def test_a_killed_process_leaves_a_transfer_that_goes_on(server: ObjectServer) -> None:
    url = put(DATA, "bucket/x.bin")
    server.reset()
    server.hold_after = 5
    code = f"from shodh_moe.base import remote; remote.BLOCK = {BLOCK}; remote.local_copy({url!r})"
    child = subprocess.Popen([sys.executable, "-c", code])
    assert server.held.wait(60)
    child.send_signal(signal.SIGKILL)
    child.wait()
    server.hold_after = None
    before = dict(server.sent)
    assert local_copy(url).read_bytes() == DATA
    server.released.set()
    assert before["/bucket/x.bin"] == 5 * BLOCK
    assert server.sent["/bucket/x.bin"] <= SIZE + BLOCK  # the answer that was held may have been counted meanwhile


def test_several_readers_transfer_a_file_once(server: ObjectServer) -> None:
    url = put(DATA, "bucket/x.bin")
    server.reset()
    code = f"from shodh_moe.base.remote import local_copy; print(len(local_copy({url!r}).read_bytes()))"
    children = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(lambda child: child.communicate()[0], children))
    assert all(text.splitlines()[-1] == str(SIZE) for text in texts)
    assert server.sent["/bucket/x.bin"] == SIZE


def test_a_disk_that_is_too_small(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    url = put(DATA, "bucket/x.bin")
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="free some, or set SHODH_CACHE"):
        local_copy(url)


def test_addresses_that_lead_nowhere(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in (local_copy, list_folder):
        with pytest.raises(UserError, match=r"s3://bucket/absent does not exist"):
            call("s3://bucket/absent")
    with pytest.raises(UserError, match=r"s3://absent/x does not exist"):
        local_copy("s3://absent/x")
    put(b"1", "bucket/a/x")
    with pytest.raises(UserError, match="is not a file"):
        local_copy("s3://bucket/a")
    with pytest.raises(UserError, match=r"nosuch://x/y.*nosuch"):
        local_copy("nosuch://x/y")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"gs://bucket/x needs another package: .*gcsfs"):
        local_copy("gs://bucket/x")


def test_an_upload_goes_on_with_the_files_that_are_missing(server: ObjectServer) -> None:
    folder = Path("model")
    (folder / "part").mkdir(parents=True)
    files = {"a.bin": DATA, "b.bin": DATA[:100], "part/c.bin": DATA[100:], "last.json": b"{}"}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    server.reset()
    server.fail_after = 2
    with pytest.raises(UserError, match=r"the transfer of s3://bucket/m broke .*same command again"):
        upload_folder(folder, "s3://bucket/m", "last.json")
    puts = [line for line in server.requests if line.startswith("PUT")]
    assert puts[:2] == ["PUT /bucket/m/a.bin", "PUT /bucket/m/b.bin"]
    server.reset()
    upload_folder(folder, "s3://bucket/m", "last.json")
    assert [one for one in server.requests if one.startswith("PUT")] == [
        "PUT /bucket/m/part/c.bin",
        "PUT /bucket/m/last.json",
    ]
    for name, data in files.items():
        assert local_copy(f"s3://bucket/m/{name}").read_bytes() == data
    with pytest.raises(UserError, match=r"s3://bucket/m exists"):
        upload_folder(folder, "s3://bucket/m", "last.json")


def test_an_upload_never_mixes_with_other_files(server: ObjectServer) -> None:
    Path("model").mkdir()
    Path("model/last.json").write_text("{}")
    put(b"1", "bucket/m/theirs")
    with pytest.raises(UserError, match="has other files, such as theirs"):
        upload_folder(Path("model"), "s3://bucket/m", "last.json")
    # A file that was changed at either end after a broken upload is transferred again.
    Path("model/a").write_text("1")
    server.reset()
    server.fail_after = 1
    with pytest.raises(UserError):
        upload_folder(Path("model"), "s3://bucket/n", "last.json")
    server.reset()
    put(b"2", "bucket/n/a")
    upload_folder(Path("model"), "s3://bucket/n", "last.json")
    assert local_copy("s3://bucket/n/a").read_bytes() == b"1"


def test_other_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHODH_CACHE", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    fs.pipe("/remote/a/x", b"1")
    assert list_folder("memory://remote/a") == ["x"]
    assert local_copy("memory://remote/a/x").read_bytes() == b"1"
    fs.pipe("/remote/a/x", b"2")
    assert local_copy("memory://remote/a/x").read_bytes() == b"2"
    (tmp_path / "here").write_bytes(b"3")
    assert local_copy(f"file://{tmp_path}/here").read_bytes() == b"3"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/x").write_bytes(b"4")
    upload_folder(tmp_path / "folder", "memory://remote/b", "x")
    assert fs.cat("/remote/b/x") == b"4"


def test_a_server_that_tells_no_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the cache may be out of date, so it is not used."""
    monkeypatch.setenv("SHODH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "VERSION", set())
    fs = fsspec.filesystem("memory")
    for data in (b"1", b"2"):
        fs.pipe("/silent/x.h5", data)
        assert local_copy("memory://silent/x.h5").read_bytes() == data
    with pytest.raises(UserError, match="tells no versions"):
        mirror("memory://silent")
