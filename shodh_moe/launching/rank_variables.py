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

from shodh_moe.base.cores import available_cores, cores_per_process
from shodh_moe.base.errors import UserError
from shodh_moe.base.network import common_address, free_port, own_networks
from shodh_moe.base.variables import master_port, number, number_in, require_master_port
from shodh_moe.launching.devices import VARIABLES, deepspeed_launchers, launcher_options, names_in, restore_choice
from shodh_moe.launching.mpi import in_slurm_step, mpi_world, under_mpirun

_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHER = "SHODH_LAUNCHER"
WATCH_PARENT = "SHODH_WATCH_PARENT"  # set by a process that starts single ranks itself
_WATCHED = ("CROSS_SIZE", "TORCHELASTIC_RUN_ID", WATCH_PARENT)  # of DeepSpeed, torchrun, `run_jobs`
_PORTS = range(20000, 30000)  # below the ephemeral ports of common systems


def set_rank_variables() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT unless the launcher has.

    Also gives a rank of DeepSpeed's launcher the user's choice of GPUs (`restore_choice`).

    Raises:
        UserError: the launcher did not set a variable that it should have set, or set it to something else than a
            number.
    """
    os.environ.pop(_LAUNCHER, None)
    if any(name in os.environ for name in _WATCHED):
        os.environ[_LAUNCHER] = str(os.getppid())  # now: later, the launcher may be gone already
    if "RANK" in os.environ:
        restore_choice()
        found = _given_variables()
    elif under_mpirun():
        found = _with_own_gpus(_mpi_variables())
    elif in_slurm_step():
        found = _with_own_gpus(_slurm_variables())
    else:
        found = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in found.items():
        if name.startswith("MASTER_"):
            os.environ.setdefault(name, str(value))
        else:
            os.environ[name] = str(value)
    master_port()  # check it


def watched_launcher() -> int | None:
    """Return the process ID of the launcher that started this rank, whose end is to end the rank; None without one.

    The parent of a rank that no launcher started may be a shell, which may end.
    """
    return number_in(_LAUNCHER)


def unset_rank_variables() -> None:
    """Unset the variables of DeepSpeed's launcher, so that this rank can start a job of its own."""
    restore_choice(keep_deepspeeds=False)
    for name in (*_RANK_VARIABLES, "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE"):
        os.environ.pop(name, None)


def cores_of_rank() -> int:
    """Return the number of cores that this rank may use: its share of those that the ranks of this host have.

    Raises:
        UserError: a variable is not a number.
    """
    by_srun = in_slurm_step() and not any(name in os.environ for name in ("CROSS_SIZE", "TORCHELASTIC_RUN_ID"))
    if by_srun and number_in("SLURM_CPUS_PER_TASK"):  # each rank is a task, and has these cores for itself
        return available_cores()
    return cores_per_process(number_in("LOCAL_WORLD_SIZE", least=1) or 1)


def require_launcher_hostfile() -> None:
    """Check that the hostfile given to DeepSpeed's launcher exists; the launcher only warns and uses this host alone.

    Raises:
        UserError: ``deepspeed --hostfile`` was given a file that does not exist.
    """
    hostfile = _launcher_option("--hostfile", "-H") if os.environ.get("RANK") == "0" else None
    if hostfile is not None and not os.path.isfile(hostfile):
        raise UserError(
            f"deepspeed --hostfile {hostfile} does not exist, so it trains on this host alone: check the path"
        )


def use_launcher_ssh_port() -> None:
    """Make the ssh commands of this process use the port that DeepSpeed's launcher was given with ``--ssh_port``."""
    if port := _launcher_option("--ssh_port"):
        given = os.environ.get("PDSH_SSH_ARGS_APPEND", "")
        os.environ["PDSH_SSH_ARGS_APPEND"] = f"{given} -p {port}".strip()


def _launcher_option(*names: str) -> str | None:
    """Return the value of an option of DeepSpeed's launcher that started this process; None if it is not given."""
    for launcher in deepspeed_launchers():
        words = launcher_options(launcher)
        for option, value in zip(words, [*words[1:], ""], strict=True):
            name, equals, joined = option.partition("=")
            if name in names:
                return joined if equals else value
    return None


def _given_variables() -> dict[str, str | int]:
    """Check and complete the variables of a launcher that sets RANK."""
    found: dict[str, str | int] = {"RANK": number("RANK"), "WORLD_SIZE": number("WORLD_SIZE", least=1)}
    if not os.environ.get("MASTER_ADDR"):
        raise UserError("RANK is set, and MASTER_ADDR is not: start with a launcher that sets it, or unset RANK")
    require_master_port()
    local = number_in("LOCAL_RANK")
    size = number_in("LOCAL_WORLD_SIZE", "LOCAL_SIZE", least=1)  # the second is DeepSpeed's name for it
    if local is None and (size or 1) > 1:
        raise UserError(f"RANK is set, and LOCAL_RANK is not, with {size} ranks on this host: set LOCAL_RANK too")
    # Kubeflow's PyTorchJob starts one process in each container and does not set LOCAL_RANK.
    found["LOCAL_RANK"] = local or 0
    if size or local is None:
        found["LOCAL_WORLD_SIZE"] = size or 1
    return found


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
    if "MASTER_ADDR" not in os.environ:
        found["MASTER_ADDR"] = first_host(_text("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"))
    # Every rank can compute this port without communication. The sbatch scripts choose a free port instead.
    found["MASTER_PORT"] = _PORTS[_slurm("SLURM_JOB_ID", "SLURM_JOBID") % len(_PORTS)]
    return found


def _with_own_gpus(found: dict[str, str | int]) -> dict[str, str | int]:
    """Lower LOCAL_RANK where each rank sees only GPUs of its own, as with ``srun --gpus-per-task``."""
    for name in VARIABLES:
        if names := names_in(os.environ.get(name, "")):
            found["LOCAL_RANK"] = int(found["LOCAL_RANK"]) % len(names)
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
    _text(*names)  # refuse a missing one
    return number(*names)


def _text(*names: str) -> str:
    for name in names:
        if os.environ.get(name):
            return os.environ[name]
    raise UserError(
        f"SLURM started this process without {names[0]}: start ranks with srun, as launch/slurm/pretrain.sbatch does"
    )
