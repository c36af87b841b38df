"""Hostfiles: parsing, and every kind of error."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.config import Config
from shodh_moe.launching.hostfile import Host, count_ranks, read_hostfile, require_startable


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
        ("a slots=1\nb slots=1\na slots=2\n", "line 3: a occurs a second time, after line 1"),
        ("A.x slots=1\na.x slots=1\n", "line 2: a.x occurs a second time"),
        ("a.x slots=1\na.X. slots=1\n", "line 2: a.X. occurs a second time"),
        ("a slots=1\nroot@A slots=1\n", "line 2: root@A occurs a second time"),
        (f"a slots={'9' * 5000}\n", "line 1: a has slots=99999999999999999999: give it"),
        (f"a slots={'0' * 5000}\n", "line 1: a has slots=0"),
        ("a slots=5000\n", "line 1: a has slots=5000: give it"),
        (f"{'n' * 100_000} slots=1\n", f"'{'n' * 80}' is not a valid host name"),
        (f"{'u' * 100_000}@a slots=1\n", "is not a valid host name"),
        (f"a slots={'x' * 100_000}\n", "is not of the form"),
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
    assert len(str(refusal.value)) < 500
    assert str(tmp_path / "hosts") in str(refusal.value)


def test_names_with_underscores_and_leading_zeros_of_slots_are_read(tmp_path: Path) -> None:
    text = f"job_node_1 slots=08\n_x slots={'0' * 5000}2\na_b@c_d slots=1\n"
    assert _read(tmp_path, text) == [Host("job_node_1", 8), Host("_x", 2), Host("a_b@c_d", 1)]


def test_a_byte_order_mark_is_not_part_of_the_first_name(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"\xef\xbb\xbfworker-0 slots=8\r\nworker-1 slots=8\r\n")
    assert read_hostfile(tmp_path / "hosts") == [Host("worker-0", 8), Host("worker-1", 8)]


def test_a_long_hostfile_is_read_fast(tmp_path: Path) -> None:
    """Comparing every name with every other one would take minutes."""
    began = time.process_time()
    assert len(_read(tmp_path, "".join(f"node-{number} slots=8\n" for number in range(50_000)))) == 50_000
    assert time.process_time() - began < 5


def test_more_hosts_than_a_command_line_holds_are_refused() -> None:
    require_startable([Host(f"node-{number:04}", 8) for number in range(1000)])
    with pytest.raises(UserError, match=r"10000 hosts are too many for DeepSpeed's launcher.*mpirun or SLURM"):
        require_startable([Host(f"node-{number:04}", 8) for number in range(10_000)])


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
