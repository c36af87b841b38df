"""The trainings of the benchmark, their folders, and the choice of each model's learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shodh_moe.base.errors import UserError
from shodh_moe.base.results import read_result
from shodh_moe.config.compare import fingerprint
from shodh_moe.config.paths import resolve_paths
from shodh_moe.forecast.config import OURS, ForecastConfig

VERSION = 1  # increase it when the same settings would train other weights


@dataclass(frozen=True)
class Training:
    """One training.

    Attributes:
        model: `OURS` or the name of a peer.
        learning_rate: its highest one.
        seed: of weights and data order.
        trial: whether it only helps to choose the learning rate.
    """

    model: str
    learning_rate: float
    seed: int
    trial: bool = False

    @property
    def name(self) -> str:
        return f"{self.model}-trial-{self.learning_rate:g}" if self.trial else f"{self.model}-{self.seed}"

    def folder(self, bench: ForecastConfig) -> Path:
        return bench.folder / "runs" / self.name

    def seconds(self, bench: ForecastConfig) -> float:
        """The wall time that it may take."""
        return bench.trial_seconds if self.trial else bench.seconds


def trials(bench: ForecastConfig, model: str) -> list[Training]:
    """The trials of a model's learning rates; none if there is only one rate."""
    rates = bench.rates(model)
    return [Training(model, rate, bench.seeds[0], trial=True) for rate in rates] if len(rates) > 1 else []


def chosen_rate(bench: ForecastConfig, model: str) -> float:
    """The learning rate with the smallest validation error. Raises: UserError: a trial is missing, or all diverged."""
    if not (tried := trials(bench, model)):
        return bench.rates(model)[0]
    scores = {one.learning_rate: score(outcome(bench, one)) for one in tried}
    best = min(scores, key=lambda rate: scores[rate])
    if math.isinf(scores[best]):
        raise UserError(f"all trials of {model} diverged: give lower learning rates")
    return best


def finals(bench: ForecastConfig, model: str) -> list[Training]:
    """The trainings of a model that are measured: one for each seed, at the chosen rate."""
    rate = chosen_rate(bench, model)
    return [Training(model, rate, seed) for seed in bench.seeds]


def outcome(bench: ForecastConfig, training: Training) -> dict[str, Any]:
    """What a finished training has written. Raises: UserError: it has not finished with these settings."""
    found = read_result(training.folder(bench) / "outcome.json", key(bench, training))
    if found is None:
        raise UserError(
            f"{training.folder(bench)} holds no finished training: run `shodh bench forecast` with this config until "
            "it finishes"
        )
    return found


def finished(bench: ForecastConfig, training: Training) -> bool:
    """Whether a training with these settings has finished."""
    return read_result(training.folder(bench) / "outcome.json", key(bench, training)) is not None


def score(found: dict[str, Any]) -> float:
    """The validation error of an outcome; infinite if the training diverged."""
    value = found["validation_error"]
    return math.inf if value is None or not math.isfinite(value) else float(value)


def key(bench: ForecastConfig, training: Training) -> str:
    """Hash of all settings that a training depends on."""
    measured = [bench.steps, bench.starts]  # of the validation error
    facts = [VERSION, training.model, training.learning_rate, training.seed, training.seconds(bench), measured]
    if training.model == OURS:
        return fingerprint(*facts, base_key(bench))
    base, peer = bench.base, dict(bench.peers.items())[training.model]
    data = [resolve_paths(base).data_id, base.data.grid, base.data.skip_bad, bench.history]
    return fingerprint(*facts, data, peer.model_dump(exclude={"learning_rates"}))


def base_key(bench: ForecastConfig) -> str:
    """Hash of the settings that all trainings of our model depend on."""
    base = bench.base.model_dump(exclude={"name", "runs", "seed", "evaluation", "telemetry", "parallel"})
    return fingerprint(VERSION, base, resolve_paths(bench.base).data_id, bench.seconds, bench.tokenizer_share)
