"""What one host is like, in a fraction of a second: run here, or its source sent to other hosts.

The standard library alone is used up to ``facts``, since this file runs as it stands on a host where nothing else may
be in order. ``python probe.py`` prints the facts as one line of JSON.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "deepspeed", "shodh_moe", "triton", "numpy")


def facts() -> dict[str, Any]:
    """What must fit between the hosts of a job.

    python, executable, hostname: text. addresses: IPv4 without loopback, in the system's order. port: a TCP port that
    is free now. time: seconds since 1970. versions: by package, "none" where it is not installed. code: hash of
    shodh_moe's source, "none" without. cores: that this process may use. gpus: NVIDIA devices. tools: whether a C++
    compiler and ninja, with which DeepSpeed compiles, are on the PATH.
    """
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "hostname": socket.gethostname(),
        "addresses": _addresses(),
        "port": _free_port(),
        "versions": {name: _version(name) for name in PACKAGES},
        "code": _code(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": _gpus(),
        "tools": {name: bool(shutil.which(name)) for name in (os.environ.get("CXX", "c++"), "ninja")},
        "time": time.time(),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _code() -> str:
    """The same for the same source, wherever and however it is installed."""
    files: dict[str, Path] = {}
    for package in ("shodh_moe", "shodh_moe.kernels"):  # which may stand in a folder of its own
        try:
            found = importlib.util.find_spec(package)
        except ImportError:
            found = None
        for folder in map(Path, found.submodule_search_locations or [] if found else []):
            for path in folder.rglob("*.py"):
                files["/".join((*package.split("."), *path.relative_to(folder).parts))] = path
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name} {hashlib.sha256(files[name].read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12] if files else "none"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def _addresses() -> list[str]:
    """Of the interfaces that are up; Linux only, elsewhere none."""
    try:
        import fcntl
    except ImportError:
        return []
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                (flags,) = struct.unpack_from("H", fcntl.ioctl(any_socket, 0x8913, request), 16)  # SIOCGIFFLAGS
                if flags & 1 and not flags & 8:  # up, and not the loopback
                    answer = fcntl.ioctl(any_socket, 0x8915, request)  # SIOCGIFADDR
                    found.append(socket.inet_ntoa(answer[20:24]))
            except OSError:  # no IPv4 address
                continue
    return found


def _gpus() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=5).stdout
        return sum(line.startswith("GPU ") for line in listed.splitlines())
    except (OSError, subprocess.TimeoutExpired):
        return len(glob.glob("/dev/nvidia[0-9]*"))


def probe_hosts(hosts: list[str], timeout_seconds: float = 10.0) -> dict[str, dict[str, Any]]:
    """The facts of every host, asked over ssh, all at once.

    Each has two more: ``seconds`` that it took to answer, and ``clock``, the seconds by which its clock is at least
    ahead of this one's (negative: behind; 0 where the time of the answer leaves it open). A host that does not answer
    has ``error`` alone, one line.
    """
    # Here: a host to which this file is sent need not have the package.
    from shodh_moe.launching.ssh import run_on_hosts

    source = Path(__file__).read_text(encoding="utf-8")

    def ask(host: str) -> dict[str, Any]:
        sent = time.time()
        (answer,) = run_on_hosts([host], source, timeout_seconds=timeout_seconds)
        received = time.time()
        if answer.error:
            return {"error": answer.error}
        try:
            told = json.loads(answer.output.splitlines()[-1])
            earliest, latest = told["time"] - received, told["time"] - sent
        except (ValueError, IndexError, KeyError, TypeError):
            return {"error": f"its answer is not the expected one: {answer.output[-200:]!r}"}
        return told | {"seconds": received - sent, "clock": max(earliest, min(latest, 0.0))}

    if not hosts:
        return {}
    with ThreadPoolExecutor(len(hosts)) as pool:
        return dict(zip(hosts, pool.map(ask, hosts), strict=True))


if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if entry]  # the working folder counts for nothing in a training either
    print(json.dumps(facts()))
