"""Measure the cost of an exactly divergence-free velocity: compare tokenizers that differ only in how they produce it.

    python benchmarks/studies/tokenizer_controls.py [--seeds 0,1,2] [--variants direct,spectral] [--summary-only]

Trains and evaluates with `shodh tokenizer train` and `evaluate`, one run at a time, seed by seed. Finished runs are
skipped, so repeating the command resumes. Settings (key=value) apply to all runs and their data. Writes numbers
(--json), tables beside them (.md) and figures (--images). See docs/tokenizer.md.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, for `support` and `studies`

from shodh_moe.base.command import OneLineParser, exit_code
from shodh_moe.base.errors import UserError
from shodh_moe.base.files import finite_json, require_made, require_writable, write_text
from shodh_moe.config.load import load_config
from shodh_moe.config.paths import resolve_paths
from shodh_moe.metrics.fields import band_edges
from shodh_moe.tokenizer.tokenizer import tokenizer_sha256
from studies.tokenizer_controls_pictures import draw_pictures
from studies.tokenizer_controls_summary import ONE_SEED, VARIANTS, markdown, missing_runs, rows_of, summarise
from support.common import machine

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "tokenizer" / "controls.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "tokenizer_controls_cpu.json"
IMAGES = ROOT / "docs" / "tokenizer_controls"
SPLIT = "test"


@dataclass(frozen=True)
class Run:
    """One variant with one seed.

    Attributes:
        settings: ``key=value`` arguments for the commands.
        tokenizer: folder of the trained tokenizer.
        evaluation: output of `shodh tokenizer evaluate`; logs and the seconds of training are beside it.
        split: the split that it is evaluated on.
    """

    variant: str
    seed: int
    config: Path
    settings: list[str]
    tokenizer: Path
    evaluation: Path
    split: str = SPLIT

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.seed}"

    @property
    def trained(self) -> bool:
        return tokenizer_sha256(self.tokenizer) is not None

    @property
    def seconds_path(self) -> Path:
        return self.evaluation.with_suffix(".seconds")

    def read_evaluation(self) -> dict[str, Any] | None:
        """The evaluation of the current tokenizer; None if it is missing or belongs to another tokenizer."""
        try:
            found: dict[str, Any] = json.loads(self.evaluation.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        same = found.get("sha256") == tokenizer_sha256(self.tokenizer) and found.get("split") == self.split
        return found if same and self.trained else None

    def validation(self) -> dict[str, float] | None:
        """Mean squared velocity error by domain on the validation split, at the last step."""
        try:
            lines = (self.tokenizer / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            records = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        last = [record["velocity_mse"] for record in records if record.get("kind") == "valid"]
        return last[-1] if last else None

    def seconds(self) -> float | None:
        """Seconds of training; None if it was interrupted or done elsewhere."""
        return float(self.seconds_path.read_text()) if self.seconds_path.exists() else None


def planned(options: argparse.Namespace) -> list[Run]:
    """Every run, ordered by seed, so that an interruption leaves complete seeds."""
    folder = options.output
    runs = []
    for seed in options.seeds:
        for variant in options.variants:
            if variant in ONE_SEED and seed != options.seeds[0] and not options.all_seeds:
                continue
            changes = [f"tokenizer.{key}={value}" for key, value in VARIANTS[variant].items()]
            settings = [*options.overrides, f"seed={seed}", *changes]
            tokenizer = resolve_paths(load_config(options.config, settings)).tokenizer
            evaluation = folder / f"{variant}-{seed}.json"
            runs.append(Run(variant, seed, options.config, settings, tokenizer, evaluation))
    return runs


def shodh(run: Run, step: str, *arguments: str) -> bool:
    """Run a step of `shodh tokenizer` in a separate process that writes to a log. Returns False if it failed."""
    log = run.evaluation.with_suffix(f".{step}.log")
    words = ["tokenizer", step, "--config", str(run.config), "--name", f"controls-{run.name}", *arguments]
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "shodh_moe.cli", *words, *run.settings], stdout=file, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait()
        except BaseException:
            process.terminate()  # gives it time to end its ranks and to finish writing
            process.wait()
            raise
    if code:
        print(f"[{run.name}] {step} failed with code {code}: see {log}", file=sys.stderr, flush=True)
    return code == 0


def carry_out(run: Run) -> bool:
    """Train and evaluate unless done before. Returns False if a step failed."""
    if not run.trained:
        from_start, began = not run.tokenizer.exists(), time.perf_counter()
        print(f"[{run.name}] training", flush=True)
        run.seconds_path.unlink(missing_ok=True)
        if not shodh(run, "train"):
            return False
        took = time.perf_counter() - began
        if from_start:  # otherwise a part of the training was done before
            write_text(run.seconds_path, f"{took:.1f}\n")
        print(f"[{run.name}] trained in {took:.0f} s", flush=True)
    if run.read_evaluation() is None:
        began = time.perf_counter()
        if not shodh(run, "evaluate", "--split", run.split, "--output", str(run.evaluation)):
            return False
        print(f"[{run.name}] evaluated in {time.perf_counter() - began:.0f} s", flush=True)
    return True


def report(options: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Write numbers, tables and figures of the finished runs."""
    results: dict[str, dict[int, dict[str, Any]]] = {}
    valid: dict[str, dict[int, dict[str, float]]] = {}
    records = []
    for run in runs:
        if (evaluation := run.read_evaluation()) is None:
            continue
        results.setdefault(run.variant, {})[run.seed] = evaluation
        errors = run.validation()
        if errors is not None:
            valid.setdefault(run.variant, {})[run.seed] = errors
        here = {"variant": run.variant, "seed": run.seed, "training_seconds": run.seconds(), "validation": errors}
        records.append({**here, "evaluation": evaluation})
    if not results:
        raise UserError(
            f"{options.output} contains no evaluation of these variants and seeds: run without --summary-only"
        )
    rows, missing = rows_of(results), missing_runs(results, [(run.variant, run.seed) for run in runs])
    summary = summarise(rows, valid)
    config = load_config(options.config, options.overrides)
    text = markdown(summary, missing)
    print(f"\n{text}")
    content = {
        "benchmark": "tokenizer_controls",
        "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "config": config.model_dump(),
        "split": SPLIT,
        "variants": VARIANTS,
        "band_edges_radians_per_cell": band_edges(torch.Size(config.data.grid)),
        "missing": missing,
        "summary": summary,
        "runs": records,
    }
    write_text(options.json, json.dumps(finite_json(content), indent=1) + "\n")
    write_text(options.json.with_suffix(".md"), text)
    done = [run for run in runs if run.seed in results.get(run.variant, {})]
    pictured = {run.variant: run.tokenizer for run in done if run.seed == done[0].seed}
    draw_pictures(options.images, rows, pictured, resolve_paths(config).dataset, config.data.grid)
    print(f"results: {options.json}")


def work(options: argparse.Namespace) -> None:
    # Stop the running training as Ctrl-C does; the next call resumes it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = load_config(options.config, options.overrides)
    if options.output is None:
        options.output = Path(config.runs) / config.name
    runs = planned(options)
    for folder in (options.output, options.json.absolute().parent, options.images):
        require_writable(folder)
    options.output.mkdir(parents=True, exist_ok=True)
    if not options.summary_only:
        require_made(resolve_paths(config).dataset / "stats.yaml", "shodh data generate")
    failed = [] if options.summary_only else [run.name for run in runs if not carry_out(run)]
    report(options, runs)
    if failed:
        raise UserError(f"{', '.join(failed)} failed: see the logs in {options.output}, then repeat the command")


def names(text: str) -> list[str]:
    """Parse ``direct,spectral``; the result has the order of `VARIANTS` (argparse type)."""
    given = text.split(",")
    if unknown := [name for name in given if name not in VARIANTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(VARIANTS)}")
    return [name for name in VARIANTS if name in given]


def seeds(text: str) -> list[int]:
    """Parse ``0,1,2`` (argparse type)."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different seeds like 0,1,2")
    return [int(part) for part in parts]


def parser() -> OneLineParser:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIG, help="default: configs/tokenizer/controls.yaml")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="folder of evaluations and logs; default: runs/<its name>"
    )
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2], metavar="LIST", help="default: 0,1,2")
    parser.add_argument("--variants", type=names, default=list(VARIANTS), metavar="LIST", help=", ".join(VARIANTS))
    parser.add_argument(
        "--all-seeds",
        action="store_true",
        help=f"run all seeds of {' and '.join(ONE_SEED)} too; default: the first only",
    )
    parser.add_argument(
        "--summary-only", action="store_true", help="summarise existing results; train and evaluate nothing"
    )
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="results file; tables go beside it")
    parser.add_argument("--images", type=Path, default=IMAGES, metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for all runs and their data")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return exit_code(lambda: work(options))


if __name__ == "__main__":
    sys.exit(main())
