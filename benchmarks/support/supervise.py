"""Run the cases of a fuzz test in child processes, so that a crash or a hang is counted without ending the run.

A child is ``SCRIPT --child START STOP --seed S --folder F``. Before each case it prints a line of JSON with its number,
and after it one with number, case, outcome and message.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

SECONDS_A_FILE = 60.0


def watch(
    script: str, seed: int, files: int, folder: Path, faulty: Collection[str]
) -> tuple[Counter[str], list[dict[str, Any]], Counter[str], float]:
    """Run all cases in child processes. Returns outcomes, faults, refusals by reason, the slowest file's seconds.

    Args:
        faulty: the outcomes that are faults, besides a crash and a timeout.
    """
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    faults: list[dict[str, Any]] = []
    number, longest = 0, 0.0
    while number < files:
        arguments = [sys.executable, script, "--child", str(number), str(files), "--seed", str(seed)]
        with subprocess.Popen([*arguments, "--folder", str(folder)], stdout=subprocess.PIPE) as process:
            for line in lines_of(process):
                if line is None or "outcome" not in line:
                    began = time.monotonic()
                    number = line["number"] if line else number
                    continue
                longest = max(longest, time.monotonic() - began)
                outcomes[line["outcome"]] += 1
                reasons[reason_of(line["message"], folder)] += line["outcome"] == "refused"
                if line["outcome"] in faulty:
                    faults.append(line)
                    print(line["number"], line["case"], line["outcome"], line["message"], flush=True)
                number = line["number"] + 1
                if number % 500 == 0:
                    print(number, dict(outcomes), flush=True)
        if number < files:
            outcome = "timeout" if process.returncode == -9 else "crash"
            outcomes[outcome] += 1
            faults.append({"number": number, "outcome": outcome, "message": f"exit code {process.returncode}"})
            print(faults[-1], flush=True)
            number += 1
    return outcomes, faults, reasons, longest


def lines_of(process: subprocess.Popen[bytes]) -> Any:
    """Yield the child's decoded lines; kill it if it prints nothing for too long."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        rest = b""
        while True:
            if not selector.select(SECONDS_A_FILE):
                process.kill()
                return
            piece = os.read(process.stdout.fileno(), 65536)
            if not piece:
                return
            *lines, rest = (rest + piece).split(b"\n")
            yield from map(json.loads, lines)


def reason_of(message: str, folder: Path) -> str:
    """The start of a refusal's message, without the parts that differ between files."""
    text = message.replace(str(folder), "")
    return " ".join(word for word in text.split()[:9] if not any(c.isdigit() for c in word))[:70]
