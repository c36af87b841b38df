"""What can be known to be wrong before any work begins, and whose a run folder is."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import torch
import yaml
from pydantic import ValidationError

from shodh_moe.checkpoint import list_checkpoints
from shodh_moe.config import COMPRESSION, Config, RunConfig
from shodh_moe.config_io import differing_keys, flatten
from shodh_moe.data.sampler import DomainSampler, domain_weights
from shodh_moe.environment import describe_environment
from shodh_moe.errors import UserError
from shodh_moe.files import require_writable, write_text
from shodh_moe.kernels.backend import describe
from shodh_moe.model.norm import available_norm
from shodh_moe.parallel.hostfile import read_hostfile
from shodh_moe.paths import paths_of
from shodh_moe.tokenizer import Tokenizer, load_tokenizer
from shodh_moe.training.deepspeed_config import deepspeed_config, expert_parallel_size
from shodh_moe.training.optimizer import resolve_optimizer

# Settings that do not change what is learned: a run folder accepts others, and goes on, measures or reports again.
# Its checkpoints fit every layout; what a run does with one of these is told when it starts.
FREE_SECTIONS = ("evaluation.", "parallel.", "telemetry.", "deepspeed.", "family.root", "runs", "name")
FREE_DATA = ("data.compression", "data.device", "data.skip_bad")
FREE_TRAINING = [
    *("optimizer", "norm", "activation_checkpointing", "on_nonfinite", "stall_seconds"),
    *("checkpoint_every", "keep_last", "keep_every", "log_every", "validate_every"),
]
FREE = FREE_SECTIONS + FREE_DATA + tuple(f"training.{key}" for key in FREE_TRAINING)


def check(config: Config) -> None:
    """Everything that can be known to be wrong before any work begins.

    Raises:
        UserError: parallel layout, DeepSpeed section, back ends, sizes, tokenizer or run folder do not fit, or a folder
            cannot be written.
    """
    world = processes(config)
    expert_parallel_size(config, world)
    deepspeed_config(config, world)
    resolve_optimizer(config.training)
    available_norm(config.training.norm, "cuda" if torch.cuda.is_available() else "cpu")
    _check_kernels()
    for size in config.data.grid:
        if (size // COMPRESSION) % config.model.patch:
            raise UserError(
                f"data.grid {config.data.grid}: latents of {size // COMPRESSION} are not divisible by "
                f"model.patch {config.model.patch}: change one of them"
            )
    if not config.data.path:
        _check_generated(config)
    if config.tokenizer.path:
        require_fit(load_tokenizer(paths_of(config).tokenizer), config)
    claim_run_folder(config, write=False)
    paths = paths_of(config)
    if config.start and not list_checkpoints(paths.run / "checkpoints"):  # a run that goes on needs its start no more
        start = Path(config.start)
        if not (start / "checkpoints").is_dir() and not (start / "state.json").is_file():
            raise UserError(f"start: {start} is no run folder and no checkpoint: give one of the same network, or null")
    require_writable(paths.run)
    for made in (paths.dataset, paths.tokenizer, paths.latents):
        if not made.exists():
            require_writable(made)


def _check_kernels() -> None:
    try:
        describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except (ValueError, RuntimeError) as error:  # SHODH_KERNELS asks for what is not there
        raise UserError(str(error)) from error


def _check_generated(config: Config) -> None:
    """Sizes that a dataset has only once it is there, but that the config of a generated one tells."""
    domains = sorted(name for name, _ in config.data.domains.items())
    if not domains:
        raise UserError("data.domains names no domain: keep at least one")
    weights = domain_weights(config.data.weights, domains)
    DomainSampler(tuple(1 for _ in domains), config.training.batch_size, config.seed, weights=weights)
    if config.model.history >= config.data.snapshots:
        raise UserError(
            f"model.history {config.model.history} needs more than the {config.data.snapshots} snapshots of a "
            "trajectory: lower it or raise data.snapshots"
        )


def require_fit(tokenizer: Tokenizer, config: Config) -> None:
    """Refuse a tokenizer of another grid than the data's (its fields are checked when it is loaded)."""
    if tokenizer.grid != config.data.grid:
        raise UserError(
            f"tokenizer {paths_of(config).tokenizer} was trained on grid {tokenizer.grid}, data.grid is "
            f"{config.data.grid}: set tokenizer.path to one of that grid, or to null to train one"
        )


def require_made(path: Path, command: str) -> None:
    """Refuse to go on without what an earlier stage makes."""
    if not path.exists():
        raise UserError(f"{path} is missing: run `{command}` with this config first")


def processes(config: RunConfig) -> int:
    """Ranks: those of the hostfile; or on this host as configured, or one per GPU, or 2 on a machine without.

    Raises:
        UserError: the hostfile cannot be used, or ``parallel.processes`` is set beside it.
    """
    if config.parallel.hostfile:
        if config.parallel.processes != "auto":
            raise UserError("parallel.processes is for this host alone: with a hostfile its slots say how many")
        return sum(host.slots for host in read_hostfile(Path(config.parallel.hostfile)))
    if config.parallel.processes != "auto":
        return config.parallel.processes
    return torch.cuda.device_count() if torch.cuda.is_available() else 2


def claim_run_folder(config: RunConfig, write: bool = True) -> None:
    """Make the run folder, or make sure that an existing one belongs to this config.

    Raises:
        UserError: it belongs to another config (the differing keys are named), or cannot be written.
    """
    run = Path(config.runs) / config.name
    stored_path = run / "config.yaml"
    mine = config.model_dump()
    stored = None
    if stored_path.exists():
        try:
            stored = yaml.safe_load(stored_path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError):
            stored = None
        if not isinstance(stored, dict):
            raise UserError(f"{stored_path} is damaged: choose another name (NAME=... or --name) or remove {run}")
        with suppress(ValidationError):  # a key that has come since has its default there
            stored = type(config).model_validate(stored).model_dump()
        differing = [key for key in differing_keys(stored, mine) if not key.startswith(FREE)]
        if differing:
            theirs, ours = flatten(stored), flatten(mine)
            named = [f"{key} ({theirs.get(key, 'unset')} there, {ours.get(key, 'unset')} here)" for key in differing]
            raise UserError(
                f"run folder {run} belongs to another config; it differs in {', '.join(named)}: "
                f"choose another name (NAME=... or --name) or remove {run}"
            )
    if write and stored != mine:
        write_text(stored_path, yaml.safe_dump(mine, sort_keys=False))


def open_run_folder(config: Config) -> None:
    """Claim the run folder and put there what a report needs beside the training, whoever starts the ranks."""
    paths = paths_of(config)
    claim_run_folder(config)
    write_environment(paths.run)
    tokenizer_log = paths.tokenizer / "metrics.jsonl"
    if tokenizer_log.exists():
        write_text(paths.run / "tokenizer_metrics.jsonl", tokenizer_log.read_text(encoding="utf-8"))


def open_tokenizer_folder(config: Config, folder: Path) -> None:
    """Make the folder in which a tokenizer is trained; its name tells that it belongs to ``config``.

    Args:
        config: from `tokenizer_run`.
    """
    text = yaml.safe_dump(config.model_dump(), sort_keys=False)
    if not (folder / "config.yaml").exists() or (folder / "config.yaml").read_text(encoding="utf-8") != text:
        write_text(folder / "config.yaml", text)
    write_environment(folder)


def write_environment(run: Path) -> None:
    """Tell in the run folder what machine and versions it is trained with."""
    write_text(run / "environment.json", json.dumps(describe_environment(), indent=2) + "\n")
