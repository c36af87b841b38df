"""The summary of the benchmark: means over seeds of all measures of each model, and the verdict."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from shodh_moe.base.cores import available_cores
from shodh_moe.base.errors import UserError
from shodh_moe.forecast.config import ForecastConfig
from shodh_moe.forecast.data import periods
from shodh_moe.forecast.measure import Result, result_of, result_path
from shodh_moe.forecast.plan import chosen_rate, finals, outcome, score, trials
from shodh_moe.forecast.verdict import verdict
from shodh_moe.runs.jobs import cpu_seconds


def summarise(bench: ForecastConfig) -> dict[str, Any]:
    """Summarise all results.

    Returns:
        ``verdict``, sentences; ``models`` by name, first the trained ones: for each ``domains`` (`domain_summary`),
        and for trained ones ``seeds``, ``learning_rate``, ``trials`` (validation error by rate), ``parameters``,
        ``diverged`` (seeds); and by seed ``steps``, ``samples``, ``seconds``, ``stages``, ``cost``; and what is the
        same for all models.

    Raises:
        UserError: a result is missing.
    """
    models: dict[str, Any] = {model: _trained(bench, model) for model in bench.models}
    baselines = result_of(bench, None)
    if baselines is None:
        raise _missing(bench, "baselines")
    for name, domains in baselines["models"].items():
        models[name] = {"domains": {domain: domain_summary([found]) for domain, found in domains.items()}}
    return {
        "verdict": verdict(models, bench.steps),
        "models": models,
        "steps": bench.steps,
        "history": bench.history,
        "seconds": bench.seconds,
        "trial_seconds": bench.trial_seconds,
        "threads": available_cores(),
        "operator": bench.base.tokenizer.operator,
        "periods": periods(bench.base),
        "grid": bench.base.data.grid,
        "cpu_seconds": cpu_seconds(bench.folder),
    }


def _trained(bench: ForecastConfig, model: str) -> dict[str, Any]:
    results = []
    for training in finals(bench, model):
        if (found := result_of(bench, training)) is None:
            raise _missing(bench, training.name)
        results.append(found)
    tried = {f"{one.learning_rate:g}": score(outcome(bench, one)) for one in trials(bench, model)}
    return {
        "seeds": [one["seed"] for one in results],
        "learning_rate": chosen_rate(bench, model),
        "trials": {rate: error if math.isfinite(error) else None for rate, error in tried.items()},
        "parameters": results[0]["parameters"],
        "diverged": [one["seed"] for one in results if one["diverged"]],
        "steps": [one["steps"] for one in results],
        "samples": [one["samples"] for one in results],
        "seconds": [one["seconds"] for one in results],
        "stages": [one.get("stages") for one in results],
        "cost": [one["cost"] for one in results],
        "domains": {
            domain: domain_summary([one["domains"][domain] for one in results]) for domain in results[0]["domains"]
        },
    }


def domain_summary(results: list[Result]) -> dict[str, Any]:
    """Summarise the measures of one model and domain (`errors.rollout_errors`), one for each seed.

    Returns:
        ``nrmse`` and ``vrmse`` by field, each with ``mean``, ``low`` and ``high`` (smallest and largest seed) at each
        step; means of the other measures. A value is null where a forecast was not finite.
    """
    found: dict[str, Any] = {
        kind: {name: _spread([one[kind][name] for one in results]) for name in results[0][kind]}
        for kind in ("nrmse", "vrmse")
    }
    for kind in ("band_errors", "band_energy", "solid_velocity"):
        found[kind] = _mean([one[kind] for one in results])
    for kind in ("divergence", "divergence_true"):
        found[kind] = _mean([one[kind]["rms_relative"] for one in results])
    return {**found, "forecasts": results[0]["forecasts"]}


def _spread(seeds: list[list[float | None]]) -> dict[str, list[float | None]]:
    columns = list(zip(*seeds, strict=True))
    whole = [None if None in column else [float(value) for value in column if value is not None] for column in columns]
    return {
        "mean": [fmean(column) if column else None for column in whole],
        "low": [min(column) if column else None for column in whole],
        "high": [max(column) if column else None for column in whole],
    }


def _mean(values: list[Any]) -> Any:
    """Mean over seeds of numbers or of lists of numbers of any depth; None where one is missing."""
    if isinstance(values[0], list):
        return [_mean(list(column)) for column in zip(*values, strict=True)]
    return None if None in values else fmean(values)


def _missing(bench: ForecastConfig, name: str) -> UserError:
    return UserError(
        f"{result_path(bench, name)} is missing or of other settings: run `shodh bench forecast` with this config "
        "until it finishes"
    )
