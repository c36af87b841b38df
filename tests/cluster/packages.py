"""Debian's packages that the tests need, installed where they are missing and this is root's own machine."""

from __future__ import annotations

import os
import shutil
import subprocess

SECONDS = 300.0  # for each command; a mirror that does not answer must not hold the tests up


def lacking(programs: dict[str, str]) -> str:
    """Install the packages of programs that are not there, {program: package}; says in one line what is still missing.

    Programs of the system's own folders count wherever PATH ends.
    """
    missing = {program: package for program, package in programs.items() if not which(program)}
    if not missing:
        return ""
    packages = sorted(set(missing.values()))
    told = f"not installed: {', '.join(missing)} (Debian: apt-get install {' '.join(packages)})"
    if not shutil.which("apt-get") or os.geteuid() != 0:
        return told
    # RUNLEVEL: the packages must not start daemons of their own.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for arguments in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        command = ["apt-get", "-qq", "-o", "Acquire::http::Timeout=20", "-o", "DPkg::Lock::Timeout=60", *arguments]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return f"{told}: apt-get {arguments[0]} did not end in {SECONDS:g} s"
    return f"{told}: {' '.join(done.stderr.split())[-300:]}" if not all(map(which, missing)) else ""


def which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin")
