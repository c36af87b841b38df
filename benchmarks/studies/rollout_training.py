"""Measure what each setting of training for rollouts is worth: the audit's mixture with one of them changed.

    python benchmarks/studies/rollout_training.py [--config configs/audit/cpu.yaml] [--variants NAME ...]
        [--summary-only] [--set key=value ...]

The runs use the audit's two main domains with its data, tokenizer and steps, and lie in its folder. Rollouts begin at
every snapshot of the validation trajectories that leaves room for the longest history and the last step, so all
variants predict the same snapshots. Finished runs and measurements are skipped, so repeating the command resumes.
Writes numbers (--json) and a table beside them (.md). See docs/rollouts.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from shodh_moe.audit.arms import run_config, set_domains
from shodh_moe.audit.config import AuditConfig
from shodh_moe.audit.outcome import diverged, last_checkpoint
from shodh_moe.audit.run import make_latents, train
from shodh_moe.base.command import OneLineParser, exit_code
from shodh_moe.base.environment import describe_environment
from shodh_moe.base.errors import UserError
from shodh_moe.base.files import finite_json, require_writable, write_text
from shodh_moe.base.progress import progress
from shodh_moe.base.results import read_result, write_result
from shodh_moe.config import Config
from shodh_moe.config.compare import fingerprint
from shodh_moe.config.load import load_config_of
from shodh_moe.config.paths import resolve_paths
from shodh_moe.inference.loading import find_source, load_source
from shodh_moe.inference.rollout import rollout
from shodh_moe.launching.jobs import resolve_jobs
from shodh_moe.metrics.latents import sample_mse
from shodh_moe.model import Context, LatentTransformer
from shodh_moe.runs.jobs import cost_of
from shodh_moe.tokenizer.latents import LatentTrajectory, load_latents

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "audit" / "cpu.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "rollout_training_cpu.json"
SEEDS = [1000, 1001, 1002]
STEPS = [1, 3, 5, 10]
BASE = "as configured"
PERSISTENCE = "persistence"


@dataclass(frozen=True)
class Variant:
    """The settings of the sections ``training`` and ``model`` that one variant changes."""

    training: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    BASE: Variant(),
    "unroll 2, push-forward": Variant({"unroll": 2, "unroll_gradient": "last"}),
    "unroll 2, through time": Variant({"unroll": 2, "unroll_gradient": "through"}),
    "unroll 4, push-forward": Variant({"unroll": 4, "unroll_gradient": "last"}),
    "noise 0.02": Variant({"history_noise": 0.02}),
    "noise 0.05": Variant({"history_noise": 0.05}),
    "strides 1, 2, 3": Variant(model={"strides": [1, 2, 3]}),
    "scaled history": Variant(model={"scale_history": True}),
    "relative loss": Variant({"loss": "relative"}),
    "history 3": Variant(model={"history": 3}),
    "history 4": Variant(model={"history": 4}),
}


@dataclass(frozen=True)
class Study:
    """What to train and measure.

    Attributes:
        rate: learning rate of all runs.
        steps: the steps of a rollout to report, in increasing order.
        longest: the longest history of all variants, chosen or not.
    """

    audit: AuditConfig
    rate: float
    seeds: list[int]
    steps: list[int]
    variants: list[str]

    @property
    def longest(self) -> int:
        base = self.audit.base.model.history
        return max(variant.model.get("history", base) for variant in VARIANTS.values())

    def config(self, name: str, seed: int) -> Config:
        """The config of one run."""
        variant, domains = VARIANTS[name], set_domains(self.audit, "main")
        moe = self.audit.base.model.moe.model_copy(update={"num_experts": len(domains)})
        model = self.audit.base.model.model_copy(update={"moe": moe, **variant.model})
        training = {"learning_rate": self.rate, **variant.training}
        return run_config(self.audit, "rollout", model, domains, seed, training)

    def configs(self) -> list[Config]:
        return [self.config(name, seed) for name in self.variants for seed in self.seeds]

    def trajectories(self, config: Config) -> list[LatentTrajectory]:
        """The validation trajectories of the main domains.

        Raises:
            UserError: the latents cannot be read, or a trajectory is too short.
        """
        paths, domains = resolve_paths(config), set_domains(self.audit, "main")
        found = [one for one in load_latents(paths.latents, "valid", paths.tokenizer) if one.domain in domains]
        need = self.longest + self.steps[-1]
        if short := [one.snapshots for one in found if one.snapshots < need]:
            raise UserError(
                f"a validation trajectory has {short[0]} snapshots, but a history of {self.longest} and "
                f"{self.steps[-1]} steps need {need}: raise base.data.snapshots, or lower --steps"
            )
        return found


@torch.no_grad()
def rollout_errors(
    transformer: LatentTransformer, latent: LatentTrajectory, context: Context, first: int, steps: int
) -> Tensor:
    """Latent MSE of rollouts and of persistence, [2, steps], means over all starts in a trajectory.

    Args:
        context: of one sample.
        first: index of the first snapshot that is predicted; the last one leaves room for ``steps``.
    """
    z_TCxyz, history = latent.read(), transformer.config.history
    starts = range(first, latent.snapshots - steps + 1)
    given = torch.stack([z_TCxyz[start - history : start] for start in starts])
    geometry = latent.geometry_Cxyz.expand(len(starts), -1, -1, -1, -1)
    assert context.domain_B is not None
    all_alike = Context(
        len(starts),
        context.domain_B.expand(len(starts)),
        stride_B=torch.ones(len(starts)).long(),
        boundary_B32=latent.boundaries().expand(len(starts), -1, -1),
    )
    errors = torch.zeros(2, steps)
    for step, predicted in enumerate(islice(rollout(transformer, given, geometry, all_alike), steps)):
        target = torch.stack([z_TCxyz[start + step] for start in starts])
        errors[0, step] = sample_mse(predicted, target).mean()
        errors[1, step] = sample_mse(given[:, -1], target).mean()
    return errors


def measured(study: Study, config: Config) -> dict[str, Any] | None:
    """Errors of a run by domain, those of persistence, and its processor time; None if it diverged.

    They are kept in the audit's folder.
    """
    if diverged(config):
        return None
    last = study.steps[-1]
    key = fingerprint(study.longest, last)
    path = study.audit.folder / "rollouts" / f"{config.name}.json"
    if found := read_result(path, key):
        return found
    model, domains = load_source(find_source(last_checkpoint(config))), set_domains(study.audit, "main")
    by_domain: dict[str, list[Tensor]] = {}
    for latent in study.trajectories(config):
        context = Context(1, torch.tensor([domains.index(latent.domain)]))
        errors = rollout_errors(model.transformer, latent, context, study.longest, last)
        by_domain.setdefault(latent.domain, []).append(errors)
    means = {domain: torch.stack(rows).mean(0).tolist() for domain, rows in by_domain.items()}
    found = {
        "latent_mse": {domain: rows[0] for domain, rows in means.items()},
        PERSISTENCE: {domain: rows[1] for domain, rows in means.items()},
        "cpu_seconds": cost_of(study.audit.folder, config.name)["cpu_seconds"],
    }
    write_result(path, key, found)
    return found


def summarise(study: Study) -> dict[str, Any]:
    """By variant: each seed's latent MSE by domain at ``study.steps``, their mean, processor time, diverged runs.

    The entry ``persistence`` has its errors by domain.
    """
    rows: dict[str, Any] = {}
    for name in progress(study.variants, "measure", len(study.variants)):
        runs = [measured(study, study.config(name, seed)) for seed in study.seeds]
        kept = [run for run in runs if run is not None]
        rows[name] = {"diverged": len(runs) - len(kept), "domains": {}}
        if kept:
            rows[name]["cpu_seconds"] = fmean(run["cpu_seconds"] for run in kept)
            rows.setdefault(PERSISTENCE, {"domains": _at(study, kept[0][PERSISTENCE])})
        for domain in kept[0]["latent_mse"] if kept else ():
            by_seed = [_at(study, run["latent_mse"])[domain] for run in kept]
            mean = [fmean(column) for column in zip(*by_seed, strict=True)]
            rows[name]["domains"][domain] = {"seeds": by_seed, "mean": mean}
    return rows


def _at(study: Study, errors: dict[str, list[float]]) -> dict[str, list[float]]:
    return {domain: [values[step - 1] for step in study.steps] for domain, values in errors.items()}


def markdown(rows: dict[str, Any], steps: list[int]) -> str:
    """One table for each domain: the mean error at each step, with the change against the base."""
    base = rows.get(BASE, {"domains": {}})["domains"]
    domains = rows.get(PERSISTENCE, {"domains": {}})["domains"]
    lines = []
    for domain in domains:
        titles = " | ".join(f"step {step}" for step in steps)
        lines += [f"| {domain.replace('_', ' ')} | {titles} | CPU s |", "|---" * (len(steps) + 2) + "|"]
        for name, row in rows.items():
            if name == PERSISTENCE:
                continue
            if domain not in row["domains"]:
                lines.append(f"| {name} " + "| diverged " * len(steps) + "| |")
                continue
            mean = row["domains"][domain]["mean"]
            first = base.get(domain, {"mean": mean})["mean"]
            changes = ["" if name == BASE else f" {m / b - 1:+.1%}" for m, b in zip(mean, first, strict=True)]
            cells = [f"{m:.4f}{change}" for m, change in zip(mean, changes, strict=True)]
            note = f" ({row['diverged']} diverged)" if row["diverged"] else ""
            lines.append(f"| {name}{note} | {' | '.join(cells)} | {row['cpu_seconds']:.0f} |")
        still = " | ".join(f"{value:.4f}" for value in rows[PERSISTENCE]["domains"][domain])
        lines += [f"| persistence | {still} | |", ""]
    return "\n".join(lines)


def parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--rate", type=float, default=5e-3, help="learning rate of all runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="SEED")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="steps of a rollout to report")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument(
        "--json", type=Path, default=RESULTS, metavar="FILE", help="results file; the table goes beside"
    )
    parser.add_argument("--summary-only", action="store_true", help="do not train")
    parser.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="key=value", help="audit's settings")
    return parser


def work(options: argparse.Namespace) -> None:
    audit = load_config_of(AuditConfig, options.config, options.overrides)
    study = Study(audit, options.rate, options.seeds, sorted(options.steps), options.variants)
    if study.steps[0] < 1:
        raise UserError(f"--steps {study.steps[0]}: steps count from 1")
    require_writable(options.json.absolute().parent)
    configs = study.configs()
    if not options.summary_only:
        make_latents(audit)
        study.trajectories(configs[0])
        train(audit, configs, resolve_jobs(audit.jobs))
    rows = summarise(study)
    content = {
        "rate": study.rate,
        "seeds": study.seeds,
        "steps": study.steps,
        "rows": rows,
        "environment": describe_environment(),
    }
    write_text(options.json, json.dumps(finite_json(content), indent=1) + "\n")
    write_text(options.json.with_suffix(".md"), markdown(rows, study.steps))


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return exit_code(lambda: work(options))


if __name__ == "__main__":
    sys.exit(main())
