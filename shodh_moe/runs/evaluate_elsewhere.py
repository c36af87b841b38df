"""Evaluate a model that does not belong to the config's run: an exported one, or another run's checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shodh_moe.base.files import require_writable, write_text
from shodh_moe.base.records import read_run
from shodh_moe.config import Config
from shodh_moe.config.paths import Paths, resolve_paths
from shodh_moe.config.sizes import require_size
from shodh_moe.evaluation.ensemble import measure_members
from shodh_moe.evaluation.evaluate import measure
from shodh_moe.inference.loading import ModelSource, find_source, load_source
from shodh_moe.inference.members import load_members
from shodh_moe.runs import pipeline


def evaluate_elsewhere(
    config: Config,
    checkpoint: Path | str,
    output: Path,
    tokenizer: Path | None = None,
    members: tuple[Path | str, ...] = (),
) -> dict[str, Any]:
    """Measure the model at ``checkpoint`` on the test split of ``config`` and write the results to ``output``.

    With ``members``, further models, each domain gets the entry ``ensemble`` (see `measure_members`).

    Missing latents of the model's tokenizer are made first. The run folder of ``config`` is not touched.

    Raises:
        UserError: the model is missing, damaged or of another architecture, or does not fit the data.
    """
    source = find_source(checkpoint, tokenizer)
    require_writable(output)
    model = load_source(source, config.model)
    ensemble = load_members(source, model, members, tokenizer)
    config, paths = _with_tokenizer_of(source, config)
    require_size(config.data.grid, config.model, "data.grid is")
    pipeline.make_latents(config, paths)
    output.mkdir(parents=True, exist_ok=True)
    history = read_run(source.run, "train") if source.run else []
    metrics = measure(config, model, paths, output, history)
    if members:
        for domain, entry in measure_members(config, ensemble, paths).items():
            metrics["domains"][domain]["ensemble"] = entry
        write_text(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def _with_tokenizer_of(source: ModelSource, config: Config) -> tuple[Config, Paths]:
    """``config`` with the model's name and tokenizer. If its own tokenizer is the same one, its latents are reused."""
    folder = source.tokenizer_folder()
    named = config.model_copy(update={"name": source.config.name})
    if not config.tokenizer.path:
        paths = resolve_paths(named)
        own = paths.tokenizer / "tokenizer.json"
        # The file holds a hash of the weights.
        if own.is_file() and own.read_bytes() == (folder / "tokenizer.json").read_bytes():
            return named, paths
    tokenizer = config.tokenizer.model_copy(update={"path": str(folder)})
    config = named.model_copy(update={"tokenizer": tokenizer})
    return config, resolve_paths(config)
