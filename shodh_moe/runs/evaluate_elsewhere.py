"""Evaluation of a model that is not the run of the config: an exported one, or another run's checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shodh_moe.base.files import require_writable
from shodh_moe.config import Config
from shodh_moe.config.paths import paths_of
from shodh_moe.evaluation.evaluate import measure
from shodh_moe.inference.loading import ModelSource, find_source, load_models
from shodh_moe.runs import pipeline
from shodh_moe.tokenizer.tokenizer import require_fit
from shodh_moe.training.records import read_run


def evaluate_elsewhere(config: Config, checkpoint: Path, output: Path, tokenizer: Path | None = None) -> dict[str, Any]:
    """Measure the model at ``checkpoint`` on the test split of ``config``; its files go to ``output``.

    Latents of its tokenizer that are not cached yet are made first. The run folder of ``config`` stays as it is.

    Raises:
        UserError: the model is missing, damaged or of another architecture, or does not fit the data.
    """
    source = find_source(checkpoint, tokenizer)
    require_writable(output)
    models = load_models(source, config.model)
    config = _with_tokenizer_of(source, config)
    require_fit(models.tokenizer, config)
    pipeline.make_latents(config)
    paths = paths_of(config)
    output.mkdir(parents=True, exist_ok=True)
    history = read_run(source.run, "train") if source.run else []
    return measure(config, models, paths.dataset, paths.latents, output, history)


def _with_tokenizer_of(source: ModelSource, config: Config) -> Config:
    """``config`` with the model's tokenizer, unless its own is the same one: then its latents are there already."""
    folder = source.tokenizer_folder()
    if not config.tokenizer.path:
        own = paths_of(config).tokenizer / "tokenizer.json"
        # The file holds a hash of the weights.
        if own.is_file() and own.read_bytes() == (folder / "tokenizer.json").read_bytes():
            return config.model_copy(update={"name": source.config.name})
    tokenizer = config.tokenizer.model_copy(update={"path": str(folder)})
    return config.model_copy(update={"tokenizer": tokenizer, "name": source.config.name})
