"""Compare the step times that `shodh plan` predicts with those of short trainings, in every layout that runs.

    python benchmarks/plan_accuracy.py --json FILE [--machine FILE] [--ranks 1 2 4] [--sizes small medium large]

First this machine is measured as `shodh plan --measure` does (or ``--machine`` names such a file); no training is part
of that. Then each layout makes a few steps of the trainer's own loop under DeepSpeed, on random latents. The number of
samples per step and rank is the same in all layouts of a size. The oracle router gives every domain an expert of its
own, so all ranks have equal loads, as the prediction assumes. CPU only, over gloo; the machine must be idle.

The JSON file is rewritten after each group of layouts, and a second call continues it. The table has, for each size and
number of ranks, the median and largest relative error, the share of layouts within 15 %, Kendall's tau between
predicted and measured times, and how much slower the layout that the plan prefers is than the fastest one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from scipy.stats import kendalltau

from shodh_moe.base.command import OneLineParser, exit_code
from shodh_moe.base.cores import available_cores
from shodh_moe.base.errors import UserError
from shodh_moe.base.files import require_writable, write_text
from shodh_moe.base.network import free_port
from shodh_moe.config import Config
from shodh_moe.plan.layouts import StepLayout, layouts
from shodh_moe.plan.machine import Machine, read_machine
from shodh_moe.plan.measure import measure
from shodh_moe.plan.predict import predict
from support.common import machine as describe_machine
from support.plan_ranks import write_latents

DOMAINS = ("decaying_turbulence", "obstacle_wake", "open_channel", "porous_media")
# Width, depth, latent grid, channels, samples per rank and step.
SIZES = {
    "small": (64, 2, 4, 16, 16),
    "medium": (128, 4, 4, 32, 16),
    "large": (256, 4, 8, 16, 8),
    "tiny": (24, 1, 2, 4, 8),
}
WITHIN = 0.15
GROUP = 6  # layouts that one start of the ranks runs


def tree_of(size: str) -> dict[str, Any]:
    """The config of a size."""
    dim, depth, grid, channels, samples = SIZES[size]
    moe = {"num_experts": 4, "expert_hidden": 2 * dim, "attention": "low_rank", "router": {"kind": "oracle"}}
    return {
        "name": f"plan_{size}",
        "data": {"grid": [8 * grid] * 3, "domains": {name: {} for name in DOMAINS}},
        "tokenizer": {"latent_channels": channels},
        "model": {"dim": dim, "depth": depth, "heads": max(2, dim // 32), "moe": moe},
        "training": {"batch_size": samples, "steps": 1000, "log_every": 1000, "stall_seconds": 0.0},
    }


def chosen(config: Config, ranks: int, few: bool) -> list[StepLayout]:
    """The layouts to run; ``few``: of each kind of exchange one."""
    found = list(layouts(config, ranks))
    if not few:
        return found
    by_exchange = {(one.ep, one.exchange): one for one in found if one.zero == 0 and one.accumulation == 1}
    return list(by_exchange.values())


def run_layouts(tree: dict[str, Any], ranks: int, settings: list[str], steps: int) -> dict[str, list[float]]:
    """Step times of each layout, by its settings."""
    with tempfile.TemporaryDirectory() as folder:
        task, results = Path(folder, "task.json"), Path(folder, "results.jsonl")
        latents = Path(folder, "latents.h5")
        write_latents(latents, Config.model_validate(tree))
        content = {"config": tree, "layouts": settings, "steps": steps}
        task.write_text(json.dumps({**content, "latents": str(latents), "results": str(results)}))
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        shared |= {"OMP_NUM_THREADS": str(max(1, available_cores() // ranks)), "DS_ACCELERATOR": "cpu"}
        shared |= {"DEEPSPEED_LOG_LEVEL": "error", "LOCAL_WORLD_SIZE": str(ranks), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, str(Path(__file__).parent / "support" / "plan_ranks.py"), str(task)]
        log = Path(folder, "log")
        with open(log, "w") as output:
            started = [
                subprocess.Popen(
                    command,
                    env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=output,
                    stderr=output,
                )
                for rank in range(ranks)
            ]
            try:
                codes = [one.wait() for one in started]
            finally:
                for one in started:
                    one.kill()
                    one.wait()
        if any(codes):
            raise RuntimeError(f"{settings}: a rank failed:\n{log.read_text(errors='replace')[-3000:]}")
        rows = [json.loads(line) for line in results.read_text().splitlines()]
        return {row["layout"]: row["times"] for row in rows}


def row_of(size: str, ranks: int, layout: StepLayout, times: list[float], machine: Machine) -> dict[str, Any]:
    """Predicted and measured time of one layout."""
    found = predict(layout.applied_to(Config.model_validate(tree_of(size))), ranks, machine)
    measured = statistics.median(times)
    return {
        "size": size,
        "ranks": ranks,
        "layout": layout.settings,
        "measured": measured,
        "times": times,
        "predicted": found.step,
        "parts": found.parts,
        "error": found.step / measured - 1,
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Errors and order for each size and number of ranks."""
    found = []
    for (size, ranks), group in itertools.groupby(rows, key=lambda row: (row["size"], row["ranks"])):
        members = list(group)
        errors = [abs(row["error"]) for row in members]
        preferred = min(members, key=lambda row: row["predicted"])
        order = [row["predicted"] for row in members], [row["measured"] for row in members]
        found.append(
            {
                "size": size,
                "ranks": ranks,
                "layouts": len(members),
                "median_error": statistics.median(errors),
                "largest_error": max(errors),
                "within": sum(error <= WITHIN for error in errors) / len(errors),
                "kendall_tau": float(kendalltau(*order).statistic) if len(members) > 1 else None,
                "regret": preferred["measured"] / min(row["measured"] for row in members) - 1,
            }
        )
    return found


def report(content: dict[str, Any]) -> None:
    print(f"{'size':<8}{'ranks':>6}{'layouts':>9}{'median':>9}{'largest':>9}{'within 15 %':>13}{'tau':>7}{'regret':>9}")
    for row in content["summary"]:
        tau = "" if row["kendall_tau"] is None else f"{row['kendall_tau']:.2f}"
        print(
            f"{row['size']:<8}{row['ranks']:>6}{row['layouts']:>9}{row['median_error']:>9.1%}{row['largest_error']:>9.1%}"
            f"{row['within']:>13.0%}{tau:>7}{row['regret']:>9.1%}"
        )


def work(options: argparse.Namespace) -> None:
    path: Path = options.json
    require_writable(path.absolute().parent)
    content: dict[str, Any] = {"benchmark": "plan_accuracy", "quick": options.quick, "results": []}
    if path.exists():
        content = json.loads(path.read_text())
        if content.get("benchmark") != "plan_accuracy":
            raise UserError(f"--json {path} holds another benchmark's results: name another file")
        measured = Machine.model_validate_json(json.dumps(content["calibration"]))
    else:
        measured = read_machine(options.machine) if options.machine else measure(sorted(set(options.ranks)))
        content |= {"machine": describe_machine(torch.device("cpu")), "calibration": measured.model_dump(mode="json")}
    done = {(row["size"], row["ranks"], row["layout"]) for row in content["results"]}
    for size, ranks in itertools.product(options.sizes, options.ranks):
        todo = chosen(Config.model_validate(tree_of(size)), ranks, options.quick)
        todo = [layout for layout in todo if (size, ranks, layout.settings) not in done]
        for first in range(0, len(todo), GROUP):
            group, began = todo[first : first + GROUP], time.monotonic()
            times = run_layouts(tree_of(size), ranks, [layout.settings for layout in group], options.steps)
            content["results"] += [row_of(size, ranks, one, times[one.settings], measured) for one in group]
            content["results"].sort(key=lambda row: (list(SIZES).index(row["size"]), row["ranks"], row["layout"]))
            content["summary"] = summary(content["results"])
            write_text(path, json.dumps(content, indent=1) + "\n")
            left = len(todo) - first - len(group)
            print(f"{size}, {ranks} ranks: {left} layouts left, {time.monotonic() - began:.0f} s", flush=True)
    report(content)


def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--json", type=Path, required=True, metavar="FILE", help="write results here, and continue them"
    )
    parser.add_argument(
        "--machine", type=Path, metavar="FILE", help="what `shodh plan --measure` wrote on this machine"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--sizes", choices=list(SIZES), nargs="+", default=["small", "medium", "large"])
    parser.add_argument("--steps", type=int, default=10, help="steps of each layout, after two others")
    parser.add_argument("--quick", action="store_true", help="few layouts of a tiny size, to test; times mean nothing")
    options = parser.parse_args(arguments)
    if min(options.ranks) < 1 or options.steps < 1:
        parser.error("--ranks and --steps must be at least 1")
    if options.quick:
        options.sizes = ["tiny"]
    return exit_code(lambda: work(options))


if __name__ == "__main__":
    sys.exit(main())
