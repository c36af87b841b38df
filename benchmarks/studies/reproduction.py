"""Run a config from data to table (by default 20,000 steps) and compare its numbers with the paper's.

    python benchmarks/studies/reproduction.py [--config configs/reproduce.yaml] [--collect-only] [key=value ...]

Runs `shodh run`, which skips finished stages, and passes signals on to it (exit code 75). Repeating the command
resumes. Then it writes metrics.json, config.yaml, environment.json, run.json (times, validation, bifurcation), table.md
and the report's figures to docs/reproduction, or for another config to a subfolder. See docs/reproduction.md.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, for `support` and `studies`

from shodh_moe.audit.routing import bifurcation
from shodh_moe.base.command import OneLineParser, exit_code
from shodh_moe.base.errors import EXIT_FAILED, EXIT_REQUEUE, UserError
from shodh_moe.base.files import atomic_file, finite_json, require_writable, write_text
from shodh_moe.config import Config
from shodh_moe.config.load import load_config
from shodh_moe.config.paths import resolve_paths
from shodh_moe.launching.stop_signals import on_stop_signals
from shodh_moe.runs.plan import count_parameters, latent_grid, snapshots
from studies.reproduction_table import markdown

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "reproduce.yaml"
OUTPUT = ROOT / "docs" / "reproduction"
PICTURES = ("expert_load", "routing_over_steps", "losses", "routing_map_")
COPIED = ("metrics.json", "config.yaml", "environment.json")
STAGES = ("data", "tokenizer", "latents", "pretrain", "evaluate", "report")
ENDS = re.compile(rf"\[({'|'.join(STAGES)})\] ((?:unchanged|given), .*|.* in \d+ s)")


def run_stages(options: argparse.Namespace, times: Path) -> int:
    """Run `shodh run` in a separate process and add the seconds of its stages to ``times``.

    Only the first SIGTERM or SIGUSR1 is passed on, because `timeout` sends its signal twice and a second one would end
    ranks at once.

    Returns:
        the exit code of `shodh run`; `EXIT_REQUEUE` if a signal ended it, whatever its exit code.
    """
    command = [sys.executable, "-u", "-m", "shodh_moe.cli", "run", "--config", str(options.config), *options.overrides]
    clock, code = StageClock(), EXIT_FAILED
    asked: list[bool] = []
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, encoding="utf-8", errors="replace", start_new_session=True
    )

    def pass_on() -> None:
        if not asked:
            process.terminate()
        asked.append(True)

    assert process.stdout
    try:
        with on_stop_signals(pass_on):
            for line in process.stdout:
                print(line, end="", flush=True)
                clock.hear(line.rstrip())
            code = process.wait()
    except BaseException:
        process.send_signal(signal.SIGINT)  # gives it time to end its ranks and to finish writing
        process.wait()
        raise
    finally:
        if seconds := clock.seconds(finished=code == 0):
            write_text(times, json.dumps([*read_times(times), seconds]) + "\n")
    if code and asked:
        return EXIT_REQUEUE
    return code if code >= 0 else EXIT_FAILED


class StageClock:
    """Measure the seconds of each stage from the output of `shodh run`. Stages that were up to date have none."""

    def __init__(self) -> None:
        self._mark = time.perf_counter()
        self._ended: dict[str, float | None] = {}

    def hear(self, line: str) -> None:
        if found := ENDS.fullmatch(line):
            now = time.perf_counter()
            self._ended[found[1]] = None if found[2].startswith(("unchanged", "given")) else now - self._mark
            self._mark = now

    def seconds(self, finished: bool) -> dict[str, float]:
        ended = {name: seconds for name, seconds in self._ended.items() if seconds is not None}
        under_way = next((name for name in STAGES if name not in self._ended), None)
        if not finished and under_way:
            ended[under_way] = time.perf_counter() - self._mark
        return {name: round(seconds, 1) for name, seconds in ended.items()}


def read_times(path: Path) -> list[dict[str, float]]:
    """Seconds by stage, one entry for each call of `run_stages` that did any work; [] if none is recorded."""
    try:
        calls: list[dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return calls


def summary_of_times(calls: list[dict[str, float]]) -> dict[str, Any]:
    """Seconds by stage over all calls, their sum as ``total``, and the number of ``calls``."""
    stages = {name: sum(one.get(name, 0.0) for one in calls) for name in STAGES if any(name in one for one in calls)}
    return {"stages": stages, "total": sum(stages.values()), "calls": len(calls)}


def collect(run: Path, config: Config, calls: list[dict[str, float]]) -> dict[str, Any]:
    """Read a run folder: ``metrics``, ``environment``, and ``run`` (times, validation, bifurcation, sizes).

    Raises:
        UserError: the folder lacks a file, or a file is damaged.
    """
    metrics, environment = (_json(run / name) for name in ("metrics.json", "environment.json"))
    path = run / "metrics.jsonl"
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(_not_there(path)) from error
    train = [record for record in records if record["kind"] == "train"]
    valid = [record for record in records if record["kind"] == "valid"]
    steps_ms = sorted(record["step_ms"] for record in train)
    parted = bifurcation(train)
    world = metrics["world_size"]
    count = count_parameters(config, world)
    facts = {
        "steps": metrics["step"],
        "world_size": world,
        "ep_size": metrics["ep_size"],
        "parameters": {"total": count.total, "active": count.active},
        "grid": config.data.grid,
        "latent_grid": latent_grid(config),
        "latent_channels": config.tokenizer.latent_channels,
        "snapshots": snapshots(config),
        "seconds": summary_of_times(calls),
        "step_ms": {"median": statistics.median(steps_ms), "slowest": steps_ms[-1]} if steps_ms else None,
        "validation": valid[-1] if valid else None,
        "bifurcation_step": parted["step"] if parted else None,
    }
    return {"metrics": metrics, "environment": environment, "run": facts}


def _json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(_not_there(path)) from error
    return content


def _not_there(path: Path) -> str:
    return f"{path} is missing or damaged: repeat the command without --collect-only to complete the run"


def write(run: Path, found: dict[str, Any], output: Path) -> None:
    """Write numbers, copies of the run's files, table and figures to ``output``."""
    for name in COPIED:
        write_text(output / name, (run / name).read_text(encoding="utf-8"))
    write_text(output / "run.json", json.dumps(finite_json(found["run"]), indent=1) + "\n")
    write_text(output / "table.md", markdown(found["metrics"], found["run"], found["environment"]))
    for picture in sorted((run / "report").glob("*.png")):
        if picture.stem.startswith(PICTURES):
            with atomic_file(output / picture.name) as temporary:
                shutil.copyfile(picture, temporary)


def work(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    run = resolve_paths(config).run
    output = options.output or (OUTPUT if config.name == "reproduce" else OUTPUT / config.name)
    times = run.with_name(f"{run.name}.times.json")  # beside the run folder, which only pretraining creates
    for folder in (run.parent, output):
        require_writable(folder)
    if not options.collect_only and (code := run_stages(options, times)):
        if code == EXIT_REQUEUE:
            print("[reproduction] stopped by a signal: repeat the command to resume", flush=True)
        return code
    found = collect(run, config, read_times(times))
    output.mkdir(parents=True, exist_ok=True)
    write(run, found, output)
    print(f"\n{(output / 'table.md').read_text()}\n[reproduction] {output}")
    return 0


def parser() -> OneLineParser:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIG, help="default: configs/reproduce.yaml")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: docs/reproduction, or a folder below")
    parser.add_argument(
        "--collect-only", action="store_true", help="run nothing; write the table and copies of an existing run"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the config's")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    ended: list[int] = []
    return exit_code(lambda: ended.append(work(options))) or ended[0]


if __name__ == "__main__":
    sys.exit(main())
