"""Our model within a wall time: its configs, and the numbers of steps that fit.

A training of ours is counted by steps, so the time is turned into steps with times measured once (`calibrate`): of a
step, and of everything else that a stage does. The stages' own times are measured too and reported.
"""

from __future__ import annotations

import importlib
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shodh_moe.audit.outcome import diverged
from shodh_moe.base.errors import UserError
from shodh_moe.base.memory import keep_freed_memory
from shodh_moe.base.records import read_run
from shodh_moe.base.results import read_result, write_result
from shodh_moe.config import Config
from shodh_moe.config.compare import fingerprint
from shodh_moe.config.paths import resolve_paths
from shodh_moe.forecast.config import ForecastConfig
from shodh_moe.forecast.plan import Training, base_key
from shodh_moe.runs import pipeline
from shodh_moe.runs.jobs import write_config

CALIBRATION_STEPS = 12
LEAST_STEPS = 4  # that must fit into the time
FIRST_STEPS = 2  # slower than the others, and not counted
SPARE = 0.03  # of the time, because a step does not always take equally long

Times = dict[str, Any]


def calibration(bench: ForecastConfig) -> Times | None:
    """Read what `calibrate` measured; None if it has not with these settings."""
    return read_result(bench.folder / "calibration.json", base_key(bench))


def calibrate(bench: ForecastConfig) -> None:
    """Measure the seconds of a step and of the rest of each stage, by training a little in a scratch folder."""
    scratch = bench.folder / "calibration"
    shutil.rmtree(scratch, ignore_errors=True)
    steps = CALIBRATION_STEPS
    config = _with(bench.base, "calibration", bench.seeds[0], scratch, steps, steps, log_every=1)
    paths = resolve_paths(config)
    tokenizer = timed(lambda: _train("tokenizer_rank", write_config(scratch, config)))
    encoding = timed(lambda: pipeline.make_latents(config, paths))
    pretraining = timed(lambda: _train("pretrain_rank", write_config(scratch, config)))
    found = {
        "tokenizer": _step_and_rest(paths.tokenizer, tokenizer),
        "encoding": encoding,
        "pretraining": _step_and_rest(paths.run, pretraining),
    }
    shutil.rmtree(scratch)
    write_result(bench.folder / "calibration.json", base_key(bench), found)


def tokenizer_config(bench: ForecastConfig, seed: int) -> Config:
    """The config of a seed's tokenizer and latents, with as many steps as fit."""
    return _with(bench.base, f"tokenizer-{seed}", seed, bench.folder, _tokenizer_steps(bench), 1)


def transformer_config(bench: ForecastConfig, training: Training) -> Config:
    """The config of a training of our transformer, after its tokenizer, with as many steps as fit."""
    measured = _calibrated(bench)
    seconds = (1 - SPARE) * training.seconds(bench)
    if not training.trial:
        found = tokenizer_outcome(bench, training.seed)
        assert found is not None, "train the tokenizer first"
        seconds -= found["tokenizer_seconds"] + found["encoding_seconds"]
    steps = _fitting(seconds, measured["pretraining"])
    config = _with(bench.base, training.name, training.seed, bench.folder, _tokenizer_steps(bench), steps)
    rate = {"learning_rate": training.learning_rate}
    return config.model_copy(update={"training": config.training.model_copy(update=rate)})


def require_fitting(bench: ForecastConfig) -> None:
    """Raise `UserError` if the times that `calibrate` measured leave no time for a few steps of every training."""
    measured = _calibrated(bench)
    given = {
        ("tokenizer", "seconds or tokenizer_share"): _tokenizer_seconds(bench),
        ("pretraining", "seconds, or lower tokenizer_share"): (1 - SPARE) * (1 - bench.tokenizer_share) * bench.seconds,
        ("pretraining", "trial_seconds"): (1 - SPARE) * bench.trial_seconds,
    }
    for (stage, remedy), seconds in given.items():
        times = measured[stage]
        if seconds < (needed := times["rest"] + LEAST_STEPS * times["step"]):
            raise UserError(
                f"{LEAST_STEPS} steps of our {stage} with what comes before and after take {needed:.1f} s, but only "
                f"{max(seconds, 0):.1f} s are allowed: raise {remedy}"
            )


def make_tokenizer(bench: ForecastConfig, seed: int) -> None:
    """Train a seed's tokenizer and encode the data, each from the start, and write how long both took."""
    config = tokenizer_config(bench, seed)
    paths = resolve_paths(config)
    shutil.rmtree(paths.tokenizer, ignore_errors=True)
    seconds = timed(lambda: _train("tokenizer_rank", write_config(bench.folder, config)))
    encoding = timed(lambda: pipeline.make_latents(config, paths))
    found = {"steps": config.tokenizer.steps, "tokenizer_seconds": seconds, "encoding_seconds": encoding}
    write_result(_tokenizer_file(bench, seed), _tokenizer_key(bench, seed), found)


def tokenizer_outcome(bench: ForecastConfig, seed: int) -> Times | None:
    """Read what `make_tokenizer` wrote; None if it has not finished with these settings."""
    return read_result(_tokenizer_file(bench, seed), _tokenizer_key(bench, seed))


def train_transformer(bench: ForecastConfig, training: Training) -> dict[str, Any]:
    """Train our transformer from the start.

    Returns:
        ``steps``, ``samples``, ``seconds`` (for a training that is measured: with tokenizer and encoding), and
        ``stages``: the seconds of each.
    """
    config = transformer_config(bench, training)
    shutil.rmtree(training.folder(bench), ignore_errors=True)
    stages = {"transformer": timed(lambda: _train_or_diverge(bench, config))}
    found = tokenizer_outcome(bench, training.seed)
    if not training.trial and found:
        stages |= {"tokenizer": found["tokenizer_seconds"], "encoding": found["encoding_seconds"]}
    steps, t = config.training.steps, config.training
    samples = steps * t.batch_size * t.accumulation
    return {"steps": steps, "samples": samples, "seconds": sum(stages.values()), "stages": stages}


def timed(work: Callable[[], object]) -> float:
    """Do some work and return its wall time in seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _train(rank_program: str, config: Path) -> None:
    """Train in this process as its only rank. Raises: SystemExit: it failed or was stopped by a signal."""
    module = importlib.import_module(f"shodh_moe.runs.{rank_program}")
    if code := module.main(["--config", str(config)]):
        raise SystemExit(code)


def _train_or_diverge(bench: ForecastConfig, config: Config) -> None:
    try:
        _train("pretrain_rank", write_config(bench.folder, config))
    except SystemExit:
        if diverged(config) is None:
            raise


def load_libraries() -> None:
    """Import what the trainings need, so that their times do not include it."""
    from shodh_moe.runs.rank import prepare

    keep_freed_memory()
    prepare()
    for module in ("shodh_moe.training.pretrain", "shodh_moe.training.tokenizer_task", "scipy.cluster.vq"):
        importlib.import_module(module)
    torch.use_deterministic_algorithms(True, warn_only=True)  # as the tokenizer's training does; it imports a lot


def _with(
    base: Config, name: str, seed: int, folder: Path, tokenizer_steps: int, steps: int, log_every: int | None = None
) -> Config:
    """The base config with a name, a seed, folders of its own and numbers of steps; one rank on all cores."""
    training = base.training
    warm_up = round(steps * training.warmup_steps / training.steps)
    changes: dict[str, Any] = {
        "name": name,
        "seed": seed,
        "runs": str(folder / "runs"),
        "tokenizer": base.tokenizer.model_copy(
            update={
                "root": str(folder / "tokenizers"),
                "steps": tokenizer_steps,
                "checkpoint_every": tokenizer_steps,
                "log_every": log_every or base.tokenizer.log_every,
            }
        ),
        "training": training.model_copy(
            update={
                "steps": steps,
                "warmup_steps": warm_up,
                "checkpoint_every": steps,
                "validate_every": steps,
                "log_every": log_every or training.log_every,
            }
        ),
        "parallel": base.parallel.model_copy(update={"processes": 1, "ep_size": "auto"}),
    }
    return base.model_copy(update=changes)


def _step_and_rest(folder: Path, seconds: float) -> Times:
    records = read_run(folder, "train")[FIRST_STEPS:]
    step = statistics.mean(record["step_ms"] for record in records) / 1e3
    return {"step": step, "rest": max(seconds - CALIBRATION_STEPS * step, 0.0)}


def _calibrated(bench: ForecastConfig) -> Times:
    measured = calibration(bench)
    assert measured is not None, "calibrate first"
    return measured


def _tokenizer_seconds(bench: ForecastConfig) -> float:
    return (1 - SPARE) * bench.tokenizer_share * bench.seconds - float(_calibrated(bench)["encoding"])


def _tokenizer_steps(bench: ForecastConfig) -> int:
    return _fitting(_tokenizer_seconds(bench), _calibrated(bench)["tokenizer"])


def _fitting(seconds: float, times: Times) -> int:
    """Number of steps in a time, at least 1: if a stage before took longer than expected, the report says so."""
    return max(int((seconds - times["rest"]) / times["step"]), 1)


def _tokenizer_key(bench: ForecastConfig, seed: int) -> str:
    return fingerprint(base_key(bench), seed, _tokenizer_steps(bench))


def _tokenizer_file(bench: ForecastConfig, seed: int) -> Path:
    return bench.folder / "runs" / f"tokenizer-{seed}.json"
