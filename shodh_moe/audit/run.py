"""`shodh audit`: data, tuning, runs, relearning, measurements, report. Finished work is skipped."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from shodh_moe.audit.arms import (
    Run,
    all_runs,
    choose_rates,
    shared_config,
    tuning,
    tuning_runs,
    unseen_config,
    with_all_domains,
)
from shodh_moe.audit.config import AuditConfig
from shodh_moe.audit.measure import measured, result_path
from shodh_moe.audit.outcome import diverged, ended
from shodh_moe.audit.page import markdown, write_page
from shodh_moe.audit.pictures import draw
from shodh_moe.audit.relearning import curves, pair, relearns
from shodh_moe.audit.summary import summarise
from shodh_moe.base.environment import describe_environment
from shodh_moe.base.errors import UserError
from shodh_moe.base.files import copy_files, require_writable, write_text
from shodh_moe.config import Config
from shodh_moe.config.paths import resolve_paths
from shodh_moe.launching.jobs import ProcessJob, resolve_jobs, run_jobs
from shodh_moe.runs import pipeline
from shodh_moe.runs.checks import check
from shodh_moe.runs.folder import claim_run_folder
from shodh_moe.runs.jobs import cpu_seconds, job_in, training_job


def run(audit: AuditConfig, output: Path | None = None) -> dict[str, Any]:
    """Do all unfinished work and return the summary.

    Writes ``summary.json``, ``summary.md``, figures and ``index.html`` to ``<runs>/<name>/report``, and copies them to
    ``output`` if given.

    Raises:
        UserError: a setting is invalid, a process failed other than by diverging, or a folder cannot be written.
    """
    require_writable(audit.folder)
    write_text(audit.folder / "config.yaml", yaml.safe_dump(audit.model_dump(), sort_keys=False))
    at_once = resolve_jobs(audit.jobs)
    make_latents(audit)
    rates = find_rates(audit, at_once)
    runs = all_runs(audit, rates)
    train(audit, [one.config for one in runs], at_once)
    train(audit, [config for one in runs if relearns(audit, one) for config in pair(audit, one)], at_once)
    for one in runs:
        if reason := diverged(one.config):
            print(f"[audit] {one.name} diverged: {reason}", flush=True)
    unmeasured = {one.name: one for one in runs if not measured(audit, one)}
    run_jobs([_measure_job(audit, one) for one in unmeasured.values()], at_once, "audit")
    return report(audit, output)


def make_latents(audit: AuditConfig) -> None:
    """Make the data, tokenizer and latents that all runs share, and the data and latents of unseen geometry."""
    base = with_all_domains(audit, audit.base)
    base = base.model_copy(update={"name": audit.name, "runs": str(audit.folder / "arms")})
    paths = resolve_paths(base)
    check(base, paths)
    pipeline.make_data(base, paths)
    pipeline.make_tokenizer(base, paths)
    shared, unseen = with_all_domains(audit, shared_config(audit)), unseen_config(audit)
    pipeline.make_latents(shared, resolve_paths(shared))
    unseen_paths = resolve_paths(unseen)
    pipeline.make_data(unseen, unseen_paths)
    pipeline.make_latents(unseen, unseen_paths)


def find_rates(audit: AuditConfig, at_once: int) -> dict[str, float]:
    """Train the runs among which learning rates are chosen, and return the chosen rates by `tuned_as`."""
    if len(audit.learning_rates) > 1:
        tried = [one.config for rates in tuning_runs(audit).values() for runs in rates.values() for one in runs]
        train(audit, tried, at_once)
    return choose_rates(audit)


def train(audit: AuditConfig, configs: Iterable[Config], at_once: int) -> None:
    """Train the runs that have not ended. A run that diverges counts as ended.

    Raises:
        UserError: a run failed for another reason; the message contains the end of its output.
    """
    unfinished = {config.name: config for config in configs if not ended(config)}
    for config in unfinished.values():
        claim_run_folder(config, write=False)
    run_jobs([_training_job(audit, config) for config in unfinished.values()], at_once, "audit")


def _training_job(audit: AuditConfig, config: Config) -> ProcessJob:
    return training_job(audit.folder, config, excused=lambda: diverged(config) is not None)


def _measure_job(audit: AuditConfig, one: Run) -> ProcessJob:
    arguments = ["-m", "shodh_moe.audit", str(audit.folder / "config.yaml"), one.name]
    return job_in(audit.folder, f"measure-{one.name}", arguments)


def report(audit: AuditConfig, output: Path | None = None) -> dict[str, Any]:
    """Summarise the results and write the report. Raises `UserError` if a result is missing."""
    tuned, results = tuning(audit), []
    for one in all_runs(audit, {name: record["chosen"] for name, record in tuned.items()}):
        path = result_path(audit, one)
        if not path.exists():
            raise UserError(f"{path} is missing: run `shodh audit` with this config until it finishes")
        # A run shared by two sets is measured once.
        results.append({**json.loads(path.read_text()), "set": one.set, "relearning": curves(audit, one)})
    summary = summarise(results, tuned) | {
        "cpu_seconds": cpu_seconds(audit.folder),
        "environment": describe_environment(),
        "config": audit.model_dump(),
    }
    folder = audit.folder / "report"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_text(folder / "summary.md", markdown(summary))
    pictures = draw(results, summary, folder, _maps(audit, results))
    page = write_page(summary, pictures, folder)
    if output:
        copy_files((folder / "summary.json", folder / "summary.md", page, *pictures), output)
    return summary


def _maps(audit: AuditConfig, results: list[dict[str, Any]]) -> dict[str, dict[str, np.ndarray]] | None:
    """The routing maps of the first mixture run that has them, by domain and name; None if there is no such run."""
    for result in results:
        path = audit.folder / "results" / f"{result['run']}.npz"
        if (result["set"], result["arm"], result["diverged"]) == ("main", "moe", None) and path.exists():
            maps: dict[str, dict[str, np.ndarray]] = {}
            with np.load(path) as arrays:  # allow_pickle is off
                for key in arrays.files:
                    domain, name = key.split("/")
                    maps.setdefault(domain, {})[name] = arrays[key]
            return maps
    return None
