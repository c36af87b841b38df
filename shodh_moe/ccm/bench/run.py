"""`shodh bench ccm`: data, experts, measurements, summary. Finished work is skipped, so the command resumes."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from shodh_moe.base.environment import describe_environment
from shodh_moe.base.errors import UserError
from shodh_moe.base.files import require_writable, write_text
from shodh_moe.ccm import data
from shodh_moe.ccm.bench.aims import family_title
from shodh_moe.ccm.bench.config import EXPERTS, BenchConfig, expert_name
from shodh_moe.ccm.bench.measure import load_path, measured, result_path
from shodh_moe.ccm.bench.pictures import draw, draw_fields
from shodh_moe.ccm.bench.summary import summarise
from shodh_moe.ccm.bench.tables import markdown
from shodh_moe.ccm.expert import require_same_dataset
from shodh_moe.launching.jobs import ProcessJob, read_cost, resolve_jobs, run_jobs
from shodh_moe.runs.folder import claim_run_folder


def run(config: BenchConfig, output: Path | None = None) -> dict[str, Any]:
    """Do all unfinished work and return the summary.

    Writes ``summary.json``, ``summary.md`` and figures to ``<runs>/<name>/report``, and copies them to ``output`` if
    given.

    Raises:
        UserError: a setting is invalid, a process failed, or a folder cannot be written.
    """
    require_writable(config.folder)
    write_text(config.folder / "config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False))
    at_once = resolve_jobs(config.jobs)
    pairs = list(itertools.product(config.seeds, config.families))
    experts = {(key, seed, role): config.expert(key, seed, role) for seed, key in pairs for role in EXPERTS}
    for expert in experts.values():
        claim_run_folder(expert, write=False)
        require_same_dataset(expert)
    datasets = {(one.family.folder(), one.family.name): key for key, one in config.families.items()}
    run_jobs([job for key in datasets.values() if (job := _data_job(config, key))], at_once)
    for roles in (("anchor", "conditioned"), ("low", "high")):
        run_jobs(
            [job for seed, key in pairs for role in roles if (job := _expert_job(config, key, seed, role))], at_once
        )
    run_jobs([_measure_job(config, key, seed) for seed, key in pairs if not measured(config, key, seed)], at_once)
    return report(config, output)


def report(config: BenchConfig, output: Path | None = None) -> dict[str, Any]:
    """Summarise the results and write the report. Raises `UserError` if a result is missing."""
    results = []
    for key, seed in itertools.product(config.families, config.seeds):
        path = result_path(config, key, seed)
        if not path.exists():
            raise UserError(f"{path} is missing: run `shodh bench ccm` with this config until it finishes")
        result = json.loads(path.read_text())
        spent = {role: _seconds(_cost(config, expert_name(key, seed, role))) for role in EXPERTS}
        result["cpu_seconds"] = {**spent, "measure": _seconds(_cost(config, f"{key}-{seed}-measure"))}
        if seed == config.seeds[0]:
            result["cpu_seconds"]["data"] = _seconds(_cost(config, f"{key}-data"))
        results.append(result)
    summary = {**summarise(results), "environment": describe_environment(), "config": config.model_dump()}
    folder = config.folder / "report"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_text(folder / "summary.md", markdown(summary))
    pictures = draw(results, summary, folder)
    for key in config.families:
        example = result_path(config, key, config.seeds[0]).with_suffix(".npz")
        if example.exists():
            with np.load(example) as arrays:  # allow_pickle is off
                images = {name: arrays[name] for name in arrays.files}
            title = f"{family_title(key)} at s = {float(images.pop('coordinate')):+.2f}, last frame"
            draw_fields(images, title, folder / f"fields_{key}.png")
            pictures.append(folder / f"fields_{key}.png")
    if output:
        _copy([folder / "summary.json", folder / "summary.md", *pictures], output)
    return summary


def _copy(files: Iterable[Path], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, output / file.name)


def _data_job(config: BenchConfig, key: str) -> ProcessJob | None:
    one = config.families[key].family
    if all(data.is_done(regime) for regime in data.regimes(one.family(), one.folder())):
        return None
    return _job(config, f"{key}-data", ["shodh_moe.ccm.bench", "data", key, "0"])


def _expert_job(config: BenchConfig, key: str, seed: int, role: str) -> ProcessJob | None:
    if (load_path(config, key, seed, role) / "state.json").exists():
        return None
    expert = config.expert(key, seed, role)
    path = config.folder / "configs" / f"{expert.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(expert.model_dump(), sort_keys=False))
    return _job(config, expert.name, ["shodh_moe.ccm.expert_rank", "--config", str(path)])


def _measure_job(config: BenchConfig, key: str, seed: int) -> ProcessJob:
    return _job(config, f"{key}-{seed}-measure", ["shodh_moe.ccm.bench", "measure", key, str(seed)])


def _job(config: BenchConfig, name: str, module: list[str]) -> ProcessJob:
    if module[0] == "shodh_moe.ccm.bench":
        module = [module[0], str(config.folder / "config.yaml"), *module[1:]]
    return ProcessJob(name, ["-m", *module], config.folder / "logs" / f"{name}.log", _cost(config, name))


def _cost(config: BenchConfig, name: str) -> Path:
    return config.folder / "cost" / f"{name}.json"


def _seconds(path: Path) -> float:
    return read_cost(path)["cpu_seconds"]
