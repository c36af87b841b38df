"""Gather facts about this host. Each part may fail or hang without affecting the others."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import shodh_moe

PACKAGE = Path(shodh_moe.__file__).parent
SECONDS = 60.0  # time limit for importing a package, which is slow from a cold network file system
FOLDER_SECONDS = 5.0  # time limit for inspecting a folder
HDF5_SECONDS = 20.0  # time limit for importing h5py and writing to a folder
DEFAULT_PORT = 29500  # default of deepspeed and torchrun

Found = dict[str, Any]


def gather(folders: list[str]) -> Found:
    """Gather the facts for software.py and machine.py. A part that failed has only ``error``, a line of text."""
    script = PACKAGE / "doctor" / "local_script.py"
    with ThreadPoolExecutor(16) as pool:
        parts: dict[str, Future[Any]] = {
            "facts": pool.submit(run_part, PACKAGE / "launching" / "probe.py"),
            "torch": pool.submit(run_part, script, "torch"),
            "deepspeed": pool.submit(run_part, script, "deepspeed"),
            "hdf5": pool.submit(run_part, script, "hdf5", folders[0], seconds=HDF5_SECONDS),
            "nvidia": pool.submit(_nvidia),
            "mpirun": pool.submit(_mpirun),
            "pdsh": pool.submit(_output, "pdsh", "-V"),
            "ssh": pool.submit(_output, "ssh", "-V"),
            "slurm": pool.submit(_output, "scontrol", "ping"),
            "compiler": pool.submit(_output, os.environ.get("CXX", "c++"), "--version"),
            "ninja": pool.submit(_output, "ninja", "--version"),
            "git": pool.submit(_git),
            "port": pool.submit(_port, script),
            "clock": pool.submit(_output, "timedatectl", "show", "-p", "NTPSynchronized", "--value"),
        }
        for package, part in (("triton", "triton"), ("mpi4py", "mpi")):
            if _installed(package):
                parts[package] = pool.submit(run_part, script, part)
        looks = {name: pool.submit(run_part, script, "folder", name, seconds=FOLDER_SECONDS) for name in folders}
        found: Found = {name: part.result() for name, part in parts.items()}
        found["folders"] = {name: look.result() for name, look in looks.items()}
    return found | _system()


def run_part(script: Path, *arguments: str, seconds: float = SECONDS) -> Found:
    """Run a script and return the JSON in its last line of output, or ``{"error": reason}``."""
    process = subprocess.Popen(
        [sys.executable, "-", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        output, errors = process.communicate(script.read_text(encoding="utf-8"), timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()  # do not wait for it: on a hanging file system it may never end
        return {"error": f"no answer within {seconds:g} s"}
    if process.returncode < 0:
        return {"error": f"ended by signal {-process.returncode}"}
    try:
        return dict(json.loads(output.splitlines()[-1]))
    except (ValueError, IndexError):
        lines = [line for line in errors.splitlines() if line.strip()]
        return {"error": lines[-1][:300] if lines else f"exit code {process.returncode}"}


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _output(*command: str) -> str | None:
    """Return a command's output; None if it is not installed."""
    if not shutil.which(command[0]):
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=5)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"failed: {error}"
    return (done.stdout + done.stderr).strip()


def _nvidia() -> list[dict[str, str]]:
    names = ("name", "memory.total", "compute_cap", "driver_version")
    output = _output("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader") or ""
    rows = [[cell.strip() for cell in line.split(",")] for line in output.splitlines()]
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]


def _mpirun() -> dict[str, str] | None:
    # An mpirun from a Python package is next to the interpreter, which may not be on the PATH.
    beside = Path(sys.executable).with_name("mpirun")
    path = str(beside) if beside.exists() else shutil.which("mpirun")
    return {"path": path, "version": _output(path, "--version") or ""} if path else None


def _git() -> str:
    """Return the commit of the source, with ``+`` if files have changed since; "" outside git."""
    revision = _output("git", "-C", str(PACKAGE.parent), "rev-parse", "--short=10", "HEAD") or ""
    if not re.fullmatch("[0-9a-f]{10,}", revision):
        return ""
    return revision + ("+" if _output("git", "-C", str(PACKAGE.parent), "status", "--porcelain", "-uno") else "")


def _port(script: Path) -> Found:
    text = os.environ.get("MASTER_PORT", "")
    found: Found = {"number": text or str(DEFAULT_PORT), "chosen": bool(text), "free": False, "holder": ""}
    if not found["number"].isdecimal() or not 0 < int(found["number"]) < 65536:
        return found | {"error": "is not a port number"}
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", int(found["number"])))
            return found | {"free": True}
        except PermissionError:
            return found | {"error": "needs root privileges"}
        except OSError:
            return found | {"holder": run_part(script, "port", found["number"]).get("holder", "")}


def _system() -> Found:
    memory = {}
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            memory[name] = int(rest.split()[0]) * 1024
    limit = None
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max" is not a number
            limit = int(Path(path).read_text())
    shm = None
    with suppress(OSError):
        shm = shutil.disk_usage("/dev/shm").total
    return {
        "memory": min(memory.get("MemTotal", 0), limit or memory.get("MemTotal", 0)),
        "available": memory.get("MemAvailable"),
        "shm": shm,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "time": time.time(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "file_locking": os.environ.get("HDF5_USE_FILE_LOCKING"),
        "headers": Path(sysconfig.get_paths()["include"], "Python.h").exists(),
        **_requirements(),
    }


def _requirements() -> Found:
    try:
        texts = [text for text in metadata.requires("shodh_moe") or [] if "extra ==" not in text]
        python = metadata.metadata("shodh_moe")["Requires-Python"] or ""
    except metadata.PackageNotFoundError:
        return {"requires": [], "requires_python": "", "installed": {}}
    names = [re.match(r"[\w.-]+", text)[0] for text in texts]  # type: ignore[index]
    return {
        "requires": texts,
        "requires_python": python,
        "installed": {name: metadata.version(name) for name in names if _installed(name)},
    }
