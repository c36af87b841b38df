"""Check a config before any work starts."""

from __future__ import annotations

from pathlib import Path

import torch

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import require_writable
from shodh_moe.base.lock import wait_for_maker
from shodh_moe.checkpoint import checkpoints_at, list_checkpoints
from shodh_moe.config import Config
from shodh_moe.config.paths import Paths
from shodh_moe.config.sizes import require_size, require_slabs
from shodh_moe.data.sampler import DomainSampler, domain_weights
from shodh_moe.kernels.backend import describe
from shodh_moe.launching.hostfile import count_ranks
from shodh_moe.model.norm import available_norm
from shodh_moe.runs.folder import claim_run_folder, require_same_inputs_as_run
from shodh_moe.runs.plan import latent_grid
from shodh_moe.tokenizer import load_tokenizer
from shodh_moe.trackers.tracker import require_library
from shodh_moe.training.deepspeed_config import deepspeed_config, layout_of
from shodh_moe.training.optimizer import resolve_optimizer


def check(config: Config, paths: Paths) -> None:
    """Check everything about a config that can be checked before any work starts.

    Raises:
        UserError: the parallel layout, DeepSpeed section, back ends, sizes, tokenizer or run folder do not fit, the run
            was trained on other inputs, or a folder cannot be written.
    """
    world = count_ranks(config)
    layout_of(config, world)
    deepspeed_config(config, world)
    resolve_optimizer(config.training)
    available_norm(config.training.norm, "cuda" if torch.cuda.is_available() else "cpu")
    _check_kernels()
    for tracker in config.telemetry.trackers:
        require_library(tracker)
    require_size(config.data.grid, config.model, "data.grid is")
    require_slabs(latent_grid(config), config.model, config.parallel.context_size)
    if not config.data.path:
        _check_generated(config)
    if config.tokenizer.path:
        load_tokenizer(paths.tokenizer)
    claim_run_folder(config, write=False)
    require_same_inputs_as_run(config, paths)
    if config.start and not list_checkpoints(paths.run / "checkpoints"):  # a resumed run no longer needs its start
        start = Path(config.start)
        wait_for_maker(start, "pretrain")  # the weights of a run in training change
        if checkpoints_at(start) is None:
            raise UserError(f"start: {start} is not a run folder or checkpoint: give one of the same network, or null")
    require_writable(paths.run)
    for made in (paths.dataset, paths.tokenizer, paths.latents):
        if not made.exists():
            require_writable(made)


def _check_kernels() -> None:
    try:
        describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except (ValueError, RuntimeError) as error:  # SHODH_KERNELS names a back end that is not available
        raise UserError(str(error)) from error


def _check_generated(config: Config) -> None:
    """Check the sizes of a dataset that is not generated yet, as its config gives them."""
    domains = sorted(name for name, _ in config.data.domains.items())
    if not domains:
        raise UserError("data.domains names no domain: keep at least one")
    weights = domain_weights(config.data.weights, domains)
    DomainSampler(tuple(1 for _ in domains), config.training.batch_size, config.seed, weights=weights)
    for window in config.windows.values():
        if window.snapshots > config.data.snapshots:
            raise UserError(
                f"{window} needs {window.snapshots} snapshots, more than the {config.data.snapshots} snapshots of a "
                "trajectory: lower it or raise data.snapshots"
            )
