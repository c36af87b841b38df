"""The table's lines about the machine and its folders."""

from __future__ import annotations

from typing import Any

import pytest

from shodh_moe.doctor.machine import machine_lines
from tests.doctor.found import here

GIB = 2**30
PORT = here()["port"]


def line(what: str, found: dict[str, Any], with_hostfile: bool) -> tuple[str, str]:
    (one,) = (one for one in machine_lines(found, with_hostfile) if one.what.startswith(what))
    assert bool(one.remedy) == (one.status != "ok")
    return one.status, one.value


@pytest.mark.parametrize("with_hostfile", [False, True])
def test_a_healthy_host_is_all_ok(with_hostfile: bool) -> None:
    assert {one.status for one in machine_lines(here(), with_hostfile)} == {"ok"}


def folder(**changes: Any) -> dict[str, Any]:
    return {"folders": {"/shared/runs": {"exists": True, "type": "ext4", "free": 500 * GIB} | changes}}


@pytest.mark.parametrize(
    ("what", "changes", "with_hostfile", "status", "text"),
    [
        ("ssh", {"ssh": None}, False, "ok", "needed with a hostfile"),
        ("ssh", {"ssh": None}, True, "error", "not on the PATH"),
        ("pdsh", {"pdsh": None}, False, "ok", "needed with a hostfile"),
        ("pdsh", {"pdsh": None}, True, "error", "not on the PATH"),
        ("pdsh", {"pdsh": "pdsh-2.33\nrcmd modules: rsh,exec (default: rsh)"}, True, "error", "built without ssh"),
        ("pdsh", {"pdsh": "pdsh-2.33\nrcmd modules: rsh,exec (default: rsh)"}, False, "warning", "built without ssh"),
        ("slurm", {"slurm": None}, False, "ok", "no client"),
        ("slurm", {"slurm": "Slurmctld(primary) at head is DOWN"}, False, "warning", "is DOWN"),
        ("slurm", {"slurm": ""}, False, "warning", "no answer"),
        ("memory", {"available": 2 * GIB}, False, "warning", "2.0 of it free"),
        ("memory", {"available": GIB // 2}, False, "error", "0.5 of it free"),
        ("memory", {"memory": 2 * GIB}, False, "warning", "2.0 GiB, 2.0 of it free"),  # a container's limit
        ("memory", {"available": None}, False, "ok", "512.0 GiB, 64 cores"),
        ("/dev/shm", {"shm": 64 * 2**20}, False, "warning", "0.1 GiB"),
        ("/dev/shm", {"shm": None}, False, "warning", "does not exist"),
        ("open files", {"open_files": 256}, False, "warning", "256"),
        ("open files", {"open_files": 64}, False, "error", "64"),
        ("open files", {"open_files": -1}, False, "ok", "no limit"),
        ("clock", {"clock": "no"}, False, "ok", "not synchronised"),
        ("clock", {"clock": "no"}, True, "warning", "not synchronised"),
        ("clock", {"clock": None}, True, "ok", "2023-11-14 22:13:20 UTC"),
        (
            "port",
            {"port": PORT | {"free": False, "holder": "python, process 7"}},
            False,
            "warning",
            "python, process 7",
        ),
        ("port", {"port": PORT | {"free": False, "chosen": True}}, False, "error", "MASTER_PORT 29500, is held"),
        (
            "port",
            {"port": PORT | {"number": "x", "error": "is not a port number"}},
            False,
            "error",
            "'x' is not a port number",
        ),
        ("folder", folder(), False, "ok", "ext4, 500 GiB free"),
        ("folder", folder(type="lustre"), False, "ok", "a network file system"),
        ("folder", folder(exists=False), False, "ok", "will be created"),
        ("folder", folder(type="tmpfs"), False, "warning", "lost with a restart"),
        ("folder", folder(type="overlay"), False, "warning", "lost with the container"),
        ("folder", folder(free=3 * GIB), False, "warning", "3.0 GiB free"),
        ("folder", folder(free=GIB // 8), False, "error", "0.1 GiB free"),
        ("folder", folder(refused="Read-only file system"), False, "error", "Read-only file system"),
        ("folder", folder(error="no answer within 5 s"), False, "error", "no answer"),
    ],
)
def test_each_problem_of_the_machine_is_reported(
    what: str, changes: dict[str, Any], with_hostfile: bool, status: str, text: str
) -> None:
    result = line(what, here(**changes), with_hostfile)
    assert result[0] == status
    assert text in result[1]
