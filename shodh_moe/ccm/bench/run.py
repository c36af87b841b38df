"""`shodh bench ccm`: data, experts, measurements, summary. Finished work is skipped, so the command resumes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from shodh_moe.base.environment import describe_environment
from shodh_moe.base.errors import UserError
from shodh_moe.base.files import copy_files, finite_json, require_writable, write_text
from shodh_moe.ccm import data
from shodh_moe.ccm.bench.aims import family_title
from shodh_moe.ccm.bench.config import EXPERTS, BenchConfig, checkpoint_of_last_step, expert_name
from shodh_moe.ccm.bench.measure import measured, result_path
from shodh_moe.ccm.bench.paths import compare_paths
from shodh_moe.ccm.bench.pictures import draw, draw_fields
from shodh_moe.ccm.bench.summary import summarise
from shodh_moe.ccm.bench.tables import markdown
from shodh_moe.ccm.bench.vary import summarise_variants, unmeasured, variants_of
from shodh_moe.ccm.bench.worth import markdown as worth
from shodh_moe.ccm.config import ExpertConfig
from shodh_moe.ccm.expert import require_same_dataset
from shodh_moe.launching.jobs import ProcessJob, resolve_jobs, run_jobs
from shodh_moe.runs.folder import claim_run_folder
from shodh_moe.runs.jobs import cost_of, job_in, write_config


def run(config: BenchConfig, output: Path | None = None) -> dict[str, Any]:
    """Do all unfinished work and return the summary.

    Writes ``summary.json``, ``summary.md``, ``worth.md`` and figures to ``<runs>/<name>/report``, and copies them to
    ``output`` if given.

    Raises:
        UserError: a setting is invalid, a process failed, or a folder cannot be written.
    """
    require_writable(config.folder)
    write_text(config.folder / "config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False))
    at_once = resolve_jobs(config.jobs)
    pairs = list(itertools.product(config.seeds, config.families))
    experts = _experts(config)
    for expert in experts.values():
        claim_run_folder(expert, write=False)
        require_same_dataset(expert)
    run_jobs([job for name, one in _datasets(config).items() if (job := _data_job(config, name, one))], at_once)
    for begun in (False, True):  # the others start from those that start from nothing
        group = [one for one in experts.values() if bool(one.start) == begun]
        run_jobs([job for one in group if (job := _expert_job(config, one))], at_once)
    run_jobs([_job_of(config, "measure", *pair) for pair in pairs if not measured(config, *pair[::-1])], at_once)
    run_jobs([_job_of(config, "vary", *pair) for pair in pairs if unmeasured(config, *pair[::-1])], at_once)
    return report(config, output)


def report(config: BenchConfig, output: Path | None = None) -> dict[str, Any]:
    """Summarise the results and write the report. Raises `UserError` if a result is missing."""
    results = []
    for key, seed in itertools.product(config.families, config.seeds):
        path = result_path(config, key, seed)
        if not path.exists():
            raise UserError(f"{path} is missing: run `shodh bench ccm` with this config until it finishes")
        result = json.loads(path.read_text())
        costs = {role: cost_of(config.folder, expert_name(key, seed, role)) for role in EXPERTS}
        costs["measure"] = cost_of(config.folder, f"{key}-{seed}-measure")
        if seed == config.seeds[0]:
            costs["data"] = cost_of(config.folder, f"{key}-data")
        result["name"] = config.families[key].family.name
        result["cpu_seconds"] = {name: cost["cpu_seconds"] for name, cost in costs.items()}
        result["wall_seconds"] = {name: cost["seconds"] for name, cost in costs.items() if name != "measure"}
        if config.families[key].variants:
            names = [expert.name for expert in _experts_of_variants(config, key, seed)]
            jobs = [f"{key}-{seed}-vary", *names, *(f"{name}-data" for name in names)]
            result["cpu_seconds"]["variants"] = sum(cost_of(config.folder, job)["cpu_seconds"] for job in jobs)
        results.append(result)
    summary = summarise(results)
    variants = summarise_variants(config)
    paths = {
        key: compare_paths(key, summary["families"][key], found, _paths_of(config, key))
        for key, found in variants.items()
    }
    summary |= {
        "backbones": backbones(config),
        "paths": finite_json(paths),
        "variants": finite_json(variants),
        "environment": describe_environment(),
        "config": config.model_dump(),
    }
    folder = config.folder / "report"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_text(folder / "summary.md", markdown(summary))
    write_text(folder / "worth.md", worth(summary))
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
        copy_files([*(folder / name for name in ("summary.json", "summary.md", "worth.md")), *pictures], output)
    return summary


def _paths_of(config: BenchConfig, key: str) -> dict[str, str | None]:
    return {name: one.curve for name, one in variants_of(config.families[key]).items() if one.is_path}


def backbones(config: BenchConfig) -> dict[str, dict[str, str]]:
    """For each family that several networks are trained on: the benchmark's key of each network, by its label."""
    found: dict[str, dict[str, str]] = {}
    for key, one in config.families.items():
        networks = found.setdefault(one.family.name, {})
        networks[key if one.network.label in networks else one.network.label] = key
    return {name: networks for name, networks in found.items() if len(networks) > 1}


def _experts(config: BenchConfig) -> dict[str, ExpertConfig]:
    """All experts by name: those of every family and seed, and those of its variants."""
    found: dict[str, ExpertConfig] = {}
    for seed, key in itertools.product(config.seeds, config.families):
        found |= {one.name: one for one in (config.expert(key, seed, role) for role in EXPERTS)}
        found |= {one.name: one for one in _experts_of_variants(config, key, seed)}
    return found


def _experts_of_variants(config: BenchConfig, key: str, seed: int) -> list[ExpertConfig]:
    """The experts that only variants of a family need."""
    own = {expert_name(key, seed, role) for role in EXPERTS}
    found = [
        one
        for variant in config.families[key].variants.values()
        for one in config.experts_of_variant(key, seed, variant).values()
        if one.name not in own
    ]
    return list({one.name: one for one in found}.values())


def _datasets(config: BenchConfig) -> dict[str, ExpertConfig]:
    """By the name of its job, one expert for each different dataset."""
    named = {f"{key}-data": config.expert(key, config.seeds[0], "anchor") for key in config.families}
    named |= {f"{one.name}-data": one for one in _experts(config).values()}
    found: dict[tuple[Path, str], tuple[str, ExpertConfig]] = {}
    for name, one in named.items():
        found.setdefault((one.family.folder(), one.family.name), (name, one))
    return dict(found.values())


def _data_job(config: BenchConfig, name: str, expert: ExpertConfig) -> ProcessJob | None:
    folder = expert.family.folder()
    if all(data.is_done(regime) for regime in data.regimes(expert.family.family(), folder)):
        return None
    return _job(config, name, "shodh_moe.ccm.bench", "data", str(write_config(config.folder, expert)))


def _expert_job(config: BenchConfig, expert: ExpertConfig) -> ProcessJob | None:
    if (checkpoint_of_last_step(expert) / "state.json").exists():
        return None
    return _job(config, expert.name, "shodh_moe.ccm.expert_rank", "--config", str(write_config(config.folder, expert)))


def _job_of(config: BenchConfig, step: str, seed: int, key: str) -> ProcessJob:
    path = str(config.folder / "config.yaml")
    return _job(config, f"{key}-{seed}-{step}", "shodh_moe.ccm.bench", step, path, key, str(seed))


def _job(config: BenchConfig, name: str, *module: str) -> ProcessJob:
    return job_in(config.folder, name, ["-m", *module])
