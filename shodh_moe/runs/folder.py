"""The run folder: whose it is, and what is put there before training begins."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import yaml
from pydantic import ValidationError

from shodh_moe.base.environment import describe_environment
from shodh_moe.base.errors import UserError
from shodh_moe.base.files import write_text
from shodh_moe.config import Config, RunConfig
from shodh_moe.config.compare import differing_keys, flatten
from shodh_moe.config.paths import paths_of

# Settings that do not change what is learned: a run folder accepts others, and goes on, measures or reports again.
# Its checkpoints fit every layout; what a run does with one of these is told when it starts.
FREE_SECTIONS = ("evaluation.", "parallel.", "telemetry.", "deepspeed.", "family.root", "runs", "name")
FREE_DATA = ("data.compression", "data.device", "data.skip_bad")
FREE_TRAINING = [
    *("optimizer", "norm", "activation_checkpointing", "on_nonfinite", "stall_seconds"),
    *("checkpoint_every", "keep_last", "keep_every", "log_every", "validate_every"),
]
FREE = FREE_SECTIONS + FREE_DATA + tuple(f"training.{key}" for key in FREE_TRAINING)


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
