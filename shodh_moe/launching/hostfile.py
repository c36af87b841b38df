"""Hostfiles in DeepSpeed's format (``worker-0 slots=8``), and the number of ranks of a run."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import write_text
from shodh_moe.config import RunConfig

# An optional user, then a name or an IPv4 address: ssh, pdsh and mpirun accept it, and no shell interprets it. DNS
# limits a name to 253 characters.
_NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]{0,63}@)?[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}", re.ASCII)
_LINE = re.compile(r"(\S+)\s+slots=(\d+)", re.ASCII)
_MOST_SLOTS = 4096  # far more than the GPUs or cores of any host
# Linux accepts 131,072 characters (MAX_ARG_STRLEN), and a remote shell gets the whole line as one word.
_LONGEST_WORD = 120_000


@dataclass(frozen=True)
class Host:
    """A host name for ssh, and the number of ranks on that host."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """Read the hosts in file order. Empty lines and comments, which begin with ``#``, are ignored.

    Raises:
        UserError: the file is missing or empty, a line is not ``name slots=number``, a name is not a valid host name,
            or a host occurs twice (names that differ only in case, user or a final dot are one host) or has no slots
            or too many.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()  # Windows editors begin a file with a mark
    except FileNotFoundError:
        raise UserError(f"hostfile {path} does not exist: check --hostfile") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise UserError(f"cannot read hostfile {path}: {reason}") from None
    hosts: list[Host] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        where, match = f"hostfile {path}, line {number}", _LINE.fullmatch(line.partition("#")[0].rstrip())
        if not match:
            raise UserError(f"{where}: {line[:80]!r} is not of the form `worker-0 slots=8`")
        name, slots = match[1], match[2].lstrip("0")
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{where}: {name[:80]!r} is not a valid host name: use letters, digits, dots, hyphens and underscores, "
                "at most 253"
            )
        if not slots:
            raise UserError(f"{where}: {name} has slots=0: give it as many as it has GPUs, or remove the line")
        if len(slots) > 4 or int(slots) > _MOST_SLOTS:
            raise UserError(f"{where}: {name} has slots={slots[:20]}: give it as many as it has GPUs")
        first = line_of.setdefault(name.rpartition("@")[2].rstrip(".").lower(), number)
        if first != number:
            raise UserError(
                f"{where}: {name} occurs a second time, after line {first}: give it one line with all its slots"
            )
        hosts.append(Host(name, int(slots)))
    if not hosts:
        raise UserError(f"hostfile {path} names no host: add one line per host, such as `worker-0 slots=8`")
    return hosts


def write_hostfile(path: Path, hosts: list[Host]) -> None:
    """Write a file that `read_hostfile` and DeepSpeed read."""
    write_text(path, "".join(f"{host.name} slots={host.slots}\n" for host in hosts))


def require_startable(hosts: list[Host]) -> None:
    """Check that DeepSpeed's launcher can pass the hosts to each of them, as JSON in one word of a command line.

    Raises:
        UserError: they are too many.
    """
    text = json.dumps({host.name: list(range(host.slots)) for host in hosts})
    if len(text) * 4 / 3 > _LONGEST_WORD:  # in base64
        raise UserError(
            f"{len(hosts)} hosts are too many for DeepSpeed's launcher, which names all of them and their slots on one "
            "command line: start with mpirun or SLURM (docs/cluster.md)"
        )


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
