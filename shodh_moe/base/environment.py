"""The machine and software of a run, for ``environment.json``."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from shodh_moe.base.cores import available_cores

PACKAGES = ("shodh_moe", "torch", "deepspeed", "triton", "numpy", "numba", "h5py", "scipy", "safetensors", "pydantic")


def describe_environment() -> dict[str, Any]:
    """Describe versions, processor, devices, source commit and date, but not the host's or user's name."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": available_cores(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "packages": versions,
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _commit() -> str | None:
    """Return the commit of this package's source, with ``+`` if files have changed since; None outside git."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def has_apex(*modules: str) -> bool:
    """Whether NVIDIA's apex is installed with its fused optimizers and the given modules.

    PyPI has an unrelated package of the same name, which does not count.
    """
    try:
        for name in ("apex.optimizers", *modules):
            import_module(name)
        return hasattr(import_module("apex.optimizers"), "FusedAdam")
    except Exception:  # the unrelated package fails in its own ways
        return False
