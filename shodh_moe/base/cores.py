"""The number of cores that this process may use, and a rank's share of them. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from shodh_moe.base.variables import number_in


def available_cores() -> int:
    """Return the number of cores that this process may use, at least 1.

    It is the smallest of what the system binds the process to (taskset, cpusets of containers and schedulers), the CPU
    quota of its control groups, and SLURM's cores per task, which not every SLURM installation enforces.

    Raises:
        UserError: SLURM_CPUS_PER_TASK is not a number.
    """
    return min(_within_quota(len(bound_to())), number_in("SLURM_CPUS_PER_TASK", least=1) or 10**9)


def cores_per_process(processes: int, bound: set[int] | None = None) -> int:
    """Return the number of cores for each of several processes that share what this one may use, at least 1.

    Args:
        processes: number of processes on this host, this one included.
        bound: the cores that any of them is bound to; by default those of this process and of its parent, because
            launchers may bind each process to cores of its own.
    """
    if bound is None:
        bound = bound_to() | bound_to(os.getppid())
    return max(1, min(_within_quota(len(bound)) // processes, available_cores()))


def bound_to(process: int = 0) -> set[int]:
    """Return the numbers of the cores to which the system binds a process (0: this one); all if it does not say."""
    with suppress(AttributeError, OSError):  # Linux only; the process may have ended
        return set(os.sched_getaffinity(process))
    return set(range(os.cpu_count() or 1)) if process == 0 else set()


def _within_quota(cores: int) -> int:
    return max(1, min([cores, *map(int, cpu_quotas())]))


def cpu_quotas(root: Path = Path("/")) -> Iterator[float]:
    """Yield the CPU quotas, in cores, of this process's control groups (version 1 or 2) and of the groups around them.

    Args:
        root: the folder that holds ``proc``, for tests.
    """
    with suppress(OSError, ValueError, IndexError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        groups = [line.split(":", 2) for line in lines]
        for line in (root / "proc/self/mountinfo").read_text().splitlines():
            left, _, right = line.partition(" - ")
            kind, _, options = right.split()[:3]
            if kind == "cgroup2":
                path = next((path for number, _, path in groups if number == "0"), None)
            elif kind == "cgroup" and "cpu" in options.split(","):
                path = next((path for _, names, path in groups if "cpu" in names.split(",")), None)
            else:
                continue
            if path is not None:
                top, mount = left.split()[3], root / left.split()[4].lstrip("/")
                # A container may see its own group as the mount's root, while /proc names the group from outside.
                inside = os.path.relpath(path, top) if Path(path).is_relative_to(top) else "."
                group = Path(os.path.normpath(mount / inside))
                for folder in (group, *group.parents):
                    if folder.is_relative_to(mount) and (quota := _quota(folder)) is not None:
                        yield quota


def _quota(group: Path) -> float | None:
    """Return the quota of one control group in cores; None without one."""
    with suppress(OSError, ValueError):
        given, period = (group / "cpu.max").read_text().split()
        return int(given) / int(period) if given != "max" else None
    with suppress(OSError, ValueError):
        microseconds = int((group / "cpu.cfs_quota_us").read_text())
        return microseconds / int((group / "cpu.cfs_period_us").read_text()) if microseconds > 0 else None
    return None
