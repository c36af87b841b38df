"""Query all hosts of a hostfile in parallel, in two rounds. Each round has a time limit, even if hosts are silent."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from shodh_moe.launching.probe import probe_hosts
from shodh_moe.launching.ssh import run_on_hosts

FACTS_SECONDS = 8.0  # time limit of the first round
PORT_SECONDS = 4.0  # time that the first host listens
CHECK_SECONDS = 6.8  # time limit of the second round: PORT_SECONDS plus the time that ssh takes

Found = dict[str, Any]


def ask_facts(names: list[str]) -> dict[str, Found]:
    """Run `probe_hosts` and add ``keepalive``, ssh's ServerAliveInterval in seconds, to each host."""
    with ThreadPoolExecutor(len(names) + 1) as pool:
        asked = pool.submit(probe_hosts, names, FACTS_SECONDS)
        intervals = list(pool.map(_keepalive, names))
        return {
            name: facts | {"keepalive": interval}
            for (name, facts), interval in zip(asked.result().items(), intervals, strict=True)
        }


def _keepalive(name: str) -> int | None:
    """Return ServerAliveInterval for a host; None if this ssh does not show it."""
    with suppress(OSError, subprocess.TimeoutExpired, ValueError):
        output = subprocess.run(["ssh", "-G", "--", name], capture_output=True, text=True, timeout=5).stdout
        for line in output.splitlines():
            key, _, value = line.partition(" ")
            if key == "serveraliveinterval":
                return int(value)
    return None


def check_between(facts: dict[str, Found], folders: list[str]) -> dict[str, Found]:
    """Check shared folders and ports on the hosts that answered.

    Returns:
        by host: ``error``; or ``folders`` ({folder: {error, free}}), ``reached`` ({address of the first host: error or
        ""}) and ``listened`` (error of listening on the port, or "").
    """
    source = Path(__file__).with_name("remote_script.py").read_text(encoding="utf-8")
    names = list(facts)
    token, inside = secrets.token_hex(16), f".shodh-doctor-{secrets.token_hex(6)}"
    placed = [(str(Path(folder).absolute()), inside) for folder in folders if _place(Path(folder, inside), token)]
    addresses = facts[names[0]]["addresses"][:4]

    def check(number: int) -> Found:
        order = {
            "folders": placed,
            "number": number,
            "token": token,
            "port": facts[names[0]]["port"],
            "seconds": PORT_SECONDS,
            "addresses": addresses if number else [],
            "visits": 0 if number else (len(names) - 1) * len(addresses),
        }
        (answer,) = run_on_hosts([names[number]], source, [json.dumps(order)], timeout_seconds=CHECK_SECONDS)
        if answer.error:
            return {"error": answer.error}
        try:
            return dict(json.loads(answer.output.splitlines()[-1]))
        except (ValueError, IndexError):
            return {"error": f"unexpected answer: {answer.output[-200:]!r}"}

    try:
        with ThreadPoolExecutor(len(names)) as pool:
            found = dict(zip(names, pool.map(check, range(len(names))), strict=True))
        for number, name in enumerate(names):
            for folder, _ in placed:
                result = found[name].get("folders", {}).get(folder)
                if result and not result["error"] and not _arrived(Path(folder, inside, f"host-{number}"), token):
                    result["error"] = "accepts files that this host does not see"
    finally:
        for folder, _ in placed:
            shutil.rmtree(Path(folder, inside), ignore_errors=True)
    return found


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


def _arrived(path: Path, token: str) -> bool:
    """Wait up to a second for the token that another host wrote. Returns whether it appeared."""
    deadline = time.monotonic() + 1
    while True:
        with suppress(OSError):
            if path.read_text() == token:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
