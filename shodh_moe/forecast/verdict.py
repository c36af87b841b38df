"""The verdict in sentences, computed from the velocity errors: first where another network wins."""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any

from shodh_moe.forecast.config import OURS
from shodh_moe.report.style import words

NAMES = {OURS: "our model", "fno": "FNO", "uno": "U-NO", "unet": "U-Net", "dpot": "DPOT"}
Errors = dict[str, list[float]]  # velocity nRMSE at each step, by model


def verdict(models: dict[str, Any], steps: int) -> list[str]:
    """Say where other networks, and then where baselines, have a smaller or equal velocity nRMSE than our model.

    Means over seeds are compared, at every step and in every domain.

    Args:
        models: as in `summary.summarise`. Those with ``seeds`` are trained.
        steps: number of steps.
    """
    domains = list(models[OURS]["domains"])
    peers, baselines = [], []
    for domain in domains:
        errors = errors_of(models, domain)
        trained = {name: found for name, found in errors.items() if "seeds" in models[name]}
        others = {name: found for name, found in errors.items() if name == OURS or name not in trained}
        peers += _losses(trained, domain)
        baselines += _losses(others, domain)
    if not peers and not baselines:
        where = _list([words(domain) for domain in domains])
        return [f"Our model has the smallest velocity error of all at each of the {steps} steps in {where}."]
    if not peers:
        peers = [f"Our model has a smaller velocity error than every other network at each of the {steps} steps."]
    return [*peers, *baselines]


def errors_of(models: dict[str, Any], domain: str) -> Errors:
    """The mean velocity nRMSE of every model that was measured on a domain; infinite where a forecast blew up."""
    return {
        name: [math.inf if value is None else value for value in model["domains"][domain]["nrmse"]["velocity"]["mean"]]
        for name, model in models.items()
        if domain in model["domains"]
    }


def title(model: str) -> str:
    """The name of a model in texts."""
    return NAMES.get(model, model)


def _losses(errors: Errors, domain: str) -> list[str]:
    """One sentence for each run of steps at which the same other model is the best and not worse than ours."""
    ours = errors[OURS]
    others = [name for name in errors if name != OURS]
    if not others:
        return []
    best = [min(others, key=lambda name: errors[name][step]) for step in range(len(ours))]
    winners = [name if errors[name][step] <= ours[step] else None for step, name in enumerate(best)]
    found = []
    for winner, run in groupby(range(len(ours)), key=lambda step: winners[step]):
        if winner:
            steps = list(run)
            first, last = steps[0], steps[-1]
            span = f"at step {first + 1}" if first == last else f"at steps {first + 1} to {last + 1}"
            which = "" if first == last else f" at step {last + 1}"
            found.append(
                f"In {words(domain)}, {title(winner)} has a smaller velocity error than our model {span}: "
                f"{_against(errors, winner, last)}{which}."
            )
    return found


def _against(errors: Errors, winner: str, step: int) -> str:
    return f"{errors[winner][step]:.3f} against {errors[OURS][step]:.3f}"


def _list(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
