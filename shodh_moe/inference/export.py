"""Export a run to one self-contained folder with everything that evaluation and prediction need.

model.safetensors     all weights by parameter name, experts stacked over the global expert axis
tokenizer/            tokenizer.safetensors, tokenizer.json
config.yaml           config of the run
metrics.json          evaluation of these weights, if there is one
contexts.safetensors  contexts of the training data, if its latents are there (see `contexts`)
portable/             graphs that run without this package, if wanted (see `portable.write`)
config.json           what the model hub shows of a model
README.md             model card
export.json           format, step, grids, versions, and SHA-256 of every other file except the card
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from shodh_moe.base.environment import describe_environment
from shodh_moe.base.errors import UserError
from shodh_moe.base.files import sha256, whole_folder
from shodh_moe.base.remote import cache_folder, require_free, upload_folder
from shodh_moe.base.tensors import save_tensors
from shodh_moe.inference import contexts
from shodh_moe.inference.contexts import Contexts
from shodh_moe.inference.loading import EXPORT_FORMAT, ModelSource, find_source, load_source
from shodh_moe.inference.model import Model
from shodh_moe.inference.model_card import hub_config, model_card
from shodh_moe.inference.portable import write as portable_graphs
from shodh_moe.inference.portable.parts import require_portable

DESCRIPTION = "export.json"


def export(
    path: Path,
    output: Path | str,
    tokenizer: Path | None = None,
    portable: Sequence[str] = (),
    licence: str | None = None,
) -> Path | str:
    """Write the model of a checkpoint or run folder to the new folder ``output``, a path or a URL, and return it.

    A folder at a URL is complete if it has ``export.json``. After a broken transfer, the same call goes on with the
    files that are missing.

    Args:
        portable: kinds of graphs to add, of `portable.write.KINDS`.
        licence: the weights' licence for the model card, as the model hub names it, such as ``cc-by-4.0``.

    Raises:
        UserError: there is no intact checkpoint or no tokenizer, ``output`` exists, it cannot be written, or the model
            cannot be written as graphs.
    """
    portable_graphs.require_exporters(portable)
    if isinstance(output, str):
        require_free(output, DESCRIPTION)
        cache_folder().mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache_folder(), prefix="export-") as folder:
            _write(path, Path(folder, "model"), tokenizer, portable, licence)
            upload_folder(Path(folder, "model"), output, DESCRIPTION)
        return output
    _write(path, output, tokenizer, portable, licence)
    return output


def _write(path: Path, output: Path, tokenizer: Path | None, portable: Sequence[str], licence: str | None) -> None:
    if output.exists():
        raise UserError(f"{output} exists: give --output a new folder, or remove it")
    source = find_source(path, tokenizer)
    if source.exported:
        raise UserError(f"{path} is an exported model already: copy the folder")
    model = load_source(source)
    if portable:
        require_portable(model)
    known = contexts.contexts_of(source)
    if known is None:
        print(
            f"warning: the latents that {path} was trained on are not here or cannot be read, so the export cannot "
            "tell whether an input is unlike them; export in the folder in which it was trained",
            file=sys.stderr,
            flush=True,
        )
    write_export(output, source, model, known, _metrics(source, model.weights_sha256), portable, licence)


def write_export(
    output: Path,
    source: ModelSource,
    model: Model,
    known: Contexts | None,
    metrics: dict[str, Any] | None = None,
    portable: Sequence[str] = (),
    licence: str | None = None,
) -> None:
    """Write a model to the new folder ``output``.

    Args:
        source: gives the config and the tokenizer's folder.
        known: contexts of its training data.
        metrics: content of metrics.json for these weights; None if they were not evaluated.
        portable, licence: as for `export`.
    """
    weights = model.transformer.state_dict()
    with whole_folder(output) as folder:
        save_tensors(weights, folder / "model.safetensors")
        (folder / "tokenizer").mkdir()
        for name in ("tokenizer.safetensors", "tokenizer.json"):
            shutil.copyfile(source.tokenizer_folder() / name, folder / "tokenizer" / name)
        (folder / "config.yaml").write_text(yaml.safe_dump(source.config.model_dump(), sort_keys=False))
        if metrics:
            (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        if known:
            contexts.save(known, folder / contexts.FILE)
        if portable:
            portable_graphs.write_portable(model, folder / portable_graphs.FOLDER, portable)
        (folder / "config.json").write_text(json.dumps(hub_config(source, model), indent=2) + "\n")
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        (folder / "README.md").write_text(model_card(source, model, metrics, portable, licence), encoding="utf-8")
        described = {
            "format": EXPORT_FORMAT,
            "run": source.config.name,
            "step": model.step,
            "world_size": model.world_size,
            "ep_size": model.ep_size,
            "weights_sha256": model.weights_sha256,
            "grid": model.tokenizer.grid,
            "latent_grid": model.tokenizer.latent_grid,
            "latent_channels": model.tokenizer.config.latent_channels,
            "versions": describe_environment()["packages"],
            "sha256": {str(file.relative_to(folder)): sha256(file) for file in files},
        }
        (folder / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n")


def _metrics(source: ModelSource, weights_sha256: str) -> dict[str, Any] | None:
    """Return the run's metrics if they were measured on exactly these weights, else None."""
    try:
        metrics = json.loads((source.run / "metrics.json").read_text()) if source.run else {}
    except (OSError, ValueError):
        return None
    return metrics if metrics.get("weights_sha256") == weights_sha256 else None
