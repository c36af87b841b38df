"""The rank of a process, derived from the variables that each launcher sets."""

from __future__ import annotations

import os
import socket
import sys

import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.base.network import common_address, interface_towards, port_holder
from shodh_moe.launching.rank_variables import cores_of_rank, first_host, set_rank_variables

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Variables that srun of SLURM 22.05 sets in the second of two tasks on the second of two nodes, as observed.
SRUN = {
    "SLURM_JOB_ID": "54321",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "3,2",
    "SLURM_NTASKS": "5",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in os.environ:
        if name in NAMES or name.startswith(("SLURM", "OMPI", "PMI", "MPI", "LOCAL_SIZE", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)
    for name in NAMES:  # registers the names, so that what the function sets is undone
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return monkeypatch


def _set(patch: pytest.MonkeyPatch, variables: dict[str, str]) -> list[str]:
    for name, value in variables.items():
        patch.setenv(name, value)
    set_rank_variables()
    return [os.environ[name] for name in NAMES]


def test_without_a_launcher_there_is_one_process_with_its_own_port(environment: pytest.MonkeyPatch) -> None:
    *ranks, port = _set(environment, {})
    assert ranks == ["0", "1", "0", "1", "127.0.0.1"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", int(port)))


def test_variables_of_torchrun_and_deepspeed_are_kept(environment: pytest.MonkeyPatch) -> None:
    own = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert _set(environment, own | {"LOCAL_SIZE": "2"} | SRUN) == ["3", "4", "1", "2", "a", "1"]


def test_variables_of_srun(environment: pytest.MonkeyPatch) -> None:
    assert _set(environment, SRUN) == ["4", "5", "1", "2", "gpu03", "24321"]


def test_master_variables_of_an_sbatch_script_are_kept(environment: pytest.MonkeyPatch) -> None:
    assert _set(environment, SRUN | {"MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "4711"})[-2:] == ["10.1.1.1", "4711"]


def test_a_task_that_sees_only_its_own_gpu_uses_it(environment: pytest.MonkeyPatch) -> None:
    assert _set(environment, SRUN | {"CUDA_VISIBLE_DEVICES": "0"})[2] == "0"
    environment.delenv("RANK")
    assert _set(environment, SRUN | {"CUDA_VISIBLE_DEVICES": "0,1"})[2] == "1"


def test_python_in_a_batch_script_without_srun_is_one_process(environment: pytest.MonkeyPatch) -> None:
    batch = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_NODEID": "0"}
    assert _set(environment, batch)[:2] == ["0", "1"]


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID"])
def test_a_missing_srun_variable_is_refused_by_name(environment: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(UserError, match=f"without {name}: start ranks with srun"):
        _set(environment, {key: value for key, value in SRUN.items() if key != name})


@pytest.mark.parametrize(("name", "value"), [("SLURM_PROCID", "x"), ("SLURM_STEP_TASKS_PER_NODE", "3(y2)")])
def test_an_invalid_srun_variable_is_refused(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    with pytest.raises(UserError, match=r"not a number|not a whole number"):
        _set(environment, SRUN | {name: value})


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("login1", "login1"),
        ("gpu[003-007,12],login1", "gpu003"),
        ("a[5,7]", "a5"),
        ("rack[1-2]node[03-04]", "rack1node03"),
        ("b-1,b-2", "b-1"),
    ],
)
def test_the_first_node_of_a_node_list_is_found_without_scontrol(
    environment: pytest.MonkeyPatch, nodelist: str, first: str
) -> None:
    environment.setenv("PATH", "")
    assert first_host(nodelist) == first


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "", "RANK is '', not a whole number"),
        ("RANK", "first", "RANK is 'first', not a whole number"),
        ("RANK", "-1", "RANK is '-1', not a whole number"),
        ("RANK", "1" * 5000, "RANK is '1111"),
        ("WORLD_SIZE", "0", "WORLD_SIZE is '0', not a whole number of at least 1"),
        ("WORLD_SIZE", "", "WORLD_SIZE is '', not a whole number: start with a launcher"),
        ("LOCAL_RANK", "x", "LOCAL_RANK is 'x', not a whole number"),
        ("LOCAL_WORLD_SIZE", "2.0", "LOCAL_WORLD_SIZE is '2.0', not a whole number of at least 1"),
        ("LOCAL_SIZE", "٣", "LOCAL_SIZE is '٣', not a whole number"),
        ("MASTER_ADDR", "", "MASTER_ADDR is not: start with a launcher"),
        ("MASTER_PORT", "", "MASTER_PORT is '', not a whole number"),
        ("MASTER_PORT", "65536", "MASTER_PORT is '65536', not a whole number from 1 to 65535"),
        (
            "MASTER_PORT",
            "tcp://10.0.0.1:80",
            "Kubernetes sets it so for a service named 'master'",
        ),
    ],
)
def test_an_invalid_variable_of_a_launcher_is_refused(
    environment: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        _set(environment, TORCHRUN | {name: value})


def test_a_port_that_is_none_is_refused_without_a_launcher_and_under_srun(environment: pytest.MonkeyPatch) -> None:
    for variables in ({}, SRUN):
        with pytest.raises(UserError, match=r"MASTER_PORT is 'tcp://10\.0\.0\.1:80', not a whole number"):
            _set(environment, {**variables, "MASTER_PORT": "tcp://10.0.0.1:80"})
        for name in NAMES:
            environment.delenv(name, raising=False)


def test_a_rank_without_a_local_rank_is_alone_on_its_host(environment: pytest.MonkeyPatch) -> None:
    """Kubeflow's PyTorchJob sets these variables in a container for each rank."""
    kubeflow = {key: value for key, value in TORCHRUN.items() if key != "LOCAL_RANK"}
    assert _set(environment, kubeflow) == ["1", "2", "0", "1", "a", "29500"]


def test_a_missing_local_rank_among_several_is_refused(environment: pytest.MonkeyPatch) -> None:
    variables = {key: value for key, value in TORCHRUN.items() if key != "LOCAL_RANK"}
    with pytest.raises(UserError, match="RANK is set, and LOCAL_RANK is not, with 2 ranks on this host"):
        _set(environment, variables | {"LOCAL_WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("variables", "cores"),
    [
        ({}, 4),
        ({"SLURM_STEP_ID": "0", "SLURM_CPUS_PER_TASK": "6"}, 6),  # a task of srun has them for itself
        ({"SLURM_STEP_ID": "0"}, 4),
        ({"SLURM_STEP_ID": "0", "SLURM_CPUS_PER_TASK": "6", "TORCHELASTIC_RUN_ID": "a"}, 4),  # srun torchrun
        ({"LOCAL_WORLD_SIZE": "1"}, 8),
        ({"LOCAL_WORLD_SIZE": "1", "SLURM_CPUS_PER_TASK": "3"}, 3),
    ],
)
def test_the_cores_of_a_rank(environment: pytest.MonkeyPatch, variables: dict[str, str], cores: int) -> None:
    environment.setattr("shodh_moe.base.cores.bound_to", lambda process=0: set(range(8)))
    environment.setattr("shodh_moe.base.cores.cpu_quotas", lambda: iter([]))
    for name, value in {"LOCAL_WORLD_SIZE": "2", **variables}.items():
        environment.setenv(name, value)
    assert cores_of_rank() == cores


def test_mpirun_without_mpi4py_is_refused(environment: pytest.MonkeyPatch) -> None:
    environment.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match=r"mpi4py cannot be used .*: pip install 'shodh_moe\[mpi\]'"):
        _set(environment, {"OMPI_COMM_WORLD_SIZE": "2"})


def test_hosts_meet_at_an_address_that_all_can_reach() -> None:
    docker, first = "172.17.0.1/16", ["172.17.0.1/16", "192.168.5.1/24", "10.0.0.1/8"]
    assert common_address([first, [docker, "10.0.3.2/8"], ["10.9.0.1/8"]]) == "10.0.0.1"
    assert common_address([first, first]) == "127.0.0.1"
    assert common_address([["10.0.0.1/24"], ["10.0.9.1/24"]]) == "10.0.0.1"


def test_the_network_interface_towards_a_host() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no.such.host.invalid") == ""


def test_the_process_that_holds_a_port() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        assert f"process {os.getpid()}" in port_holder(holder.getsockname()[1])
