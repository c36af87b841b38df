"""Whether a model notices inputs of domains that it was not trained on: AUROC on held-out domains.

    python benchmarks/studies/unlike.py [--config FILE] [--json FILE] [key=value ...]

Trains the base model of the study if it is not there, generates the held-out domains, and encodes them with the model's
tokenizer. Usual inputs are the test samples of the training domains. Finished work is skipped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, for `support` and `studies`

from shodh_moe.base.command import exit_code
from shodh_moe.base.errors import UserError
from shodh_moe.base.files import require_writable, write_text
from shodh_moe.config import ModelConfig
from shodh_moe.config.load import load_config, read_yaml
from shodh_moe.config.paths import resolve_paths
from shodh_moe.inference.contexts import context_rows, contexts_of, router_features
from shodh_moe.inference.loading import find_source, load_source
from shodh_moe.inference.model import Model
from shodh_moe.inference.unlikeness import Unlikeness, fit_unlikeness
from shodh_moe.metrics.detection import auroc
from shodh_moe.model.inputs import embedding_inputs
from shodh_moe.model.routers.cosine import CosineRouter
from shodh_moe.tokenizer.latents import LatentSamples, load_latents
from studies.finetune_config import StudyConfig, base_model, command, only_domain, read_arguments
from support.common import machine


def held_out(config: StudyConfig, base: Path, domain: str) -> Path:
    """Generate and encode trajectories of a domain, and return the folder of their latents."""
    tree = read_yaml(Path(config.base))
    tree |= {"name": f"held_out_{domain}", "runs": str(Path(config.folder) / "runs")}
    count = config.held_out_trajectories
    tree["data"] |= {
        "path": None,
        "name": f"held_out_{domain}",
        "root": str(Path(config.folder) / "data"),
        "seed": config.seed + 2,
        "snapshots": config.snapshots,
        "domains": only_domain(domain, {}, {"train": 1, "valid": 1, "test": count}),
    }
    tree["tokenizer"] |= {"path": str(base / "tokenizer"), "root": str(Path(config.folder) / "tokenizers")}
    tree["tokenizer"]["latent_copies"] = 1
    path = Path(config.folder) / f"held_out_{domain}.yaml"
    write_text(path, yaml.safe_dump(tree, sort_keys=False))
    command("data", "generate", "--config", str(path))
    command("tokenizer", "encode", "--config", str(path))
    return resolve_paths(load_config(path)).latents


def rows_of(latents: Path, model: ModelConfig) -> Tensor:
    """The contexts of all test samples."""
    samples = LatentSamples(load_latents(latents, "test"), model.history)
    rows = []
    for domain, size in enumerate(samples.sizes):
        for number in range(size):
            batch = samples.batch([(domain, number)])
            z_BSI = embedding_inputs(batch.history_BHCxyz, batch.geometry_BCxyz, model)
            rows.append(context_rows(z_BSI, model.history))
    return torch.cat(rows)


def scores_of(fitted: Unlikeness, model: Model, rows: Tensor) -> dict[str, Tensor]:
    """The score of the warning and, for a path router with context sample, the router's own: minus the best cosine."""
    found = {"warning": fitted.score(rows)[0]}
    path, settings = model.transformer.path, model.transformer.config.moe.router
    if path is not None and isinstance(path.router, CosineRouter) and settings.context == "sample":
        q = path.router.projection(router_features(rows, fitted.inputs))
        cosine = torch.nn.functional.cosine_similarity(q[:, None], path.router.prototypes_ER, dim=2)
        found["router's best cosine"] = -cosine.amax(1)
    return found


@torch.no_grad()
def work(config: StudyConfig, output: Path) -> None:
    require_writable(output.absolute().parent)
    base = base_model(config)
    source = find_source(base)
    contexts, model = contexts_of(source), load_source(source)
    if contexts is None:
        raise UserError(f"{base} records no contexts: remove it, and run this again")
    fitted = fit_unlikeness(contexts)
    usual = scores_of(fitted, model, rows_of(resolve_paths(source.config).latents, source.config.model))
    strange = {
        domain: scores_of(fitted, model, rows_of(held_out(config, base, domain), source.config.model))
        for domain in config.held_out
    }
    result: dict[str, Any] = {
        "benchmark": "unlike",
        "machine": machine(torch.device("cpu")),
        "config": config.model_dump(),
        "usual_samples": len(usual["warning"]),
        "false_alarms": float((usual["warning"] > 1).double().mean()),
        "noticed": {domain: float((found["warning"] > 1).double().mean()) for domain, found in strange.items()},
        "auroc": {
            name: {
                **{domain: auroc(usual[name], found[name]) for domain, found in strange.items()},
                "all": auroc(usual[name], torch.cat([found[name] for found in strange.values()])),
            }
            for name in usual
        },
    }
    write_text(output, json.dumps(result, indent=1) + "\n")
    print("| score | " + " | ".join([*config.held_out, "all"]) + " |")
    print("|---" * (len(config.held_out) + 2) + "|")
    for name, row in result["auroc"].items():
        print(f"| {name}, AUROC | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |")
    print("| warned of | " + " | ".join(f"{value:.1%}" for value in result["noticed"].values()) + " | |")
    print(
        f"false alarms: {result['false_alarms']:.1%} of {result['usual_samples']} test samples of the training domains"
    )
    print(f"results: {output}")


def main(arguments: list[str] | None = None) -> int:
    def run() -> None:
        work(*read_arguments(str(__doc__).partition("\n")[0], "unlike.json", arguments))

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
