"""A real SLURM of two nodes on this machine, which ends with the process that started it.

Its daemons live in a process namespace of their own, so that whatever they started ends with them, however the test
ends; their key, sockets, ports, state and logs are in one folder. Nothing of the machine's own SLURM is touched.
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

from tests.cluster.packages import lacking

_SLURM = dict.fromkeys(("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel"), "slurm-wlm")
PACKAGES = {"munged": "munge", **_SLURM, "unshare": "util-linux"}  # by program
NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child=KILL")
NODES = ("n1", "n2")
GPUS = 32  # of a node, for SLURM to count: its nodes have /dev/null in their place

# One machine plays both nodes: they share its address and differ by port. A requeued job waits cred_expire seconds,
# 120 by default. config_overrides lets a small machine pass for nodes on which the scripts' own numbers of cores, GPUs
# and gigabytes fit.
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
    """Why there can be no SLURM here, "" if there can; as root, what Debian has is installed first."""
    if os.geteuid():
        return "the SLURM tests need root: their daemons run as root in a process namespace of their own"
    if told := lacking(PACKAGES):
        return f"the SLURM tests need more: {told}"
    tried = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"the SLURM tests need a process namespace: {tried.stderr.strip()}"


@dataclass(frozen=True)
class Slurm:
    """A running SLURM. ``environment`` is that of its commands, and so of the jobs that they submit."""

    folder: Path
    environment: dict[str, str]

    def command(self, *arguments: str, cwd: Path | None = None) -> str:
        """The output of ``sbatch``, ``scontrol``, ...; RuntimeError with it where the command fails."""
        done = subprocess.run(
            arguments, cwd=cwd, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)}: exit code {done.returncode}: {done.stdout}")
        return done.stdout

    def submit(self, script: Path, *options: str, cwd: Path, **variables: str) -> str:
        """Submit a batch script from ``cwd`` with environment variables of its own; the job's id.

        ``options`` are sbatch's, and after ``--`` the script's arguments.
        """
        export = [f"{name}={value}" for name, value in variables.items()]
        split = options.index("--") if "--" in options else len(options)
        mine = [f"--output={self.folder}/%j.out", *options[:split], str(script), *options[split + 1 :]]
        return self.command("env", *export, "sbatch", "--parsable", *mine, cwd=cwd).strip()

    def job(self, job_id: str) -> dict[str, str]:
        """What ``scontrol show job`` says, by field, each up to its first space; an array's task is ``<id>_<task>``."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.command("scontrol", "--oneliner", "show", "job", job_id)))

    def wait(self, job_id: str, timeout: float, states: tuple[str, ...] = ()) -> dict[str, str]:
        """Wait until a job is in one of ``states``, by default until it has ended; its fields.

        Raises:
            TimeoutError: the last fields and the end of the job's output are in the message.
        """
        deadline = time.monotonic() + timeout
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
        while (job := self.job(job_id))["JobState"] not in (states or ended):
            if time.monotonic() > deadline:
                said = self.output(job_id)[-2000:]
                raise TimeoutError(f"job {job_id} is {job['JobState']} ({job['Reason']}): {said}")
            time.sleep(0.1)
        return job

    def output(self, job_id: str) -> str:
        """What the job wrote so far, in all its starts."""
        path = self.folder / f"{self.job(job_id)['JobId']}.out"
        return path.read_text(errors="replace") if path.is_file() else ""


@contextmanager
def running(folder: Path, **environment: str) -> Iterator[Slurm]:
    """Two nodes, ready for jobs, whose daemons keep everything in ``folder``; all is gone after the block.

    Args:
        folder: not long, it holds a socket whose path the kernel limits to 107 characters.
        environment: further variables of the commands.

    Raises:
        RuntimeError: the nodes are not ready within 30 s; the logs are in the message.
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
    # --force: as root, in a folder that others cannot enter.
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
        stack.callback(process.kill)  # and with it, by the kernel, the namespace and all in it
        _wait_until_ready(slurm, process)
        yield slurm


def _wait_until_ready(slurm: Slurm, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    said = ""
    while process.poll() is None and time.monotonic() < deadline:
        try:
            said = slurm.command("sinfo", "--noheader", "--Node", "--partition=all", "--format=%T")
        except RuntimeError as error:
            said = str(error)
        if said.split() == ["idle"] * len(NODES):
            return
        time.sleep(0.1)
    logs = "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(slurm.folder.glob("*.log")))
    raise RuntimeError(f"the two nodes are not ready: {said}\n{logs}")


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def free_ports(count: int) -> list[int]:
    """TCP ports of this machine that nobody holds now, all different."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
