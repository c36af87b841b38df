"""Faults of machines for the soak test: each takes a number of seconds of its own, and leaves the machine as it was.

They act on two hosts of `hosts`, whose run folder is on a disk of its own (a file mounted as a loop
device), and need root.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

import psutil

from support.hosts import Host, Hosts

DISK_BYTES = 4 * 2**30
PROGRAMS = ("shodh_moe.cli", "/shodh", "deepspeed.launcher", "pdsh")  # that start and watch ranks


@dataclass
class Site:
    """What faults act on.

    Attributes:
        disk: the mounted disk of the run folder.
        random: chooses victims and durations.
    """

    hosts: Hosts
    disk: Path
    random: Random

    def ranks(self) -> list[tuple[Host, psutil.Process]]:
        found = [(host, process) for host in self.hosts.all for process in host.processes("--local_rank=0")]
        return [(host, process) for host, process in found if "--config" in process.cmdline()]

    def commands(self) -> list[tuple[Host, psutil.Process]]:
        """The `shodh` command, pdsh and DeepSpeed's launchers, on any host."""
        return [
            (host, process)
            for host in self.hosts.all
            for process in host.processes()
            if any(word in part for part in process.cmdline()[:4] for word in PROGRAMS)
        ]


@contextmanager
def loop_disk(file: Path, folder: Path) -> Iterator[None]:
    """Within the block, ``folder`` is a disk of its own, of `DISK_BYTES`."""
    with open(file, "wb") as disk:
        disk.truncate(DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(file)], check=True)
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-o", "loop", str(file), str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "-u", str(folder)], stderr=subprocess.DEVNULL, check=False)
        subprocess.run(["umount", "-l", str(folder)], check=False)
        file.unlink()


def kill_rank(site: Site) -> str:
    return _send(site, site.ranks(), signal.SIGKILL)


def kill_command(site: Site) -> str:
    return _send(site, site.commands(), signal.SIGKILL)


def suspend_rank(site: Site) -> str:
    return _send(site, site.ranks(), signal.SIGSTOP)


def link_down(site: Site) -> str:
    host, seconds = site.random.choice(site.hosts.all), site.random.choice((3, 10, 20))
    site.hosts.set_link(host, "down")
    time.sleep(seconds)
    site.hosts.set_link(host, "up")
    return f"{host.name}, {seconds} s"


def disk_full(site: Site) -> str:
    filler, seconds = site.disk / "filler", 20
    with suppress(OSError), open(filler, "wb") as file:
        while True:
            left = os.statvfs(site.disk).f_bavail * os.statvfs(site.disk).f_frsize
            os.posix_fallocate(file.fileno(), file.tell(), max(left, 4096))
            file.seek(0, os.SEEK_END)
    time.sleep(seconds)
    filler.unlink()
    return f"{seconds} s"


def disk_stalls(site: Site) -> str:
    seconds = site.random.choice((5, 20, 30))
    subprocess.run(["fsfreeze", "-f", str(site.disk)], check=True)
    time.sleep(seconds)
    subprocess.run(["fsfreeze", "-u", str(site.disk)], check=True)
    return f"{seconds} s"


def clock_jumps(site: Site) -> str:
    """Set the machine's clock forward or back by an hour, for 20 s."""
    seconds, jump = 20.0, site.random.choice((-3600.0, 3600.0))
    real, began = time.time(), time.monotonic()
    time.clock_settime(time.CLOCK_REALTIME, real + jump)
    time.sleep(seconds)
    time.clock_settime(time.CLOCK_REALTIME, real + time.monotonic() - began)
    return f"{jump / 3600:+.0f} h, {seconds:.0f} s"


FAULTS: dict[str, Callable[[Site], str]] = {
    "kill -9 of a rank": kill_rank,
    "kill -9 of a launcher or of shodh": kill_command,
    "SIGSTOP of a rank": suspend_rank,
    "link of a host down": link_down,
    "disk full": disk_full,
    "disk stalls": disk_stalls,
    "clock jumps": clock_jumps,
}


def _send(site: Site, victims: list[tuple[Host, psutil.Process]], number: signal.Signals) -> str:
    """Send a signal to one of the processes; return its program and host."""
    host, process = site.random.choice(victims)
    words = process.cmdline()
    process.send_signal(number)
    program = next((word for word in words[:4] if any(part in word for part in PROGRAMS)), words[0])
    return f"{'rank' if '--local_rank=0' in words else Path(program).name} on {host.name}"
