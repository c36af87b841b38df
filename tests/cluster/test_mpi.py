"""Several ranks under a real ``mpirun`` generate the same dataset as one process, even after a rank is killed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from shodh_moe.base.errors import EXIT_REQUEUE
from shodh_moe.base.files import sha256
from tests.tiny import write_config

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "generate_data.py"
SLOW = ("data.domains.open_channel.spinup_steps=500", "data.domains.porous_media.spinup_steps=500")
RANKS = 4


@pytest.fixture(scope="module")
def mpirun() -> str:
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if not found or not importlib.util.find_spec("mpi4py"):
        pytest.skip("mpirun or mpi4py is not installed: pip install 'shodh_moe[mpi]'")
    return found


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serial")
    command = [sys.executable, str(SCRIPT), "--config", str(write_config(folder)), *SLOW]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=120)
    return folder


@pytest.fixture
def here(tmp_path: Path) -> Path:
    write_config(tmp_path)
    return tmp_path


def start(mpirun: str, folder: Path, *settings: str, **environment: str) -> subprocess.Popen[str]:
    command = [mpirun, "--oversubscribe", "-n", str(RANKS)]
    if os.geteuid() == 0:
        command.append("--allow-run-as-root")
    command += [sys.executable, str(SCRIPT), "--config", "tiny.yaml", *SLOW, *settings]
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str], timeout: float = 150) -> tuple[int, str, str]:
    try:
        out, error = process.communicate(timeout=timeout)
    finally:
        # The ranks end with their mpirun, which ends with the session.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, error


def once_writing(process: subprocess.Popen[str], folder: Path) -> subprocess.Popen[str]:
    """Return the process as soon as the first file exists."""
    deadline = time.monotonic() + 120
    while not list(folder.glob("data/*/data/train/*.hdf5")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def hashes(folder: Path) -> dict[str, str]:
    """Hash every file of the dataset, except hidden leftovers."""
    paths = [path for path in (folder / "data").rglob("*") if path.is_file() and path.name[0] != "."]
    return {str(path.relative_to(folder)): sha256(path) for path in paths}


def test_ranks_generate_the_same_files_as_one_process(mpirun: str, here: Path, serial: Path) -> None:
    code, out, error = end(start(mpirun, here))
    assert code == 0, out + error
    assert hashes(here) == hashes(serial)
    assert f"{RANKS} ranks, 8 trajectories to generate" in out
    assert error.count("simulating: 8/8") == 1
    assert out.count("[data] data/tiny-") == 1
    done = subprocess.run(
        [sys.executable, "-m", "shodh_moe.cli", "data", "generate", "--config", "tiny.yaml", *SLOW],
        cwd=here,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "[data] unchanged" in done.stdout, done.stdout + done.stderr


def test_a_killed_rank_ends_the_job_and_the_next_job_completes_it(mpirun: str, here: Path, serial: Path) -> None:
    process = once_writing(start(mpirun, here), here)
    children = psutil.Process(process.pid).children(recursive=True)
    ranks = [child for child in children if any("generate_data.py" in word for word in child.cmdline())]
    assert len(ranks) == RANKS
    ranks[2].kill()
    code, out, error = end(process, timeout=30)
    assert code != 0, out + error
    assert not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]
    assert not list(here.glob("data/*/stats.yaml"))
    made = hashes(here)
    code, out, error = end(start(mpirun, here))
    assert code == 0, out + error
    assert hashes(here) == hashes(serial)
    assert f"{8 - len(made)} trajectories to generate" in out


def test_a_signal_to_mpirun_ends_all_ranks_with_the_requeue_exit_code(mpirun: str, here: Path) -> None:
    endless = "data.domains.porous_media.spinup_steps=100000000"
    process = once_writing(start(mpirun, here, endless), here)
    process.send_signal(signal.SIGUSR1)
    code, out, error = end(process, timeout=30)
    assert code == EXIT_REQUEUE, out + error
    assert out.count("stopped by a signal") <= 1, out


def test_an_error_on_one_rank_ends_all_and_is_printed_once(mpirun: str, here: Path) -> None:
    code, out, error = end(start(mpirun, here, "data.domains.porous_media.speed=50"))
    assert code == 2, out + error
    messages = [line for line in error.splitlines() if line.startswith("error")]
    assert len(messages) == 1, error
    assert "data.domains.porous_media.viscosity" in messages[0]
    assert "Traceback" not in error


def test_an_invalid_config_is_reported_once(mpirun: str, here: Path) -> None:
    code, out, error = end(start(mpirun, here, "data.snapshot=3"))
    assert code == 2, out + error
    assert error.count("error: ") == 1, error
    assert "data.snapshot" in error


def test_ranks_without_mpi4py_are_refused(mpirun: str, here: Path, tmp_path: Path) -> None:
    """Without it, every rank would generate all files."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "mpi4py.py").write_text("raise ImportError('no MPI here')")
    code, out, error = end(start(mpirun, here, PYTHONPATH=str(tmp_path / "modules")))
    assert code == 2, out + error
    assert error.count("error: ") == 1, error
    assert "mpirun started 4 processes, but mpi4py cannot be used (no MPI here)" in error
    assert not (here / "data").exists()
