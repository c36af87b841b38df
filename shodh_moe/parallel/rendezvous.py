"""Rendezvous: ranks compare their settings before the process group exists, and stop if they differ.

Every rank writes its facts as JSON to the launcher's key-value store. Rank 0 compares them and writes a verdict that
every rank reads: either all continue, or all fail with the same message.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import platform
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from shodh_moe.base.errors import UserError
from shodh_moe.base.network import interface_towards, port_holder
from shodh_moe.base.polling import wait_until
from shodh_moe.base.variables import master_port, number, require_master_port

WORLD = "WORLD_SIZE"
VERSION = "version of "
_ANSWER_SECONDS = 10.0  # how long a rank waits for another one that is known to have started
_LAUNCH = "start all ranks with one launcher command, or give every host the same WORLD_SIZE and its own ranks"
_joins = itertools.count()  # a second group in the same process must not read the facts of the first


def join(backend: str, facts: dict[str, Any], timeout_seconds: float) -> None:
    """Compare the ranks' facts and library versions, then create torch.distributed's default process group.

    Reads the launcher's variables RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT (and LOCAL_RANK on GPUs). Does nothing
    if the process group already exists.

    Args:
        backend: ``gloo`` or ``nccl``.
        facts: JSON-like values by name that must be equal on every rank.
        timeout_seconds: how long to wait for ranks that start later.

    Raises:
        UserError: ranks differ, or a rank is missing, started twice or out of range; raised on every running rank.
    """
    if dist.is_initialized():
        return
    rank, world = number("RANK"), number(WORLD, least=1)
    require_master_port()
    try:
        # World size 1, so that the store does not wait: it could not say which rank is missing.
        store, _, _ = next(dist.rendezvous("env://", rank, 1, timeout=timedelta(seconds=timeout_seconds)))
    except (dist.DistError, ValueError) as error:
        raise UserError(_unreachable(rank, world, timeout_seconds, error)) from None
    store = dist.PrefixStore(f"shodh{next(_joins)}", store)
    try:
        agree(
            store,
            rank,
            world,
            {VERSION + name: version for name, version in versions().items()} | facts,
            timeout_seconds,
        )
    except dist.DistError as error:
        raise UserError(f"rank {rank} lost rank 0 while they compared settings ({_short(error)}): see rank 0") from None
    store.set_timeout(dist.default_pg_timeout)
    # By default, gloo uses the address of this host's name, which on many systems is the loopback.
    if backend == "gloo" and (interface := interface_towards(os.environ["MASTER_ADDR"])):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    # Bind the group to its device as DeepSpeed does: NCCL then connects now, and subgroups share the connection.
    device = torch.device("cuda", number("LOCAL_RANK")) if backend == "nccl" and world > 1 else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, device_id=device)


def agree(store: dist.Store, rank: int, world: int, facts: dict[str, Any], timeout_seconds: float) -> None:
    """Return once ``world`` ranks have arrived with equal facts. Every rank calls it, at most once per store.

    Args:
        facts, timeout_seconds: as in `join`.

    Raises:
        UserError: as in `join`.
    """
    own = {"rank": rank, "facts": {WORLD: world} | json.loads(json.dumps(facts, default=str))}
    number = store.add("arrivals", 1)
    store.set(f"arrival {number}", json.dumps(own))
    deadline = time.monotonic() + timeout_seconds
    if rank == 0 and store.add("judges", 1) == 1:
        arrivals = _gather(store, deadline)
        message = _difference(arrivals, timeout_seconds)
        store.set("verdict", json.dumps({"message": message, "arrivals": len(arrivals)}))
        if message:  # this process may host the store, so it must not end before the others have read the verdict
            wait_until(lambda: store.add("read", 0) >= len(arrivals) - 1, _ANSWER_SECONDS)
            raise UserError(message)
        return
    if not wait_until(lambda: store.check(["verdict"]), deadline - time.monotonic() + _ANSWER_SECONDS):
        raise UserError(_difference(_read(store), timeout_seconds) or _absent({0}, world, timeout_seconds))
    verdict = json.loads(store.get("verdict"))
    store.add("read", 1)
    if not verdict["message"] and number > verdict["arrivals"]:  # the others started without this rank
        verdict["message"] = _difference(_read(store), timeout_seconds)
    if verdict["message"]:
        raise UserError(verdict["message"])


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that must be equal on all ranks."""
    found = {"python": platform.python_version()}
    for name in ("torch", "deepspeed", "shodh_moe"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


Arrival = dict[str, Any]  # rank: int, facts: dict[str, Any]


def _gather(store: dist.Store, deadline: float) -> list[Arrival]:
    """Collect arrivals until all ranks have arrived, the deadline passes, or two ranks have different world sizes."""

    def complete() -> bool:
        arrivals = _read(store)
        worlds = {a["facts"][WORLD] for a in arrivals}
        return len(worlds) > 1 or {a["rank"] for a in arrivals} >= set(range(min(worlds)))

    wait_until(complete, deadline - time.monotonic())
    arrivals = _read(store)
    if len({a["facts"][WORLD] for a in arrivals}) > 1:  # unknown how many will arrive; most do within a second
        time.sleep(max(0.0, min(1.0, deadline - time.monotonic())))
        arrivals = _read(store)
    return arrivals


def _read(store: dist.Store) -> list[Arrival]:
    return [json.loads(store.get(f"arrival {number}")) for number in range(1, store.add("arrivals", 0) + 1)]


def _difference(arrivals: list[Arrival], timeout_seconds: float) -> str:
    """Describe in one line what is wrong with the arrivals; "" if nothing is."""
    worlds = {a["facts"][WORLD] for a in arrivals}
    differing = [key for key in _keys(arrivals) if len({_value(a, key) for a in arrivals}) > 1]
    ranks = [a["rank"] for a in arrivals]
    # With different world sizes, the other checks would only report consequences.
    if WORLD not in differing:
        twice = {rank for rank in ranks if ranks.count(rank) > 1}
        if twice:
            return f"{_ranks(twice)} was started more than once: the launcher must give each process its own RANK"
        beyond = {rank for rank in ranks if rank >= min(worlds)}
        if beyond:
            return f"{_ranks(beyond)} cannot be part of a WORLD_SIZE of {min(worlds)}: ranks count from 0; {_LAUNCH}"
        if missing := set(range(min(worlds))) - set(ranks):
            return _absent(missing, min(worlds), timeout_seconds)
    if not differing:
        return ""
    first = differing[0]
    holders: dict[str, set[int]] = {}
    for arrival in sorted(arrivals, key=lambda a: a["rank"]):
        holders.setdefault(_value(arrival, first), set()).add(arrival["rank"])
    values = ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in holders.items())
    more = f" (and on {', '.join(differing[1:4])}{', ...' if len(differing) > 4 else ''})" if differing[1:] else ""
    if first == WORLD:
        return f"ranks disagree on {WORLD}: {values}: {_LAUNCH}"
    remedy = "install the same one everywhere" if first.startswith(VERSION) else "start every rank with the same config"
    return f"ranks disagree on {first}: {values}{more}: {remedy}"


def _keys(arrivals: list[Arrival]) -> list[str]:
    """List the names of all facts, in the order in which they were given."""
    return list(dict.fromkeys(key for arrival in arrivals for key in arrival["facts"]))


def _value(arrival: Arrival, key: str) -> str:
    return json.dumps(arrival["facts"][key], sort_keys=True) if key in arrival["facts"] else "nothing"


def _absent(missing: set[int], world: int, timeout_seconds: float) -> str:
    return (
        f"{_ranks(missing)} of {world} did not arrive within {timeout_seconds:g} s: see its host for an error, "
        "and whether WORLD_SIZE is the number of processes that the launcher starts"
    )


def _unreachable(rank: int, world: int, timeout_seconds: float, error: Exception) -> str:
    where = f"{os.environ.get('MASTER_ADDR', '(no MASTER_ADDR)')}:{os.environ.get('MASTER_PORT', '(no MASTER_PORT)')}"
    reason = _short(error)
    if rank == 0:
        holder = port_holder(master_port() or 0)
        holder = f", held by {holder}" if holder else ""
        return (
            f"rank 0 cannot listen on {where} ({reason}{holder}): set MASTER_ADDR to this host and MASTER_PORT to a "
            "free port, and see that RANK differs between processes"
        )
    return (
        f"rank 0 of {world} did not arrive at {where} within {timeout_seconds:g} s, reports rank {rank} ({reason}): "
        "see rank 0's host for an error, and whether MASTER_ADDR and MASTER_PORT are the same everywhere"
    )


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def _ranks(ranks: set[int]) -> str:
    """Format ranks as ``rank 3`` or ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
