"""Measure the experts of one domain and seed, merged at held-out values of the domain's parameter.

The mixture and the experts differ only in what the domain's path has for itself, so a merge moves that alone, and the
other domains' predictions must keep their bits; this is measured. The scale gamma is chosen on validation values.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shodh_moe.audit.measure import heldout_errors
from shodh_moe.audit.outcome import last_checkpoint
from shodh_moe.base.errors import UserError
from shodh_moe.base.parameters import marks
from shodh_moe.base.results import read_result, write_result
from shodh_moe.ccm.bench3d.config import ROLES, Bench3dConfig
from shodh_moe.ccm.readout import BANK, GAMMAS, clip, golden_section
from shodh_moe.checkpoint import CheckpointReader
from shodh_moe.config import Config
from shodh_moe.config.compare import fingerprint
from shodh_moe.config.paths import resolve_paths
from shodh_moe.data import trajectories_by_source
from shodh_moe.inference.loading import Model, find_source, load_source, read_weights
from shodh_moe.inference.one_step import predict_windows
from shodh_moe.merging.recipe import affine_sum
from shodh_moe.model import LatentTransformer
from shodh_moe.tokenizer.latents import LatentSamples, load_latents

VERSION = 1  # increase it when the same experts would give different numbers
ORACLE_REACH = 2.0
Weights = dict[str, Tensor]


def result_path(bench: Bench3dConfig, domain: str, seed: int) -> Path:
    return bench.folder / "results" / f"{domain}-{seed}.json"


def measured(bench: Bench3dConfig, domain: str, seed: int) -> bool:
    """Whether a result for the current experts and settings exists."""
    return read_result(result_path(bench, domain, seed), _key(bench, domain, seed)) is not None


def checkpoints(bench: Bench3dConfig, domain: str, seed: int) -> dict[str, Path]:
    """The last checkpoint of the mixture and of the domain's experts, by role."""
    found = {"mixture": last_checkpoint(bench.mixture(seed))}
    return found | {role: last_checkpoint(bench.expert(domain, role, seed)) for role in ROLES}


def _key(bench: Bench3dConfig, domain: str, seed: int) -> str:
    hashes = [CheckpointReader(path).state["sha256"] for path in checkpoints(bench, domain, seed).values()]
    axis = bench.axes[domain]
    data = [bench.held_out(domain, value).data.model_dump() for value in (*axis.validation, *axis.test)]
    return fingerprint(VERSION, hashes, axis.model_dump(), data, bench.frames)


def composed(low: Weights, high: Weights, alpha: float) -> Weights:
    """CCM as in `shodh merge`: (1 - alpha)/2 low + (1 + alpha)/2 high; what both share keeps its bits."""
    pair = [(1 - alpha) / 2, (1 + alpha) / 2]
    return {name: affine_sum(pair, [values, high[name]]) for name, values in low.items()}


class Regime:
    """A held-out value of the parameter, with its test trajectories."""

    def __init__(self, config: Config, model: Model):
        paths = resolve_paths(config)
        self._config, self._model = config, model
        self._test = load_latents(paths.latents, "test", paths.tokenizer)
        self._samples = LatentSamples(self._test, config.model.history)
        self._records = trajectories_by_source(paths.dataset, "test", config.data.grid, config.data.skip_bad)

    def errors(self, weights: Weights) -> dict[str, float]:
        """One-step errors of the domain, see `heldout_errors`."""
        self._model.transformer.load_state_dict(weights)
        (found,) = heldout_errors(self._model, self._config, self._records, self._test, self._samples).values()
        return found

    def latent_mse(self, weights: Weights, frames: int | None = None) -> float:
        """One-step latent error, of the predictions of the first ``frames`` snapshots or of all."""
        self._model.transformer.load_state_dict(weights)
        history, windows = self._config.model.history, []
        for one in self._test:
            own = self._samples.windows_of(one)
            windows += own if frames is None else own[: frames - history]
        size = self._config.evaluation.batch_size
        total, count = 0.0, 0
        for found in predict_windows(self._model.transformer, self._samples, windows, size):
            wanted = found.batch.target_BCxyz
            total += float((found.latent_BCxyz - wanted).square().mean()) * len(wanted)
            count += len(wanted)
        return total / count

    def paths(self, weights: Weights) -> list[int]:
        """The path of each window."""
        self._model.transformer.load_state_dict(weights)
        windows = [window for one in self._test for window in self._samples.windows_of(one)]
        size = self._config.evaluation.batch_size
        chosen = predict_windows(self._model.transformer, self._samples, windows, size)
        return [int(e) for found in chosen for e in found.routing[0].expert_N.view(len(found.windows), -1)[:, 0]]


def measure(bench: Bench3dConfig, domain: str, seed: int) -> Path:
    """Measure one domain and seed, and write its result file.

    Raises:
        UserError: an expert, data or latents are missing or damaged, or an expert has changed more than its path.
    """
    axis, found = bench.axes[domain], checkpoints(bench, domain, seed)
    model = load_source(find_source(found["mixture"]))
    weights = {role: read_weights(find_source(path)) for role, path in found.items()}
    path = _own_path(model.transformer, weights, found)
    regimes = {value: Regime(bench.held_out(domain, value), model) for value in (*axis.validation, *axis.test)}

    def at(alpha: float) -> Weights:
        return composed(weights["low"], weights["high"], alpha)

    def validation_error(gamma: float) -> float:
        errors = [regimes[value].latent_mse(at(clip(gamma * axis.alpha(value)))) for value in axis.validation]
        still = [regimes[value].latent_mse(weights["mixture"]) for value in axis.validation]
        return sum(error / base for error, base in zip(errors, still, strict=True)) / len(errors)

    errors = {gamma: validation_error(gamma) for gamma in GAMMAS}
    gamma = min(errors, key=lambda one: (errors[one], abs(one - 1)))
    rows = [_rows(regimes[value], axis.alpha(value), gamma, weights, at, bench.frames) for value in axis.test]
    result = {
        "domain": domain,
        "seed": seed,
        "parameter": axis.parameter,
        "middle": bench.middle(domain),
        "ends": [axis.low, axis.high],
        "path": path,
        "own_path": {str(value): _share(regimes[value].paths(weights["mixture"]), path) for value in axis.test},
        "gamma": gamma,
        "validation": {str(key): value for key, value in errors.items()},
        "regimes": [{"value": value, **one} for value, one in zip(axis.test, rows, strict=True)],
        "others": _others(bench, domain, model, weights["mixture"], at(clip(axis.alpha(max(axis.test))))),
    }
    target = result_path(bench, domain, seed)
    write_result(target, _key(bench, domain, seed), result)
    return target


def _rows(
    regime: Regime, s: float, gamma: float, weights: dict[str, Weights], at: Callable[[float], Weights], frames: int
) -> dict[str, Any]:
    bank = {alpha: regime.latent_mse(at(alpha), frames) for alpha in BANK}
    best = min(bank, key=lambda alpha: bank[alpha])
    step = BANK[1] - BANK[0]
    refined, smallest = golden_section(
        lambda alpha: regime.latent_mse(at(alpha), frames), max(best - step, BANK[0]), min(best + step, BANK[-1]), 4
    )
    prefix = refined if smallest < bank[best] else best
    oracle, _ = golden_section(lambda alpha: regime.latent_mse(at(alpha)), -ORACLE_REACH, ORACLE_REACH, 6)
    alphas = {
        "average": 0.0,
        "ccm_coordinate": clip(s),
        "ccm_scale": clip(gamma * s),
        "ccm_prefix": prefix,
        "oracle": oracle,
        "wrong_sign": clip(-s),
    }
    rows: dict[str, dict[str, Any]] = {role: {"errors": regime.errors(own)} for role, own in weights.items()}
    rows |= {row: {"alpha": alpha, "errors": regime.errors(at(alpha))} for row, alpha in alphas.items()}
    return {"coordinate": s, "rows": rows}


def _own_path(transformer: LatentTransformer, weights: dict[str, Weights], where: dict[str, Path]) -> int:
    """The one path on which the experts differ from the mixture. Raises `UserError` if they differ elsewhere too."""
    by_path = {name for name, parameter in transformer.named_parameters() if marks(parameter).per_expert}
    changed: set[int] = set()
    for role in ROLES:
        for name, values in weights["mixture"].items():
            other = weights[role][name]
            if torch.equal(values, other):
                continue
            if name not in by_path:
                raise UserError(
                    f"{where[role]} differs from {where['mixture']} in {name}, which all paths share: "
                    "remove its run, and start the benchmark again"
                )
            changed |= {e for e in range(len(values)) if not torch.equal(values[e], other[e])}
    if len(changed) != 1:
        raise UserError(
            f"the experts of {where['mixture']} differ from it on {len(changed)} paths, not on one: the router sends "
            "the domain's samples to several of them; train the mixture longer, or choose another router.context"
        )
    return changed.pop()


def _share(chosen: list[int], path: int) -> float:
    return sum(one == path for one in chosen) / len(chosen)


def _others(bench: Bench3dConfig, domain: str, model: Model, before: Weights, after: Weights) -> dict[str, Any]:
    """Of each other domain: how many predictions of the mixture's test split there are, and whether all bits stay."""
    config = bench.mixture(bench.seeds[0])
    paths = resolve_paths(config)
    test = [one for one in load_latents(paths.latents, "test", paths.tokenizer) if one.domain != domain]
    found: dict[str, dict[str, Any]] = {}
    for one in test:
        samples = LatentSamples([one], config.model.history)
        made = []
        for weights in (before, after):
            model.transformer.load_state_dict(weights)
            windows = samples.windows_of(one)
            parts = predict_windows(model.transformer, samples, windows, config.evaluation.batch_size)
            made.append(torch.cat([part.latent_BCxyz for part in parts]))
        entry = found.setdefault(one.domain, {"predictions": 0, "identical": 0})
        entry["predictions"] += len(made[0])
        entry["identical"] += sum(torch.equal(a, b) for a, b in zip(*made, strict=True))
    return found
