"""Query all hosts of a hostfile in two rounds. Each round has one time limit, however many hosts there are."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from shodh_moe.launching.probe import probe_hosts
from shodh_moe.launching.ssh import AT_ONCE, Answer, run_on_hosts, run_processes, ssh_command, time_limit

FACTS_SECONDS = 8.0  # time limit of the first round
CHECK_SECONDS = 6.8  # time limit of the second round
PORT_SECONDS = 4.0  # time that a host tries to connect to the first one
REPLY_SECONDS = 1.5  # time of a round that is left to ssh
ARRIVAL_SECONDS = 1.0  # time for all files of other hosts to appear in a shared folder

Found = dict[str, Any]


def ask_facts(names: list[str]) -> dict[str, Found]:
    """Run `probe_hosts` and add ``keepalive``, ssh's ServerAliveInterval in seconds, to each host that answers."""
    limit = time_limit(FACTS_SECONDS)
    deadline = time.monotonic() + limit
    facts = probe_hosts(names, limit)
    answered = [name for name, found in facts.items() if "error" not in found]
    intervals = _keepalive(answered, max(deadline - time.monotonic(), limit / 10))
    return {name: found | {"keepalive": intervals.get(name)} for name, found in facts.items()}


def _keepalive(names: list[str], seconds: float) -> dict[str, int]:
    """Return ServerAliveInterval for each host, as plain DeepSpeed uses it; none where this ssh does not show it."""
    commands = [["ssh", "-G", *ssh_command(name, options=[])[1:]] for name in names]
    found = {}
    for answer in run_processes(names, commands, Path(os.devnull), seconds):
        for line in answer.output.splitlines():
            key, _, value = line.partition(" ")
            if key == "serveraliveinterval" and value.isdecimal():
                found[answer.host] = int(value)
    return found


def check_between(facts: dict[str, Found], folders: list[str]) -> dict[str, Found]:
    """Check shared folders and ports on the hosts that answered.

    Returns:
        by host: ``error``; or ``folders`` ({folder: {error, free}}), ``reached`` ({address of the first host: error or
        ""}) and ``listened`` (error of listening on the port, or "").
    """
    names = list(facts)
    token, inside = secrets.token_hex(16), f".shodh-doctor-{secrets.token_hex(6)}"
    placed = [(str(Path(folder).absolute()), inside) for folder in folders if _place(Path(folder, inside), token)]
    addresses = facts[names[0]]["addresses"][:4]
    limit = time_limit(CHECK_SECONDS)
    listening = max(limit - REPLY_SECONDS, limit / 2)  # until the end of the round, for hosts whose turn comes late
    trying = min(PORT_SECONDS, listening) / math.ceil(len(names) / AT_ONCE)

    def order(number: int) -> Found:
        return {
            "folders": placed,
            "number": number,
            "token": token,
            "port": facts[names[0]]["port"],
            "seconds": trying if number else listening,
            "addresses": addresses if number else [],
            "visits": 0 if number else (len(names) - 1) * len(addresses),
        }

    script = Path(__file__).with_name("remote_script.py")
    try:
        arguments = [[json.dumps(order(number))] for number in range(len(names))]
        answers = run_on_hosts(names, script, arguments, limit)
        found = {answer.host: _checks_of(answer) for answer in answers}
        for answer in answers[1:]:
            # The first host may have stopped listening before this one had its turn.
            if answer.sent + trying > answers[0].received and any(found[answer.host].get("reached", {}).values()):
                found[answer.host] = {"error": f"not asked: the {limit:g} s for all hosts were over"}
        _check_arrival(found, placed, token)
    finally:
        for folder, _ in placed:
            shutil.rmtree(Path(folder, inside), ignore_errors=True)
    return found


def _checks_of(answer: Answer) -> Found:
    if answer.error:
        return {"error": answer.error}
    try:
        return dict(json.loads(answer.output.splitlines()[-1]))
    except (ValueError, IndexError):
        return {"error": f"unexpected answer: {answer.output[-200:]!r}"}


def _check_arrival(found: dict[str, Found], placed: list[tuple[str, str]], token: str) -> None:
    """Store an error for each host whose file in a shared folder does not appear here."""
    deadline = time.monotonic() + ARRIVAL_SECONDS
    waiting = [
        (result, Path(folder, inside, f"host-{number}"))
        for number, checks in enumerate(found.values())
        for folder, inside in placed
        if (result := checks.get("folders", {}).get(folder)) and not result["error"]
    ]
    while waiting := [(result, path) for result, path in waiting if not _holds(path, token)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    for result, _ in waiting:
        result["error"] = "accepts files that this host does not see"


def _place(folder: Path, token: str) -> bool:
    """Write the token for the other hosts. Returns whether that worked; another line of the table reports a failure."""
    try:
        folder.mkdir()
        with open(folder / "token", "w") as file:
            file.write(token)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        return False
    return True


def _holds(path: Path, token: str) -> bool:
    with suppress(OSError):
        return path.read_text() == token
    return False
