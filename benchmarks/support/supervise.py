"""The command of a fuzz test: its cases run in child processes, so that a crash or a hang does not end the run.

A child is ``SCRIPT --child START STOP --seed S --folder F``. Before each case it prints a line of JSON with its number,
and after it one with number, case, outcome and message.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from shodh_moe.base.command import OneLineParser
from shodh_moe.base.environment import describe_environment
from shodh_moe.base.files import write_text

SECONDS_A_FILE = 60.0
MEMORY = 4 * 2**30  # address space that a child may add to its initial size


def fuzz_command(
    script: str,
    description: str | None,
    files: int,
    faulty: Collection[str],
    child: Callable[[int, int, int, Path], None],
    only: Callable[[int, int, Path], None],
    arguments: list[str] | None,
) -> int:
    """Run the command of a fuzz test, and return its exit code: 1 if there are faults.

    Args:
        script: the test's file.
        files: number of cases, unless given.
        faulty: see `watch`.
        child: runs the cases start..stop of a seed in a folder, and prints lines of JSON as described above.
        only: runs one case of a seed in a folder, and keeps its files there.
    """
    parser = OneLineParser(description=description)
    parser.add_argument("--files", type=int, default=files, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and outcomes here")
    parser.add_argument("--only", type=int, metavar="N", help="run case N, and keep its files in --folder")
    parser.add_argument("--folder", type=Path, help="folder for the files; default: a temporary one")
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if options.child:
            start, stop = options.child
            child(options.seed, start, stop, folder)
            return 0
        if options.only is not None:
            only(options.seed, options.only, folder)
            return 0
        began = time.monotonic()
        outcomes, faults, reasons, longest = watch(script, options.seed, options.files, folder, faulty)
        seconds = time.monotonic() - began
    content = {
        "benchmark": Path(script).stem,
        "machine": describe_environment(),
        "seed": options.seed,
        "files": options.files,
        "seconds": round(seconds, 1),
        "longest_seconds": round(longest, 2),
        "outcomes": dict(sorted(outcomes.items())),
        "faults": faults,
        "refused_because": dict(reasons.most_common(40)),
    }
    print(json.dumps({key: content[key] for key in ("files", "seconds", "longest_seconds", "outcomes")}, indent=1))
    if options.json:
        write_text(options.json, json.dumps(content, indent=1) + "\n")
    return 1 if faults else 0


def limit_child() -> None:
    """Limit what a damaged file can make this process take: no core files, and `MEMORY` more than now."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))


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
