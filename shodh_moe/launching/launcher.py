"""Start the ranks of a run with DeepSpeed's launcher, on this host or over ssh on the hosts of a hostfile.

DeepSpeed's multi-host launch builds a command line for a remote shell with little quoting, forwards few variables, does
not check whether a host answers, and kills every DeepSpeed job on a host when it is interrupted. Therefore we check
everything in that line, pass variables in a file, probe the hosts first, and let the `sentinel` end ranks.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil

from shodh_moe.base.cores import available_cores
from shodh_moe.base.errors import EXIT_FAILED, EXIT_REQUEUE, EXIT_USER_ERROR, UserError
from shodh_moe.base.lock import RUN_LOCK, holder_of
from shodh_moe.base.network import free_port
from shodh_moe.base.polling import wait_until
from shodh_moe.base.variables import master_port
from shodh_moe.config import RunConfig
from shodh_moe.launching.devices import VARIABLES, accelerator, numbers_for_deepspeed, require_choice_fits
from shodh_moe.launching.guard import guarded
from shodh_moe.launching.hostfile import Host, count_ranks, read_hostfile, require_startable, write_hostfile
from shodh_moe.launching.probe import probe_hosts
from shodh_moe.launching.sentinel import KILL, PAUSE_S, STOP, STOP_FILE
from shodh_moe.launching.ssh import TIME_VARIABLE, group_failures, launcher_ssh_arguments, some, time_limit
from shodh_moe.launching.stop_signals import on_stop_signals

REACH_S = 10.0  # time limit for every host to answer
END_S = 20.0  # time limit for ranks to end after an interruption
ORPHANS_S = 600.0  # time limit for ranks that have lost their launcher to write a checkpoint and end
FORWARDED = ("SHODH_", "DS_", "GLOO_", "NCCL_", "TORCH_", "OMP_", "MKL_", "CUDA_DEVICE_MAX", "TRITON_", "HDF5_", "FI_")
# Prefixes of the variables that DeepSpeed exports to the hosts by itself, in double quotes if they need any.
EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL", "LD_LIBRARY", "PATH")
# Text that neither a shell nor pdsh, which replaces %h and the like, interprets: as it is, and in double quotes.
_PLAIN = re.compile(r"[\w@+=:,./-]+", re.ASCII)
_QUOTABLE = re.compile(r"[^\"$`\\%\n]*")


class TrainingFailed(Exception):
    """The launcher returned a rank's error code; the error has already been printed.

    Attributes:
        exit_code: exit code for our own process: codes with a meaning are kept, all others become 1.
    """

    def __init__(self, code: int):
        self.exit_code = code if code in (EXIT_USER_ERROR, EXIT_REQUEUE) else EXIT_FAILED
        super().__init__(f"training ended with exit code {self.exit_code}")


class HostsUnusable(UserError):
    """Hosts of the hostfile do not answer, or lack this Python."""


def launch_ranks(
    config: RunConfig, run: Path, resume: str, module: str, finished: Callable[[], bool] = lambda: True
) -> int:
    """Train in the run folder and return the launcher's exit code, which is that of the ranks.

    SIGTERM, SIGUSR1 and SIGHUP make the ranks write a checkpoint and end. A second signal (other than SIGHUP), or
    Ctrl-C, ends them at once.

    Args:
        run: the run folder, which holds ``config.yaml``.
        resume: ``auto``, or the folder of the checkpoint to resume.
        module: name of the module that each rank runs.
        finished: returns whether training has made its last checkpoint, without which 0 is never returned.

    Raises:
        HostsUnusable: hosts do not answer, or lack this Python.
        UserError: the hostfile cannot be used.
    """
    stop_file = run / f"{STOP_FILE}{uuid.uuid4().hex[:8]}"
    training = ["--module", module, "--config", str(run / "config.yaml")]
    training += ["--resume", resume, "--stop-file", str(stop_file)]
    if config.parallel.hostfile:
        command, environment = _on_hosts(Path(config.parallel.hostfile), run, training)
    else:
        command, environment = _here(count_ranks(config), training)
    asked: list[bool] = []

    def pass_on() -> None:
        asked.append(True)
        if len(asked) > 1:
            raise KeyboardInterrupt
        stop_file.write_text(STOP)

    with guarded(stop_file) as guard, on_stop_signals(pass_on):
        launcher = subprocess.Popen(command, env=environment, start_new_session=True)
        guard.watch(launcher.pid)
        try:
            code = launcher.wait()
            if code < 0:  # the launcher was killed, and its ranks go on
                stop_file.write_text(STOP)
                while _group_is_alive(launcher.pid):
                    time.sleep(PAUSE_S)
            # If pdsh is killed, DeepSpeed's runner returns 0, and ssh and the ranks go on.
            if code == 0 and (not finished() or holder_of(run / RUN_LOCK) is not None):
                print("the launcher has ended before the ranks: they are asked to end as well", file=sys.stderr)
                stop_file.write_text(STOP)
                wait_until(lambda: holder_of(run / RUN_LOCK) is None, ORPHANS_S)
                code = 0 if finished() else EXIT_FAILED
        except BaseException:
            # Checkpoints are complete at any moment, so the ranks may be killed.
            if config.parallel.hostfile:
                stop_file.write_text(KILL)  # the file is kept for ranks that are still starting
            else:
                os.killpg(launcher.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(timeout=END_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            raise
    if config.parallel.hostfile and code not in (0, EXIT_REQUEUE):
        with contextlib.suppress(OSError):  # the disk may be full
            stop_file.write_text(KILL)  # to ranks on hosts that are cut off, which would keep the run locked
    else:
        stop_file.unlink(missing_ok=True)
    return code


# The launcher's own errors only repeat the exit code of a rank that has already reported the reason.
_QUIET = ["--log_level", "critical"]


def _group_is_alive(group: int) -> bool:
    """Whether a process group has processes that have not ended."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def _here(world: int, training: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command that starts ``world`` ranks on this host, and its environment."""
    # This is what DeepSpeed's runner starts. The runner itself would ignore CUDA_VISIBLE_DEVICES, or require numbers.
    gpus = json.dumps({"localhost": numbers_for_deepspeed(world)})
    command = [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
    command += ["--world_info", base64.urlsafe_b64encode(gpus.encode()).decode(), "--master_addr", "127.0.0.1"]
    command += ["--master_port", str(free_port()), *_QUIET]
    defaults = {
        "DS_ACCELERATOR": accelerator(),
        "OMP_NUM_THREADS": str(max(1, available_cores() // world)),
        "DEEPSPEED_LOG_LEVEL": "warning",
    }
    return [*command, *training], {**defaults, **os.environ}


def _on_hosts(hostfile: Path, run: Path, training: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command that starts ranks on the hosts of a hostfile, and its environment."""
    hosts = read_hostfile(hostfile)
    require_startable(hosts)
    require_choice_fits({host.name: host.slots for host in hosts})
    for what, text in (
        ("the working folder", os.getcwd()),
        ("the path of Python", sys.executable),
        *(("a setting", text) for text in training),
    ):
        _require_plain(what, text)
    if not shutil.which("pdsh"):
        raise UserError("no pdsh on this host's PATH, which DeepSpeed needs to start ranks on other hosts: install it")
    address, port = _meeting_point(hosts)
    # DeepSpeed reads hostfiles differently: it would take a byte order mark for a part of the first name.
    copy = run / ".launch_hosts"
    write_hostfile(copy, hosts)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *_QUIET, "--hostfile", str(copy)]
    command += ["--force_multi", "--no_ssh_check", "--master_addr", address, "--master_port", port]
    environment = {**os.environ, "DEEPSPEED_LOG_LEVEL": "warning"}
    environment["DS_ENV_FILE"] = str(_write_variables(run / ".launch_env"))
    environment["PDSH_SSH_ARGS_APPEND"] = launcher_ssh_arguments()
    return [*command, *training], environment


def _require_plain(what: str, text: str) -> None:
    """Check a text that DeepSpeed passes to a shell unquoted. Raises: UserError: a shell would interpret it."""
    if not _PLAIN.fullmatch(text):
        raise UserError(
            f"{what} is {text!r}, and DeepSpeed's launcher passes it to a shell on every host unquoted: "
            "use only letters, digits and . _ - / + = : , @"
        )


def _meeting_point(hosts: list[Host]) -> tuple[str, str]:
    """Return address and port of rank 0, after checking that every host answers and has this Python version."""
    facts = probe_hosts([host.name for host in hosts], time_limit(REACH_S), brief=True)
    here = ".".join(map(str, sys.version_info[:3]))
    wrong = {}
    for host, found in facts.items():
        if "error" in found:
            wrong[host] = found["error"]
        elif found["python"] != here:
            wrong[host] = f"{sys.executable} is Python {found['python']}, here {here}"
    if wrong:
        kinds = group_failures(wrong)
        text = "; ".join(f"{some(names)}: {error}" for error, names in kinds[:3])
        if len(kinds) > 3:
            text += f"; {sum(len(names) for _, names in kinds[3:])} more hosts with other errors"
        remedy = "see `shodh doctor --hostfile`"
        if any(error.startswith("not asked") for error in wrong.values()):
            remedy += f", or allow more time, as in {TIME_VARIABLE}=60"
        raise HostsUnusable(f"{len(wrong)} of {len(hosts)} hosts cannot be used: {text}: {remedy}")
    first = facts[hosts[0].name]
    # The bridge of a container engine has the same address on every host.
    others = {a for host in hosts[1:] for a in facts[host.name]["addresses"]}
    address = os.environ.get("MASTER_ADDR") or next((a for a in first["addresses"] if a not in others), "127.0.0.1")
    _require_plain("MASTER_ADDR", address)
    return address, str(master_port() or first["port"])


def _write_variables(path: Path) -> Path:
    """Write the variables for the ranks on all hosts, ours and the user's, to the file that DeepSpeed reads."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    forwarded = (*FORWARDED, *VARIABLES)
    lines = [f"{k}={v}" for k, v in os.environ.items() if k.startswith(forwarded) and k != "DS_ENV_FILE"]
    for given in {Path.home() / name, Path.cwd() / name}:
        if given.is_file():
            lines += [line.strip() for line in given.read_text().splitlines() if line.strip() and line[0] != "#"]
    for key, value in os.environ.items():
        if key.startswith(EXPORTED):
            _require_plain("the name of a variable", key)
            if not _QUOTABLE.fullmatch(value):
                _require_plain(f"the variable {key}", value)
    for line in lines:
        key, _, value = line.partition("=")
        _require_plain("the name of a variable", key)
        if value:
            _require_plain(f"the variable {key}", value)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path.absolute()
