"""The main job, stage by stage: data, tokenizer, latents, pretraining, evaluation, report.

A stage whose inputs and settings are unchanged is skipped, and an interrupted stage resumes.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import require_made, whole_folder, write_text
from shodh_moe.base.lock import making, wait_for_maker
from shodh_moe.checkpoint import find_checkpoint, last_checkpoint
from shodh_moe.config import Config
from shodh_moe.config.compare import fingerprint
from shodh_moe.config.inputs import difference
from shodh_moe.config.paths import Paths, tokenizer_seed
from shodh_moe.data.sampler import DomainSampler
from shodh_moe.launching.hostfile import count_ranks
from shodh_moe.launching.launcher import launch_ranks
from shodh_moe.runs.checks import check
from shodh_moe.runs.elastic import train_elastic
from shodh_moe.runs.folder import (
    claim_run_folder,
    open_run_folder,
    open_tokenizer_folder,
    remember_data,
    require_same_inputs_as_run,
)
from shodh_moe.runs.track import send_report, wait_for_trackers
from shodh_moe.tokenizer import load_tokenizer
from shodh_moe.tokenizer.encoding import encode_dataset, latent_inputs
from shodh_moe.tokenizer.latents import inputs_of_latents, load_latents, require_boundaries, samples_of
from shodh_moe.tokenizer.tokenizer import use_tokenizer
from shodh_moe.training.deepspeed_config import fit_layout
from shodh_moe.training.tokenizer_config import tokenizer_run


def run_all(config: Config, paths: Paths) -> dict[str, Any]:
    """Run every stage in order and return the content of metrics.json."""
    check(config, paths)
    if not _has_tokenizer(config, paths):
        tokenizer_run(config, count_ranks(config))  # raises where the tokenizer's config is wrong
    for stage in (make_data, make_tokenizer, make_latents, pretrain):
        stage(config, paths)
    metrics = evaluate(config, paths)
    report(config, paths)
    return metrics


def make_data(config: Config, paths: Paths) -> Path:
    """Generate the missing or damaged files of the dataset. A dataset that the config names is checked instead.

    If another process is generating it, this waits and then uses it. The same holds for tokenizers and latents.
    """
    from shodh_moe.data import generate, is_complete, require_trainable
    from shodh_moe.data.listing import READ_BYTES

    dataset = paths.dataset
    manifest = dataset / "manifest.json"
    if config.data.path:
        # Latents are named after the dataset's files: if they exist, every value has been read before.
        budget = 0 if paths.latents.exists() else READ_BYTES
        batch, data = config.training.batch_size, config.data
        require_trainable(dataset, data.grid, config.windows, batch, budget, data.skip_bad, data.weights)
        remember_data(config, paths)
        return _say("data", f"given, {dataset}", dataset)
    if manifest.exists() and is_complete(config.data, dataset):
        return _say("data", f"unchanged, {dataset}", dataset)
    with making(dataset, "data", config.name):
        if manifest.exists() and is_complete(config.data, dataset):  # another process has made it meanwhile
            return _say("data", f"unchanged, {dataset}", dataset)
        began = time.perf_counter()
        generate(config.data, dataset)
        write_text(manifest, json.dumps({"config": config.data.model_dump()}, indent=2) + "\n")
        return _say("data", f"{dataset} in {time.perf_counter() - began:.0f} s", dataset)


def make_tokenizer(config: Config, paths: Paths) -> Path:
    """Train the tokenizer under the DeepSpeed launcher, unless it exists or the config names one that fits the data.

    Raises:
        TrainingFailed: the launcher exited with an error.
    """
    if _has_tokenizer(config, paths):
        return _say("tokenizer", use_tokenizer(config, paths), paths.tokenizer)
    require_made(paths.dataset / "stats.yaml", "shodh data generate")
    tokenizer_run(config, count_ranks(config))  # raises where its config is wrong

    def start(config: Config, resume: str) -> int:
        run = tokenizer_run(config, count_ranks(config))
        open_tokenizer_folder(run, paths)
        return launch_ranks(run, paths.tokenizer, resume, "shodh_moe.runs.tokenizer_rank", finished)

    def finished() -> bool:
        return _has_tokenizer(config, paths)

    def for_ranks(config: Config, ranks: int) -> Config:
        tokenizer_run(config, ranks)
        return config

    with making(paths.tokenizer, "tokenizer", config.name):
        if _has_tokenizer(config, paths):  # another process has made it meanwhile
            return _say("tokenizer", use_tokenizer(config, paths), paths.tokenizer)
        began = time.perf_counter()
        train_elastic(config, paths.tokenizer, "auto", start, for_ranks)
    return _say("tokenizer", f"{paths.tokenizer} in {time.perf_counter() - began:.0f} s", paths.tokenizer)


def _has_tokenizer(config: Config, paths: Paths) -> bool:
    return bool(config.tokenizer.path) or (paths.tokenizer / "tokenizer.json").exists()


def make_latents(config: Config, paths: Paths) -> Path:
    """Encode the dataset unless its latents are cached."""
    if paths.latents.exists():
        _check_latents(config, paths)
        return _say("latents", f"unchanged, {paths.latents}", paths.latents)
    require_made(paths.dataset / "stats.yaml", "shodh data generate")
    tokenizer = load_tokenizer(paths.tokenizer)
    with making(paths.latents, "latents", config.name):
        if paths.latents.exists():  # another process has made them meanwhile
            return make_latents(config, paths)
        began = time.perf_counter()
        with whole_folder(paths.latents, keep_first=True) as temporary:
            c, seed, skip_bad = config.tokenizer, tokenizer_seed(config), config.data.skip_bad
            how = (c.latent_copies, seed, device(), skip_bad, c.latent_symmetries)
            inputs = latent_inputs(config, paths)
            encode_dataset(tokenizer, paths.dataset, config.data.grid, temporary, *how, paths.tokenizer, inputs)
    remember_data(config, paths)
    return _say("latents", f"{paths.latents} in {time.perf_counter() - began:.0f} s", paths.latents)


def _check_latents(config: Config, paths: Paths) -> None:
    """Report once, before the ranks start, any error in the latents that every rank would find.

    Raises:
        UserError: in addition, if the latents were made from something else than the config's data and tokenizer.
    """
    for split in ("train", "valid", "test"):
        latents = load_latents(paths.latents, split, paths.tokenizer)
        samples = samples_of(config, latents, split)
        require_boundaries(samples, config.model)
        DomainSampler(samples.sizes, config.training.batch_size, config.seed, count_ranks(config), samples.weights)
    if found := difference(inputs_of_latents(paths.latents), latent_inputs(config, paths)):
        raise UserError(
            f"latents {paths.latents} were made from something else, which differs in {found}: restore that, or remove "
            f"{paths.latents} and run `shodh tokenizer encode` again"
        )


def pretrain(config: Config, paths: Paths, resume: str = "auto") -> Path:
    """Train under the DeepSpeed launcher unless the run already has its last checkpoint.

    ``resume`` is ``auto``, which takes the run's newest intact checkpoint, or the folder of the checkpoint to resume.

    Raises:
        TrainingFailed: the launcher exited with an error.
    """
    wait_for_maker(paths.latents, "latents")
    require_made(paths.latents, "shodh tokenizer encode")
    _check_latents(config, paths)
    claim_run_folder(config, write=False)
    require_same_inputs_as_run(config, paths)  # again: now the latents exist
    made = last_checkpoint(paths.run / "checkpoints", config.training.steps)
    if resume == "auto" and made:
        return _say("pretrain", f"unchanged, {made}", paths.run)

    def start(config: Config, resume: str) -> int:
        open_run_folder(config, paths)
        return launch_ranks(config, paths.run, resume, "shodh_moe.runs.pretrain_rank", finished)

    def finished() -> bool:
        return last_checkpoint(paths.run / "checkpoints", config.training.steps) is not None

    began = time.perf_counter()
    train_elastic(config, paths.run, resume, start, fit_layout)
    wait_for_trackers(config.telemetry, paths.run)
    return _say("pretrain", f"{paths.run} in {time.perf_counter() - began:.0f} s", paths.run)


def evaluate(config: Config, paths: Paths) -> dict[str, Any]:
    """Measure the newest checkpoint on the test split unless it has been measured with these settings."""
    from shodh_moe.evaluation.evaluate import evaluate as measure

    found = find_checkpoint(paths.run / "checkpoints")
    if found is None:
        raise UserError(f"{paths.run / 'checkpoints'} holds no checkpoint: run `shodh pretrain` first")
    key = fingerprint(found[1]["sha256"], str(paths.latents), config.evaluation.model_dump())
    metrics_path = paths.run / "metrics.json"
    if _stamp(paths.run, "evaluate") == key and metrics_path.exists() and (paths.run / "evaluation.npz").exists():
        _say("evaluate", f"unchanged, {metrics_path}", None)
        return json.loads(metrics_path.read_text())
    claim_run_folder(config)
    _stamp(paths.run, "evaluate", "")  # until the new measurement is complete
    began = time.perf_counter()
    metrics = measure(config, paths)
    _stamp(paths.run, "evaluate", key)
    _say("evaluate", f"{metrics_path} in {time.perf_counter() - began:.0f} s", None)
    return metrics


def report(config: Config, paths: Paths) -> Path:
    """Write the report unless it already shows the current metrics."""
    from shodh_moe.report import write_report

    run = paths.run
    page, key = run / "report" / "index.html", _stamp(run, "evaluate")
    if page.exists() and key and _stamp(run, "report") == key:
        return _say("report", f"unchanged, {page}", page)
    began = time.perf_counter()
    page = write_report(run)
    if key:
        _stamp(run, "report", key)
    send_report(config.telemetry, run)
    return _say("report", f"{page} in {time.perf_counter() - began:.0f} s", page)


def device() -> str:
    """``cuda`` if torch can use it, otherwise ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _stamp(run: Path, stage: str, key: str | None = None) -> str | None:
    """Read, or with ``key`` write, the fingerprint of the inputs that a stage last ran with; None if it never ran."""
    path = run / "stages.json"
    try:
        stamps = json.loads(path.read_text())
    except (OSError, ValueError):
        stamps = {}
    if key is not None:
        write_text(path, json.dumps({**stamps, stage: key}) + "\n")
        return key
    return stamps.get(stage)


def _say(stage: str, text: str, result: Any) -> Any:
    print(f"[{stage}] {text}", flush=True)
    return result
