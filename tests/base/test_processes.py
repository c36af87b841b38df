"""Processes that the system hides: /proc mounted with hidepid, as on shared login nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from shodh_moe.base.processes import ancestors, command_line

# Runs as an unprivileged user whose parent belongs to root; calls everything that asks the system about processes.
HIDDEN = """
import json, os, socket, sys
from pathlib import Path
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", CROSS_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="1")
import psutil
try:
    psutil.Process().parents()
    hidden = False
except psutil.AccessDenied:
    hidden = True
from shodh_moe.base.network import interface_towards, own_networks, port_holder
from shodh_moe.base.processes import ancestors
from shodh_moe.launching.rank_variables import require_launcher_hostfile, set_rank_variables, unset_rank_variables
from shodh_moe.launching.sentinel import ranks_here, register
from shodh_moe.merging.merge import resident
require_launcher_hostfile()
set_rank_variables()
unset_rank_variables()
folder = Path(sys.argv[1])
register(folder, 0, "attempt", True)
listener = socket.create_server(("127.0.0.1", 0))
print(json.dumps({
    "hidden": hidden, "ancestors": len(ancestors()), "holder": port_holder(listener.getsockname()[1]),
    "interface": interface_towards("127.0.0.1"), "networks": type(own_networks()).__name__,
    "ranks": len(ranks_here(folder, "attempt")), "resident": resident() > 0,
}))
"""


def test_the_ancestors_of_this_process() -> None:
    found = [process.pid for process in ancestors()]
    assert found[0] == os.getppid()
    assert found == [process.pid for process in psutil.Process().parents()]


def test_the_command_line_of_a_process_that_has_ended_is_empty() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = psutil.Process(child.pid)
        child.communicate(b"\n")
    assert command_line(process) == []


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user may write to."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


def test_hidden_processes_of_other_users_are_no_error(public: Path) -> None:
    inside = "mount -t proc -o hidepid=1 proc /proc && setpriv --reuid 65534 --regid 65534 --clear-groups"
    shell = ["unshare", "--mount", "--pid", "--fork", "sh", "-c"]
    try:
        usable = [*shell, f'{inside} "$0" -c "import shodh_moe"', sys.executable]
        subprocess.run(usable, capture_output=True, check=True, timeout=60, cwd=public)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs root, Linux's namespaces, and a Python that every user may run: {error}")
    (public / "hidden.py").write_text(HIDDEN)
    # The shell remains, as root, the parent of the program.
    line = f'{inside} "$@"; exit $?'
    command = [*shell, line, "sh", sys.executable, str(public / "hidden.py"), str(public)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=public)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["hidden"], "otherwise this test shows nothing"
    assert "process" in found.pop("holder")
    expected = {"hidden": True, "ancestors": 0, "interface": "lo", "networks": "list", "ranks": 1, "resident": True}
    assert found == expected
