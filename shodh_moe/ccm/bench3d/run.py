"""`shodh bench ccm3d`: data, tokenizer, runs, measurements, summary. Finished work is skipped, so it resumes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import yaml

from shodh_moe.audit.outcome import last_checkpoint
from shodh_moe.base.environment import describe_environment
from shodh_moe.base.errors import UserError
from shodh_moe.base.files import copy_files, require_writable, write_text
from shodh_moe.ccm.bench3d.config import ROLES, Bench3dConfig
from shodh_moe.ccm.bench3d.measure import measured, result_path
from shodh_moe.ccm.bench3d.tables import markdown, summarise
from shodh_moe.config.paths import resolve_paths
from shodh_moe.launching.jobs import ProcessJob, resolve_jobs, run_jobs
from shodh_moe.runs import pipeline
from shodh_moe.runs.checks import check
from shodh_moe.runs.folder import claim_run_folder
from shodh_moe.runs.jobs import cpu_seconds, job_in, training_job


def run(bench: Bench3dConfig, output: Path | None = None) -> dict[str, Any]:
    """Do all unfinished work and return the summary.

    Writes ``summary.json`` and ``summary.md`` to ``<runs>/<name>/report``, and copies them to ``output`` if given.

    Raises:
        UserError: a setting is invalid, a process failed, or a folder cannot be written.
    """
    require_writable(bench.folder)
    write_text(bench.folder / "config.yaml", yaml.safe_dump(bench.model_dump(), sort_keys=False))
    at_once = resolve_jobs(bench.jobs)
    base = bench.data_config()
    check(base, resolve_paths(base))
    pipeline.make_data(base, resolve_paths(base))
    pipeline.make_tokenizer(base, resolve_paths(base))
    mixtures = [bench.mixture(seed) for seed in bench.seeds]
    experts = [bench.expert(*one) for one in itertools.product(bench.axes, ROLES, bench.seeds)]
    held_out = [
        bench.held_out(domain, value) for domain, axis in bench.axes.items() for value in (*axis.validation, *axis.test)
    ]
    for config in (mixtures[0], *experts, *held_out):  # data and latents that several need are made once
        paths = resolve_paths(config)
        pipeline.make_data(config, paths)
        pipeline.make_latents(config, paths)
    for runs in (mixtures, experts):
        unfinished = [one for one in runs if not (last_checkpoint(one) / "state.json").exists()]
        for one in unfinished:
            claim_run_folder(one, write=False)
        run_jobs([training_job(bench.folder, one) for one in unfinished], at_once, "bench")
    pairs = list(itertools.product(bench.axes, bench.seeds))
    run_jobs([_measure_job(bench, *pair) for pair in pairs if not measured(bench, *pair)], at_once, "bench")
    return report(bench, output)


def report(bench: Bench3dConfig, output: Path | None = None) -> dict[str, Any]:
    """Summarise the results and write the report. Raises `UserError` if a result is missing."""
    results = []
    for domain, seed in itertools.product(bench.axes, bench.seeds):
        path = result_path(bench, domain, seed)
        if not path.exists():
            raise UserError(f"{path} is missing: run `shodh bench ccm3d` with this config until it finishes")
        results.append(json.loads(path.read_text()))
    summary = summarise(results) | {
        "cpu_seconds": cpu_seconds(bench.folder),
        "environment": describe_environment(),
        "config": bench.model_dump(),
    }
    folder = bench.folder / "report"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_text(folder / "summary.md", markdown(summary))
    if output:
        copy_files((folder / "summary.json", folder / "summary.md"), output)
    return summary


def _measure_job(bench: Bench3dConfig, domain: str, seed: int) -> ProcessJob:
    arguments = ["-m", "shodh_moe.ccm.bench3d", str(bench.folder / "config.yaml"), domain, str(seed)]
    return job_in(bench.folder, f"measure-{domain}-{seed}", arguments)
