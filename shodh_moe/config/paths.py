"""Where a config's artefacts are. What others can reuse is named after a hash of all that it depends on.

    <data.root>/<data.name>-<hash>/            generated dataset, in the_well's schema
    <tokenizer.root>/<data.name>-<hash>/       tokenizer.safetensors, tokenizer.json, and what its training keeps
    <tokenizer.root>/<...>/latents/<dataset>/  cached latents of one dataset; also of a tokenizer at tokenizer.path,
                                               which may be shared and read-only
    <runs>/<name>/                             run folder (DESIGN 5)

A changed data or tokenizer setting therefore makes new artefacts beside the old ones, and an unchanged one
finds what is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shodh_moe.base.errors import UserError
from shodh_moe.config import Config
from shodh_moe.config.compare import fingerprint

# Raised when the code makes other files from the same config.
DATA_VERSION = 1
TOKENIZER_VERSION = 2
LATENTS_VERSION = 2
# Settings of the data section that change no field of a dataset.
FREE_OF_DATA = {"name", "path", "root", "compression", "device", "skip_bad", "weights"}
# Settings of the tokenizer section that change no trained tokenizer.
FREE_OF_TOKENIZER = {
    *("path", "root", "seed", "log_every", "checkpoint_every", "activation_checkpointing"),
    *("latent_copies", "latent_symmetries"),
}


@dataclass(frozen=True)
class Paths:
    """The folders of a config."""

    dataset: Path
    tokenizer: Path
    latents: Path
    run: Path


def paths_of(config: Config) -> Paths:
    """Folders of this config; none need exist, except a dataset or tokenizer that the config names.

    Raises:
        UserError: ``data.path`` or ``tokenizer.path`` is no folder.
    """
    data = config.data
    if data.path:
        dataset = _existing(data.path, "data.path")
        found = [*dataset.glob("data/*/*"), dataset / "stats.yaml"]
        files = sorted(path for path in found if path.is_file() and path.name[0] != ".")
        data_id = fingerprint([(str(p.relative_to(dataset)), p.stat().st_size, p.stat().st_mtime_ns) for p in files])
    else:
        data_id = fingerprint(DATA_VERSION, data.model_dump(exclude=FREE_OF_DATA))
        dataset = Path(data.root) / f"{data.name}-{data_id}"
    seed = tokenizer_seed(config)
    if config.tokenizer.path:
        tokenizer = _existing(config.tokenizer.path, "tokenizer.path")
        meta = tokenizer / "tokenizer.json"
        # By its content: a tokenizer trained anew in the same place has other latents.
        tokenizer_id = fingerprint(meta.read_text(encoding="utf-8", errors="replace") if meta.is_file() else "")
        cache = Path(config.tokenizer.root) / f"{data.name}-{tokenizer_id}"
    else:
        settings = config.tokenizer.model_dump(exclude=FREE_OF_TOKENIZER)
        if data.weights:
            settings["weights"] = data.weights
        tokenizer_id = fingerprint(TOKENIZER_VERSION, data_id, data.grid, settings, seed)
        tokenizer = cache = Path(config.tokenizer.root) / f"{data.name}-{tokenizer_id}"
    copies = [config.tokenizer.latent_copies, config.tokenizer.latent_symmetries]
    latents = cache / "latents" / f"{data.name}-{fingerprint(LATENTS_VERSION, data_id, copies, seed)}"
    return Paths(dataset, tokenizer, latents, Path(config.runs) / config.name)


def tokenizer_seed(config: Config) -> int:
    """Of the tokenizer's weights and batches, and of the symmetries of latent copies."""
    return config.seed if config.tokenizer.seed is None else config.tokenizer.seed


def _existing(text: str, key: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise UserError(f"{key}: there is no folder {path}; give an existing one, or null to make one")
    return path
