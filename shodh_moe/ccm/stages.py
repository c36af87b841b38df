"""The two stages of an expert's config: the data of its family, and its training. Finished work is skipped."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import require_writable
from shodh_moe.base.lock import making, wait_for_maker
from shodh_moe.ccm import data
from shodh_moe.ccm.config import ExpertConfig
from shodh_moe.ccm.expert import require_same_dataset, units_of_start
from shodh_moe.ccm.regime_folder import remember
from shodh_moe.checkpoint import last_checkpoint, list_checkpoints
from shodh_moe.data.sampler import DomainSampler
from shodh_moe.launching.hostfile import count_ranks
from shodh_moe.launching.launcher import launch_ranks
from shodh_moe.runs.elastic import train_elastic
from shodh_moe.runs.folder import claim_run_folder, write_environment
from shodh_moe.training.deepspeed_config import deepspeed_config
from shodh_moe.training.optimizer import resolve_optimizer


def check(config: ExpertConfig) -> None:
    """Check a config before any work starts.

    Raises:
        UserError: the layout, DeepSpeed section, splits, batch size, anchor or run folder do not fit, or the run folder
            cannot be written.
    """
    world = count_ranks(config)
    deepspeed_config(config, world)
    resolve_optimizer(config.training)
    family = config.family.family()
    regimes = [regime for regime in data.regimes(family, config.family.folder()) if regime.split in config.splits]
    if not regimes:
        raise UserError(f"family {family.name} has no regimes in the splits {', '.join(config.splits)}: change splits")
    coordinates = {regime.coordinate for regime in regimes}
    DomainSampler(tuple(1 for _ in coordinates), config.training.batch_size, config.seed, world)
    if config.start:
        if not list_checkpoints(Path(config.runs) / config.name / "checkpoints"):
            wait_for_maker(Path(config.start), "expert")  # an anchor in training is not finished
        units_of_start(config)
    claim_run_folder(config, write=False)
    require_same_dataset(config)
    require_writable(Path(config.runs) / config.name)


def make_data(config: ExpertConfig) -> Path:
    """Generate the missing or damaged files of the family and return its folder."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    family, folder = config.family.family(), config.family.folder()
    if all(data.is_done(regime) for regime in data.regimes(family, folder)):
        print(f"[data] unchanged, {folder / family.name}", flush=True)
        return folder / family.name
    began = time.perf_counter()
    home = data.generate(family, folder, device=device, run=config.name)
    if config.family.source:
        remember(Path(config.family.source), Path(config.family.root))
    print(f"[data] {home} in {time.perf_counter() - began:.0f} s", flush=True)
    return home


def train(config: ExpertConfig, resume: str = "auto") -> Path:
    """Train under the DeepSpeed launcher unless the run already has its last checkpoint; return the run folder.

    If another process is training the same expert, this waits and then uses it.

    Raises:
        TrainingFailed: the launcher exited with an error.
    """
    run = Path(config.runs) / config.name
    if resume == "auto" and _is_trained(config, run):
        return run

    def start(config: ExpertConfig, resume: str) -> int:
        claim_run_folder(config)
        write_environment(run)
        return launch_ranks(config, run, resume, "shodh_moe.ccm.expert_rank", finished)

    def finished() -> bool:
        return last_checkpoint(run / "checkpoints", config.training.steps) is not None

    with making(run, "expert", config.name):
        if resume == "auto" and _is_trained(config, run):  # another process has trained it meanwhile
            return run
        began = time.perf_counter()
        train_elastic(config, run, resume, start, lambda config, ranks: config)
        print(f"[expert] {run} in {time.perf_counter() - began:.0f} s", flush=True)
    return run


def _is_trained(config: ExpertConfig, run: Path) -> bool:
    made = last_checkpoint(run / "checkpoints", config.training.steps)
    if made is None:
        return False
    print(f"[expert] unchanged, {made}", flush=True)
    return True
