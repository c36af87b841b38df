"""Means, intervals and verdicts from the audit's result files (one per run)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from shodh_moe.audit import findings, verdict
from shodh_moe.audit.arm_models import ARMS, SINGLE
from shodh_moe.audit.results import (
    QUANTITIES,
    SETS,
    Estimate,
    Run,
    Seeds,
    Sets,
    arms_of,
    by_arm,
    domains_of,
    error_of,
    estimate,
    measured,
    relative_difference,
)
from shodh_moe.base.errors import UserError
from shodh_moe.base.files import finite_json

AGAINST = [arm for arm in ARMS if arm not in ("moe", SINGLE)]  # arms that the mixture is compared with


def summarise(results: list[Run], tuning: dict[str, Any]) -> dict[str, Any]:
    """Compute the numbers of the tables and figures, ready for JSON.

    Args:
        results: the audit's results, one per run, in any order. A run that diverged has ``diverged`` set and no
            measurements; it counts as diverged in every estimate it belongs to.
        tuning: what `shodh_moe.audit.arms.tuning` returns, by arm or ``single:<domain>``.

    Returns:
        ``verdicts``, ``diverged`` and lists of rows: ``arms``, ``errors``, ``transfer``, ``pairs``, ``routing``,
        ``bifurcation``, ``swap``, ``kinship``, ``place``, ``unseen``, ``gradients``, ``plasticity``, ``relearning``;
        each row names its ``set``
        and ``arm``. Each `Estimate` is a dictionary with seeds as strings. ``tuning`` is returned as given.

    Raises:
        UserError: there are no results, or they do not fit together (`by_arm`).
    """
    if not results:
        raise UserError("there are no results of the audit to summarise: run `shodh audit` first")
    sets = by_arm(results)
    transfer, pairs = _transfer(sets), _pairs(sets)
    rows: dict[str, Any] = {
        "verdicts": _verdicts(sets, transfer, pairs),
        "diverged": [
            {"set": name, "arm": arm, "seed": seed, "run": run["run"], "reason": run["diverged"]}
            for name, arm, seeds in arms_of(sets)
            for seed, run in seeds.items()
            if run["diverged"]
        ],
        "arms": [_arm(name, arm, seeds, tuning) for name, arm, seeds in arms_of(sets)],
        "errors": _errors(sets),
        "transfer": transfer,
        "pairs": pairs,
        "routing": findings.routing(sets),
        "bifurcation": findings.bifurcation(sets),
        "swap": findings.swap(sets),
        "kinship": findings.kinship(sets),
        "place": findings.place(sets),
        "unseen": findings.unseen(sets),
        "gradients": findings.gradients(sets),
        "plasticity": findings.plasticity(sets),
        "relearning": findings.relearning(sets),
        "tuning": tuning,
    }
    return dict(finite_json(_plain(rows)))


def _plain(tree: Any) -> Any:
    """Convert estimates and verdicts to dictionaries, and keys to strings."""
    if isinstance(tree, (Estimate, verdict.Verdict)):
        tree = asdict(tree)
    if isinstance(tree, dict):
        return {str(key): _plain(value) for key, value in tree.items()}
    return [_plain(value) for value in tree] if isinstance(tree, list) else tree


def _arm(name: str, arm: str, seeds: Seeds, tuning: dict[str, Any]) -> dict[str, Any]:
    first = next(iter(seeds.values()))
    tuned = tuning.get(arm) or tuning.get(first["arm"]) or {}
    keys = ("parameters", "learning_rate", "steps", "experts")
    return {
        "set": name,
        "arm": arm,
        **{key: first.get(key) for key in keys},
        "at_edge": tuned.get("at_edge"),
        "seeds": list(seeds),
        "diverged": [seed for seed, run in seeds.items() if run["diverged"]],
    }


def _errors(sets: Sets) -> list[dict[str, Any]]:
    return [
        {"set": name, "arm": arm, "domain": domain}
        | {quantity: estimate(error_of(seeds, domain, quantity)) for quantity in QUANTITIES}
        | {"latent_mse_persistence": estimate(error_of(seeds, domain, "latent_mse_persistence")).value}
        for name, arm, seeds in arms_of(sets)
        for domain in domains_of(seeds)
    ]


def _difference(name: str, arm: str, base: str, domain: str, runs: Seeds, others: Seeds) -> dict[str, Any]:
    row: dict[str, Any] = {"set": name, "arm": arm, "base": base, "domain": domain}
    return row | {q: relative_difference(error_of(runs, domain, q), error_of(others, domain, q)) for q in QUANTITIES}


def _transfer(sets: Sets) -> list[dict[str, Any]]:
    """Compare every joint arm with the single-domain models of its set."""
    rows = [
        _difference(name, arm, f"single:{domain}", domain, seeds, sets[name][f"single:{domain}"])
        for name, arm, seeds in arms_of(sets)
        if not arm.startswith("single:")
        for domain in domains_of(seeds)
        if f"single:{domain}" in sets[name]
    ]
    return [row | {"answer": verdict.harm(row[QUANTITIES[0]])} for row in rows]


def _pairs(sets: Sets) -> list[dict[str, Any]]:
    """Compare the mixture with every other joint arm."""
    rows = [
        _difference(name, arm, base, domain, seeds, sets[name][base])
        for name, arm, seeds in arms_of(sets)
        if arm.startswith("moe")
        for base in AGAINST
        if base in sets[name]
        for domain in domains_of(seeds)
    ]
    return [row | {"answer": verdict.difference(row[QUANTITIES[0]])} for row in rows]


def _verdicts(sets: Sets, transfer: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Verdicts by latent MSE. Questions other than the main one are answered with the main set only."""

    def latent_mse(rows: list[dict[str, Any]], **wanted: str) -> dict[str, Estimate]:
        """The estimates by domain of the rows with these entries."""
        return {
            row["domain"]: row[QUANTITIES[0]] for row in rows if all(row[key] == value for key, value in wanted.items())
        }

    main, harms = {}, {}
    for name in [one for one in SETS if any(row["set"] == one for row in transfer)]:
        dense = latent_mse(transfer, set=name, arm="dense_active")
        arm = f"moe_{len(dense)}" if name == "four" else "moe"  # an expert for each domain
        moe = latent_mse(transfer, set=name, arm=arm)
        against = latent_mse(pairs, set=name, arm=arm, base="dense_active")
        harms[name] = {domain: verdict.harm(one) for domain, one in dense.items()}
        main[name] = verdict.ends_negative_transfer(dense, moe, against)
    differences = {base: latent_mse(pairs, set="main", arm="moe", base=base) for base in AGAINST}
    four = next((len(domains_of(seeds)) for seeds in sets.get("four", {}).values()), 0)
    grouping = latent_mse(pairs, set="four", arm=f"moe_{four}", base="oracle")
    seeds = sets.get("main", {}).get("moe", {})
    split = {seed: None if run["diverged"] else findings.bifurcated(run) for seed, run in seeds.items()}
    return {
        "ends_negative_transfer": main,
        "dense_joint_training": harms,
        **{
            arm: (verdict.as_good if arm == "oracle" else verdict.compare)(differences[arm])
            for arm, one in ARMS.items()
            if one.question
        },
        "grouping": verdict.as_good(grouping),
        "splits": verdict.splits(split),
        "reads_mask": verdict.reads_mask(measured(seeds, findings.beyond_mask)),
    }
