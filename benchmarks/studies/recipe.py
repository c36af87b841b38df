"""Measure what single settings and parts of the mixture are worth, with the audit's data, tokenizer and steps.

    python benchmarks/studies/recipe.py [--table recipe|parts] [--config FILE] [--summary-only] [key=value ...]

recipe: the audit's mixture with one setting changed. parts: from a dense network to a model for each domain, one part
of the network after another chosen by the sample's label, to see in which part the harm of joint training sits.

The runs use the audit's tuning seeds and rates, and lie in its folder. Errors are those of validation trajectories at
the last step. Finished runs are skipped, so repeating the command resumes. Writes numbers (--json) and a table beside
them (.md). See docs/audit.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from shodh_moe.audit.arm_models import ARMS, SINGLE, with_moe
from shodh_moe.audit.arms import arm_config, choose_rates, rate_of, run_config, set_domains, trained_together
from shodh_moe.audit.config import AuditConfig
from shodh_moe.audit.outcome import diverged, last_validation, run_folder
from shodh_moe.audit.run import find_rates, make_latents, train
from shodh_moe.base.command import OneLineParser, exit_code
from shodh_moe.base.environment import describe_environment
from shodh_moe.base.files import finite_json, require_writable, write_text
from shodh_moe.base.records import read_run
from shodh_moe.config import Config
from shodh_moe.config.load import load_config_of
from shodh_moe.launching.jobs import resolve_jobs

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "audit" / "cpu.yaml"
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Variant:
    """An arm of the audit with some settings changed.

    Attributes:
        arm: a key of `ARMS`.
        training, router, moe: changed settings of ``training``, ``model.moe.router`` and ``model.moe``.
        sets: the sets of the audit it is trained on, with an expert for each domain.
        rate: its learning rate relative to the arm's in the audit.
    """

    arm: str = "moe"
    training: dict[str, Any] = field(default_factory=dict)
    router: dict[str, Any] = field(default_factory=dict)
    moe: dict[str, Any] = field(default_factory=dict)
    sets: tuple[str, ...] = ("main", "four")
    rate: float = 1.0


# The first of each table is what the others are compared with.
TABLES = {
    "recipe": {
        "as configured": Variant(),
        "loss mse": Variant(training={"loss": "mse"}),
        "loss sample": Variant(training={"loss": "sample"}),
        "loss relative": Variant(training={"loss": "relative"}),
        "no commitment loss": Variant(router={"commitment_weight": 0.0}),
        "router at the full rate": Variant(router={"lr_scale": 1.0}, sets=("main",)),
    },
    "parts": {
        "a model for each domain": Variant(SINGLE),
        "nothing by label: dense": Variant("dense_active"),
        "experts by label": Variant("oracle", moe={"scope": "layer", "attention": "shared"}),
        "experts, embedding and head by label": Variant("oracle", moe={"attention": "shared"}),
        "attention too: oracle routing": Variant("oracle"),
        "and no part that all samples use": Variant("oracle", moe={"shared_linear": False}),
        "the same, twice the rate": Variant("oracle", moe={"shared_linear": False}, rate=2.0),
        "routed by the mixture": Variant("moe"),
    },
}


def configs(audit: AuditConfig, table: str, rates: dict[str, float]) -> Iterator[tuple[str, str, Config]]:
    """Yield set, variant and config of every run of a table.

    Args:
        rates: learning rates by `tuned_as`, see `choose_rates`.
    """
    for name, variant in TABLES[table].items():
        for set_name in variant.sets:
            for domains in trained_together(variant.arm, set_domains(audit, set_name)):
                rate = variant.rate * rate_of(audit, variant.arm, domains, rates)
                for seed in audit.tuning_seeds:
                    yield set_name, name, _config(audit, set_name, variant, domains, seed, rate)


def _config(audit: AuditConfig, set_name: str, variant: Variant, domains: list[str], seed: int, rate: float) -> Config:
    if variant.arm == SINGLE:
        return arm_config(audit, set_name, SINGLE, seed, rate, domain=domains[0])
    model = with_moe(ARMS[variant.arm].model(audit.base, len(domains)), **variant.moe, router=variant.router)
    return run_config(audit, variant.arm, model, domains, seed, {"learning_rate": rate, **variant.training})


def measured(config: Config) -> dict[str, Any] | None:
    """Validation error, purity and gate of each domain at the end of a run; None if it diverged."""
    if diverged(config):
        return None
    valid = last_validation(config)
    routing = read_run(run_folder(config), "train")[-1]["routing"][0]
    return {
        domain: {
            "latent_mse": error,
            "purity": max(routing["load"][domain]),
            "gate": routing["mean_gate"][domain],
        }
        for domain, error in valid["latent_mse"].items()
    }


def summarise(audit: AuditConfig, table: str, rates: dict[str, float]) -> dict[str, Any]:
    """By set and variant: the means over seeds of what `measured` returns, by domain, and how many runs diverged."""
    found: dict[str, dict[str, list[Any]]] = {}
    for set_name, name, config in configs(audit, table, rates):
        found.setdefault(set_name, {}).setdefault(name, []).append(measured(config))
    return {set_name: {name: _means(runs) for name, runs in variants.items()} for set_name, variants in found.items()}


def _means(runs: list[dict[str, Any] | None]) -> dict[str, Any]:
    kept = [one for one in runs if one is not None]
    domains = sorted({domain for one in kept for domain in one})
    means = {
        domain: {
            key: fmean(one[domain][key] for one in kept if domain in one) for key in ("latent_mse", "purity", "gate")
        }
        for domain in domains
    }
    return {"diverged": len(runs) - len(kept), **means}


def markdown(rows: dict[str, Any]) -> str:
    """A table for each set: error of each domain, with the change against the first row."""
    lines = []
    for set_name, variants in rows.items():
        first = next(iter(variants.values()))
        domains = [domain for domain in first if domain != "diverged"]
        titles = [f"{domain.replace('_', ' ')} (purity, gate)" for domain in domains]
        lines += [f"| {set_name} | {' | '.join(titles)} |", "|---|" + "---|" * len(domains)]
        for name, row in variants.items():
            cells = [
                _cell(row[domain], first[domain], row is first) if domain in row else "diverged" for domain in domains
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(one: dict[str, float], base: dict[str, float], is_base: bool) -> str:
    change = "" if is_base else f" {one['latent_mse'] / base['latent_mse'] - 1:+.1%}"
    return f"{one['latent_mse']:.4f}{change} ({one['purity']:.2f}, {one['gate']:.2f})"


def parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=list(TABLES), default="recipe")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="results file, by default benchmarks/results/TABLE_cpu.json; the table goes beside",
    )
    parser.add_argument("--summary-only", action="store_true", help="do not train")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the audit")
    return parser


def work(options: argparse.Namespace) -> None:
    audit = load_config_of(AuditConfig, options.config, options.overrides)
    path = options.json or RESULTS / f"{options.table}_cpu.json"
    require_writable(path.parent)
    if options.summary_only:
        rates = choose_rates(audit)
    else:
        at_once = resolve_jobs(audit.jobs)
        make_latents(audit)
        rates = find_rates(audit, at_once)
        train(audit, [config for _, _, config in configs(audit, options.table, rates)], at_once)
    rows = summarise(audit, options.table, rates)
    content = {"learning_rates": rates, "rows": rows, "environment": describe_environment()}
    write_text(path, json.dumps(finite_json(content), indent=1) + "\n")
    write_text(path.with_suffix(".md"), markdown(rows))


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return exit_code(lambda: work(options))


if __name__ == "__main__":
    sys.exit(main())
