"""Measure what single settings of the mixture's recipe are worth: the audit's mixture with one of them changed.

    python benchmarks/studies/recipe.py [--config configs/audit/cpu.yaml] [--summary-only] [key=value ...]

The runs use the audit's data, tokenizer, steps and tuning seeds, and lie in its folder. Errors are those of validation
trajectories at the last step. Finished runs are skipped, so repeating the command resumes. Writes numbers (--json) and
a table beside them (.md). See docs/audit.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from shodh_moe.audit.arms import run_config, set_domains
from shodh_moe.audit.config import AuditConfig
from shodh_moe.audit.outcome import diverged, run_folder
from shodh_moe.audit.run import make_latents, train
from shodh_moe.base.command import OneLineParser, exit_code
from shodh_moe.base.environment import describe_environment
from shodh_moe.base.files import finite_json, require_writable, write_text
from shodh_moe.base.records import read_run
from shodh_moe.config import Config
from shodh_moe.config.load import load_config_of
from shodh_moe.launching.jobs import resolve_jobs

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "audit" / "cpu.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "recipe_cpu.json"
UNCHANGED = "as configured"


@dataclass(frozen=True)
class Variant:
    """One change of the recipe: settings of ``training`` and of ``model.moe.router``, and the sets it is tried on."""

    training: dict[str, Any]
    router: dict[str, Any]
    sets: tuple[str, ...] = ("main", "four")


VARIANTS = {
    UNCHANGED: Variant({}, {}),
    "loss mse": Variant({"loss": "mse"}, {}),
    "loss sample": Variant({"loss": "sample"}, {}),
    "loss relative": Variant({"loss": "relative"}, {}),
    "no commitment loss": Variant({}, {"commitment_weight": 0.0}),
    "router at the full rate": Variant({}, {"lr_scale": 1.0}, ("main",)),
}


def configs(audit: AuditConfig, rate: float) -> Iterator[tuple[str, str, Config]]:
    """Yield set, variant and config of every run."""
    for name, variant in VARIANTS.items():
        for set_name in variant.sets:
            domains = set_domains(audit, set_name)
            moe = audit.base.model.moe
            router = moe.router.model_copy(update=variant.router)
            experts = len(domains)
            model = audit.base.model.model_copy(
                update={"moe": moe.model_copy(update={"num_experts": experts, "router": router})}
            )
            for seed in audit.tuning_seeds:
                training = {"learning_rate": rate, **variant.training}
                yield set_name, name, run_config(audit, "recipe", model, domains, seed, training)


def measured(config: Config) -> dict[str, Any] | None:
    """Validation error, purity and gate of each domain at the end of a run; None if it diverged."""
    if diverged(config):
        return None
    folder = run_folder(config)
    valid, train_records = read_run(folder, "valid")[-1], read_run(folder, "train")
    routing = train_records[-1]["routing"][0]
    return {
        domain: {
            "latent_mse": error,
            "purity": max(routing["load"][domain]),
            "gate": routing["mean_gate"][domain],
        }
        for domain, error in valid["latent_mse"].items()
    }


def summarise(audit: AuditConfig, rate: float) -> dict[str, Any]:
    """The mean over seeds of what `measured` returns, by set, variant and domain."""
    found: dict[str, dict[str, list[Any]]] = {}
    for set_name, name, config in configs(audit, rate):
        found.setdefault(set_name, {}).setdefault(name, []).append(measured(config))
    rows: dict[str, Any] = {}
    for set_name, variants in found.items():
        for name, runs in variants.items():
            kept = [one for one in runs if one is not None]
            rows.setdefault(set_name, {})[name] = {
                domain: {key: fmean(one[domain][key] for one in kept) for key in kept[0][domain]}
                for domain in (kept[0] if kept else {})
            } | {"diverged": len(runs) - len(kept)}
    return rows


def markdown(rows: dict[str, Any]) -> str:
    """A table for each set: error of each domain, with the change against the recipe as configured."""
    lines = []
    for set_name, variants in rows.items():
        base = variants[UNCHANGED]
        domains = [domain for domain in base if domain != "diverged"]
        titles = [f"{domain.replace('_', ' ')} (purity, gate)" for domain in domains]
        lines += [f"| {set_name} | {' | '.join(titles)} |", "|---|" + "---|" * len(domains)]
        for name, row in variants.items():
            cells = []
            for domain in domains:
                if domain not in row:
                    cells.append("diverged")
                    continue
                one, first = row[domain], base[domain]["latent_mse"]
                change = f" {one['latent_mse'] / first - 1:+.1%}" if name != UNCHANGED else ""
                cells.append(f"{one['latent_mse']:.4f}{change} ({one['purity']:.2f}, {one['gate']:.2f})")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--rate", type=float, default=5e-3, help="learning rate of all runs")
    parser.add_argument(
        "--json", type=Path, default=RESULTS, metavar="FILE", help="results file; the table goes beside"
    )
    parser.add_argument("--summary-only", action="store_true", help="do not train")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the audit")
    return parser


def work(options: argparse.Namespace) -> None:
    audit = load_config_of(AuditConfig, options.config, options.overrides)
    require_writable(options.json.parent)
    if not options.summary_only:
        make_latents(audit)
        train(audit, [config for _, _, config in configs(audit, options.rate)], resolve_jobs(audit.jobs))
    rows = summarise(audit, options.rate)
    content = {"rate": options.rate, "rows": rows, "environment": describe_environment()}
    write_text(options.json, json.dumps(finite_json(content), indent=1) + "\n")
    write_text(options.json.with_suffix(".md"), markdown(rows))


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return exit_code(lambda: work(options))


if __name__ == "__main__":
    sys.exit(main())
