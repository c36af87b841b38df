"""Measure how the latent error falls with width, data and steps, and persistence's with the time between snapshots.

    python benchmarks/studies/reproduction_trend.py [--steps LIST] [--summary-only] [key=value ...]

Each run is `shodh run` on one rank with the tokenizer of configs/reproduce.yaml, so that all errors refer to the same
latents. Each axis varies one quantity and keeps the others at the base point: the config's width, the most training
trajectories, and half the most steps. A power law is fitted to each axis. Finished runs are skipped, so repeating the
command resumes. With one seed the results show a trend, not differences between two runs. Persistence needs no
training: the test trajectories are simulated again with half and a quarter of the time between snapshots. Writes
numbers (--json) and tables beside them (.md). See docs/reproduction.md.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, for `support` and `studies`

from shodh_moe.base.command import OneLineParser, exit_code
from shodh_moe.base.environment import describe_environment
from shodh_moe.base.errors import UserError
from shodh_moe.base.files import finite_json, require_made, require_writable, write_text
from shodh_moe.config import Config
from shodh_moe.config.load import load_config
from shodh_moe.config.paths import resolve_paths
from shodh_moe.launching.hostfile import count_ranks
from shodh_moe.runs import pipeline
from shodh_moe.runs.checks import check
from shodh_moe.runs.plan import count_parameters
from shodh_moe.solvers import SPLIT_BASE, Simulation, simulate
from shodh_moe.tokenizer import Tokenizer, load_tokenizer
from studies.reproduction_laws import AXES, markdown, power_law
from studies.reproduction_table import number

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "reproduce.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "reproduction_trend_cpu.json"
DIVISORS = (1, 2, 4)  # divisors of the time between snapshots
SEED = 0


@dataclass(frozen=True)
class Point:
    """One training: model width, training trajectories per domain, and steps."""

    dim: int
    trajectories: int
    steps: int

    def settings(self, tokenizer: Path, domains: Sequence[str], samples: int) -> list[str]:
        """Arguments ``key=value`` for `shodh run`; ``samples`` is the batch size of the single rank."""
        return [
            f"seed={SEED}",
            f"model.dim={self.dim}",
            f"model.moe.expert_hidden={2 * self.dim}",
            *(f"data.domains.{name}.trajectories.train={self.trajectories}" for name in domains),
            f"tokenizer.path={tokenizer}",
            f"training.steps={self.steps}",
            f"training.batch_size={samples}",
            f"training.warmup_steps={max(1, self.steps // 20)}",
            "parallel.processes=1",
            "parallel.ep_size=1",
            "parallel.context_size=1",
        ]

    def name(self, base: str) -> str:
        return f"{base}-trend-d{self.dim}-t{self.trajectories}-s{self.steps}"


def axes(base: Point, dims: Sequence[int], trajectories: Sequence[int], steps: Sequence[int]) -> dict[str, list[Point]]:
    """The points of each axis, a key of `AXES`: the base point, varied in that quantity alone."""
    values = {"dim": dims, "trajectories": trajectories, "steps": steps}
    return {axis: [replace(base, **{axis: value}) for value in sorted(set(values[axis]))] for axis in AXES}


def planned(options: argparse.Namespace, base: Config) -> dict[Point, list[str]]:
    """Arguments of each point's `shodh run` after ``--config``; cheap points first."""
    tokenizer = resolve_paths(base).tokenizer
    domains = [name for name, _ in base.data.domains.items()]
    samples = base.training.batch_size * count_ranks(base) // base.parallel.context_size
    words = {}
    found = {point for points in _axes(options, base).values() for point in points}
    for point in sorted(found, key=lambda point: (point.dim**2 * point.steps, astuple(point))):
        settings = point.settings(tokenizer, domains, samples)
        words[point] = ["--name", point.name(base.name), *options.overrides, *settings]
    return words


def _axes(options: argparse.Namespace, base: Config) -> dict[str, list[Point]]:
    at = Point(base.model.dim, max(options.trajectories), max(options.steps) // 2)
    return axes(at, options.dims, options.trajectories, options.steps)


def carry_out(config: Path, words: list[str]) -> bool:
    """Run `shodh run` in a separate process. Returns False if it failed."""
    process = subprocess.Popen([sys.executable, "-m", "shodh_moe.cli", "run", "--config", str(config), *words])
    try:
        return process.wait() == 0
    except BaseException:
        process.terminate()
        process.wait()
        raise


def result(config_path: Path, words: list[str], point: Point) -> dict[str, Any] | None:
    """Results of the point's run; None if it is unfinished or has other settings."""
    config = load_config(config_path, words[2:], words[1])
    run = resolve_paths(config).run
    try:
        metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        theirs = load_config(run / "config.yaml")
    except (OSError, ValueError, UserError):
        return None
    if theirs.model_dump() != config.model_dump() or metrics["step"] != config.training.steps:
        return None
    count = count_parameters(config, 1)
    errors = {
        domain: {key: value for key, value in measured.items() if key.startswith("latent_mse")}
        for domain, measured in metrics["domains"].items()
    }
    here = {"dim": point.dim, "trajectories": point.trajectories, "run": run.name, "steps": metrics["step"]}
    return {**here, "parameters": {"total": count.total, "active": count.active}, "errors": errors}


@torch.no_grad()
def persistence_error(tokenizer: Tokenizer, simulation: Simulation, history: int, divisor: int) -> float:
    """Mean squared difference of successive normalised latents over the predictions that an evaluation makes.

    Args:
        divisor: factor by which snapshots are closer together, and more numerous, than in the dataset.
    """
    velocity, pressure = torch.from_numpy(simulation.velocity_T3XYZ), torch.from_numpy(simulation.pressure_TXYZ)
    solid = torch.from_numpy(simulation.solid_XYZ).to(velocity.dtype).expand(len(velocity), 1, -1, -1, -1)
    fields_T5XYZ = torch.cat([velocity, pressure[:, None], solid], dim=1)
    z_TCxyz = torch.cat([tokenizer.encode(part) for part in fields_T5XYZ.split(8)])
    first = (history - 1) * divisor
    return float((z_TCxyz[first + 1 :] - z_TCxyz[first:-1]).square().mean())


def persistence(base: Config, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Time steps between snapshots and persistence's mean latent MSE over the test split, by divisor and domain."""
    rows, grid = [], (base.data.grid[0], base.data.grid[1], base.data.grid[2])
    for name, domain in base.data.domains.items():
        for divisor in DIVISORS:
            every = max(1, domain.steps_per_snapshot // divisor)
            closer = domain.model_copy(update={"steps_per_snapshot": every})
            count = (base.data.snapshots - 1) * divisor + 1
            errors = []
            for index in range(domain.trajectories.test):
                flow = simulate(name, closer, grid, base.data.seed, SPLIT_BASE["test"] + index, count)
                errors.append(persistence_error(tokenizer, flow, base.model.history, divisor))
            if errors:
                row = {"domain": name, "divisor": divisor, "steps_per_snapshot": every, "trajectories": len(errors)}
                rows.append({**row, "latent_mse_persistence": sum(errors) / len(errors)})
                print(
                    f"[trend] persistence, {name}, {every} time steps: {number(sum(errors) / len(errors))}", flush=True
                )
    return rows


def scaling(axes: dict[str, list[Point]], runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The power law of each axis and domain, from the runs that exist."""
    by_point = {Point(run["dim"], run["trajectories"], run["steps"]): run for run in runs}
    rows = []
    for axis, points in axes.items():
        found = [by_point[point] for point in points if point in by_point]
        values = [run[axis] for run in found]
        for domain in found[0]["errors"] if found else ():
            if law := power_law(values, [run["errors"][domain]["latent_mse"] for run in found]):
                rows.append({"axis": axis, "domain": domain, "values": values, **asdict(law)})
    return rows


def kept_persistence(path: Path, sha256: str) -> list[dict[str, Any]] | None:
    """Persistence measured by an earlier call with the same tokenizer, or None."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("persistence") if content.get("tokenizer_sha256") == sha256 else None


def work(options: argparse.Namespace) -> None:
    # Stop the running training as Ctrl-C does; the next call resumes it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    base = load_config(options.config, options.overrides)
    require_writable(options.json.absolute().parent)
    paths = resolve_paths(base)
    if not options.summary_only:
        check(base, paths)
        pipeline.make_data(base, paths)
        pipeline.make_tokenizer(base, paths)
    require_made(paths.tokenizer / "tokenizer.json", "shodh tokenizer train")
    meta = json.loads((paths.tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    jobs = planned(options, base)
    failed = (
        [] if options.summary_only else [words[1] for words in jobs.values() if not carry_out(options.config, words)]
    )
    runs = [found for point, words in jobs.items() if (found := result(options.config, words, point))]
    missing = [words[1] for words in jobs.values() if words[1] not in {run["run"] for run in runs}]
    still = kept_persistence(options.json, meta["sha256"])
    if still is None:
        still = [] if options.summary_only else persistence(base, load_tokenizer(paths.tokenizer))
    laws = scaling(_axes(options, base), runs)
    content = {
        "benchmark": "reproduction_trend",
        "machine": describe_environment(),
        "config": base.model_dump(),
        "tokenizer_sha256": meta["sha256"],
        "seed": SEED,
        "missing": missing,
        "runs": runs,
        "power_laws": laws,
        "persistence": still,
    }
    text = markdown(runs, laws, still)
    write_text(options.json, json.dumps(finite_json(content), indent=1) + "\n")
    write_text(options.json.with_suffix(".md"), text)
    print(f"\n{text}\n[trend] {options.json}" + (f"; missing: {', '.join(missing)}" if missing else ""))
    if failed:
        raise UserError(f"{', '.join(failed)} failed: see the messages above, then repeat the command")


def counts(text: str) -> list[int]:
    """Parse ``32,64`` (argparse type)."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive integers like 32,64")
    return [int(part) for part in parts]


def parser() -> OneLineParser:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIG, help="default: configs/reproduce.yaml")
    parser.add_argument(
        "--steps",
        type=counts,
        default=[250, 500, 1000, 2000],
        metavar="LIST",
        help="steps of the trainings; the other axes use half the largest; default: 250,500,1000,2000",
    )
    parser.add_argument(
        "--dims", type=counts, default=[64, 128, 256], metavar="LIST", help="model widths; default: 64,128,256"
    )
    parser.add_argument(
        "--trajectories",
        type=counts,
        default=[16, 32, 64, 128],
        metavar="LIST",
        help="training trajectories per domain; default: 16,32,64,128",
    )
    parser.add_argument(
        "--summary-only", action="store_true", help="summarise existing results; train and simulate nothing"
    )
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="results file; tables go beside it")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for all runs and the tokenizer")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return exit_code(lambda: work(options))


if __name__ == "__main__":
    sys.exit(main())
