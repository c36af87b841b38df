"""CCM on the latent mixture of experts: train experts at two viscosities and compose them at others.

    python benchmarks/studies/ccm_latent.py [--json FILE] [key=value ...]

Runs the commands `shodh data generate`, `tokenizer`, `pretrain`, `merge` and `evaluate`. Finished work is skipped, so
repeating the command resumes. Settings (key=value) apply to all runs and data. See docs/ccm_latent.md.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, for `support` and `studies`

from shodh_moe.base.command import OneLineParser, exit_code
from shodh_moe.base.files import require_writable, write_text
from shodh_moe.checkpoint import CheckpointReader
from shodh_moe.cli import main as shodh
from shodh_moe.config import Config
from shodh_moe.config.compare import fingerprint
from shodh_moe.config.load import load_config, read_yaml
from shodh_moe.config.paths import resolve_paths
from support.common import machine

ROOT = Path(__file__).resolve().parents[2]
ANCHOR = ROOT / "configs" / "latent_ccm" / "anchor.yaml"
MERGE = ROOT / "configs" / "latent_ccm" / "merge.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "ccm_latent.json"

VISCOSITY = "data.domains.open_channel.viscosity"
FINE_TUNING = ["training.steps=160", "training.learning_rate=5e-4", "training.warmup_steps=10"]
# Viscosities at which nothing is trained. The readout is chosen on the validation ones, which have separate flows.
VALIDATION, TEST = (0.004, 0.0075, 0.024), (0.0036, 0.0065, 0.015, 0.028)
SWEPT, ALPHAS = 0.024, (-1.0, -0.5, 0.0, 0.5, 1.0, 1.25, 1.5, 2.0)
FEW = [
    f"data.domains.{domain}.trajectories.{split}={count}"
    for domain, counts in (("open_channel", (1, 1, 3)), ("porous_media", (1, 1, 1)))
    for split, count in zip(("train", "valid", "test"), counts, strict=True)
]
READOUTS = ("linear", "log")
TITLES = {
    "anchor": "anchor",
    "continued": "anchor, trained further",
    "low": "expert, low viscosity",
    "high": "expert, high viscosity",
    "average": "average of the experts",
    "linear": "CCM, linear in the viscosity",
    "log": "CCM, in its logarithm",
}
MEASURES = ("latent_mse", "physical_mse", "latent_mse_persistence", "physical_mse_persistence")


@dataclass(frozen=True)
class Regime:
    """An open-channel viscosity at which models are measured; ``role`` is end, validation, inside or outside."""

    viscosity: float
    role: str

    @property
    def settings(self) -> list[str]:
        """Settings of its data. An end uses its own test split; for other regimes the data are a small test split."""
        if self.role == "end":
            return []
        return [*FEW, "tokenizer.latent_copies=1", *(["data.seed=1"] if self.role == "validation" else [])]


class Bench:
    """Paths and settings of the whole study.

    Attributes:
        own: settings given on the command line, which override all others.
        anchor: config of the anchor.
        ends: viscosities of the two experts.
        folder: folder of files that belong to no single run.
        regimes: where models are measured.
        times: longest wall-clock and CPU seconds of each step, by name.
    """

    def __init__(self, own: list[str]):
        self.own = own
        self.anchor = load_config(ANCHOR, own)
        self.words = read_yaml(MERGE)
        low, high = (entry["parameters"]["coordinate"] for entry in self.words["models"])
        self.ends = {"low": float(low), "high": float(high)}
        self.folder = Path(self.anchor.runs) / f"{self.anchor.name}_bench"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.regimes = [Regime(value, "end") for value in self.ends.values()]
        self.regimes += [Regime(value, "validation") for value in VALIDATION]
        self.regimes += [Regime(value, "inside" if low < value < high else "outside") for value in TEST]
        self._times_path = self.folder / "seconds.json"
        self.times: dict[str, dict[str, float]] = {}
        if self._times_path.exists():
            self.times = json.loads(self._times_path.read_text())

    def at(self, viscosity: float, settings: Iterable[str] = ()) -> list[str]:
        """Settings for data at this viscosity, encoded with the anchor's tokenizer."""
        tokenizer = resolve_paths(self.anchor).tokenizer
        name = f"{self.anchor.data.name}_{viscosity:g}"
        return [f"{VISCOSITY}={viscosity}", f"data.name={name}", f"tokenizer.path={tokenizer}", *settings, *self.own]

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Record the time of a step. The longest is kept, because a call that finds the step finished takes less."""
        began, cpu = time.perf_counter(), sum(os.times()[:4])
        yield
        took = {"wall": time.perf_counter() - began, "cpu": sum(os.times()[:4]) - cpu}
        if took["cpu"] > self.times.get(what, took | {"cpu": 0})["cpu"]:
            self.times[what] = took
            write_text(self._times_path, json.dumps(self.times, indent=1) + "\n")

    def train(self, name: str, settings: list[str]) -> Path:
        """Complete a run from its data to its last checkpoint, and return the path of that."""
        config = load_config(ANCHOR, settings, name)
        for step in (("data", "generate"), ("tokenizer", "train"), ("tokenizer", "encode"), ("pretrain",)):
            with self.timed(f"{name}: {' '.join(step)}"):
                command(*step, "--config", str(ANCHOR), "--name", name, *settings)
        return Path(config.runs) / name / "checkpoints" / str(config.training.steps)

    def measure(self, row: str, regime: Regime, checkpoint: Path) -> dict[str, Any]:
        """Evaluate the model at ``checkpoint`` on the regime's test split."""
        settings = self.at(regime.viscosity, regime.settings)
        config = load_config(ANCHOR, settings)
        key = fingerprint(_sha256(checkpoint), config.data.model_dump(), config.evaluation.model_dump())
        folder = self.folder / f"{regime.role}_{regime.viscosity:g}" / f"{row}-{key}"
        if not (folder / "metrics.json").exists():
            print(f"[measure] {row} at {regime.viscosity:g}", flush=True)
            log = self.folder / "evaluate.log"
            what = ("--config", str(ANCHOR), "--checkpoint", str(checkpoint), "--output", str(folder))
            with (
                self.timed(f"evaluate {row} at {regime.viscosity:g}"),
                open(log, "a") as file,
                redirect_stdout(file),
                redirect_stderr(file),
            ):
                code = shodh(["evaluate", *what, *settings])
            if code:
                print(
                    f"error: measuring {row} at {regime.viscosity:g} failed; the end of {log} says why", file=sys.stderr
                )
                raise SystemExit(code)
        metrics = json.loads((folder / "metrics.json").read_text())
        manifest = checkpoint / "merge.json"
        found = {"low": -1.0, "high": 1.0}.get(row)
        return {
            "regime": asdict(regime),
            "row": row,
            "alpha": json.loads(manifest.read_text())["alpha"]["value"] if manifest.exists() else found,
            "weights_sha256": metrics["weights_sha256"],
            **{key: {name: d[key] for name, d in metrics["domains"].items()} for key in MEASURES},
        }


def command(*arguments: str) -> None:
    """Run a command. Raises SystemExit with the command's exit code, after its message."""
    if code := shodh([*arguments]):
        raise SystemExit(code)


def _sha256(checkpoint: Path) -> str:
    return str(CheckpointReader(checkpoint).state["sha256"])


def work(own: list[str], output: Path) -> None:
    require_writable(output.absolute().parent)
    bench = Bench(own)
    anchor: Config = bench.anchor
    models = {"anchor": bench.train(anchor.name, own)}
    # The control: the anchor trained at its own viscosity for as many more steps as an expert.
    start = [f"start={models['anchor']}", *FINE_TUNING]
    models["continued"] = bench.train(f"{anchor.name}_continued", [*start, *own])
    for end, viscosity in bench.ends.items():
        models[end] = bench.train(f"{anchor.name}_{end}", bench.at(viscosity, start))
    for regime in bench.regimes:
        if regime.role != "end":
            with bench.timed(f"{regime.viscosity:g}: data"):
                name = f"{anchor.name}_at_{regime.viscosity:g}"  # because two configs must not share a run folder
                settings = bench.at(regime.viscosity, regime.settings)
                command("data", "generate", "--config", str(ANCHOR), "--name", name, *settings)

    merged = merge(bench, models)
    rows: list[dict[str, Any]] = []
    for regime in bench.regimes:
        plain = ("anchor",) if regime.role == "validation" else ("anchor", "continued", "low", "high")
        rows += [bench.measure(row, regime, models[row]) for row in plain]
        if regime.role != "validation":
            rows.append(bench.measure("average", regime, merged / "average"))
        if regime.role != "end":  # at an end, CCM by a coordinate gives the expert itself
            for readout in READOUTS:
                rows.append(bench.measure(readout, regime, merged / f"{readout}_{regime.viscosity:g}"))
    swept = next(regime for regime in bench.regimes if regime.role == "validation" and regime.viscosity == SWEPT)
    same = {-1.0: models["low"], 0.0: merged / "average", 1.0: models["high"]}
    sweep = [bench.measure("sweep", swept, same.get(alpha, merged / f"alpha_{alpha:g}")) for alpha in ALPHAS]
    for alpha, row in zip(ALPHAS, sweep, strict=True):
        row["alpha"] = alpha

    chosen = min(READOUTS, key=lambda readout: _change(rows, readout))
    content = {
        "benchmark": "ccm_latent",
        "machine": machine(torch.device("cpu")),
        "config": anchor.model_dump(),
        "fine_tuning": FINE_TUNING,
        "settings": own,
        "ends": bench.ends,
        "chosen": chosen,
        "validation": {readout: _change(rows, readout) for readout in READOUTS},
        "rows": rows,
        "sweep": sweep,
        "seconds": bench.times,
    }
    write_text(output, json.dumps(content, indent=1) + "\n")
    print_tables(bench, rows, sweep, chosen)
    total = {key: sum(one[key] for one in bench.times.values()) / 60 for key in ("wall", "cpu")}
    print(f"\n{total['wall']:.1f} minutes, {total['cpu']:.1f} CPU minutes; results: {output}")


def merge(bench: Bench, models: dict[str, Path]) -> Path:
    """Create all merged models. Returns their folder, whose name contains a hash of the experts."""
    values = [regime.viscosity for regime in bench.regimes if regime.role != "end"]
    sweep: list[dict[str, Any]] = [{"name": "average", "parameters": {"alpha": 0.0}}]
    for value in values:
        for readout in READOUTS:
            place = {"coordinate": value, "power": 0 if readout == "log" else 1}
            sweep.append({"name": f"{readout}_{value:g}", "parameters": place})
    sweep += [{"name": f"alpha_{a:g}", "parameters": {"alpha": a}} for a in ALPHAS if a not in (-1.0, 0.0, 1.0)]
    words = {**bench.words, "base_model": str(models["anchor"]), "sweep": sweep}
    words["models"] = [
        {**entry, "model": str(models[end])} for end, entry in zip(bench.ends, words["models"], strict=True)
    ]
    folder = bench.folder / f"merged-{fingerprint([_sha256(models[end]) for end in ('anchor', 'low', 'high')])}"
    path = bench.folder / "merge.yaml"
    write_text(path, yaml.safe_dump(words, sort_keys=False))
    with bench.timed("merge"):
        command("merge", str(path), "--output", str(folder))
    return folder


def _change(rows: Sequence[dict[str, Any]], row: str) -> float:
    """Mean log(error / anchor's error) over the validation viscosities: physical error, open channel."""
    errors: dict[str, list[float]] = {}
    for one in rows:
        if one["regime"]["role"] == "validation":
            errors.setdefault(one["row"], []).append(one["physical_mse"]["open_channel"])
    ratios = [math.log(ours / anchor) for ours, anchor in zip(errors[row], errors["anchor"], strict=True)]
    return sum(ratios) / len(ratios)


def print_tables(bench: Bench, rows: Sequence[dict[str, Any]], sweep: Sequence[dict[str, Any]], chosen: str) -> None:
    """Print the tables of docs/ccm_latent.md."""
    print(f"\nchosen on validation: {TITLES[chosen]}")
    tested = [regime for regime in bench.regimes if regime.role != "validation"]
    validated = [regime for regime in bench.regimes if regime.role == "validation"]
    for title, regimes in (("test", tested), ("validation", validated)):
        for domain in ("open_channel", "porous_media"):
            for key in ("physical_mse", "latent_mse"):
                print(f"\n{title}, {domain}, {key} (change against the anchor)\n")
                _table(rows, sorted(regimes, key=lambda regime: regime.viscosity), domain, key)
    print(f"\nsweep of alpha at the validation viscosity {SWEPT:g}\n")
    print("| alpha | open_channel physical_mse | latent_mse | porous_media physical_mse | latent_mse |")
    print("|---|---|---|---|---|")
    for row in sweep:
        values = [row[key][domain] for domain in ("open_channel", "porous_media") for key in MEASURES[1::-1]]
        print(f"| {row['alpha']:g} | " + " | ".join(f"{value:.4g}" for value in values) + " |")


def _table(rows: Sequence[dict[str, Any]], regimes: Sequence[Regime], domain: str, key: str) -> None:
    errors = {(one["row"], one["regime"]["viscosity"]): one for one in rows if Regime(**one["regime"]) in regimes}
    print("| viscosity | " + " | ".join(f"{regime.viscosity:g}, {regime.role}" for regime in regimes) + " |")
    print("|---" * (len(regimes) + 1) + "|")
    still = [errors["anchor", regime.viscosity][f"{key}_persistence"][domain] for regime in regimes]
    print("| persistence | " + " | ".join(f"{value:.4g}" for value in still) + " |")
    for row, title in TITLES.items():
        cells = []
        for regime in regimes:
            ours, anchor = errors.get((row, regime.viscosity)), errors["anchor", regime.viscosity][key][domain]
            value = ours[key][domain] if ours else None
            change = f" ({value / anchor - 1:+.1%})" if value is not None and row != "anchor" else ""
            cells.append("" if value is None else f"{value:.4g}{change}")
        if any(cells):
            print(f"| {title} | " + " | ".join(cells) + " |")


def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for all runs and data")
    options = parser.parse_args(arguments)
    return exit_code(lambda: work(options.overrides, options.json))


if __name__ == "__main__":
    sys.exit(main())
