"""The user's choice of GPUs reaches every rank, through every launcher: real processes write down their environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.base.network import free_port
from shodh_moe.config import Config
from shodh_moe.launching.devices import environment_of_each_gpu
from shodh_moe.launching.hostfile import count_ranks
from shodh_moe.launching.jobs import resolve_jobs
from shodh_moe.launching.launcher import launch_ranks
from shodh_moe.runs.rank import prepare

SPY = """\
import json, os, sys
from pathlib import Path
from shodh_moe.runs.rank import rank_main

def spy(options):
    Path(os.environ["SHODH_SPY"], os.environ["RANK"]).write_text(json.dumps(dict(os.environ)))

if __name__ == "__main__":
    sys.exit(rank_main("spy", spy))
"""
NAMES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
UUIDS = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,GPU-0f3e8a1b-5555-4106-c12f-20bd9faed9f6"
MIG = "MIG-GPU-8932f937-d72c-4106-c12f-20bd9faed9f6/1/2,MIG-67c6c6c5-7e9a-5e6b-a5a8-5a1b2c3d4e5f"


@pytest.fixture(autouse=True)
def spy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program for ranks that writes the environment of each; returns its file, beside which they write."""
    for name in os.environ:
        if name in NAMES or name.startswith(("SLURM", "OMPI", "PMI")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SHODH_SPY", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spy_rank.py").write_text(SPY)
    return tmp_path / "spy_rank.py"


def _seen(folder: Path, ranks: int = 2, name: str = NAMES[0]) -> list[str | None]:
    """Return the variable of every rank."""
    return [json.loads((folder / str(rank)).read_text()).get(name) for rank in range(ranks)]


def _run(*command: str, **variables: str) -> None:
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.distributed
@pytest.mark.parametrize("given", ["3,2", "", f"{UUIDS},{MIG}", "5"])
def test_ranks_of_the_own_launcher_get_the_list_that_was_given(
    spy: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert launch_ranks(Config.model_validate({}), spy.parent, "auto", "spy_rank") == 0
    assert _seen(spy.parent) == [given, given]


@pytest.mark.distributed
def test_the_list_of_amd_gpus_is_kept(spy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "3,2")
    assert launch_ranks(Config.model_validate({}), spy.parent, "auto", "spy_rank") == 0
    assert _seen(spy.parent, name="HIP_VISIBLE_DEVICES") == ["3,2", "3,2"]
    assert _seen(spy.parent) == [None, None], "DeepSpeed's list would select among those"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("options", "given", "seen"),
    [
        (["--num_gpus", "2"], UUIDS, UUIDS),
        (["--num_gpus", "2"], "", ""),
        (["--include", "localhost:0,1"], "3,2", "0,1"),  # an option that names GPUs is the nearer choice
    ],
)
def test_ranks_of_the_deepspeed_command(spy: Path, options: list[str], given: str, seen: str) -> None:
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *options, "--master_port", str(free_port())]
    # Without a GPU, DeepSpeed counts a machine's NUMA nodes, of which --include could only name one.
    _run(*command, str(spy), "--config", "none", CUDA_VISIBLE_DEVICES=given, LOCAL_SIZE="2")
    assert _seen(spy.parent) == [seen, seen]


@pytest.mark.distributed
@pytest.mark.parametrize("given", ["3,2", ""])
def test_ranks_of_torchrun_and_of_no_launcher(spy: Path, given: str) -> None:
    elastic = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    _run(*elastic, str(spy), "--config", "none", CUDA_VISIBLE_DEVICES=given)
    assert _seen(spy.parent) == [given, given]
    (spy.parent / "0").unlink()
    _run(sys.executable, str(spy), "--config", "none", CUDA_VISIBLE_DEVICES=given)
    assert _seen(spy.parent, 1) == [given]


@pytest.mark.distributed
def test_a_task_of_srun_uses_a_gpu_of_its_own_list(spy: Path) -> None:
    task = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "a", "SLURM_STEP_NUM_TASKS": "2"}
    task |= {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    for given, local in (("GPU-1", "0"), ("3,2", "1"), ("", "1")):
        _run(sys.executable, str(spy), "--config", "none", CUDA_VISIBLE_DEVICES=given, **task)
        seen = json.loads((spy.parent / "1").read_text())
        assert (seen["CUDA_VISIBLE_DEVICES"], seen["LOCAL_RANK"]) == (given, local)


# Hosts. The ssh and pdsh of these tests start the commands of all hosts on this one, in a bare environment.

PDSH = """\
#!/bin/bash
while [[ $1 != -w ]]; do shift; done
hosts=${2//,/ }; shift 2; number=0
for host in $hosts; do
    line="$*"; env -i PATH="$PATH" $HOST_VARIABLES bash -c "${line//%n/$number}" & number=$((number + 1))
done
wait
"""

SSH = """\
#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == -o ]] && shift; shift; done
bash -c "$2"
"""


@pytest.fixture
def hosts(spy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = spy.parent / "bin"
    folder.mkdir()
    (folder / "pdsh").write_text(PDSH)
    (folder / "ssh").write_text(SSH)
    for path in folder.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("HOST_VARIABLES", "")
    (spy.parent / "hosts").write_text("one slots=1\ntwo slots=1\n")
    return spy.parent / "hosts"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("here", "there", "seen"),
    [("3,2", "", "3,2"), ("", "CUDA_VISIBLE_DEVICES=5", ""), (None, "CUDA_VISIBLE_DEVICES=5", "5")],
)
def test_hosts_get_the_list_of_the_command_or_else_their_own(
    spy: Path, hosts: Path, monkeypatch: pytest.MonkeyPatch, here: str | None, there: str, seen: str
) -> None:
    if here is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", here)
    monkeypatch.setenv("HOST_VARIABLES", there)
    config = Config.model_validate({"parallel": {"hostfile": str(hosts)}})
    assert launch_ranks(config, spy.parent, "auto", "spy_rank") == 0
    assert _seen(spy.parent) == [seen, seen]


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        ("one slots=1\ntwo slots=3\n", "3,2", "two has slots=3 in the hostfile, and CUDA_VISIBLE_DEVICES=3,2"),
        (
            "one slots=1\ntwo slots=1\n",
            UUIDS,
            "a GPU of one machine, and the hostfile has 2 hosts",
        ),
    ],
)
def test_a_list_that_hosts_cannot_use_is_refused(
    hosts: Path, monkeypatch: pytest.MonkeyPatch, text: str, given: str, message: str
) -> None:
    hosts.write_text(text)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    config = Config.model_validate({"parallel": {"hostfile": str(hosts)}})
    with pytest.raises(UserError, match=message):
        launch_ranks(config, hosts.parent, "auto", "spy_rank")


# Counting. torch reads CUDA_VISIBLE_DEVICES itself; a machine with four GPUs is pretended.


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR")

    def count() -> int:
        given = torch.cuda._parse_visible_devices()
        mig = bool(given) and str(given[0]).startswith("MIG-")
        return 1 if mig else len([gpu for gpu in given if not isinstance(gpu, int) or gpu < 4])

    monkeypatch.setattr(torch.cuda, "device_count", count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count() > 0)


@pytest.mark.parametrize(
    ("given", "ranks", "gpus"),
    [
        (None, 4, ["0", "1", "2", "3"]),
        ("3,2", 2, ["3", "2"]),
        ("3, 2", 2, ["3", "2"]),
        ("1,-1,2", 1, ["1"]),  # CUDA stops at a number that no GPU has
        (UUIDS, 2, UUIDS.split(",")),
        (MIG, 1, MIG.split(",")),  # CUDA shows a process one MIG device at most
    ],
)
def test_processes_and_jobs_count_the_gpus_that_were_given(
    four_gpus: None, monkeypatch: pytest.MonkeyPatch, given: str | None, ranks: int, gpus: list[str]
) -> None:
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert count_ranks(Config.model_validate({})) == ranks
    assert environment_of_each_gpu() == [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus]
    assert resolve_jobs("auto") == len(gpus)


def test_without_gpus_jobs_count_cores(four_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert environment_of_each_gpu() == []
    assert count_ranks(Config.model_validate({})) == 2
    assert 1 <= resolve_jobs("auto") <= (os.cpu_count() or 1)


def test_more_ranks_than_gpus_are_refused(four_gpus: None, spy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,2")
    with pytest.raises(UserError, match=r"processes is 3, and this process may use 2 GPUs \(CUDA_VISIBLE_DEVICES=3,2"):
        launch_ranks(Config.model_validate({"parallel": {"processes": 3}}), spy.parent, "auto", "spy_rank")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"LOCAL_RANK": "2", "CUDA_VISIBLE_DEVICES": "3,2"},
            r"LOCAL_RANK 2 may use 2 GPUs \(CUDA_VISIBLE_DEVICES=3,2",
        ),
        ({"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cuda"}, "may use 0 GPUs"),
        ({"LOCAL_RANK": "0", "DS_ACCELERATOR": "tpu"}, "DS_ACCELERATOR is 'tpu': set it to cpu or cuda"),
    ],
)
def test_a_rank_without_a_gpu_of_its_own_is_refused(
    four_gpus: None, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        prepare()
