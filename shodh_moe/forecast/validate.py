"""The validation error by which learning rates are chosen, the same for all models."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean

from shodh_moe.forecast.config import ForecastConfig
from shodh_moe.forecast.data import dataset_records
from shodh_moe.forecast.errors import rollout_errors
from shodh_moe.forecast.forecasters import Forecaster


def validation_error(bench: ForecastConfig, forecaster: Forecaster, dataset: Path) -> float:
    """Velocity nRMSE of forecasts on the validation split: mean over steps, flows, and then domains.

    Infinite if a forecast is not finite.
    """
    records = dataset_records(bench.base, dataset, "valid")
    operator = bench.base.tokenizer.operator
    found = rollout_errors(forecaster, records, bench.history, bench.steps, min(bench.starts, 2), operator)
    error = fmean(fmean(one["nrmse"]["velocity"]) for one in found.values())
    return error if math.isfinite(error) else math.inf
