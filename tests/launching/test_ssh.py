"""Asking many hosts over ssh, with executables that stand in for ssh."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.launching.probe import probe_hosts
from shodh_moe.launching.ssh import (
    AT_ONCE,
    group_failures,
    launcher_ssh_arguments,
    run_on_hosts,
    ssh_command,
    time_limit,
)

# Each call leaves a line with its arguments, and a file as long as it runs.
RECORD = 'line=$(printf "%s\\t" "$@"); echo "$line" >>"{folder}/calls"\n'
COUNT = 'touch "{folder}/running/$$"; ls "{folder}/running" | wc -l >>"{folder}/counts"\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "running").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "script.py").write_text("import sys; print('hello', *sys.argv[1:])\n")
    return tmp_path


def _install(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    path = folder / "bin" / "ssh"
    path.write_text("#!/bin/bash\n" + text.replace("{folder}", str(folder)))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


def _names(count: int) -> list[str]:
    return [f"n{number}" for number in range(count)]


def _running(text: str) -> list[str]:
    return subprocess.run(["pgrep", "-f", text], capture_output=True, text=True).stdout.split()


def test_many_hosts_are_asked_a_few_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(folder, monkeypatch, COUNT + 'sleep 0.3; rm "{folder}/running/$$"; echo hello\n')
    answers = run_on_hosts(_names(100), folder / "script.py", seconds=100)
    assert [answer.host for answer in answers] == _names(100)
    assert {answer.error for answer in answers} == {""}
    most = max(map(int, (folder / "counts").read_text().split()))
    assert AT_ONCE // 2 < most <= AT_ONCE == 32


@pytest.mark.parametrize(
    "behaviour", ["sleep 61.7", "sleep 61.7 & wait", "(trap '' TERM HUP; sleep 61.7) & sleep 61.7"]
)
def test_ten_thousand_silent_hosts_take_no_longer_than_the_limit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str
) -> None:
    """Also if ssh has children, such as a ProxyCommand, that keep its output open."""
    _install(folder, monkeypatch, COUNT + behaviour + "\n")
    began = time.monotonic()
    seconds = 4.0  # long enough to start AT_ONCE processes on a busy machine
    answers = run_on_hosts(_names(10_000), folder / "script.py", seconds=seconds)
    assert time.monotonic() - began < seconds + 3.5
    errors = [answer.error for answer in answers]
    assert errors.count("not asked: the 4 s for all hosts were over") == 10_000 - AT_ONCE
    assert errors.count("no answer within 4 s") == AT_ONCE
    assert not _running("sleep 61.7")


def test_an_answer_is_not_delayed_by_children_that_outlive_ssh(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The master of a multiplexed connection (ControlPersist) does so; it is left alone."""
    _install(folder, monkeypatch, "setsid sleep 63.7 & echo hello\n")
    began = time.monotonic()
    (answer,) = run_on_hosts(["n"], folder / "script.py", seconds=10)
    assert (answer.output, answer.error) == ("hello\n", "")
    assert time.monotonic() - began < 3
    (sleep,) = _running("sleep 63.7")
    os.kill(int(sleep), signal.SIGKILL)


def test_ctrl_c_ends_every_ssh_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(folder, monkeypatch, "touch {folder}/running/$$; sleep 62.7\n")
    script = "from pathlib import Path; from shodh_moe.launching.ssh import run_on_hosts\n"
    script += f"run_on_hosts([f'n{{n}}' for n in range(100)], Path({str(folder / 'script.py')!r}), seconds=60)"
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    while len(list((folder / "running").iterdir())) < AT_ONCE:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert "KeyboardInterrupt" in process.communicate(timeout=20)[1]
    assert time.monotonic() - began < 10
    assert not _running("sleep 62.7")
    assert len(list((folder / "running").iterdir())) == AT_ONCE, "no more hosts were asked"


def test_hosts_get_their_own_arguments_unchanged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(
        folder, monkeypatch, 'while [[ $1 == -* ]]; do [[ $1 == -o ]] && shift; shift; done; shift; bash -c "$*"\n'
    )
    answers = run_on_hosts(["a", "b"], folder / "script.py", [["x y", "$(id)"], ['"']])
    assert [answer.output for answer in answers] == ["hello x y $(id)\n", 'hello "\n']
    assert all(answer.sent < answer.received for answer in answers)


def test_the_last_line_of_the_errors_is_the_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(folder, monkeypatch, "echo welcome >&2; echo; printf 'bad\\xff luck\\n\\n' >&2; exit 3\n")
    assert run_on_hosts(["a"], folder / "script.py")[0].error == "bad� luck"
    _install(folder, monkeypatch, "exit 3\n")
    assert run_on_hosts(["a"], folder / "script.py")[0].error == "exit code 3"


def test_a_start_asks_only_for_what_it_needs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(
        folder, monkeypatch, 'while [[ $1 == -* ]]; do [[ $1 == -o ]] && shift; shift; done; shift; bash -c "$*"\n'
    )
    assert set(probe_hosts(["a"], brief=True)["a"]) == {"python", "addresses", "port", "time", "seconds", "clock"}


@pytest.mark.parametrize(
    ("variables", "hosts"),
    [
        ({}, ["a_b", "c.x", "10.0.0.3"]),
        ({"PDSH_SSH_ARGS_APPEND": "-p 2222   -o ProxyJump=gate"}, ["a", "bob@c.x", "d"]),
        ({"PDSH_SSH_ARGS": "-q -l%u -p 3 %h -v %n %%h"}, ["a", "bob@c.x"]),
        ({"PDSH_SSH_ARGS": "-q", "PDSH_SSH_ARGS_APPEND": "-F /etc/ssh_%h"}, ["a", "bob@c.x"]),
        ({"PDSH_SSH_ARGS": "-q %h"}, ["a", "bob@c.x"]),
    ],
)
def test_the_probe_runs_the_ssh_command_that_pdsh_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], hosts: list[str]
) -> None:
    """With the options and names of ports, jump hosts and users that pdsh takes from its variables and the hostfile."""
    if not shutil.which("pdsh"):
        pytest.skip("needs pdsh")
    _install(folder, monkeypatch, RECORD)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    environment = {**os.environ, "PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": launcher_ssh_arguments()}
    # pdsh's own time limit, which comes first, is the only difference.
    subprocess.run(["pdsh", "-S", "-t", "0", "-w", ",".join(hosts), "COMMAND"], env=environment, check=True, timeout=20)
    calls = sorted(line.split("\t")[:-1] for line in (folder / "calls").read_text().splitlines())
    assert calls == sorted([*ssh_command(host, number)[1:], "COMMAND"] for number, host in enumerate(hosts))


def test_the_time_limit_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert time_limit(8.0) == 8
    monkeypatch.setenv("SHODH_HOST_SECONDS", "60")
    assert time_limit(8.0) == 60
    for text in ("soon", "0", "-1", "inf", "nan"):
        monkeypatch.setenv("SHODH_HOST_SECONDS", text)
        with pytest.raises(UserError, match=r"SHODH_HOST_SECONDS is .* set it to a number of seconds"):
            time_limit(8.0)


def test_failures_are_grouped_if_only_names_and_numbers_differ() -> None:
    errors = {"a1": "ssh: connect to host a1 port 22: refused", "bob@b": "bob@b: Permission denied", "c": "no answer"}
    errors |= {"a2": "ssh: connect to host a2 port 2222: refused", "d": "root@d: Permission denied"}
    assert group_failures(errors) == [
        ("ssh: connect to host a1 port 22: refused", ["a1", "a2"]),
        ("bob@b: Permission denied", ["bob@b"]),
        ("no answer", ["c"]),
        ("root@d: Permission denied", ["d"]),
    ]
