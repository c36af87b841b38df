"""Rank variables: each launcher sets its own, which are translated to those that torch reads.

========================  =====================================================================
started with              source
========================  =====================================================================
``deepspeed``, torchrun   RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set already
``mpirun``                the communicator of mpi4py; its first rank chooses address and port
``srun``                  SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID; first host of the step; port from job ID
none                      a single process
========================  =====================================================================
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from shodh_moe.base.errors import UserError
from shodh_moe.base.network import common_address, free_port, own_networks
from shodh_moe.launching.mpi import in_slurm_step, mpi_world, under_mpirun

_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PORTS = range(20000, 30000)  # below the ephemeral ports of common systems


def set_rank_variables() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT unless the launcher has.

    Raises:
        UserError: the launcher did not set a variable that it should have set.
    """
    if "RANK" in os.environ:
        local = os.environ.get("LOCAL_SIZE")  # DeepSpeed's name for it
        if local:
            os.environ.setdefault("LOCAL_WORLD_SIZE", local)
        return
    if under_mpirun():
        found = _mpi_variables()
    elif in_slurm_step():
        found = _slurm_variables()
    else:
        found = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in found.items():
        if name.startswith("MASTER_"):
            os.environ.setdefault(name, str(value))
        else:
            os.environ[name] = str(value)


def unset_rank_variables() -> None:
    """Unset the variables of DeepSpeed's launcher, so that this rank can start a job of its own."""
    for name in (*_RANK_VARIABLES, "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE"):
        os.environ.pop(name, None)


def require_launcher_hostfile() -> None:
    """Check that the hostfile given to DeepSpeed's launcher exists; the launcher only warns and uses this host alone.

    Raises:
        UserError: ``deepspeed --hostfile`` was given a file that does not exist.
    """
    import psutil

    for ancestor in psutil.Process().parents() if os.environ.get("RANK") == "0" else []:
        try:
            words = ancestor.cmdline()
        except psutil.Error:
            continue
        if not any("deepspeed" in Path(word).name for word in words[:3]):
            continue
        for option, value in zip(words, [*words[1:], ""], strict=True):
            if option.endswith(".py") and "deepspeed" not in option:  # the script, which gets the other arguments
                break
            name, equals, joined = option.partition("=")
            if name in ("--hostfile", "-H") and not os.path.isfile(joined if equals else value):
                raise UserError(
                    f"deepspeed --hostfile {joined or value} does not exist, so it trains on this host alone: "
                    "check the path"
                )


def _mpi_variables() -> dict[str, str | int]:
    world = mpi_world()
    from mpi4py import MPI

    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    networks = world.gather(own_networks(), root=0)
    chosen = (common_address(networks), free_port("")) if networks else None  # on the first rank
    address, port = world.bcast(chosen, root=0)
    found = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": local.rank, "LOCAL_WORLD_SIZE": local.size}
    # MPI is no longer needed. Without this call, mpirun would treat every rank that ends as crashed.
    MPI.Finalize()
    return found | {"MASTER_ADDR": address, "MASTER_PORT": port}


def _slurm_variables() -> dict[str, str | int]:
    found: dict[str, str | int] = {
        "RANK": _slurm("SLURM_PROCID"),
        "WORLD_SIZE": _slurm("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        "LOCAL_RANK": _slurm("SLURM_LOCALID"),
    }
    found["LOCAL_WORLD_SIZE"] = _tasks_here()
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if devices and devices.count(",") < int(found["LOCAL_RANK"]):  # with --gpus-per-task each task sees only its own
        found["LOCAL_RANK"] = int(found["LOCAL_RANK"]) % (devices.count(",") + 1)
    if "MASTER_ADDR" not in os.environ:
        found["MASTER_ADDR"] = first_host(_text("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"))
    # Every rank can compute this port without communication. The sbatch scripts choose a free port instead.
    found["MASTER_PORT"] = _PORTS[_slurm("SLURM_JOB_ID", "SLURM_JOBID") % len(_PORTS)]
    return found


def first_host(nodelist: str) -> str:
    """Return the first host of a SLURM node list such as ``gpu[003-007,12],login1``."""
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, timeout=30)
        if done.returncode == 0 and done.stdout.split():
            return done.stdout.split()[0]
    except (OSError, subprocess.TimeoutExpired):
        pass  # containers often have SLURM's variables without its commands
    name = re.match(r"[^,\[]+(\[[^\]]*\][^,\[]*)*", nodelist)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", name[0]) if name else nodelist


def _tasks_here() -> int:
    """Return the step's number of tasks on this node, from SLURM_STEP_TASKS_PER_NODE such as ``2(x3),1``."""
    counts: list[int] = []
    for part in _text("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not match:
            raise UserError(f"SLURM's tasks per node are {part!r}, which is not a number: start with srun")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _slurm("SLURM_NODEID")
    return counts[min(node, len(counts) - 1)]


def _slurm(*names: str) -> int:
    text = _text(*names)
    if not text.isdecimal():
        raise UserError(f"SLURM's variable {names[0]} is {text!r}, not a whole number: start with srun")
    return int(text)


def _text(*names: str) -> str:
    for name in names:
        if os.environ.get(name):
            return os.environ[name]
    raise UserError(
        f"SLURM started this process without {names[0]}: start ranks with srun, as launch/slurm/pretrain.sbatch does"
    )
