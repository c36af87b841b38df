"""The folders of a config's artefacts. Reusable artefacts are named after a hash of everything they depend on.

    <data.root>/<data.name>-<hash>/            generated dataset, in the_well's schema
    <tokenizer.root>/<data.name>-<hash>/       tokenizer.safetensors, tokenizer.json, and records of its training
    <tokenizer.root>/<...>/latents/<dataset>/  cached latents of one dataset; also for a tokenizer at tokenizer.path,
                                               which may be shared and read-only
    <runs>/<name>/                             run folder (DESIGN 5)

A changed data or tokenizer setting therefore creates new artefacts beside the old ones, and unchanged settings find the
existing artefacts. Each key of a config declares which artefact it changes (see `shodh_moe.base.section`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shodh_moe.base.errors import UserError
from shodh_moe.base.remote import is_url
from shodh_moe.base.remote_file import mirror
from shodh_moe.base.section import settings_that_change
from shodh_moe.config import Config
from shodh_moe.config.compare import fingerprint
from shodh_moe.config.content import content_of, list_dataset, times_of

# Increment these when the code creates different files from the same config.
DATA_VERSION = 1
TOKENIZER_VERSION = 2
LATENTS_VERSION = 2
# Keys of the tokenizer that came later, with the values that mean what was done before. At these values they are left
# out of a tokenizer's identity, so that existing tokenizers are found.
LATER_KEYS = {"patches": "apart", "refine": 0, "scales": "all"}


@dataclass(frozen=True)
class Paths:
    """The folders of a config.

    Attributes:
        data_id: identity of the dataset: of its content for one at ``data.path``, otherwise of its settings.
    """

    dataset: Path
    tokenizer: Path
    latents: Path
    run: Path
    data_id: str = ""


def resolve_paths(config: Config) -> Paths:
    """Find the folders of a config.

    The folders need not exist, except those at ``data.path`` and ``tokenizer.path``. This lists the files of
    ``data.path`` and hashes those that are new, so a command calls it once and passes the result on.

    Raises:
        UserError: ``data.path`` or ``tokenizer.path`` is not a folder, or a file at ``data.path`` cannot be read.
    """
    data = config.data
    if not data.path:
        data_id = fingerprint(DATA_VERSION, settings_that_change(data, "data"))
        return _paths(config, Path(data.root) / f"{data.name}-{data_id}", data_id)
    dataset = mirror(data.path) if is_url(data.path) else _existing(data.path, "data.path")
    # Earlier versions identified a dataset by the times of its files. Their artefacts are used while the times last.
    listing = list_dataset(dataset)
    earlier = _paths(config, dataset, times_of(dataset, listing))
    if (earlier.latents if config.tokenizer.path else earlier.tokenizer).exists():
        return earlier
    return _paths(config, dataset, content_of(dataset, listing, Path(config.tokenizer.root)))


def _paths(config: Config, dataset: Path, data_id: str) -> Paths:
    data, seed = config.data, tokenizer_seed(config)
    if config.tokenizer.path:
        tokenizer = _existing(config.tokenizer.path, "tokenizer.path")
        meta = tokenizer / "tokenizer.json"
        # Identified by its contents: a tokenizer retrained in the same place has different latents.
        tokenizer_id = fingerprint(meta.read_text(encoding="utf-8", errors="replace") if meta.is_file() else "")
        cache = Path(config.tokenizer.root) / f"{data.name}-{tokenizer_id}"
    else:
        settings = settings_that_change(config.tokenizer, "tokenizer")
        del settings["seed"]  # `seed` replaces it
        settings = {key: value for key, value in settings.items() if key not in LATER_KEYS or value != LATER_KEYS[key]}
        # Keys with an empty value are left out, which keeps the folder names from before these keys existed.
        settings |= {key: value for key, value in settings_that_change(data, "tokenizer").items() if value}
        tokenizer_id = fingerprint(TOKENIZER_VERSION, data_id, data.grid, settings, seed)
        tokenizer = cache = Path(config.tokenizer.root) / f"{data.name}-{tokenizer_id}"
    copies = list(settings_that_change(config.tokenizer, "latents").values())
    latents = cache / "latents" / f"{data.name}-{fingerprint(LATENTS_VERSION, data_id, copies, seed)}"
    return Paths(dataset, tokenizer, latents, Path(config.runs) / config.name, data_id)


def tokenizer_seed(config: Config) -> int:
    """Return the seed of the tokenizer's weights and batches, and of the symmetries of latent copies."""
    return config.seed if config.tokenizer.seed is None else config.tokenizer.seed


def _existing(text: str, key: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise UserError(f"{key}: there is no folder {path}; give an existing one, or null to create one")
    return path
