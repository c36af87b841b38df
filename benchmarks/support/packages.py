"""Install the Debian packages that the tests need, where they are missing and the tests run as root."""

from __future__ import annotations

import os
import shutil
import subprocess

SECONDS = 300.0  # for each command: a mirror that does not answer must not block the tests


def lacking(programs: dict[str, str]) -> str:
    """Install the packages of missing programs, {program: package}; return one line about what is still missing, or "".

    Programs in the system's sbin folders are found even if PATH does not list them.
    """
    missing = {program: package for program, package in programs.items() if not which(program)}
    if not missing:
        return ""
    packages = sorted(set(missing.values()))
    not_installed = f"not installed: {', '.join(missing)} (Debian: apt-get install {' '.join(packages)})"
    if not shutil.which("apt-get") or os.geteuid() != 0:
        return not_installed
    # RUNLEVEL keeps the packages from starting their daemons.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for arguments in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        command = ["apt-get", "-qq", "-o", "Acquire::http::Timeout=20", "-o", "DPkg::Lock::Timeout=60", *arguments]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return f"{not_installed}: apt-get {arguments[0]} did not end in {SECONDS:g} s"
    return f"{not_installed}: {' '.join(done.stderr.split())[-300:]}" if not all(map(which, missing)) else ""


def which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin")
