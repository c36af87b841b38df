"""What an artefact was made from: recorded in tokenizers, latents and checkpoints, and compared before they are used.

A record maps some of `NAMES` to JSON-like values. A value that one of two records lacks is not compared: an earlier
version did not record it, or it is not known yet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import sha256
from shodh_moe.config import Config
from shodh_moe.config.compare import fingerprint
from shodh_moe.config.paths import DATA_VERSION, TOKENIZER_VERSION, Paths
from shodh_moe.solvers import SOLVER_VERSION

Inputs = dict[str, Any]

NAMES = {
    "data_version": "the version of the code that generates data",
    "data": "the data",
    "stats_sha256": "the statistics of the data",
    "grid": "the grid",
    "tokenizer_version": "the version of the code that trains tokenizers",
    "tokenizer_sha256": "the tokenizer",
    "latents_version": "the version of the code that encodes latents",
    "latent_channels": "the number of latent channels",
    "copies": "the number of latent copies",
    "symmetries": "the symmetries of latent copies",
    "seed": "the seed of latent copies",
}


def data_inputs(config: Config, paths: Paths) -> Inputs:
    """What identifies the dataset of a config: its content, or the request that generates it, and its statistics."""
    found: Inputs = {"grid": list(config.data.grid)}
    if config.data.path:
        found["data"] = paths.data_id
    else:
        found["data_version"] = f"{DATA_VERSION}.{SOLVER_VERSION}"
        try:  # a domain's identity contains the content of its geometry file, the folder's name does not
            domains = {name: domain.identity() for name, domain in config.data.domains.items()}
            found["data"] = fingerprint(paths.data_id, domains)
        except UserError:
            pass  # the geometry file is gone; the data may still be there
    stats = paths.dataset / "stats.yaml"
    if stats.is_file():
        found["stats_sha256"] = sha256(stats)
    return found


def tokenizer_inputs(config: Config, paths: Paths) -> Inputs:
    """What the training of a config's tokenizer depends on, besides the config."""
    return {"tokenizer_version": TOKENIZER_VERSION, **data_inputs(config, paths)}


def recorded_inputs(state: dict[str, Any]) -> Inputs:
    """What a checkpoint was trained on, from its ``state.json``. Earlier versions recorded the tokenizer at most."""
    if isinstance(found := state.get("inputs"), dict):
        return found
    return {"tokenizer_sha256": state.get("tokenizer_sha256")}


def require_same_inputs(checkpoint: Path, state: dict[str, Any], now: Inputs) -> None:
    """Check that a checkpoint was trained on these inputs, as far as it records them.

    Args:
        state: content of its ``state.json``.

    Raises:
        UserError: they differ (the message names which).
    """
    if found := difference(recorded_inputs(state), now):
        raise UserError(
            f"checkpoint {checkpoint} is refused: it was trained on something else, which differs in {found}: restore "
            "that to go on from it; to train anew, choose another name (NAME=... or --name), or remove the folder of a "
            "tokenizer"
        )


def difference(recorded: Inputs, now: Inputs) -> str:
    """Name what differs between two records, with both values; "" if nothing does that both have."""
    both = [key for key in NAMES if _known(recorded.get(key)) and _known(now.get(key)) and recorded[key] != now[key]]
    return ", ".join(f"{NAMES[key]} ({_short(recorded[key])} then, {_short(now[key])} now)" for key in both)


def _known(value: Any) -> bool:
    return value not in (None, "")


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
