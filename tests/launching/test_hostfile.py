"""Hostfiles: parsing, and every kind of error."""

from __future__ import annotations

from pathlib import Path

import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.config import Config
from shodh_moe.launching.hostfile import Host, count_ranks, read_hostfile


def _read(folder: Path, text: str) -> list[Host]:
    (folder / "hosts").write_text(text)
    return read_hostfile(folder / "hosts")


def test_hosts_keep_their_order(tmp_path: Path) -> None:
    text = "# training\nworker-1 slots=8\n\n  user@worker-0.cluster   slots=4  # the old one\n10.0.0.3 slots=1\n"
    assert _read(tmp_path, text) == [Host("worker-1", 8), Host("user@worker-0.cluster", 4), Host("10.0.0.3", 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("# nobody\n\n", "names no host"),
        ("worker-0\n", "line 1: 'worker-0' is not of the form"),
        ("worker-0 slots=two\n", "is not of the form"),
        ("worker-0 slots=-1\n", "is not of the form"),
        ("worker-0 slots=8 max\n", "is not of the form"),
        ("a slots=1\nworker-0 slots=0\n", "line 2: worker-0 has slots=0"),
        ("a slots=1\nb slots=1\na slots=2\n", "line 3: a occurs a second time"),
        ("$(touch x) slots=1\n", "is not of the form"),
        ("$(touch${IFS}x) slots=1\n", "is not a valid host name"),
        ("a;reboot slots=1\n", "is not a valid host name"),
        ("`id` slots=1\n", "is not a valid host name"),
        ("a|b slots=1\n", "is not a valid host name"),
        ("a&b slots=1\n", "is not a valid host name"),
        ("a,b slots=1\n", "is not a valid host name"),  # pdsh would take it for two
        ("a[1-3] slots=1\n", "is not a valid host name"),
        ("%h slots=1\n", "is not a valid host name"),
        ("-oProxyCommand=id slots=1\n", "is not a valid host name"),  # ssh would take it for an option
        ("größe slots=1\n", "is not a valid host name"),
        ("worker-0 slots=٣\n", "is not of the form"),
    ],
)
def test_an_invalid_hostfile_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        _read(tmp_path, text)
    assert message in str(refusal.value)
    assert str(tmp_path / "hosts") in str(refusal.value)


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist: check --hostfile"):
        read_hostfile(tmp_path / "nowhere")
    with pytest.raises(UserError, match="Is a directory"):
        read_hostfile(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe slots=1")
    with pytest.raises(UserError, match="not a text file"):
        read_hostfile(tmp_path / "binary")


def test_the_hostfile_determines_the_number_of_ranks(tmp_path: Path) -> None:
    _read(tmp_path, "a slots=2\nb slots=3\n")
    parallel = {"hostfile": str(tmp_path / "hosts")}
    assert count_ranks(Config.model_validate({"parallel": parallel})) == 5
    with pytest.raises(UserError, match=r"parallel\.processes applies to this host only"):
        count_ranks(Config.model_validate({"parallel": {**parallel, "processes": 2}}))
