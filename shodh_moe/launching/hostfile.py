"""Hostfiles in DeepSpeed's format (``worker-0 slots=8``), and the number of ranks of a run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from shodh_moe.base.errors import UserError
from shodh_moe.config import RunConfig

# An optional user, then a name or an IPv4 address: ssh, pdsh and mpirun accept it, and no shell interprets it.
_NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9.-]*", re.ASCII)
_LINE = re.compile(r"(\S+)\s+slots=(\d+)", re.ASCII)


@dataclass(frozen=True)
class Host:
    """A host name for ssh, and the number of ranks on that host."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """Read the hosts in file order. Empty lines and comments, which begin with ``#``, are ignored.

    Raises:
        UserError: the file is missing or empty, a line is not ``name slots=number``, a name is not a valid host name,
            or a host occurs twice or has no slots.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"hostfile {path} does not exist: check --hostfile") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise UserError(f"cannot read hostfile {path}: {reason}") from None
    hosts: list[Host] = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        where, match = f"hostfile {path}, line {number}", _LINE.fullmatch(line.partition("#")[0].rstrip())
        if not match:
            raise UserError(f"{where}: {line[:80]!r} is not of the form `worker-0 slots=8`")
        name, slots = match[1], int(match[2])
        if not _NAME.fullmatch(name):
            raise UserError(f"{where}: {name[:80]!r} is not a valid host name: use letters, digits, dots and hyphens")
        if not slots:
            raise UserError(f"{where}: {name} has slots=0: give it as many as it has GPUs, or remove the line")
        if name in (host.name for host in hosts):
            raise UserError(f"{where}: {name} occurs a second time: give it one line with all its slots")
        hosts.append(Host(name, slots))
    if not hosts:
        raise UserError(f"hostfile {path} names no host: add one line per host, such as `worker-0 slots=8`")
    return hosts


def count_ranks(config: RunConfig) -> int:
    """Return the number of ranks.

    It is the sum of the hostfile's slots, or else ``parallel.processes``, which ``auto`` sets to one per GPU, or to 2
    without GPUs.

    Raises:
        UserError: the hostfile cannot be used, or ``parallel.processes`` is set in addition to it.
    """
    if config.parallel.hostfile:
        if config.parallel.processes != "auto":
            raise UserError("parallel.processes applies to this host only: with a hostfile, set the slots there")
        return sum(host.slots for host in read_hostfile(Path(config.parallel.hostfile)))
    if config.parallel.processes != "auto":
        return config.parallel.processes
    return torch.cuda.device_count() if torch.cuda.is_available() else 2
