"""Compare tokenizers with and without seams: reconstruction errors, steps at the faces of blocks, parameters and time.

    python benchmarks/studies/seams.py [--config configs/quickstart.yaml] [--seeds 0,1] [--variants base,overlapping]
                                       [--split valid] [--summary-only] [key=value ...]

Trains and evaluates with `shodh tokenizer train` and `evaluate`, one run at a time, seed by seed. Finished runs are
skipped, so repeating the command resumes. Choose a variant by its errors on the validation split, the default. Writes
numbers (--json) and tables beside them (.md). See docs/tokenizer.md.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, for `support` and `studies`

from shodh_moe.base.command import OneLineParser, exit_code
from shodh_moe.base.errors import UserError
from shodh_moe.base.files import finite_json, require_made, require_writable, write_text
from shodh_moe.config.load import load_config
from shodh_moe.config.paths import resolve_paths
from studies.tokenizer_controls import Run, carry_out, seeds
from studies.tokenizer_controls_summary import BANDS, estimate
from support.common import machine

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "quickstart.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "seams_cpu.json"
# Settings of the tokenizer by variant; all others are the config's.
OVERLAPPING, SAMPLE = {"patches": "overlapping"}, {"scales": "sample"}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "overlapping": OVERLAPPING,
    "refine": {"refine": 16},
    "overlapping, refine": {**OVERLAPPING, "refine": 16},
    "sample": SAMPLE,
    "overlapping, sample": {**OVERLAPPING, **SAMPLE},
}


def planned(options: argparse.Namespace) -> list[Run]:
    """Every run, ordered by seed, so that an interruption leaves complete seeds."""
    runs = []
    for seed in options.seeds:
        for variant in options.variants:
            changes = [f"tokenizer.{key}={value}" for key, value in VARIANTS[variant].items()]
            settings = [*options.overrides, f"seed={seed}", *changes]
            tokenizer = resolve_paths(load_config(options.config, settings)).tokenizer
            name = variant.replace(", ", "-")
            evaluation = options.output / f"{name}-{seed}-{options.split}.json"
            runs.append(Run(name, seed, options.config, settings, tokenizer, evaluation, options.split))
    return runs


def measures(found: dict[str, Any]) -> dict[str, float]:
    """Measures of one domain of an evaluation."""
    flat = {f"{field} VRMSE": found[f"{field}_vrmse"] for field in ("velocity", "pressure")}
    for field in ("velocity", "pressure"):
        flat |= {f"{field}, {band} band": value for band, value in zip(BANDS, found["band_errors"][field], strict=True)}
        # An axis with a single block has no ratio.
        for what, title in (("jumps", "steps"), ("power", "power")):
            ratios = [value for value in found["seams"][field][what].values() if value is not None]
            flat |= {f"{field}, {title}": max(ratios)} if ratios else {}
    return flat | {f"ms {key}": value for key, value in found["ms_per_sample"].items()}


def summarise(runs: list[Run]) -> dict[str, Any]:
    """Mean and range over seeds of each measure, by domain and variant, and of parameters and seconds of training."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for run in runs:
        evaluation = run.read_evaluation()
        if evaluation is None:
            continue
        for domain, scores in evaluation["domains"].items():
            row = found.setdefault(domain, {}).setdefault(run.variant, {})
            values = {**measures(scores), "parameters": evaluation["parameters"]}
            seconds = run.seconds()
            for key, value in (values | ({"training, s": seconds} if seconds else {})).items():
                row.setdefault(key, []).append(value)
    return {
        domain: {variant: {key: estimate(values) for key, values in row.items()} for variant, row in variants.items()}
        for domain, variants in found.items()
    }


def markdown(summary: dict[str, Any], split: str) -> str:
    """A table for each domain with a row for each variant."""
    lines = []
    for domain, variants in summary.items():
        columns = list(next(iter(variants.values())))
        lines += [f"### {domain.replace('_', ' ')}", "", f"Split {split}; mean (least to largest) over seeds.", ""]
        lines += [f"| tokenizer | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for variant, row in variants.items():
            cells = [_cell(row[column]) if column in row else "-" for column in columns]
            lines.append(f"| {variant} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(found: dict[str, Any]) -> str:
    mean, low, high = (f"{found[key]:.4g}" for key in ("mean", "low", "high"))
    return mean if low == high else f"{mean} ({low} to {high})"


def names(text: str) -> list[str]:
    """Parse ``base,overlapping-refine`` (argparse type)."""
    known = {name.replace(", ", "-"): name for name in VARIANTS}
    given = text.split(",")
    if unknown := [name for name in given if name not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
    return [name for key, name in known.items() if key in given]


def parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="default: configs/quickstart.yaml")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="evaluations and logs; default: runs/seams")
    parser.add_argument("--seeds", type=seeds, default=[0, 1], metavar="LIST", help="default: 0,1")
    parser.add_argument("--variants", type=names, default=list(VARIANTS), metavar="LIST", help="default: all")
    parser.add_argument("--split", choices=["valid", "test"], default="valid", help="default: %(default)s")
    parser.add_argument("--summary-only", action="store_true", help="train and evaluate nothing")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="results; tables go beside it")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for all runs and their data")
    return parser


def work(options: argparse.Namespace) -> None:
    # Stop the running training as Ctrl-C does; the next call resumes it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = load_config(options.config, options.overrides)
    options.output = options.output or Path(config.runs) / "seams"
    for folder in (options.output, options.json.absolute().parent):
        require_writable(folder)
    options.output.mkdir(parents=True, exist_ok=True)
    runs = planned(options)
    failed = []
    if not options.summary_only:
        require_made(resolve_paths(config).dataset / "stats.yaml", "shodh data generate")
        failed = [run.name for run in runs if not carry_out(run)]
    summary = summarise(runs)
    if not summary:
        raise UserError(f"{options.output} holds no evaluation of these variants: run without --summary-only")
    text = markdown(summary, options.split)
    print(f"\n{text}")
    content = {
        "benchmark": "seams",
        "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "config": config.model_dump(),
        "split": options.split,
        "variants": VARIANTS,
        "summary": summary,
    }
    write_text(options.json, json.dumps(finite_json(content), indent=1) + "\n")
    write_text(options.json.with_suffix(".md"), text)
    print(f"results: {options.json}")
    if failed:
        raise UserError(f"{', '.join(failed)} failed: see the logs in {options.output}, then repeat the command")


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return exit_code(lambda: work(options))


if __name__ == "__main__":
    sys.exit(main())
