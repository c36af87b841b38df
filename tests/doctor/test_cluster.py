"""The table's lines about the hosts of a hostfile."""

from __future__ import annotations

from typing import Any

import pytest

from shodh_moe.doctor.cluster import answer_lines, between_lines, fact_lines, size_line
from shodh_moe.doctor.table import Line
from shodh_moe.launching.hostfile import Host
from tests.doctor.found import facts

FOLDER = "/shared/runs"
FREE = 500 * 2**30


def hosts(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return three hosts, some with changes."""
    return {name: facts(**changes.get(name, {})) for name in ("n0", "n1", "n2")}


def checks(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    healthy: dict[str, Any] = {
        "folders": {FOLDER: {"error": "", "free": FREE}},
        "reached": {"10.0.0.1": ""},
        "listened": "",
    }
    return {name: healthy | changes.get(name, {}) for name in ("n0", "n1", "n2")}


def line_about(what: str, lines: list[Line]) -> Line:
    (one,) = (line for line in lines if line.what == what)
    assert bool(one.remedy) == (one.status != "ok")
    return one


def lines_of(found: dict[str, dict[str, Any]], slots: int = 2) -> list[Line]:
    return fact_lines([Host(name, slots) for name in found], found, facts())


def test_equal_hosts_are_all_ok() -> None:
    found = hosts()
    lines = [*answer_lines(found), *lines_of(found), *between_lines(found, checks(), [FOLDER])]
    assert {line.status for line in lines} == {"ok"}
    assert line_about("hosts", lines).value.startswith("3 of 3 answer")
    assert line_about("same packages", lines).value.startswith("torch 2.13.0, deepspeed 0.19.8")


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("root@n1: Permission denied (publickey,password).", "ssh-copy-id n1"),
        ("Host key verification failed.", "accept its key"),
        ("ssh: Could not resolve hostname n1: Name or service not known", "correct the name"),
        ("bash: line 1: /opt/venv/bin/python: No such file or directory", "same environment"),
        ("no answer within 8 s", "ssh n1 true"),
    ],
)
def test_a_silent_host_gives_one_error_with_a_remedy(error: str, remedy: str) -> None:
    lines = answer_lines({"n0": facts(), "n1": {"error": error}})
    assert [line.status for line in lines] == ["error", "ok"]
    assert line_about("host n1", lines).value == error
    assert remedy in line_about("host n1", lines).remedy
    assert line_about("hosts", lines).value.startswith("1 of 2")


def test_of_many_silent_hosts_the_first_of_each_kind_are_named() -> None:
    """Failures are alike if only names and numbers differ."""
    found: dict[str, dict[str, Any]] = {"n0": facts()}
    for number in range(1, 5000):
        found[f"a{number}"] = {"error": f"ssh: connect to host a{number} port 22: Connection refused"}
        found[f"b{number}"] = {"error": f"root@b{number}: Permission denied (publickey)."}
    found |= {f"c{number}": {"error": f"unexpected answer: '{'x' * number}'"} for number in range(1, 100)}
    lines = answer_lines(found)
    assert len(lines) < 20
    for name in ("a", "b"):
        assert [line.what for line in lines if line.what.startswith(f"host {name}")] == [
            f"host {name}{number}" for number in (1, 2, 3)
        ]
    values = [line.value for line in lines if line.what == "more hosts"]
    assert values[0] == "4996 more like host a3: a4, a5, a6, a7, a8 and 4991 more"
    assert values[-1].startswith("95 more with other errors: c5, ")
    assert "ssh-copy-id b1" in line_about("host b1", lines).remedy
    assert line_about("hosts", lines).value.startswith("1 of 10098 answer")


def test_remedies_name_the_ssh_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-p 2222")
    line = line_about("host bob@n1", answer_lines({"bob@n1": {"error": "no answer within 8 s"}}))
    assert "try: ssh -p 2222 -lbob n1 true" in line.remedy


def test_too_many_hosts_for_the_launcher_are_an_error() -> None:
    assert size_line([Host("n0", 8)]) is None
    line = size_line([Host(f"node-{number:04}", 8) for number in range(10_000)])
    assert line
    assert (line.status, "mpirun" in line.remedy) == ("error", True)


def test_a_slow_host_is_named() -> None:
    line = line_about("hosts", answer_lines(hosts(n2={"seconds": 6.0})))
    assert (line.status, "n2" in line.value) == ("warning", True)


@pytest.mark.parametrize(
    ("what", "changes", "status", "text"),
    [
        ("same python", {"n1": {"python": "3.11.2"}}, "error", "3.11.2 on n1; 3.12.3 on n0, n2, this host"),
        ("same code", {"n2": {"code": "ffff"}}, "error", "ffff on n2"),
        ("same torch", {"n2": {"versions": facts()["versions"] | {"torch": "2.9.0"}}}, "error", "2.9.0 on n2"),
        ("same triton", {"n2": {"versions": facts()["versions"] | {"triton": "none"}}}, "error", "none on n2"),
        ("slots", {"n1": {"gpus": 1}}, "error", "n1 has 1 GPUs for slots=2"),
        ("slots", {"n1": {"gpus": 8}}, "warning", "n1 has 8 GPUs for slots=2"),
        ("slots", {name: {"gpus": 0} for name in ("n0", "n1", "n2")}, "ok", "6 ranks"),
        ("slots", {name: {"gpus": 0, "cores": 1} for name in ("n0", "n1", "n2")}, "warning", "n0 has 1 cores"),
        ("compilers", {"n1": {"tools": {"c++": True, "ninja": False}}}, "warning", "no ninja on n1"),
        ("compilers", {"n1": {"tools": {"c++": True, "ninja": False}, "gpus": 0}}, "error", "no ninja on n1"),
        ("compilers", {"n1": {"tools": {"c++": False, "ninja": True}}}, "error", "no c++ on n1"),
        ("clocks", {"n1": {"clock": -3.4}}, "warning", "n1 is 3 s behind"),
        ("clocks", {"n1": {"clock": 1.9}}, "ok", "within 2 s"),
        ("clocks", {"n1": {"clock": 4000.0}, "n2": {"clock": 3.0}}, "error", "n1 is 4000 s ahead, n2 is 3 s ahead"),
        ("ssh keepalive", {"n1": {"keepalive": 0}}, "warning", "off for n1"),
        ("ssh keepalive", {"n1": {"keepalive": None}}, "ok", "unknown"),
    ],
)
def test_each_difference_between_hosts_is_reported(what: str, changes: dict[str, Any], status: str, text: str) -> None:
    line = line_about(what, lines_of(hosts(**changes)))
    assert line.status == status
    assert text in line.value


def test_many_differing_hosts_give_one_short_line() -> None:
    found = {f"node-{number}": facts(python="3.11.2") for number in range(100)}
    assert "node-4 and 95 more" in line_about("same python", lines_of(found)).value


@pytest.mark.parametrize(
    ("changes", "status", "text"),
    [
        (
            {"n2": {"reached": {"10.0.0.1": "timed out"}}},
            "error",
            "n2 cannot connect to n0 (10.0.0.1, port 40123): timed out",
        ),
        (
            {"n0": {"listened": "Address already in use"}},
            "warning",
            "n0 could not listen on port 40123: Address already",
        ),
        ({"n0": {"error": "no answer within 7 s"}}, "error", "too few hosts answer"),
    ],
)
def test_port_problems_are_reported(changes: dict[str, Any], status: str, text: str) -> None:
    line = line_about("ports", between_lines(hosts(), checks(**changes), [FOLDER]))
    assert line.status == status
    assert text in line.value


def test_an_address_that_others_cannot_reach_is_skipped() -> None:
    found = hosts(n0={"addresses": ["172.17.0.1", "10.0.0.1"]})
    reached = {"reached": {"172.17.0.1": "Connection refused", "10.0.0.1": ""}}
    line = line_about("ports", between_lines(found, checks(n1=reached, n2=reached), []))
    assert (line.status, line.remedy.split(";")[0]) == ("warning", "export MASTER_ADDR=10.0.0.1")


def test_one_host_needs_no_ports() -> None:
    lines = between_lines({"n0": facts()}, {"n0": checks()["n0"]}, [FOLDER])
    assert [line.what for line in lines] == [f"shared {FOLDER}"]


@pytest.mark.parametrize(
    ("result", "status", "text"),
    [
        ({"error": "does not exist"}, "error", "on n1 it does not exist"),
        ({"error": "", "free": 2 * 2**30}, "warning", "2 GiB free on n1"),
    ],
)
def test_problems_of_a_shared_folder_are_reported(result: dict[str, Any], status: str, text: str) -> None:
    line = line_about(f"shared {FOLDER}", between_lines(hosts(), checks(n1={"folders": {FOLDER: result}}), [FOLDER]))
    assert line.status == status
    assert text in line.value


def test_a_host_that_stops_answering_is_reported() -> None:
    lines = between_lines(hosts(), checks(n2={"error": "no answer within 7 s"}), [FOLDER])
    assert line_about("host n2", lines).status == "error"
    assert line_about("ports", lines).status == "ok"


def test_slots_are_compared_with_the_gpus_that_were_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def slots(**changes: Any) -> Line:
        lines = lines_of({"n0": facts(gpus=8), "n1": facts(gpus=8, **changes)})
        return next(line for line in lines if line.what == "slots")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert slots(visible="5").value == "n1 has 1 GPUs for slots=2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,2")
    assert slots(visible="5").status == "ok"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert slots().status == "error"
    assert "CUDA_VISIBLE_DEVICES=3 allows 1 GPU" in slots().value
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert slots().value == "4 ranks, with a core or more for each"
