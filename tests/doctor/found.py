"""Facts of a healthy GPU host; tests change one fact at a time."""

from __future__ import annotations

from typing import Any

GPU = {"name": "NVIDIA H100 80GB HBM3", "memory": 85_017_493_504, "capability": "9.0"}
CARD = {"name": "NVIDIA H100 80GB HBM3", "memory.total": "81559 MiB", "compute_cap": "9.0", "driver_version": "570.86"}


def facts(**changes: Any) -> dict[str, Any]:
    return {
        "python": "3.12.3",
        "executable": "/opt/venv/bin/python",
        "hostname": "node-0",
        "addresses": ["10.0.0.1"],
        "port": 40123,
        "versions": {
            "torch": "2.13.0",
            "deepspeed": "0.19.8",
            "shodh_moe": "0.1.0",
            "triton": "3.7.1",
            "numpy": "2.4.6",
        },
        "code": "0123456789ab",
        "cores": 64,
        "gpus": 2,
        "visible": None,
        "tools": {"c++": True, "ninja": True},
        "time": 1.7e9,
        "seconds": 0.3,
        "clock": 0.0,
        "keepalive": 15,
    } | changes


def here(**changes: Any) -> dict[str, Any]:
    return {
        "facts": facts(),
        "git": "ce06311787",
        "requires": ["torch>=2.8", "numpy>=1.26"],
        "requires_python": ">=3.10,<3.14",
        "installed": {"torch": "2.13.0", "numpy": "2.4.6"},
        "torch": torch(),
        "nvidia": [CARD, CARD],
        "visible": None,
        "deepspeed": {"version": "0.19.8", "accelerator": "cuda"},
        "triton": {"version": "3.7.1"},
        "compiler": "g++ 13.2.0\nCopyright",
        "ninja": "1.13.2",
        "headers": True,
        "mpi4py": {"mpi4py": "4.1.2", "library": "Open MPI v5.0.11, package: Open MPI"},
        "mpirun": {"path": "/usr/bin/mpirun", "version": "mpirun (Open MPI) 5.0.7\n\nReport bugs"},
        "hdf5": {"h5py": "3.16.0", "hdf5": "1.14.6", "parallel": False, "locking": ""},
        "file_locking": None,
        "ssh": "OpenSSH_9.2p1, OpenSSL 3.0.15",
        "pdsh": "pdsh-2.34\nrcmd modules: ssh,rsh,exec (default: rsh)",
        "slurm": "Slurmctld(primary) at head is UP",
        "memory": 512 * 2**30,
        "available": 500 * 2**30,
        "shm": 256 * 2**30,
        "open_files": 65536,
        "time": 1.7e9,
        "clock": "yes",
        "port": {"number": "29500", "chosen": False, "free": True, "holder": ""},
        "folders": {"/shared/runs": {"exists": True, "type": "nfs4", "free": 5000 * 2**30}},
    } | changes


def torch(**changes: Any) -> dict[str, Any]:
    return {
        "version": "2.13.0",
        "cuda": "12.8",
        "hip": None,
        "devices": [GPU, GPU],
        "reason": "",
        "nccl": "2.27.3",
        "apex": "nvidia",
    } | changes


def cpu() -> dict[str, Any]:
    """Return the changes that make it a host without GPUs."""
    without = torch(version="2.13.0+cpu", cuda=None, devices=[], nccl=None, apex="none")
    return {"torch": without, "nvidia": [], "deepspeed": {"version": "0.19.8", "accelerator": "cpu"}}
