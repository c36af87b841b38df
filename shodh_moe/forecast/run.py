"""`shodh bench forecast`: data, trainings, measurements, report. Finished work is skipped, so the command resumes.

Trainings run one after the other, each on all cores, because their wall time is limited. One that was interrupted
starts again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from shodh_moe.base.environment import describe_environment
from shodh_moe.base.files import copy_files, require_writable, write_text
from shodh_moe.config.paths import resolve_paths
from shodh_moe.data import SPLITS
from shodh_moe.forecast import ours
from shodh_moe.forecast.config import OURS, ForecastConfig
from shodh_moe.forecast.data import dataset_records, require_long_enough
from shodh_moe.forecast.measure import result_of
from shodh_moe.forecast.page import markdown, write_page
from shodh_moe.forecast.peers import require_library
from shodh_moe.forecast.pictures import draw
from shodh_moe.forecast.plan import Training, finals, finished, trials
from shodh_moe.forecast.summary import summarise
from shodh_moe.launching.jobs import ProcessJob, run_jobs
from shodh_moe.runs import pipeline
from shodh_moe.runs.checks import check
from shodh_moe.runs.jobs import job_in


def run(bench: ForecastConfig, output: Path | None = None) -> dict[str, Any]:
    """Do all unfinished work and return the summary.

    Writes ``summary.json``, ``summary.md``, figures and ``index.html`` to ``<runs>/<name>/report``, and copies them to
    ``output`` if given.

    Raises:
        UserError: a setting is invalid, a library is missing, trajectories are too short, a process failed, or a folder
            cannot be written.
    """
    require_library(bench)
    require_writable(bench.folder)
    write_text(bench.folder / "config.yaml", yaml.safe_dump(bench.model_dump(), sort_keys=False))
    make_data(bench)
    _run([_job(bench, "calibrate")] if ours.calibration(bench) is None else [])
    ours.require_fitting(bench)
    for model in bench.models:
        if model == OURS:
            _make_tokenizers(bench)
        train(bench, trials(bench, model))
        train(bench, finals(bench, model))
    for model in bench.models:
        unmeasured = [one for one in finals(bench, model) if result_of(bench, one) is None]
        _run([_training_job(bench, "measure", one) for one in unmeasured])
    if result_of(bench, None) is None:
        _run([_job(bench, "baselines")])
    return report(bench, output)


def make_data(bench: ForecastConfig) -> None:
    """Make the data if they are to be generated, and check that the trajectories are long enough."""
    base = bench.base.model_copy(
        update={
            "name": f"{bench.name}-data",
            "runs": str(bench.folder / "runs"),
            "parallel": bench.base.parallel.model_copy(update={"processes": 1, "ep_size": "auto"}),
        }
    )
    paths = resolve_paths(base)
    check(base, paths)
    pipeline.make_data(base, paths)
    for split in SPLITS:
        require_long_enough(dataset_records(base, paths.dataset, split), bench.history, bench.steps)


def train(bench: ForecastConfig, trainings: list[Training]) -> None:
    """Do the trainings that have not finished."""
    missing = [one for one in trainings if not finished(bench, one)]
    _run([_training_job(bench, "trial" if one.trial else "final", one) for one in missing])


def _make_tokenizers(bench: ForecastConfig) -> None:
    missing = [seed for seed in bench.seeds if ours.tokenizer_outcome(bench, seed) is None]
    _run([_job(bench, "tokenizer", str(seed), name=f"tokenizer-{seed}") for seed in missing])


def _run(jobs: list[ProcessJob]) -> None:
    run_jobs(jobs, at_once=1, label="forecast")


def _training_job(bench: ForecastConfig, step: str, one: Training) -> ProcessJob:
    name = f"measure-{one.name}" if step == "measure" else one.name
    return _job(bench, step, one.model, str(one.seed), repr(one.learning_rate), name=name)


def _job(bench: ForecastConfig, step: str, *arguments: str, name: str = "") -> ProcessJob:
    config = str(bench.folder / "config.yaml")
    return job_in(bench.folder, name or step, ["-m", "shodh_moe.forecast", config, step, *arguments])


def report(bench: ForecastConfig, output: Path | None = None) -> dict[str, Any]:
    """Summarise the results and write the report. Raises `UserError` if a result is missing."""
    summary = summarise(bench) | {"environment": describe_environment(), "config": bench.model_dump()}
    folder = bench.folder / "report"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_text(folder / "summary.md", markdown(summary))
    pictures = draw(bench, summary, folder)
    page = write_page(summary, pictures, folder)
    if output:
        copy_files((folder / "summary.json", folder / "summary.md", page, *pictures), output)
    return summary
