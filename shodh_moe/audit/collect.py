"""The audit's result files by set, arm and seed, and values over the seeds of an arm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from shodh_moe.audit.transfer import Estimate, estimate
from shodh_moe.base.errors import UserError

ARMS = ("moe", "dense_active", "dense_total", "oracle", "random", "no_shared", "single")
SETS = ("main", "hard", "four")

Run = dict[str, Any]
Seeds = dict[int, Run]  # the runs of one arm
Sets = dict[str, dict[str, Seeds]]


def arm_name(run: Run) -> str:
    """What a run is called within its set: ``moe``, ``moe_4`` where experts vary, ``single:porous_media``."""
    if run["arm"] == "single":
        return f"single:{run['domains'][0]}"
    return f"moe_{run['experts']}" if run["set"] == "four" and run["arm"] == "moe" else str(run["arm"])


def by_arm(results: list[Run]) -> Sets:
    """The runs by set, name of the arm and seed, in the order of the tables.

    Raises:
        UserError: two results of one set, arm and seed, or an arm or set that the audit does not have.
    """
    for run in results:
        if run["arm"] not in ARMS or run["set"] not in SETS:
            raise UserError(
                f"the result of {run['run']} has an unknown arm or set ({run['arm']}, {run['set']}): "
                f"arms are {', '.join(ARMS)}, sets {', '.join(SETS)}"
            )
    found: Sets = {}

    def place(run: Run) -> tuple[int, int, int, str, int]:
        return SETS.index(run["set"]), ARMS.index(run["arm"]), run["experts"] or 0, arm_name(run), run["seed"]

    for run in sorted(results, key=place):
        seeds = found.setdefault(run["set"], {}).setdefault(arm_name(run), {})
        if run["seed"] in seeds:
            where = f"{run['set']}, {arm_name(run)}, seed {run['seed']}"
            raise UserError(f"there are two results of {where}: leave one out")
        seeds[run["seed"]] = run
    return found


def arms_of(sets: Sets) -> Iterator[tuple[str, str, Seeds]]:
    for name, arms in sets.items():
        for arm, seeds in arms.items():
            yield name, arm, seeds


def domains_of(seeds: Seeds) -> list[str]:
    return list(next(iter(seeds.values()))["domains"])


def error_of(seeds: Seeds, domain: str, quantity: str) -> dict[int, float | None]:
    """By seed; None where the run diverged."""
    return {s: None if run["diverged"] else run["errors"][domain].get(quantity) for s, run in seeds.items()}


def measured(seeds: Seeds, get: Callable[[Run], float | None]) -> Estimate:
    """Of what some runs may not have: these do not count; those that diverged do."""
    values = {seed: None if run["diverged"] else get(run) for seed, run in seeds.items()}
    return estimate({seed: v for seed, v in values.items() if v is not None or seeds[seed]["diverged"]})


def finished(seeds: Seeds) -> Seeds:
    return {seed: run for seed, run in seeds.items() if not run["diverged"]}
