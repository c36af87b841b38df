"""The run folder: which config it belongs to, and the files written to it before training starts."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import cast

import yaml
from pydantic import ValidationError

from shodh_moe.base.environment import describe_environment
from shodh_moe.base.errors import UserError
from shodh_moe.base.files import write_text
from shodh_moe.base.section import Section, first_changed, with_old_values
from shodh_moe.base.yaml_text import parse_yaml
from shodh_moe.checkpoint import Damaged, list_checkpoints
from shodh_moe.checkpoint.state import load_state
from shodh_moe.config import Config, RunConfig
from shodh_moe.config.compare import differing_keys, flatten
from shodh_moe.config.content import remember_content
from shodh_moe.config.inputs import require_same_inputs
from shodh_moe.config.paths import Paths
from shodh_moe.tokenizer.encoding import latent_inputs


def require_same_inputs_as_run(config: Config, paths: Paths) -> None:
    """Check that the newest checkpoint of the run was trained on the inputs that the config now has.

    Inputs that do not exist yet are not compared. A damaged checkpoint is left to those who read it.

    Raises:
        UserError: they differ (the message names which).
    """
    checkpoints = paths.run / "checkpoints"
    for step in reversed(list_checkpoints(checkpoints)):
        with suppress(Damaged):
            state = load_state(checkpoints / str(step))
            require_same_inputs(checkpoints / str(step), state, latent_inputs(config, paths))
            return


def claim_run_folder(config: RunConfig, write: bool = True) -> None:
    """Create the run folder, or check that an existing one belongs to this config.

    Keys that change "nothing" (see `shodh_moe.base.section`) may differ: the run resumes, or is measured or reported
    again. With ``write`` the folder's config.yaml is updated; without it nothing is written.

    Raises:
        UserError: the folder belongs to another config (the message names the differing keys), or cannot be written.
    """
    run = Path(config.runs) / config.name
    stored_path = run / "config.yaml"
    mine = config.model_dump()
    stored = None
    if stored_path.exists():
        try:
            stored, why = parse_yaml(stored_path.read_text(encoding="utf-8")), "it holds no settings"
        except ValueError as error:
            why = str(error)
        if not isinstance(stored, dict):
            raise UserError(
                f"{stored_path} is damaged ({why}): choose another name (NAME=... or --name) or remove {run}"
            )
        kind = cast(type[Section], type(config))
        with suppress(ValidationError):  # it may lack keys that were added since
            stored = kind.model_validate(with_old_values(kind, stored)).model_dump()
        differing = [key for key in differing_keys(stored, mine) if first_changed(kind, key) != "nothing"]
        if differing:
            theirs, ours = flatten(stored), flatten(mine)
            named = [f"{key} ({theirs.get(key, 'unset')} there, {ours.get(key, 'unset')} here)" for key in differing]
            raise UserError(
                f"run folder {run} belongs to another config; it differs in {', '.join(named)}: "
                f"choose another name (NAME=... or --name) or remove {run}"
            )
    if write and stored != mine:
        write_text(stored_path, yaml.safe_dump(mine, sort_keys=False))


def open_run_folder(config: Config, paths: Paths) -> None:
    """Claim the run folder and write the files that a report needs besides the training's records."""
    claim_run_folder(config)
    write_environment(paths.run)
    tokenizer_log = paths.tokenizer / "metrics.jsonl"
    if tokenizer_log.exists():
        write_text(paths.run / "tokenizer_metrics.jsonl", tokenizer_log.read_text(encoding="utf-8"))


def open_tokenizer_folder(config: Config, paths: Paths) -> None:
    """Create the folder in which a tokenizer is trained. Its name already ties it to the config.

    Args:
        config: the tokenizer's own config, from `tokenizer_run`.
    """
    folder = paths.tokenizer
    remember_data(config, paths)
    text = yaml.safe_dump(config.model_dump(), sort_keys=False)
    if not (folder / "config.yaml").exists() or (folder / "config.yaml").read_text(encoding="utf-8") != text:
        write_text(folder / "config.yaml", text)
    write_environment(folder)


def remember_data(config: Config, paths: Paths) -> None:
    """Keep the hashes of a dataset at ``data.path``, so that the next process need not read it to identify it."""
    if config.data.path:
        remember_content(paths.dataset, Path(config.tokenizer.root))


def write_environment(run: Path) -> None:
    """Write environment.json, which describes the machine and the software versions of a run."""
    write_text(run / "environment.json", json.dumps(describe_environment(), indent=2) + "\n")
