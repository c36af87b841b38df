"""Measure all rows of the benchmark for one family and seed, and write them as JSON.

All tuning uses the validation split. The test splits (interpolation, ood_low, ood_high) are read afterwards. Only
``oracle``, which is a bound, is chosen by its errors there; ``ccm_prefix`` and ``fine_tuned`` see the K given frames.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shodh_moe.base.results import read_result, write_result
from shodh_moe.ccm.bench.baselines import choose_rate, fine_tune, mean_error, oracle, task_vectors
from shodh_moe.ccm.bench.config import EXPERTS, BenchConfig, FamilyBench, checkpoint_of_last_step
from shodh_moe.ccm.curve import line
from shodh_moe.ccm.data import Trajectories, read_split
from shodh_moe.ccm.expert import Expert, compose, load_expert, require_same_network
from shodh_moe.ccm.readout import Prefix, bend, clip, fit_prefix, fit_scale, probes, rollout_errors, straight_to
from shodh_moe.checkpoint.read import CheckpointReader
from shodh_moe.config.compare import fingerprint

VERSION = 2  # increase it when the same experts would give different numbers
TEST_SPLITS = ("interpolation", "ood_low", "ood_high")
CURVE = tuple(step / 4 for step in range(-8, 9))  # alphas at which validation errors are measured: -2, -1.75, ..., 2


def result_path(config: BenchConfig, key: str, seed: int) -> Path:
    return config.folder / "results" / f"{key}-{seed}.json"


def measured(config: BenchConfig, key: str, seed: int) -> bool:
    """Whether a result for the current experts and settings exists."""
    return read_result(result_path(config, key, seed), _key(config, key, seed)) is not None


def _key(config: BenchConfig, key: str, seed: int) -> str:
    hashes = [CheckpointReader(load_path(config, key, seed, role)).state["sha256"] for role in EXPERTS]
    one = config.families[key]
    return fingerprint(VERSION, hashes, one.family.folder().name, one.frames, one.fine_tuning.model_dump())


def load_path(config: BenchConfig, key: str, seed: int, role: str) -> Path:
    """Path of an expert's last checkpoint, whether or not it exists yet."""
    return checkpoint_of_last_step(config.expert(key, seed, role))


def measure(config: BenchConfig, key: str, seed: int) -> Path:
    """Measure one family and seed, and write its result file.

    Raises:
        UserError: an expert or a file of the family is missing or damaged.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    experts = {role: load_expert(load_path(config, key, seed, role), device) for role in EXPERTS}
    require_same_network([experts[role] for role in ("anchor", "low", "high")])
    one = config.families[key]
    family, folder = one.family.family(), one.family.folder()
    chosen = _Choices(one, experts, read_split(family, folder, "validation"))
    support = read_split(family, folder, "support")
    bends = bend(experts["low"], experts["high"], probes(support, one.network.history))
    regimes, prefixes, example = [], [], None
    for split in (one for one in TEST_SPLITS if family.coordinates.get(one)):
        for regime in read_split(family, folder, split):
            rows, prefix = chosen.rows(regime)
            prefixes.append({"coordinate": regime.coordinate, "alpha": prefix.alpha, "sharpness": prefix.sharpness})
            found = {"split": split, "coordinate": regime.coordinate, "value": regime.value, "rows": rows}
            regimes.append(found)
            if example is None and split != "interpolation":
                example = chosen.example(regime)
    result = {
        "family": key,
        "seed": seed,
        "parameter": family.parameter,
        "frames": one.frames,
        "chosen": chosen.record,
        "curves": chosen.curves(),
        "straightness": {"bend": {str(k): v for k, v in bends.items()}, "straight_to": straight_to(bends)},
        "prefix": prefixes,
        "seconds": chosen.seconds(),
        "regimes": regimes,
    }
    path = result_path(config, key, seed)
    if example is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path.with_suffix(".npz"), allow_pickle=False, **example)
    write_result(path, _key(config, key, seed), result)
    return path


class _Choices:
    """All choices made on validation regimes, before a test regime is read, and measurements with them."""

    def __init__(self, one: FamilyBench, experts: dict[str, Expert], validation: list[Trajectories]):
        self._one, self._experts, self._validation = one, experts, validation
        self._times: dict[str, list[float]] = {}
        anchor, ends, k = experts["anchor"], [experts["low"], experts["high"]], one.frames
        scale = fit_scale(experts["low"], experts["high"], validation, k)
        self._gamma = scale["gamma"]
        self.record: dict[str, Any] = {"gamma": self._gamma}
        self._merged = {}
        for method in ("task_arithmetic", "ties", "dare"):
            self._merged[method], self.record[method] = task_vectors(method, anchor, ends, validation, k)
        self._rate, errors = choose_rate(anchor, validation, k, one.fine_tuning)
        self.record["fine_tuned"] = {"learning_rate": self._rate, "validation_errors": errors}
        sides = {
            "low": [r for r in validation if r.coordinate < 0],
            "high": [r for r in validation if r.coordinate > 0],
        }
        self._best_end = {
            # Without validation regimes on this side, all of them decide.
            side: min(("low", "high"), key=lambda end: mean_error(experts[end], regimes or validation, k))
            for side, regimes in sides.items()
        }
        self.record["best_endpoint"] = self._best_end

    def rows(self, regime: Trajectories) -> tuple[dict[str, Any], Prefix]:
        """Errors of every row on a regime (means over frames, one per trajectory), and the regime's prefix."""
        experts, s, k = self._experts, regime.coordinate, self._one.frames
        ends = (experts["low"], experts["high"])
        with self._timed("prefix"):
            prefix = fit_prefix(*ends, regime.fields, k)
        alphas = {"ccm_coordinate": clip(s), "ccm_scale": clip(self._gamma * s), "ccm_prefix": prefix.alpha}
        rows: dict[str, Any] = {role: self._row(experts[role], regime) for role in ("anchor", "low", "high")}
        rows["best_endpoint"] = rows[self._best_end["low" if s < 0 else "high"]]
        rows["average"] = self._row(compose(*ends, 0.0), regime)
        for method, expert in self._merged.items():
            rows[method] = self._row(expert, regime)
        for name, alpha in {**alphas, "wrong_sign": clip(-s)}.items():
            with self._timed("merge"):
                merged = compose(*ends, alpha)
            rows[name] = {"alpha": alpha, **self._row(merged, regime)}
        alpha, errors = oracle(line(*ends), regime, k, alphas.values())
        rows["oracle"] = {"alpha": alpha, "errors": errors.mean(1).tolist()}
        rows["conditioned"] = self._row(experts["conditioned"], regime)
        with self._timed("fine_tuned"):
            tuned = fine_tune(experts["anchor"], regime, k, self._rate, self._one.fine_tuning)
        rows["fine_tuned"] = self._row(tuned, regime)
        return rows, prefix

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        """Record the time of one regime: of the CPU, or on a GPU of the clock."""
        clock = time.perf_counter if torch.cuda.is_available() else time.process_time
        began = clock()
        yield
        self._times.setdefault(what, []).append(clock() - began)

    def seconds(self) -> dict[str, float]:
        """Mean seconds for a regime, by what was done."""
        return {what: sum(times) / len(times) for what, times in self._times.items()}

    def _row(self, expert: Expert, regime: Trajectories) -> dict[str, Any]:
        errors = rollout_errors(expert, regime.fields, regime.coordinate, self._one.frames)
        return {"errors": errors.mean(1).tolist()}

    def curves(self) -> list[dict[str, Any]]:
        """Mean error at each alpha of `CURVE` on each validation regime."""
        ends, k = (self._experts["low"], self._experts["high"]), self._one.frames
        return [
            {
                "coordinate": regime.coordinate,
                "errors": {f"{alpha:+.2f}": mean_error(compose(*ends, alpha), [regime], k) for alpha in CURVE},
            }
            for regime in self._validation
        ]

    def example(self, regime: Trajectories) -> dict[str, np.ndarray]:
        """Images [H, W] for a figure, the truth and three predictions: first trajectory, last frame, first channel."""
        experts, s, k = self._experts, regime.coordinate, self._one.frames
        shown = {
            "anchor": experts["anchor"],
            "best_endpoint": experts[self._best_end["low" if s < 0 else "high"]],
            "ccm": compose(experts["low"], experts["high"], clip(s)),
        }
        fields = regime.fields[:1]

        def last_frame(expert: Expert) -> Tensor:
            given = fields[:, :k].to(next(expert.network.parameters()))
            return expert.predict(given, fields.shape[1] - k, s)[0, -1, 0].cpu()

        images = {"truth": fields[0, -1, 0], **{name: last_frame(expert) for name, expert in shown.items()}}
        return {**{name: image.numpy() for name, image in images.items()}, "coordinate": np.float64(s)}
