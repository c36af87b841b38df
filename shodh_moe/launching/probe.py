"""Collect facts about a host in a fraction of a second, on this host or as a script that is sent to others.

`facts` uses only the standard library, because the host that runs this file may have nothing else installed.
``python probe.py`` prints the facts as one line of JSON, ``python probe.py brief`` only those of `brief_facts`.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shodh_moe.launching.ssh import Answer

PACKAGES = ("torch", "deepspeed", "shodh_moe", "triton", "numpy")


def brief_facts() -> dict[str, Any]:
    """Collect, within milliseconds, what a start needs to know.

    Returns:
        python: text. addresses: IPv4 addresses except loopback, in the system's order. port: a TCP port that is free
        now. time: seconds since 1970.
    """
    return {
        "python": platform.python_version(),
        "addresses": _addresses(),
        "port": _free_port(),
        "time": time.time(),
    }


def facts() -> dict[str, Any]:
    """Collect what must match between the hosts of a job.

    Returns:
        those of `brief_facts`, and: executable, hostname: text. versions: by package, "none" if not installed. code:
        hash of shodh_moe's source, "none" if not installed. cores: number of cores that this process may use. gpus:
        number of NVIDIA devices. visible: CUDA_VISIBLE_DEVICES, None if unset. tools: whether a C++ compiler and ninja,
        which DeepSpeed compiles with, are on the PATH.
    """
    found = {
        "executable": sys.executable,
        "hostname": socket.gethostname(),
        "versions": {name: _version(name) for name in PACKAGES},
        "code": _code(),
        "cores": _cores(),
        "gpus": _gpus(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "tools": {name: bool(shutil.which(name)) for name in (os.environ.get("CXX", "c++"), "ninja")},
    }
    return found | brief_facts()  # last, so that the time is that of the answer


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _code() -> str:
    """Hash the source, independently of where and how it is installed."""
    files: dict[str, Path] = {}
    for package in ("shodh_moe", "shodh_moe.kernels"):  # may lie in a separate folder
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
    """Return the addresses of the interfaces that are up. Linux only; [] elsewhere."""
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


def _cores() -> int:
    try:
        from shodh_moe.base.cores import available_cores
    except ImportError:
        return os.cpu_count() or 1
    return available_cores()


def _gpus() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=5).stdout
        return sum(line.startswith("GPU ") for line in listed.splitlines())
    except (OSError, subprocess.TimeoutExpired):
        return len(glob.glob("/dev/nvidia[0-9]*"))


def probe_hosts(hosts: list[str], seconds: float = 10.0, brief: bool = False) -> dict[str, dict[str, Any]]:
    """Collect the facts of all hosts over ssh.

    Each host gets two more entries: ``seconds``, its response time, and ``clock``, the minimum number of seconds by
    which its clock is ahead of this host's (negative if behind, 0 if the response time leaves it open). A host that
    does not answer has only ``error``, one line.

    Args:
        seconds: time limit for all hosts together.
        brief: collect only `brief_facts`.
    """
    # Imported here, because a host to which this file is sent may lack the package.
    from shodh_moe.launching.ssh import run_on_hosts

    answers = run_on_hosts(hosts, Path(__file__), [["brief"]] * len(hosts) if brief else None, seconds)
    return {answer.host: _facts_of(answer) for answer in answers}


def _facts_of(answer: Answer) -> dict[str, Any]:
    if answer.error:
        return {"error": answer.error}
    try:
        found = json.loads(answer.output.splitlines()[-1])
        earliest, latest = found["time"] - answer.received, found["time"] - answer.sent
    except (ValueError, IndexError, KeyError, TypeError):
        return {"error": f"unexpected answer: {answer.output[-200:]!r}"}
    return found | {"seconds": answer.received - answer.sent, "clock": max(earliest, min(latest, 0.0))}


if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if entry]  # a training ignores the working folder too
    print(json.dumps(brief_facts() if sys.argv[1:] == ["brief"] else facts()))
