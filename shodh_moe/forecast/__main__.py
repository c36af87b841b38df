"""One process of the benchmark: ``python -m shodh_moe.forecast CONFIG STEP [MODEL SEED RATE]``.

Steps: calibrate, tokenizer (of a SEED), trial and final (of a MODEL), measure (of a final training), baselines.
"""

from __future__ import annotations

import math
import sys

import torch

from shodh_moe.audit.outcome import diverged
from shodh_moe.base.command import exit_code
from shodh_moe.base.results import write_result
from shodh_moe.config.load import load_config_of
from shodh_moe.config.paths import resolve_paths
from shodh_moe.forecast import measure, ours
from shodh_moe.forecast.config import OURS, ForecastConfig
from shodh_moe.forecast.plan import Training, key
from shodh_moe.forecast.train_peer import WEIGHTS, train_peer
from shodh_moe.forecast.validate import validation_error


def main() -> int:
    path, step, *rest = sys.argv[1:]

    def work() -> None:
        bench = load_config_of(ForecastConfig, path)
        torch.manual_seed(0)
        if step == "calibrate":
            ours.load_libraries()
            ours.calibrate(bench)
        elif step == "tokenizer":
            ours.load_libraries()
            ours.make_tokenizer(bench, int(rest[0]))
        elif step == "baselines":
            measure.measure_baselines(bench)
        else:
            model, seed, rate = rest
            training = Training(model, float(rate), int(seed), trial=step == "trial")
            if step == "measure":
                measure.measure(bench, training)
            else:
                _train(bench, training)

    return exit_code(work)


def _train(bench: ForecastConfig, training: Training) -> None:
    """Train, and validate a trial; the outcome is written last."""
    dataset = resolve_paths(bench.base).dataset
    if training.model == OURS:
        ours.load_libraries()
        found = ours.train_transformer(bench, training)
        reason = diverged(ours.transformer_config(bench, training))
    else:
        peer, found = train_peer(bench, training)
        reason = f"the loss was not finite at step {found['diverged']}" if found["diverged"] else None
        training.folder(bench).mkdir(parents=True, exist_ok=True)
        peer.save(training.folder(bench) / WEIGHTS)
    found["diverged"] = reason
    if training.trial:
        forecaster = None if reason else measure.trained_forecaster(bench, training)[0]
        found["validation_error"] = validation_error(bench, forecaster, dataset) if forecaster else math.inf
    write_result(training.folder(bench) / "outcome.json", key(bench, training), found)


if __name__ == "__main__":
    sys.exit(main())
