"""Several hosts on one machine, which look like a cluster to ssh, pdsh, mpirun and the network.

A host is a set of Linux namespaces with its own network interface, host name, processes, mounts, /dev/shm and sshd. A
further network namespace is the switch between the hosts. All see the machine's files, like a shared file system. Root
can ssh from each host to the others and to itself, by name and by address. The machine's own network, /etc and ~/.ssh
are neither used nor changed.

Namespaces live as long as their first process, which dies with the process that started it, however that ends, so
nothing is left over.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from .packages import lacking

NETWORK = "192.0.2"  # a range that no network uses (RFC 5737)
PACKAGES = {"pdsh": "pdsh", "sshd": "openssh-server", "ssh": "openssh-client", "ip": "iproute2"}  # by program
BIN = Path(sys.executable).parent
# setpriv makes unshare die with this process, and unshare makes its child die with it.
UNSHARE = ["setpriv", "--pdeathsig", "KILL", "unshare", "--fork", "--kill-child"]

SSHD_CONFIG = """\
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/client_key.pub
PermitRootLogin yes
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
"""
SSH_CONFIG = """\
IdentityFile /etc/ssh/client_key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""
# $1: host name, $2: folder with ssh and hosts. Ends as the host's sshd.
BOOT = """\
set -e
hostname "$1"
mount --bind "$2/ssh" /etc/ssh
mount --bind "$2/hosts.$1" /etc/hosts
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
if [ -d ~root/.ssh ]; then mount -t tmpfs -o mode=700 tmpfs ~root/.ssh; fi
mkdir /run/sshd
ip link set lo up
exec "$(command -v sshd)" -D -e
"""


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    process: int  # id of its first process in the machine's namespace

    def command(self, *command: str, folder: Path, **environment: str) -> list[str]:
        """Return the command line that runs ``command`` on this host, in ``folder``, with .venv/bin on its PATH.

        ``environment`` is added to the caller's. A signal to the started process does not reach the command: signal
        one of `processes` instead.
        """
        path = f"PATH={BIN}{os.pathsep}{os.environ['PATH']}"
        settings = [path, *(f"{key}={value}" for key, value in environment.items())]
        enter = ["nsenter", "--target", str(self.process), "--mount", "--uts", "--ipc", "--net", "--pid"]
        return [*enter, "env", f"--chdir={folder}", *settings, *command]

    def processes(self, word: str = "") -> list[psutil.Process]:
        """Return the processes on this host whose command line contains ``word``, without the host's sshd."""
        found = []
        namespace = os.stat(f"/proc/{self.process}/ns/pid").st_ino
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                if os.stat(f"/proc/{process.pid}/ns/pid").st_ino != namespace or process.name().startswith("sshd"):
                    continue
                if process.status() != psutil.STATUS_ZOMBIE and any(word in part for part in process.cmdline()):
                    found.append(process)
        return found


@dataclass(frozen=True)
class Hosts:
    all: list[Host]
    hostfile: Path  # lists all hosts by name
    switch: int  # id of the process that holds the switch's namespace

    @property
    def first(self) -> Host:
        return self.all[0]

    @property
    def second(self) -> Host:
        return self.all[1]

    def set_link(self, host: Host, state: str) -> None:
        """Unplug the host's cable from the switch (``down``) or plug it in again (``up``)."""
        _ip(self.switch, "link", "set", host.name, state)

    def kill_all(self) -> None:
        """End every process on the hosts that are left, except their sshd, and restore the links."""
        for host in self.all:
            if not psutil.pid_exists(host.process):
                continue
            self.set_link(host, "up")
            for process in host.processes():
                with suppress(psutil.Error):
                    process.kill()


def missing() -> str:
    """Return why this machine cannot be several hosts, "" if it can; install missing Debian packages where possible."""
    if sys.platform != "linux":
        return "namespaces are Linux's"
    if os.geteuid() != 0:
        return "namespaces with a network and an sshd need root"
    if reason := lacking(PACKAGES):
        return reason
    if absent := [program for program in ("setpriv", "unshare", "nsenter", "mount") if not shutil.which(program)]:
        return f"not on PATH: {', '.join(absent)} (util-linux)"
    trial = [*UNSHARE, "--pid", "--mount", "--mount-proc", "--uts", "--ipc", "--net", "sh", "-c"]
    script = "hostname trial && mount -t tmpfs tmpfs /run && ip link add name t0 type bridge && ip link add type veth"
    done = subprocess.run([*trial, script], capture_output=True, text=True)
    return f"namespaces are not permitted here: {' '.join(done.stderr.split())[:300]}" if done.returncode else ""


@contextmanager
def boot_hosts(folder: Path, count: int = 2, slots: int = 1) -> Iterator[Hosts]:
    """Boot node1, node2, ..., with their keys and logs in ``folder``; every process on them ends with the block.

    Args:
        slots: slots of each host in the hostfile.
    """
    addresses = {f"node{number}": f"{NETWORK}.{number}" for number in range(1, count + 1)}
    settings = folder / "ssh"
    settings.mkdir(parents=True)
    for key in ("host_key", "client_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(settings / key)], check=True)
    (settings / "sshd_config").write_text(SSHD_CONFIG)
    (settings / "ssh_config").write_text(SSH_CONFIG)
    for own in addresses:
        # Like Debian, map the host's own name to a loopback address, which other hosts cannot reach.
        others = [f"{address} {name}" for name, address in addresses.items() if name != own]
        (folder / f"hosts.{own}").write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {own}", *others]) + "\n")
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{name} slots={slots}\n" for name in addresses))
    with ExitStack() as stack:
        switch = stack.enter_context(_namespaces(folder / "switch.log", ["--net"], ["sleep", "infinity"]))
        _ip(switch, "link", "add", "switch", "type", "bridge")
        _ip(switch, "link", "set", "switch", "up")
        hosts = []
        for name, address in addresses.items():
            log = folder / f"{name}.log"
            kinds = ["--pid", "--mount", "--mount-proc", "--uts", "--ipc", "--net"]
            process = stack.enter_context(_namespaces(log, kinds, ["sh", "-c", BOOT, "sh", name, str(folder)]))
            _wait(partial(_listens, log), f"sshd of {name}: see {log}")
            _ip(switch, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(process))
            _ip(switch, "link", "set", name, "master", "switch", "up")
            _ip(process, "address", "add", f"{address}/24", "dev", "eth0")
            _ip(process, "link", "set", "eth0", "up")
            hosts.append(Host(name, address, process))
        yield Hosts(hosts, hostfile, switch)


def _listens(log: Path) -> bool:
    return "Server listening" in log.read_text()


@contextmanager
def _namespaces(log: Path, kinds: Sequence[str], command: Sequence[str]) -> Iterator[int]:
    """Run ``command`` as the first process of new namespaces of the given kinds; yield its process id."""
    with log.open("w") as output:
        # A new session: Ctrl-C reaches only the tests, which then end the namespaces here.
        unshare = subprocess.Popen(
            [*UNSHARE, *kinds, *command], stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True
        )
    try:
        children: list[psutil.Process] = []

        def has_started() -> bool:
            children[:] = psutil.Process(unshare.pid).children()
            return bool(children)

        _wait(has_started, f"see {log}")
        yield children[0].pid
    finally:
        with suppress(IndexError, psutil.Error):
            children[0].kill()  # which ends its whole process namespace
        unshare.kill()
        unshare.wait()


def _ip(process: int, *arguments: str) -> None:
    subprocess.run(["nsenter", "--target", str(process), "--net", "ip", *arguments], check=True)


def _wait(condition: Callable[[], object], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not ready within {seconds:g} s: {what}")
        time.sleep(0.02)
