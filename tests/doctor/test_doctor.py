"""The whole command, on this host and on several fake hosts that are this host under other names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import shodh_moe.kernels
from shodh_moe.base.errors import UserError
from shodh_moe.doctor import diagnose, doctor, gather_remote
from shodh_moe.doctor.gather_local import PACKAGE, run_part
from shodh_moe.launching import probe, ssh
from shodh_moe.launching.ssh import Answer
from tests.doctor import found

pytestmark = pytest.mark.distributed

Lines = dict[str, dict[str, str]]


def printed_lines(capsys: pytest.CaptureFixture[str]) -> Lines:
    return {line["what"]: line for line in json.loads(capsys.readouterr().out)["lines"]}


def test_the_doctor_on_the_real_host(tmp_path: Path) -> None:
    """As users run it: one line per check, a matching exit code, and no files left behind."""
    script = "import sys; from shodh_moe.doctor import doctor; sys.exit(doctor(json=True))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert done.stderr == ""
    lines = {line["what"]: line for line in json.loads(done.stdout)["lines"]}
    for what in ("shodh_moe", "python", "packages", "torch", "cuda", "deepspeed", "hdf5"):
        assert lines[what]["status"] == "ok", lines[what]
    assert lines[f"folder {tmp_path}"]["value"].endswith("free") or lines[f"folder {tmp_path}"]["remedy"]
    assert done.returncode == (2 if any(line["status"] == "error" for line in lines.values()) else 0)
    assert not list(tmp_path.iterdir())


def test_facts_are_the_same_in_this_process_and_in_a_script() -> None:
    own, sent = probe.facts(), run_part(Path(probe.__file__))
    for key in ("python", "executable", "versions", "code", "addresses", "cores", "gpus"):
        assert own[key] == sent[key]
    assert own["code"] != "none"
    assert abs(own["time"] - sent["time"]) < 10


def test_the_code_of_a_changed_copy_differs(tmp_path: Path) -> None:
    """A copy elsewhere has the same hash until one of its files changes."""
    copy = tmp_path / "shodh_moe"
    excluded = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(Path(shodh_moe.__file__).parent, copy, ignore=excluded)
    shutil.copytree(Path(shodh_moe.kernels.__file__).parent, copy / "kernels", ignore=excluded)

    def code() -> str:
        first = "from __future__ import annotations\n"
        script = Path(probe.__file__).read_text()
        script = script.replace(first, f"{first}import sys; sys.path.insert(0, {str(tmp_path)!r})\n")
        done = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, check=True)
        return str(json.loads(done.stdout)["code"])

    assert code() == probe.facts()["code"]
    with open(copy / "kernels" / "gating.py", "a") as file:
        file.write("# changed\n")
    assert code() != probe.facts()["code"]


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("import os; os.abort()", "ended by signal 6"),
        ("import time; time.sleep(60)", "no answer within 1 s"),
        ("raise SystemExit(3)", "exit code 3"),
        ("print('no JSON')", "exit code 0"),
    ],
)
def test_a_failing_part_gives_one_line(tmp_path: Path, script: str, error: str) -> None:
    path = tmp_path / "part.py"
    path.write_text(script)
    assert run_part(path, seconds=1 if "sleep" in script else 30) == {"error": error}


def test_the_reason_why_a_folder_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run_part(PACKAGE / "doctor" / "local_script.py", "folder", str(tmp_path / "file" / "runs"))
    assert result["refused"] == "Not a directory"
    result = run_part(PACKAGE / "doctor" / "local_script.py", "folder", str(tmp_path / "runs" / "later"))
    assert result["exists"] is False
    assert result["free"] > 0
    assert "refused" not in result
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_broken_torch_gives_a_line_and_the_doctor_continues(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    (tmp_path / "hostfile").write_text("a slots=1\n")
    script = "import sys; from shodh_moe.doctor import doctor; sys.exit(doctor('hostfile', json=True))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=100, env=environment
    )
    assert done.returncode == 2, done.stderr
    lines = {line["what"]: line for line in json.loads(done.stdout)["lines"]}
    for what in ("torch", "deepspeed"):
        assert lines[what]["status"] == "error"
        assert "libcudart" in lines[what]["value"]
    assert lines["python"]["status"] == "ok"


# Tests with a hostfile, in which local processes replace ssh.


class Cluster:
    """Fake hosts by name, with errors, changed orders and changed answers."""

    def __init__(self) -> None:
        self.silent: dict[str, str] = {}
        self.orders: dict[str, dict[str, Any]] = {}
        self.answers: dict[str, dict[str, Any]] = {}

    def run(
        self, names: list[str], script: Path, arguments: list[list[str]] | None = None, seconds: float = 10.0
    ) -> list[Answer]:
        with ThreadPoolExecutor(len(names)) as pool:
            return list(
                pool.map(self._answer, names, [script.read_text()] * len(names), arguments or [[]] * len(names))
            )

    def _answer(self, name: str, source: str, arguments: list[str]) -> Answer:
        if name in self.silent:
            return Answer(name, "", self.silent[name])
        if arguments:
            arguments = [json.dumps(json.loads(arguments[0]) | self.orders.get(name, {}))]
        sent = time.time()
        done = subprocess.run(
            [sys.executable, "-", *arguments], input=source, capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout.splitlines()[-1])
        if not arguments:
            answer |= {"addresses": ["127.0.0.1"]} | self.answers.get(name, {})
        return Answer(name, json.dumps(answer) + "\n", "", sent, time.time())


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    monkeypatch.setattr(ssh, "run_on_hosts", cluster.run)
    monkeypatch.setattr(gather_remote, "run_on_hosts", cluster.run)
    monkeypatch.setattr(gather_remote, "_keepalive", lambda names, seconds: dict.fromkeys(names, 15))
    monkeypatch.setattr(diagnose, "gather", lambda folders: found.here(facts=probe.facts()))
    return cluster


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hostfile"
    path.write_text("a slots=1\nb slots=1\nc slots=1\n")
    return path


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir()
    return folder


def test_healthy_hosts_are_all_ok(
    cluster: Cluster, hostfile: Path, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor(hostfile, [str(shared)], json=True)
    lines = printed_lines(capsys)
    for what in ("hosts", "same python", "same packages", "same code", "clocks", "ports"):
        assert lines[what]["status"] == "ok", lines[what]
    assert lines["ports"]["value"].startswith("every other host connects to a at 127.0.0.1")
    assert lines[f"shared {shared}"]["value"].startswith("visible and writable on every host")
    assert not list(shared.iterdir())


def test_the_problem_of_each_host_is_reported(
    cluster: Cluster,
    hostfile: Path,
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One host is silent. Another has different code, a wrong clock, another folder, and cannot reach the port."""
    monkeypatch.setattr(gather_remote, "PORT_SECONDS", 1.0)
    cluster.silent["b"] = "no answer within 8 s"
    cluster.answers["c"] = {"code": "ffff", "time": time.time() + 100}
    with probe.socket.socket() as closed:  # bound, but not listening
        closed.bind(("127.0.0.1", 0))
        cluster.orders["c"] = {"port": closed.getsockname()[1], "folders": [[str(shared), ".not-the-one"]]}
        assert doctor(hostfile, [str(shared)], json=True) == 2
    lines = printed_lines(capsys)
    assert lines["host b"]["value"] == "no answer within 8 s"
    assert lines["hosts"]["value"].startswith("2 of 3")
    assert "ffff on c" in lines["same code"]["value"]
    assert "ahead" in lines["clocks"]["value"]
    assert "c cannot connect to a" in lines["ports"]["value"]
    assert "Connection refused" in lines["ports"]["value"]
    assert "on c it is another folder of the same name" in lines[f"shared {shared}"]["value"]
    assert lines[f"shared {shared}"]["status"] == "error"
    assert not list(shared.iterdir())


def test_a_folder_whose_files_other_hosts_do_not_see_is_reported(
    cluster: Cluster, shared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather_remote, "PORT_SECONDS", 1.0)
    cluster.orders["b"] = {"number": 7}  # it writes under an unexpected name
    facts = {name: probe.facts() | {"addresses": ["127.0.0.1"]} for name in ("a", "b")}
    checks = gather_remote.check_between(facts, [str(shared)])
    assert checks["a"]["folders"][str(shared)]["error"] == ""
    assert checks["b"]["folders"][str(shared)]["error"] == "accepts files that this host does not see"


def test_a_host_that_was_not_asked_in_time_is_not_blamed_for_its_port(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first host stops listening at the end of the round."""
    monkeypatch.setattr(gather_remote, "PORT_SECONDS", 0.5)

    def run(names: list[str], *more: Any) -> list[Answer]:
        first, second = cluster.run(names, *more)
        return [first, replace(second, sent=first.received + 1)]

    monkeypatch.setattr(gather_remote, "run_on_hosts", run)
    cluster.orders["b"] = {"port": 1}  # nobody listens
    facts = {name: probe.facts() | {"addresses": ["127.0.0.1"]} for name in ("a", "b")}
    assert gather_remote.check_between(facts, [])["b"]["error"].startswith("not asked")


def test_ten_thousand_silent_hosts_give_a_short_table_within_the_time_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ssh").write_text("#!/bin/bash\nsleep 60\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SHODH_HOST_SECONDS", "4")  # long enough to start 32 processes on a busy machine
    monkeypatch.setattr(diagnose, "gather", lambda folders: found.here(facts=probe.facts()))
    hostfile = tmp_path / "hosts"
    hostfile.write_text("".join(f"n{number} slots=1\n" for number in range(10_000)))
    began = time.monotonic()
    assert doctor(hostfile, json=True) == 2
    assert time.monotonic() - began < 8
    printed = capsys.readouterr()
    lines = [line for line in json.loads(printed.out)["lines"] if "host" in line["what"]]
    assert [line["what"] for line in lines] == [
        *("host n0", "host n1", "host n2", "more hosts"),
        *("host n32", "host n33", "host n34", "more hosts", "hostfile"),
    ]
    assert lines[3]["value"] == "29 more like host n2: n3, n4, n5, n6, n7 and 24 more"
    assert "SHODH_HOST_SECONDS=60" in lines[4]["remedy"]
    assert "asking hosts: 10000/10000" in printed.err


def test_no_answer_from_any_host(cluster: Cluster, hostfile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.silent = dict.fromkeys("abc", "ssh: connect to host port 22: No route to host")
    assert doctor(hostfile, json=True) == 2
    lines = printed_lines(capsys)
    assert [what for what in lines if what.startswith("host")] == ["host a", "host b", "host c"]


def test_an_answer_that_is_not_json_is_an_error(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A login script that writes to the terminal can cause this."""
    monkeypatch.setattr(ssh, "run_on_hosts", lambda names, *more: [Answer(names[0], "welcome\n", "")])
    assert "welcome" in probe.probe_hosts(["a"])["a"]["error"]


def test_a_missing_hostfile_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no-such-hostfile"):
        doctor(tmp_path / "no-such-hostfile")


def test_without_ssh_the_other_checks_are_still_reported(
    hostfile: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ssh.shutil, "which", lambda name: None)
    monkeypatch.setattr(diagnose, "gather", lambda folders: found.here())
    assert doctor(hostfile, json=True) == 2
    lines = printed_lines(capsys)
    assert lines["hosts"]["value"].startswith("not asked: no ssh")
    assert lines["torch"]["status"] == "ok"
