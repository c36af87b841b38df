"""A real SLURM of two nodes on this machine, which ends with the process that started it.

Its daemons run in their own process namespace, so that everything they start ends with them, however the test ends.
Their key, sockets, ports, state and logs are separate, and the machine's own SLURM is not touched.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.support.packages import lacking

_SLURM = dict.fromkeys(("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel"), "slurm-wlm")
PACKAGES = {"munged": "munge", **_SLURM, "unshare": "util-linux"}  # by program
NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child=KILL")
NODES = ("n1", "n2")
GPUS = 32  # GPUs that SLURM counts on each node; links to /dev/null stand for them

# One machine plays both nodes, which share its address and differ by port. A requeued job waits cred_expire seconds,
# 120 by default. config_overrides lets a small machine claim the cores, GPUs and gigabytes that the scripts request.
CONF = """\
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
JobRequeue=1
KillWait=30
OverTimeLimit=0
MinJobAge=3600
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = (
    "NodeName={name} NodeAddr=127.0.0.1 NodeHostname={host} Port={port} "
    "CPUs=512 RealMemory=4000000 Gres=gpu:{gpus} State=UNKNOWN"
)


def missing() -> str:
    """Return why SLURM cannot run here, "" if it can; as root, first install missing Debian packages."""
    if os.geteuid():
        return "the SLURM tests need root: their daemons run as root in a process namespace of their own"
    if reason := lacking(PACKAGES):
        return f"the SLURM tests need more: {reason}"
    tried = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"the SLURM tests need a process namespace: {tried.stderr.strip()}"


@dataclass(frozen=True)
class Slurm:
    """A running SLURM. Its commands run with ``environment``, which the submitted jobs inherit."""

    folder: Path
    environment: dict[str, str]

    def command(self, *arguments: str, cwd: Path | None = None) -> str:
        """Run ``sbatch``, ``scontrol``, ... and return the output; if it fails, raise RuntimeError with the output."""
        done = subprocess.run(
            arguments, cwd=cwd, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)}: exit code {done.returncode}: {done.stdout}")
        return done.stdout

    def submit(self, script: Path, *options: str, cwd: Path, **variables: str) -> str:
        """Submit a batch script from ``cwd`` with additional environment variables; return the job's id.

        ``options`` are options of sbatch; those after ``--`` are arguments of the script.
        """
        export = [f"{name}={value}" for name, value in variables.items()]
        split = options.index("--") if "--" in options else len(options)
        command = [f"--output={self.folder}/%j.out", *options[:split], str(script), *options[split + 1 :]]
        return self.command("env", *export, "sbatch", "--parsable", *command, cwd=cwd).strip()

    def job(self, job_id: str) -> dict[str, str]:
        """Return the fields of ``scontrol show job``, each up to its first space; an array task is ``<id>_<task>``."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.command("scontrol", "--oneliner", "show", "job", job_id)))

    def wait(self, job_id: str, timeout: float, states: tuple[str, ...] = ()) -> dict[str, str]:
        """Wait until a job is in one of ``states``, by default until it has ended; return its fields.

        Raises:
            TimeoutError: the message has the last state and the end of the job's output.
        """
        deadline = time.monotonic() + timeout
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
        while (job := self.job(job_id))["JobState"] not in (states or ended):
            if time.monotonic() > deadline:
                output = self.output(job_id)[-2000:]
                raise TimeoutError(f"job {job_id} is {job['JobState']} ({job['Reason']}): {output}")
            time.sleep(0.1)
        return job

    def output(self, job_id: str) -> str:
        """Return what the job has written so far, over all its starts."""
        path = self.folder / f"{self.job(job_id)['JobId']}.out"
        return path.read_text(errors="replace") if path.is_file() else ""


@contextmanager
def running(folder: Path, **environment: str) -> Iterator[Slurm]:
    """Run two nodes that are ready for jobs; their daemons keep everything in ``folder`` and end with the block.

    Args:
        folder: must have a short path, since the kernel limits the path of a socket in it to 107 characters.
        environment: further variables for the commands.

    Raises:
        RuntimeError: the nodes are not ready within 30 s; the message has the logs.
    """
    host = socket.gethostname().partition(".")[0]
    first, *others = free_ports(1 + len(NODES))
    nodes = [NODE.format(name=name, gpus=GPUS, host=host, port=port) for name, port in zip(NODES, others, strict=True)]
    for name in ("state", *(f"spool_{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=host, port=first, folder=folder, nodes="\n".join(nodes)))
    for number in range(GPUS):
        (folder / f"gpu{number}").symlink_to("/dev/null")
    (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    # --force is needed as root, in a folder that others cannot enter.
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}"]
    munged += [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
    daemons = [munged, ["slurmctld", "-D", "-i", "-f", str(conf)]]
    daemons += [["slurmd", "-D", "-N", node, "-f", str(conf)] for node in NODES]
    socket_made = f"until [ -S {shlex.quote(str(folder / 'munge.socket'))} ]; do sleep 0.02; done"
    lines = [f"{shlex.join(command)} &" for command in daemons]
    script = "\n".join([lines[0], socket_made, *lines[1:], "wait"])

    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
    slurm = Slurm(folder, {**kept, "SLURM_CONF": str(conf), **environment})
    with ExitStack() as stack:
        log = stack.enter_context((folder / "daemons.log").open("wb"))
        process = subprocess.Popen(
            [*NAMESPACE, "bash", "-c", script],
            env=slurm.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)  # the kernel then ends the namespace and everything in it
        _wait_until_ready(slurm, process)
        yield slurm


def _wait_until_ready(slurm: Slurm, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    output = ""
    while process.poll() is None and time.monotonic() < deadline:
        try:
            output = slurm.command("sinfo", "--noheader", "--Node", "--partition=all", "--format=%T")
        except RuntimeError as error:
            output = str(error)
        if output.split() == ["idle"] * len(NODES):
            return
        time.sleep(0.1)
    logs = "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(slurm.folder.glob("*.log")))
    raise RuntimeError(f"the two nodes are not ready: {output}\n{logs}")


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def free_ports(count: int) -> list[int]:
    """Return different TCP ports of this machine that are free now."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
