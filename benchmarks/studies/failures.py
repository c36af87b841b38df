"""Count the training runs in a folder that failed: that ended far worse than the same run with another seed.

    python benchmarks/studies/failures.py runs/audit/arms [--json FILE]

A run failed in a domain if its last validation error is more than 1.25 times the median of the runs that differ only in
their seed, or more than 0.9 of persistence's (repeating the last snapshot), or if it diverged. Runs with fewer than two
such others, runs that started from another run, and runs that have not ended are left out. Prints every group of runs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from shodh_moe.audit.outcome import relative_errors
from shodh_moe.base.command import OneLineParser, exit_code
from shodh_moe.base.environment import describe_environment
from shodh_moe.base.errors import UserError
from shodh_moe.base.files import finite_json, write_text
from shodh_moe.base.records import read_run
from shodh_moe.config.compare import fingerprint
from shodh_moe.config.load import read_yaml

ABOVE_MEDIAN = 1.25
ABOVE_PERSISTENCE = 0.9
FEWEST = 3


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed, in one of their domains.

    Attributes:
        key: identifies the settings that the runs share.
        name: the runs' name up to the seed.
        errors: the last validation latent MSE relative to persistence, by seed.
        failed: the seeds that failed.
    """

    key: str
    name: str
    steps: int
    batch_size: int
    learning_rate: float
    domain: str
    errors: dict[int, float]
    failed: list[int]

    @property
    def worst(self) -> float:
        """The largest error relative to the median."""
        return max(self.errors.values()) / median(self.errors.values())


def groups_in(folder: Path) -> list[Group]:
    """Read all runs in a folder.

    Raises:
        UserError: there is no finished run.
    """
    found: dict[str, dict[int, dict[str, float]]] = {}
    settings: dict[str, tuple[str, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/config.yaml")):
        config = read_yaml(path)
        ratios = last_errors(path.parent, config["training"]["steps"])
        if config.get("start") or ratios is None:
            continue
        seed, name, training = config.pop("seed"), config.pop("name"), config["training"]
        for irrelevant in ("keep_every", "checkpoint_every"):
            training.pop(irrelevant, None)
        key = fingerprint(config)
        settings[key] = (name.rsplit("-", 2)[0], training)
        found.setdefault(key, {})[seed] = ratios
    if not found:
        raise UserError(f"{folder} has no finished training run: give the folder that holds the run folders")
    groups = []
    for key, runs in found.items():
        name, training = settings[key]
        if len(runs) < FEWEST:
            continue
        for domain in sorted({domain for ratios in runs.values() for domain in ratios}) or ["every domain"]:
            errors = {seed: ratios.get(domain, math.inf) for seed, ratios in sorted(runs.items())}
            shared = (training["steps"], training["batch_size"], training["learning_rate"])
            groups.append(Group(key, name, *shared, domain, errors, failed(errors)))
    return sorted(groups, key=lambda one: (one.name, one.steps, one.batch_size, one.learning_rate, one.key, one.domain))


def last_errors(run: Path, steps: int) -> dict[str, float] | None:
    """The errors of a run's last validation relative to persistence; {} if it diverged, None if it has not ended."""
    records = read_run(run, "valid")
    if records and records[-1]["step"] == steps:
        return {} if None in records[-1]["latent_mse"].values() else relative_errors(records[-1])
    return {} if any((run / "nonfinite").glob("*.json")) else None


def failed(errors: dict[int, float]) -> list[int]:
    """The seeds whose error, relative to persistence, counts as a failure."""
    limit = min(ABOVE_MEDIAN * median(errors.values()), ABOVE_PERSISTENCE)
    return [seed for seed, error in errors.items() if not error <= limit]


def table(groups: list[Group]) -> str:
    """A row for each group, and a last line with the number of runs."""
    lines = [
        "| runs | steps | samples a step | rate | domain | seeds | median | worst / median | failed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in groups:
        middle, seeds = median(one.errors.values()), len(one.errors)
        lines.append(
            f"| {one.name} | {one.steps} | {one.batch_size} | {one.learning_rate:g} | {one.domain} | {seeds} | "
            f"{middle:.3f} | {one.worst:.2f} | {', '.join(f'seed {seed}' for seed in one.failed) or '-'} |"
        )
    runs = {(one.key, seed) for one in groups for seed in one.errors}
    failures = {(one.key, seed) for one in groups for seed in one.failed}
    return "\n".join([*lines, "", f"{len(failures)} of {len(runs)} runs failed."])


def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers too")
    options = parser.parse_args(arguments)

    def work() -> None:
        groups = groups_in(options.folder)
        if options.json:
            content = {"groups": [asdict(one) for one in groups], "environment": describe_environment()}
            write_text(options.json, json.dumps(finite_json(content), indent=1) + "\n")
        print(table(groups))

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
