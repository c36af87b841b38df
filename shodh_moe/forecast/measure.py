"""Measure a finished training, or a baseline, on the test split and write the result as JSON, with arrays to draw."""

from __future__ import annotations

import resource
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.base.results import read_result, write_result
from shodh_moe.checkpoint import list_checkpoints
from shodh_moe.config.compare import fingerprint
from shodh_moe.config.paths import resolve_paths
from shodh_moe.data import TrajectoryRecord
from shodh_moe.forecast import baselines
from shodh_moe.forecast.config import OURS, ForecastConfig
from shodh_moe.forecast.data import Flow, dataset_records, flows, periods, require_long_enough
from shodh_moe.forecast.errors import rollout_errors
from shodh_moe.forecast.forecasters import Forecaster, load_peer, of_fields, of_model, of_peer
from shodh_moe.forecast.ours import timed
from shodh_moe.forecast.plan import Training, key, outcome
from shodh_moe.forecast.train_peer import WEIGHTS, new_peer
from shodh_moe.inference.loading import find_source, load_source
from shodh_moe.report.run.fields import mid_slice

MEASURE_VERSION = 1  # increase it when the same weights would give different numbers
REPEATS = 3  # forecasts that are timed
Result = dict[str, Any]


def trained_forecaster(bench: ForecastConfig, training: Training) -> tuple[Forecaster, dict[str, int]]:
    """Load a finished training.

    Returns:
        the forecaster, and its numbers of parameters: ``total``, and for ours ``tokenizer`` and ``transformer``.

    Raises:
        UserError: our model diverged so early that it has no checkpoint.
    """
    if training.model != OURS:
        dataset = resolve_paths(bench.base).dataset
        peer = load_peer(new_peer(bench, training, dataset), training.folder(bench) / WEIGHTS)
        return of_peer(peer, bench.base.tokenizer.operator), {"total": peer.parameter_count()}
    if not list_checkpoints(training.folder(bench) / "checkpoints"):
        raise UserError(f"{training.name} diverged: give lower learning_rates; the other trainings are kept")
    model = load_source(find_source(training.folder(bench)))
    parts = {
        name: sum(one.numel() for one in network.parameters())
        for name, network in (("tokenizer", model.tokenizer), ("transformer", model.transformer))
    }
    return of_model(model), {"total": sum(parts.values()), **parts}


def result_path(bench: ForecastConfig, name: str) -> Path:
    return bench.folder / "results" / f"{name}.json"


def measure_key(bench: ForecastConfig, training: Training | None) -> str:
    """Hash of everything that the result of a training, or of the baselines (None), depends on."""
    base = bench.base
    data = [resolve_paths(base).data_id, base.data.grid, bench.history, base.tokenizer.operator, periods(base)]
    trained = [key(bench, training), outcome(bench, training)] if training else []
    return fingerprint(MEASURE_VERSION, data, bench.steps, bench.starts, trained)


def result_of(bench: ForecastConfig, training: Training | None) -> Result | None:
    """Read a result for the current settings; None if there is none. Those of the baselines are in ``models``."""
    name = training.name if training else "baselines"
    return read_result(result_path(bench, name), measure_key(bench, training))


def measure(bench: ForecastConfig, training: Training) -> None:
    """Measure a finished training: errors, cost of a forecast, parameters; of the first seed also arrays to draw."""
    paths = resolve_paths(bench.base)
    records = dataset_records(bench.base, paths.dataset, "test")
    require_long_enough(records, bench.history, bench.steps)
    first, _ = next(flows(records[0], bench.history, bench.steps, 1))
    before = psutil.Process().memory_info().rss
    forecaster, parameters = trained_forecaster(bench, training)
    cost = _cost(forecaster, first, bench.steps, before)
    found = {
        **outcome(bench, training),
        "model": training.model,
        "seed": training.seed,
        "learning_rate": training.learning_rate,
        "parameters": parameters,
        "cost": cost,
        "domains": _errors(bench, forecaster, records),
    }
    if training.seed == bench.seeds[0]:
        _write_pictures(bench, training.name, forecaster, records)
    write_result(result_path(bench, training.name), measure_key(bench, training), found)


def measure_baselines(bench: ForecastConfig) -> None:
    """Measure the baselines. The mean at the same phase is measured on domains whose period the config states."""
    records = dataset_records(bench.base, resolve_paths(bench.base).dataset, "test")
    require_long_enough(records, bench.history, bench.steps)
    known = periods(bench.base)

    def phase_mean(flow: Flow, steps: int) -> torch.Tensor:
        return baselines.phase_mean(flow, steps, known[flow.domain])

    found = {}
    for name, forecast in _simple(bench).items():
        found[name] = _errors(bench, of_fields(forecast, bench.base.tokenizer.operator), records)
    pulsed = [record for record in records if record.domain in known]
    if pulsed:
        found[baselines.PHASE_MEAN] = _errors(bench, of_fields(phase_mean, bench.base.tokenizer.operator), pulsed)
    _write_pictures(bench, "true", None, records)
    write_result(result_path(bench, "baselines"), measure_key(bench, None), {"models": found})


def _simple(bench: ForecastConfig) -> dict[str, Callable[[Flow, int], torch.Tensor]]:
    found: dict[str, Callable[[Flow, int], torch.Tensor]] = {baselines.PERSISTENCE: baselines.persistence}
    if bench.history > 1:
        found[baselines.LINEAR] = baselines.linear_extrapolation
    return found


def _errors(bench: ForecastConfig, forecaster: Forecaster, records: list[TrajectoryRecord]) -> dict[str, Any]:
    operator = bench.base.tokenizer.operator
    return rollout_errors(forecaster, records, bench.history, bench.steps, bench.starts, operator)


@torch.no_grad()
def _cost(forecaster: Forecaster, flow: Flow, steps: int, before: int) -> dict[str, float]:
    """Seconds of a forecast, median of several after a first one, and the memory that model and forecasts need.

    On a GPU the memory is that of the device.
    """
    forecaster(flow, steps)
    seconds = statistics.median(timed(partial(forecaster, flow, steps)) for _ in range(REPEATS))
    if torch.cuda.is_available():
        return {"seconds": seconds, "memory_bytes": torch.cuda.max_memory_allocated()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "memory_bytes": max(peak - before, 0)}


@torch.no_grad()
def _write_pictures(
    bench: ForecastConfig, name: str, forecaster: Forecaster | None, records: list[TrajectoryRecord]
) -> None:
    """Write middle planes of the speed of each domain's first test flow at each step, and the solids of the plane.

    ``forecaster`` None writes the true ones.
    """
    arrays = {}
    for domain in dict.fromkeys(record.domain for record in records):
        record = next(one for one in records if one.domain == domain)
        flow, true_N4XYZ = next(flows(record, bench.history, bench.steps, 1))
        fields = forecaster(flow, bench.steps).fields_N4XYZ if forecaster else true_N4XYZ
        arrays[f"{domain}/velocity"] = mid_slice(domain, fields[:, :3].numpy())[0].astype(np.float32)
        arrays[f"{domain}/solid"] = mid_slice(domain, flow.solid_1XYZ[0].numpy())[0].astype(np.float32)
    path = picture_path(bench, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, allow_pickle=False, **arrays)


def picture_path(bench: ForecastConfig, name: str) -> Path:
    """Where the arrays to draw of a training, or of the ``true`` flows, are."""
    return bench.folder / "results" / f"{name}.npz"
