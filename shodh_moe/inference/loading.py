"""Load a trained model from a run folder, a checkpoint or an exported folder, without DeepSpeed.

Every file's hash is checked before use, and weights are checked against the architecture that they are loaded into.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import sha256
from shodh_moe.base.records import METRICS
from shodh_moe.base.remote_file import local_folder
from shodh_moe.base.section import with_old_values
from shodh_moe.checkpoint import CheckpointReader, Damaged, checkpoints_at, mismatch, resolve_checkpoint
from shodh_moe.config import Config, ModelConfig
from shodh_moe.config.compare import differing_model_keys, flatten
from shodh_moe.config.load import load_config_of
from shodh_moe.config.paths import Paths, resolve_paths
from shodh_moe.inference.model import Model
from shodh_moe.model import LatentTransformer
from shodh_moe.model.low_rank import fold
from shodh_moe.parallel import ExpertParallel
from shodh_moe.tokenizer import load_tokenizer
from shodh_moe.tokenizer.tokenizer import tokenizer_sha256

EXPORT_FORMAT = 1


@dataclass(frozen=True)
class ModelSource:
    """A trained model on disk, checked but not loaded.

    Attributes:
        path: folder of the checkpoint or of the exported model.
        exported: whether it is an exported model.
        state: step, config, world_size and other facts about the training.
        config: config that it was trained with.
        run: run folder of a checkpoint, if it is still in one.
        tokenizer: folder of a tokenizer to use instead of the one in the config.
    """

    path: Path
    exported: bool
    state: dict[str, Any]
    config: Config
    run: Path | None = None
    tokenizer: Path | None = None

    @cached_property
    def paths(self) -> Paths:
        """The folders of ``config``. Raises: UserError: its ``data.path`` or tokenizer no longer exists."""
        return resolve_paths(self.config)

    def tokenizer_folder(self) -> Path:
        """Return the tokenizer's folder. Raises: UserError: it does not exist."""
        if self.exported:
            return self.path / "tokenizer"
        folder = self.tokenizer or self.paths.tokenizer
        if not folder.is_dir():
            raise UserError(
                f"the tokenizer of {self.path} is not at {folder}: run the command in the folder in which the model "
                "was trained, or name the tokenizer's folder with --tokenizer"
            )
        return folder


def load_model(place: Path | str, tokenizer: Path | str | None = None) -> Model:
    """Load a trained model on the CPU, without DeepSpeed.

    Args:
        place: an exported folder, a run folder (its newest intact checkpoint) or one checkpoint; a folder or its URL,
            such as ``hf://owner/name`` or ``hf://owner/name@revision`` for a model of the model hub.
        tokenizer: the folder of the tokenizer, if the config of a run or checkpoint no longer leads to it.

    Raises:
        UserError: there is no model, a file is damaged, or the tokenizer is missing or not the model's own.
    """
    return load_source(find_source(place, local_folder(tokenizer) if tokenizer else None))


def find_source(place: Path | str, tokenizer: Path | None = None) -> ModelSource:
    """Find the model at a path or URL: an exported folder, a checkpoint, or a run (its newest intact checkpoint).

    Raises:
        UserError: there is no model, it is damaged (names the file), or its config cannot be read.
    """
    path = local_folder(place)
    if not path.is_dir():
        raise UserError(f"there is no folder {path}: give a run folder, a checkpoint or an exported model")
    if (path / "export.json").exists():
        if tokenizer:
            raise UserError(f"{path} has its own tokenizer: leave --tokenizer out")
        if damages := verify_export(path):
            raise UserError(f"{damages[0]}: export the model again or copy it again")
        described = json.loads((path / "export.json").read_text(encoding="utf-8"))
        return ModelSource(path, True, described, load_config_of(Config, path / "config.yaml", stored=True))
    if not checkpoints_at(path):
        raise UserError(f"{path} holds no checkpoint and no exported model: train one with `shodh pretrain`")
    try:
        path = resolve_checkpoint(path) or path
    except Damaged as reason:
        raise UserError(f"checkpoint {path} is refused: {reason}; use another one of its run") from None
    state = CheckpointReader(path).state
    run = path.resolve().parent.parent
    try:
        config = Config.model_validate(with_old_values(Config, state["config"]))
    except (KeyError, ValidationError) as error:
        raise UserError(f"checkpoint {path} has no config that this version understands: {error}") from error
    return ModelSource(path, False, state, config, run if (run / METRICS).exists() else None, tokenizer)


def verify_export(path: Path) -> list[str]:
    """Return one line per damage of an exported folder; [] if it is intact."""
    try:
        described = json.loads((path / "export.json").read_text(encoding="utf-8"))
        number, hashes = described["format"], dict(described["sha256"])
        if {"model.safetensors", "config.yaml", "tokenizer/tokenizer.safetensors"} - hashes.keys():
            return [f"{path / 'export.json'} is damaged (hashes are missing)"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{path / 'export.json'} is damaged ({type(error).__name__})"]
    if number != EXPORT_FORMAT:
        newer = ", a newer one" if isinstance(number, int) and number > EXPORT_FORMAT else ""
        return [f"{path} has export format {number}{newer}, this version reads {EXPORT_FORMAT}: update shodh_moe"]
    damages = []
    for name, expected in hashes.items():
        file = path / name
        if name.startswith("portable/") and not file.exists():  # a copy for this package may leave them out
            continue
        if not file.is_file():
            damages.append(f"{file} is missing")
        elif sha256(file) != expected:
            damages.append(f"{file} is damaged (its hash differs from export.json)")
    return damages


def load_source(source: ModelSource, model: ModelConfig | None = None) -> Model:
    """Load the model at a source on the CPU.

    Args:
        source: from `find_source`.
        model: settings of the transformer; None for those that it was trained with.

    Raises:
        UserError: the weights belong to another architecture (names tensors and both shapes, or settings).
    """
    folder = source.tokenizer_folder()
    tokenizer = load_tokenizer(folder)
    made_with = source.state.get("tokenizer_sha256")
    if made_with and made_with != tokenizer_sha256(folder):
        raise UserError(f"{source.path} was trained on latents of another tokenizer than {folder}: name its own one")
    model = model or source.config.model
    transformer = LatentTransformer(model, tokenizer.config.latent_channels, source.config.seed, ExpertParallel())
    weights = read_weights(source)
    _require_same_shapes(source.path, transformer, weights)
    _require_same_settings(source, model)
    transformer.load_state_dict(weights)
    step, world_size = source.state["step"], source.state["world_size"]
    ep_size = source.state.get("ep_size", 1)
    # Hash the weights as loaded, because an export may store the same model in another precision.
    digest = weights_sha256(transformer.state_dict())
    return Model(tokenizer, transformer.eval(), step, world_size, ep_size, digest)


def read_weights(source: ModelSource) -> dict[str, Tensor]:
    """Read all weights by parameter name, with experts stacked over the global expert axis.

    Low-rank additions of a fine-tuning are added to the weights.
    """
    if source.exported:
        return load_file(source.path / "model.safetensors")
    reader = CheckpointReader(source.path)
    names = [name for name in reader.names() if name.startswith("model/")]
    return fold({name.removeprefix("model/"): reader.tensor(name) for name in names})


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes. A checkpoint and its export have the same hash."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _require_same_shapes(path: Path, transformer: LatentTransformer, weights: dict[str, Tensor]) -> None:
    wanted = {name: list(tensor.shape) for name, tensor in transformer.state_dict().items()}
    stored = {name: {"shape": list(tensor.shape)} for name, tensor in weights.items()}
    if reason := mismatch({"tensors": stored}, wanted):
        raise UserError(f"{path} is refused: {reason}; use the config that it was trained with")


def _require_same_settings(source: ModelSource, model: ModelConfig) -> None:
    """Check settings that do not affect shapes, such as the minimum of the routers' temperature."""
    theirs, ours = source.config.model.model_dump(), model.model_dump()
    if differing := differing_model_keys(theirs, ours):
        flat_theirs, flat_ours = flatten(theirs), flatten(ours)
        named = [f"model.{key} ({flat_theirs.get(key)} there, {flat_ours.get(key)} here)" for key in differing]
        raise UserError(
            f"the weights of {source.path} were trained with another model: {', '.join(named)}: "
            "use the config that the model was trained with"
        )
