"""The number of cores that a process may use: binding, quotas of control groups, SLURM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shodh_moe.base.cores import available_cores, bound_to, cores_per_process, cpu_quotas
from shodh_moe.base.errors import UserError

needs_linux = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="binding is a feature of Linux")
V2 = "30 23 0:26 / {mount} rw - cgroup2 cgroup rw\n"
V1 = "31 23 0:27 {top} {mount} rw - cgroup cgroup rw,cpu,cpuacct\n"
V1 += "32 23 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"


def _host(root: Path, mounts: str, groups: str, files: dict[str, str]) -> list[float]:
    """Write the files of a host and return the quotas found there."""
    for name, text in {"proc/self/mountinfo": mounts, "proc/self/cgroup": groups, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return sorted(cpu_quotas(root))


def test_quotas_of_version_2_hold_for_all_groups_inside(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/job/cpu.max": "250000 100000\n",
        "sys/fs/cgroup/job/step/cpu.max": "max 100000\n",
        "sys/fs/cgroup/job/step/task/cpu.max": "400000 100000\n",
    }
    assert _host(tmp_path, V2.format(mount="/sys/fs/cgroup"), "0::/job/step/task\n", files) == [2.5, 4.0]


def test_a_container_reads_the_root_of_its_own_namespace(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/cpu.max": "150000 100000\n"}
    assert _host(tmp_path, V2.format(mount="/sys/fs/cgroup"), "0::/\n", files) == [1.5]


@pytest.mark.parametrize(("top", "group"), [("/", "slurm/job_1"), ("/docker/abc", "."), ("/elsewhere", ".")])
def test_quotas_of_version_1(tmp_path: Path, top: str, group: str) -> None:
    mount = "sys/fs/cgroup/cpu,cpuacct"
    files = {
        f"{mount}/{group}/cpu.cfs_quota_us": "300000",
        f"{mount}/{group}/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/memory/cpu.cfs_quota_us": "1",
    }
    inside = {"/": "/slurm/job_1", "/docker/abc": "/docker/abc", "/elsewhere": "/docker/abc"}[top]
    groups = f"5:memory:/docker/abc\n4:cpu,cpuacct:{inside}\n0::/\n"
    assert _host(tmp_path, V1.format(top=top, mount=f"/{mount}"), groups, files) == [3.0]


def test_without_quotas(tmp_path: Path) -> None:
    assert _host(tmp_path / "a", V2.format(mount="/sys/fs/cgroup"), "0::/x\n", {}) == []
    assert _host(tmp_path / "b", "nonsense\n", "nonsense\n", {}) == []
    assert list(cpu_quotas(tmp_path / "nowhere")) == []
    mount = V1.format(top="/", mount="/cpu")
    assert _host(tmp_path / "c", mount, "1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1"}) == []


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr("shodh_moe.base.cores.bound_to", lambda process=0: set(range(8)))
    monkeypatch.setattr("shodh_moe.base.cores.cpu_quotas", lambda: iter([]))


@pytest.mark.parametrize(("quotas", "expected"), [([], 8), ([2.5, 4.0], 2), ([0.5], 1), ([100.0], 8)])
def test_a_quota_limits_the_cores(
    eight_cores: None, monkeypatch: pytest.MonkeyPatch, quotas: list[float], expected: int
) -> None:
    monkeypatch.setattr("shodh_moe.base.cores.cpu_quotas", lambda: iter(quotas))
    assert available_cores() == expected
    assert cores_per_process(2) == max(1, expected // 2)


def test_slurms_cores_per_task_limit_the_cores(eight_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, expected in (("3", 3), ("64", 8), ("", 8)):
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", text)
        assert available_cores() == expected
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "many")
    with pytest.raises(UserError, match="SLURM_CPUS_PER_TASK is 'many', not a whole number"):
        available_cores()


def test_a_process_bound_to_cores_of_its_own_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """mpirun binds each rank: it has two of the sixteen cores that its parent has, or shares eight of them."""
    monkeypatch.setattr("shodh_moe.base.cores.cpu_quotas", lambda: iter([]))
    for own, ranks, expected in ((2, 8, 2), (8, 8, 2), (16, 8, 2), (1, 8, 1), (16, 32, 1)):
        bound = {0: set(range(own)), os.getppid(): set(range(16))}
        monkeypatch.setattr("shodh_moe.base.cores.bound_to", lambda process=0, bound=bound: bound[process])
        assert cores_per_process(ranks) == expected


@needs_linux
def test_a_process_that_taskset_bound_counts_its_cores() -> None:
    one = min(bound_to())
    code = f"import os; os.sched_setaffinity(0, {{{one}}}); from shodh_moe.base import cores; "
    code += "print(cores.available_cores())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_no_other_file_counts_cores() -> None:
    root = Path(__file__).parents[2]
    counting = ("cpu_count", "sched_getaffinity")
    files = [path for folder in ("shodh_moe", "kernels", "launch") for path in (root / folder).rglob("*.py")]
    assert len(files) > 200
    found = {path.name for path in files if any(name in path.read_text() for name in counting)}
    assert found == {"cores.py", "probe.py"}  # the latter runs on hosts that may lack this package
