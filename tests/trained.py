"""Build a run folder without training: dataset, tokenizer, one checkpoint, one line of telemetry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import yaml

from shodh_moe.checkpoint import CheckpointWriter, model_fragments
from shodh_moe.cli import main
from shodh_moe.config import Config
from shodh_moe.config.paths import resolve_paths
from shodh_moe.model import LatentTransformer
from shodh_moe.parallel import ExpertParallel
from shodh_moe.tokenizer import Tokenizer
from shodh_moe.tokenizer.latents import LatentSamples, load_latents
from shodh_moe.tokenizer.tokenizer import tokenizer_sha256
from shodh_moe.training.router_start import start_router
from tests.tiny import CONFIG, write_dataset

GRID = (16, 8, 24)  # three different sizes, so that swapped axes do not fit
SNAPSHOTS = 5
HISTORY = 2
RECORD = {"kind": "train", "step": 7, "tokens_per_second": 5.0, "step_ms": 2.0, "peak_memory_bytes": 9}


def run_config(folder: Path, model: dict[str, Any] | None = None, **tokenizer: Any) -> Config:
    return Config.model_validate(
        {
            "name": "trained",
            "runs": str(folder / "runs"),
            "data": {"name": "theirs", "path": str(folder / "theirs"), "grid": list(GRID)},
            "tokenizer": {
                **CONFIG["tokenizer"],
                "operator": "spectral",
                "walls": "none",
                "path": str(folder / "tok"),
                "root": str(folder / "tokenizers"),
                **tokenizer,
            },
            "model": {**CONFIG["model"], "history": HISTORY, **(model or {})},
            "training": CONFIG["training"],
            "parallel": {"processes": 1},
            "evaluation": {"rollout_steps": 2},
        }
    )


def make_run(
    folder: Path, model: dict[str, Any] | None = None, seed: int = 3, start: bool = False, **settings: Any
) -> Path:
    """Make ``folder``/runs/trained with checkpoint 7, beside the dataset ``theirs`` and the tokenizer ``tok``.

    Args:
        model: keys of the section ``model`` that differ from `CONFIG`.
        start: whether to encode the latents first, from which the path router's weights start.
        settings: override tokenizer settings.
    """
    if not (folder / "theirs").exists():
        write_dataset(folder / "theirs", GRID, SNAPSHOTS)
    config = run_config(folder, model, **settings)
    make_tokenizer(config, folder / "tok")
    run = folder / "runs" / "trained"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump()))
    transformer = LatentTransformer(config.model, 16, seed, ExpertParallel())
    for name, weight in transformer.head.named_parameters():
        if name != "bias":  # initially zero, which would make every prediction persistence
            torch.nn.init.normal_(weight, std=0.3)
    if start:
        assert main(["tokenizer", "encode", "--config", str(run / "config.yaml")]) == 0
        latents = load_latents(resolve_paths(config).latents, "train")
        start_router(transformer, LatentSamples(latents, HISTORY), config)
    writer = CheckpointWriter(run / "checkpoints", 0, 1, 2, 0, "test")
    fragments, shapes = model_fragments(transformer, ExpertParallel())
    facts = {"config": config.model_dump(), "ep_size": 1, "tokenizer_sha256": tokenizer_sha256(folder / "tok")}
    writer.save(7, fragments, shapes, {"rng/cpu": torch.get_rng_state()}, facts)
    writer.finish()
    (run / "metrics.jsonl").write_text(json.dumps(RECORD) + "\n")
    return run


def make_tokenizer(config: Config, folder: Path) -> Tokenizer:
    """Make an untrained tokenizer."""
    folder.mkdir()
    torch.manual_seed(0)
    tokenizer = Tokenizer(config.tokenizer, list(GRID))
    tokenizer.pressure_rms.fill_(0.5)
    torch.nn.init.normal_(tokenizer.geometry_basis_CP, std=0.1)
    tokenizer.save(folder)
    return tokenizer


def push(dataset: Path, speeds: dict[str, float]) -> Path:
    """Add a speed along x to every domain of a dataset, which makes them unlike each other; return the dataset."""
    for path in dataset.glob("data/*/*.hdf5"):
        with h5py.File(path, "r+") as file:
            file["t1_fields/velocity"][..., 0] += speeds[path.stem]
    return dataset


def two_trajectories(path: Path, dataset: Path) -> Path:
    """Write a file with the test trajectories of both domains and a Reynolds number for each; return its path."""
    files = [dataset / "data" / "test" / f"{domain}.hdf5" for domain in ("calm", "wild")]
    with h5py.File(path, "w") as file, h5py.File(files[0]) as first, h5py.File(files[1]) as second:
        for key, value in first.attrs.items():
            file.attrs[key] = value
        file.attrs["n_trajectories"] = 2
        for name in first:
            first.copy(name, file)
        for name in ("t0_fields/pressure", "t0_fields/solid", "t1_fields/velocity"):
            attributes = dict(file[name].attrs)
            del file[name]
            file[name] = np.concatenate([first[name], second[name]])
            file[name].attrs.update(attributes)
        flags = {"sample_varying": np.True_, "time_varying": np.False_}
        for name, values in (("scalars/reynolds", [1.0, 2.0]),):
            del file[name]
            file[name] = np.array(values, dtype=np.float32)
            file[name].attrs.update(flags)
    return path
