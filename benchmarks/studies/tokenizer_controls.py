"""What an exactly divergence-free velocity costs: tokenizers that differ only in how they make it, over seeds.

    python benchmarks/studies/tokenizer_controls.py [--seeds 0,1,2] [--variants direct,spectral] [--summary-only]

Trains and evaluates with `shodh tokenizer train` and `evaluate`, one at a time, seed by seed; what is there is kept, so
the same call goes on. Settings (key=value) are for all runs and their data. Writes numbers (--json), tables beside them
(.md) and pictures (--images). Docs: docs/tokenizer.md.
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
from shodh_moe.config.paths import paths_of
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
        settings: ``key=value`` words for the commands.
        tokenizer: folder of the trained tokenizer.
        evaluation: what `shodh tokenizer evaluate` writes; logs and the seconds of training are beside it.
    """

    variant: str
    seed: int
    config: Path
    settings: list[str]
    tokenizer: Path
    evaluation: Path

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
        """The evaluation of the tokenizer that is there; None if there is none, or one of another tokenizer."""
        try:
            found: dict[str, Any] = json.loads(self.evaluation.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        same = found.get("sha256") == tokenizer_sha256(self.tokenizer) and found.get("split") == SPLIT
        return found if same and self.trained else None

    def validation(self) -> dict[str, float] | None:
        """Mean squared velocity error by domain at the last step, on the validation split."""
        try:
            lines = (self.tokenizer / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            records = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        last = [record["velocity_mse"] for record in records if record.get("kind") == "valid"]
        return last[-1] if last else None

    def seconds(self) -> float | None:
        """Of its training; None if that was interrupted or not done here."""
        return float(self.seconds_path.read_text()) if self.seconds_path.exists() else None


def planned(options: argparse.Namespace) -> list[Run]:
    """Every run, seed by seed, so that a break leaves whole seeds."""
    folder = options.output
    runs = []
    for seed in options.seeds:
        for variant in options.variants:
            if variant in ONE_SEED and seed != options.seeds[0] and not options.all_seeds:
                continue
            changes = [f"tokenizer.{key}={value}" for key, value in VARIANTS[variant].items()]
            settings = [*options.overrides, f"seed={seed}", *changes]
            tokenizer = paths_of(load_config(options.config, settings)).tokenizer
            evaluation = folder / f"{variant}-{seed}.json"
            runs.append(Run(variant, seed, options.config, settings, tokenizer, evaluation))
    return runs


def shodh(run: Run, step: str, *arguments: str) -> bool:
    """Run a step of `shodh tokenizer` in a process of its own, its output to a log; False if it failed."""
    log = run.evaluation.with_suffix(f".{step}.log")
    words = ["tokenizer", step, "--config", str(run.config), "--name", f"controls-{run.name}", *arguments]
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "shodh_moe.cli", *words, *run.settings], stdout=file, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait()
        except BaseException:
            process.terminate()  # it leaves nothing half-written, and ends its ranks
            process.wait()
            raise
    if code:
        print(f"[{run.name}] {step} failed with code {code}: see {log}", file=sys.stderr, flush=True)
    return code == 0


def carry_out(run: Run) -> bool:
    """Train and evaluate unless that is done; False if a step failed."""
    if not run.trained:
        anew, began = not run.tokenizer.exists(), time.perf_counter()
        print(f"[{run.name}] training", flush=True)
        run.seconds_path.unlink(missing_ok=True)
        if not shodh(run, "train"):
            return False
        took = time.perf_counter() - began
        if anew:  # else a part of it was done before
            write_text(run.seconds_path, f"{took:.1f}\n")
        print(f"[{run.name}] trained in {took:.0f} s", flush=True)
    if run.read_evaluation() is None:
        began = time.perf_counter()
        if not shodh(run, "evaluate", "--split", SPLIT, "--output", str(run.evaluation)):
            return False
        print(f"[{run.name}] evaluated in {time.perf_counter() - began:.0f} s", flush=True)
    return True


def report(options: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Numbers, tables and pictures of the runs that are there."""
    results: dict[str, dict[int, dict[str, Any]]] = {}
    valid: dict[str, dict[int, dict[str, float]]] = {}
    told = []
    for run in runs:
        if (evaluation := run.read_evaluation()) is None:
            continue
        results.setdefault(run.variant, {})[run.seed] = evaluation
        errors = run.validation()
        if errors is not None:
            valid.setdefault(run.variant, {})[run.seed] = errors
        here = {"variant": run.variant, "seed": run.seed, "training_seconds": run.seconds(), "validation": errors}
        told.append({**here, "evaluation": evaluation})
    if not results:
        raise UserError(f"{options.output} holds no evaluation of these variants and seeds: run without --summary-only")
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
        "runs": told,
    }
    write_text(options.json, json.dumps(finite_json(content), indent=1) + "\n")
    write_text(options.json.with_suffix(".md"), text)
    done = [run for run in runs if run.seed in results.get(run.variant, {})]
    pictured = {run.variant: run.tokenizer for run in done if run.seed == done[0].seed}
    draw_pictures(options.images, rows, pictured, paths_of(config).dataset, config.data.grid)
    print(f"results: {options.json}")


def work(options: argparse.Namespace) -> None:
    # As Ctrl-C does: the training that runs is told to stop, and goes on with the next call.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = load_config(options.config, options.overrides)
    if options.output is None:
        options.output = Path(config.runs) / config.name
    runs = planned(options)
    for folder in (options.output, options.json.absolute().parent, options.images):
        require_writable(folder)
    options.output.mkdir(parents=True, exist_ok=True)
    if not options.summary_only:
        require_made(paths_of(config).dataset / "stats.yaml", "shodh data generate")
    failed = [] if options.summary_only else [run.name for run in runs if not carry_out(run)]
    report(options, runs)
    if failed:
        raise UserError(
            f"{', '.join(failed)} failed: see the logs in {options.output}, then give the same command again"
        )


def names(text: str) -> list[str]:
    """``direct,spectral`` in the order of `VARIANTS`: an argparse type."""
    given = text.split(",")
    if unknown := [name for name in given if name not in VARIANTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(VARIANTS)}")
    return [name for name in VARIANTS if name in given]


def seeds(text: str) -> list[int]:
    """``0,1,2``: an argparse type."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different seeds like 0,1,2")
    return [int(part) for part in parts]


def parser() -> OneLineParser:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIG, help="default: configs/tokenizer/controls.yaml")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="evaluations and logs; default: runs/<its name>")
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2], metavar="LIST", help="default: 0,1,2")
    parser.add_argument("--variants", type=names, default=list(VARIANTS), metavar="LIST", help=", ".join(VARIANTS))
    parser.add_argument("--all-seeds", action="store_true", help=f"also for {' and '.join(ONE_SEED)}: else the first")
    parser.add_argument("--summary-only", action="store_true", help="train and evaluate nothing")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="results; the tables beside it")
    parser.add_argument("--images", type=Path, default=IMAGES, metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all runs and of their data")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return exit_code(lambda: work(options))


if __name__ == "__main__":
    sys.exit(main())
