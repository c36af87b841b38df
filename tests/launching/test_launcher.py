"""Every way to start the same training on one host. tests/cluster covers several hosts."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from shodh_moe.base.errors import EXIT_FAILED
from shodh_moe.base.network import free_port
from shodh_moe.config.load import load_config
from shodh_moe.launching.launcher import launch_ranks
from shodh_moe.launching.sentinel import KILL
from tests import forked
from tests.training.synthetic import write_job

pytestmark = pytest.mark.distributed

SCRIPT = Path(__file__).parents[2] / "launch/pretrain.py"
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner"]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("launch"), steps=2, checkpoint_every=2)


def _run(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=110)


def _script(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run launch/pretrain.py without any launcher."""
    return forked.run(SCRIPT, arguments, [{**os.environ, **variables}], folder, timeout=110)


def _weights(folder: Path, name: str) -> list[dict]:
    return [load_file(path) for path in sorted((folder / "runs" / name / "checkpoints/2").glob("*.safetensors"))]


def _same(one: list[dict], other: list[dict]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a) for a, b in zip(one, other, strict=True)
    )


def test_deepspeed_torchrun_and_one_process_start_the_same_training(case: Path) -> None:
    script = [str(SCRIPT), "--config", "config.yaml", "--name"]
    elastic = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    starts = {
        "deepspeed": [*DEEPSPEED, "--num_gpus", "2", "--master_port", str(free_port()), *script, "deepspeed"],
        "torchrun": [*elastic, *script, "torchrun"],
        "alone": [sys.executable, *script, "alone"],
    }
    for name, command in starts.items():
        done = _run(case, *command)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{1 if name == 'alone' else 2} ranks" in done.stdout
    assert _same(_weights(case, "deepspeed"), _weights(case, "torchrun"))
    assert len(_weights(case, "alone")) == 1


def test_a_missing_hostfile_that_deepspeed_ignores_is_refused(case: Path) -> None:
    """DeepSpeed's launcher would only warn and train on this host alone."""
    script = [str(SCRIPT), "--config", "config.yaml", "--name", "missing"]
    done = _run(case, *DEEPSPEED, "--hostfile", "nowhere", "--num_gpus", "1", *script)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "error: deepspeed --hostfile nowhere does not exist" in done.stderr
    assert not (case / "runs/missing").exists()
    done = _run(case, *DEEPSPEED, "--num_gpus", "2", *script, "--hostfile", "nowhere")
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("error: hostfile nowhere does not exist: check --hostfile") == 1


def test_a_port_in_use_is_reported_with_its_holder(case: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        ranks = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        done = _script(case, "--config", "config.yaml", "--name", "taken", **ranks)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"error: rank 0 cannot listen on 127.0.0.1:{port}" in done.stderr
    assert f"process {os.getpid()}): set MASTER_ADDR to this host and MASTER_PORT to a free port" in done.stderr


@pytest.mark.parametrize("value", ["tcp://10.0.0.1:29500", "65536", "x"])
def test_a_port_that_is_none_is_reported_in_one_line(case: Path, value: str) -> None:
    """Kubernetes sets the first one in every container if there is a service named "master"."""
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for variables in (ranks, {}):
        done = _script(case, "--config", "config.yaml", "--name", "port", **variables, MASTER_PORT=value)
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.startswith(f"error: the variable MASTER_PORT is '{value}', not a whole number")
        assert done.stderr.count("\n") == 1


def test_ranks_without_a_local_rank_train(case: Path) -> None:
    """Kubeflow's PyTorchJob starts ranks in containers of their own, without LOCAL_RANK."""
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environments = [{**common, "RANK": str(rank)} for rank in range(2)]
    done = forked.run(SCRIPT, ["--config", "config.yaml", "--name", "kubeflow"], environments, case, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks" in done.stdout


# Hosts behind a fake ssh: errors are found before anything starts.


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ``ssh`` that runs commands on this host; ``dead`` never answers, ``old`` has another Python, ``bare`` none."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(
        "#!/bin/bash\n"
        'echo "$*" >>"$0.log"\n'
        "while [[ $1 == -* ]]; do [[ $1 == -[op] ]] && shift; shift; done; host=$1; shift\n"
        "case $host in\n"
        "dead) exec sleep 60 ;;\n"
        "closed) echo 'ssh: connect to host closed port 22: Connection refused' >&2; exit 255 ;;\n"
        "lost) echo 'ssh: Could not resolve hostname lost: Name or service not known' >&2; exit 255 ;;\n"
        "bare) echo 'bash: line 1: python: No such file or directory' >&2; exit 127 ;;\n"
        'old) bash -c "$*" | sed \'s/"python": "[^"]*"/"python": "3.9.1"/\' ;;\n'
        '*) bash -c "$*" ;;\n'
        "esac\n"
    )
    (folder / "pdsh").write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >{folder}/pdsh.log\n')
    for path in folder.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        ("good slots=1\ndead slots=1\n", "hosts cannot be used: dead: no answer within 10 s: see `shodh doctor"),
        ("good slots=1\nclosed slots=1\n", "closed: ssh: connect to host closed port 22: Connection refused"),
        ("lost slots=1\n", "lost: ssh: Could not resolve hostname lost: Name or service not known"),
        ("bare slots=1\n", "bare: bash: line 1: python: No such file or directory"),
        ("good slots=1\nold slots=1\n", f"old: {sys.executable} is Python 3.9.1, here 3."),
        ("good slots=1\n$(id) slots=1\n", "'$(id)' is not a valid host name"),
    ],
)
def test_unusable_hosts_are_named(case: Path, fake_ssh: Path, tmp_path: Path, hosts: str, message: str) -> None:
    (tmp_path / "hosts").write_text(hosts)
    command = ["--config", "config.yaml", "--name", "none", "--hostfile", str(tmp_path / "hosts")]
    done = _script(case, *command)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (fake_ssh / "pdsh.log").exists(), "nothing was started"


def test_many_unusable_hosts_are_summarised_by_kind(case: Path, fake_ssh: Path, tmp_path: Path) -> None:
    fails = 'echo "ssh: connect to host $host port 22: Connection refused" >&2; exit 255'
    script = (fake_ssh / "ssh").read_text().replace("case $host in\n", f"case $host in\nclosed*) {fails} ;;\n")
    (fake_ssh / "ssh").write_text(script)
    (tmp_path / "hosts").write_text("lost slots=1\n" + "".join(f"closed{n} slots=1\n" for n in range(20)))
    command = ["--config", "config.yaml", "--name", "none", "--hostfile", str(tmp_path / "hosts")]
    done = _script(case, *command)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "error: 21 of 21 hosts cannot be used: lost: ssh: Could not resolve" in done.stderr
    assert "; closed0, closed1, closed2, closed3, closed4 and 15 more: ssh: connect to host closed0" in done.stderr
    assert done.stderr.count("Connection refused") == 1


def test_deepspeed_gets_the_hosts_as_they_were_read(case: Path, fake_ssh: Path, tmp_path: Path) -> None:
    """It would take a byte order mark for a part of the first name."""
    (tmp_path / "hosts").write_text("\ufeffgood slots=1\nfi_ne slots=1  # comment\n", encoding="utf-8")
    command = ["--config", "config.yaml", "--name", "mark", "--hostfile", str(tmp_path / "hosts")]
    done = _script(case, *command, PDSH_SSH_ARGS_APPEND="-p 2222")
    words = (fake_ssh / "pdsh.log").read_text().splitlines()
    assert words[words.index("-w") + 1] == "good,fi_ne", done.stdout + done.stderr
    calls = (fake_ssh / "ssh.log").read_text().splitlines()
    assert len(calls) == 2
    assert all(" -p 2222 " in call for call in calls)


def test_the_ssh_port_given_to_deepspeed_holds_for_a_hostfile_after_the_script(case, fake_ssh, tmp_path) -> None:
    (tmp_path / "hosts").write_text("good slots=1\nclosed slots=1\n")
    script = [str(SCRIPT), "--config", "config.yaml", "--name", "port", "--hostfile", str(tmp_path / "hosts")]
    done = _run(case, *DEEPSPEED, "--num_gpus", "1", "--ssh_port", "2222", *script)
    assert "1 of 2 hosts cannot be used: closed" in done.stderr
    calls = (fake_ssh / "ssh.log").read_text().splitlines()
    assert len(calls) == 2
    assert all(" -p 2222 " in call for call in calls)


def test_values_that_a_remote_shell_would_interpret_are_refused(case: Path, fake_ssh: Path, tmp_path: Path) -> None:
    def start(folder: Path, **variables: str) -> str:
        folder.mkdir(exist_ok=True)
        (folder / "hosts").write_text("good slots=1\nfine slots=1\n")
        command = ["--config", str(case / "config.yaml"), "--hostfile", "hosts", f"runs={tmp_path}/runs"]
        done = _script(folder, *command, **variables)
        assert done.returncode == 2 or variables.get("FINE"), done.stdout + done.stderr
        return done.stderr

    (tmp_path / "f").mkdir()
    for name in ("data", "tokenizers"):
        (case / name).mkdir(exist_ok=True)
        for folder in ("a b", "c;touch x", "d$(touch x)", "%h", "f"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / name).symlink_to(case / name)
    for folder in ("a b", "c;touch x", "d$(touch x)", "%h"):
        assert f"the working folder is {str(tmp_path / folder)!r}" in start(tmp_path / folder)
    for value in ("$(touch x)", "`touch x`", 'a"b', "a b", "a\\b"):
        assert "the variable NCCL_X is" in start(tmp_path / "f", NCCL_X=value)
    assert "the variable PYTHONPATH is" in start(tmp_path / "f", PYTHONPATH="/$(touch x)")
    assert "the name of a variable is 'PYTHON;touch x'" in start(tmp_path / "f", **{"PYTHON;touch x": "1"})
    assert not (fake_ssh / "pdsh.log").exists()
    start(tmp_path / "f", NCCL_X="good,1=2", FINE="yes")
    words = (fake_ssh / "pdsh.log").read_text().splitlines()
    assert words[words.index("-w") + 1] == "good,fine"
    assert any("export NCCL_X=good,1=2;" in word for word in words)
    assert not list(tmp_path.rglob("x"))


def test_the_ranks_meet_at_an_address_of_the_first_host(
    case: Path, fake_ssh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(case)
    (tmp_path / "hosts").write_text("good slots=1\nfine slots=1\n")
    config = load_config(case / "config.yaml", [f"parallel.hostfile={tmp_path / 'hosts'}"])
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.7")
    (tmp_path / "run").mkdir()
    assert launch_ranks(config, tmp_path / "run", "auto", "shodh_moe.runs.pretrain_rank") == 0
    pdsh_arguments = (fake_ssh / "pdsh.log").read_text()
    assert "--master_addr=192.0.2.7" in pdsh_arguments
    assert re.search(r"--master_port=\d{4,5}\n", pdsh_arguments)
    assert not list((tmp_path / "run").glob(".stop-*"))


def test_a_launcher_that_succeeds_before_training_has_finished_has_failed(
    case: Path, fake_ssh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """DeepSpeed's runner returns 0 if pdsh is killed, and the ranks go on."""
    monkeypatch.chdir(case)
    (tmp_path / "hosts").write_text("good slots=1\nfine slots=1\n")
    config = load_config(case / "config.yaml", [f"parallel.hostfile={tmp_path / 'hosts'}"])
    run = tmp_path / "run"
    run.mkdir()
    assert launch_ranks(config, run, "auto", "shodh_moe.runs.pretrain_rank", lambda: False) == EXIT_FAILED
    (found,) = run.glob(".stop-*")
    assert found.read_text() == KILL, "for ranks that were still starting"
    assert "the launcher has ended before the ranks" in capsys.readouterr().err
