"""Contexts: what a model's training data look like to its router, one row for each of some training samples.

An exported model has them in ``contexts.safetensors``. From them follow how unlike its training data an input is
(`unlikeness`), and where a new path may begin (`growth`). They are means and standard deviations over the tokens of a
sample, so they hold no field.

Shapes: M contexts, B samples, S tokens, H history, Q = C patch^3 numbers of one snapshot or of the geometry in a token,
I = (H + 1) Q inputs of a token's embedding, F = 2 I + 2 (H - 1) Q numbers of a context.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from shodh_moe.base.errors import UserError
from shodh_moe.config import ModelConfig
from shodh_moe.inference.loading import ModelSource
from shodh_moe.model.inputs import embedding_inputs
from shodh_moe.tokenizer.latents import LatentSamples, load_latents
from shodh_moe.training.draws import draw_strides

FILE = "contexts.safetensors"
SAMPLES = {"train": 384, "valid": 128}  # largest numbers of samples to keep of each domain


@dataclass(frozen=True)
class Contexts:
    """Contexts of training and validation samples.

    Attributes:
        rows_MF: float32.
        domain_M: int64, number of each sample's domain in ``domains``.
        valid_M: bool, whether it is a validation sample.
        domains: names.
        inputs: I.
    """

    rows_MF: Tensor
    domain_M: Tensor
    valid_M: Tensor
    domains: list[str]
    inputs: int

    def of_router(self) -> Tensor:
        """The features that a path router with context ``sample`` sees, see `shodh_moe.model.path.Features`."""
        return router_features(self.rows_MF, self.inputs)


def router_features(rows_MF: Tensor, inputs: int) -> Tensor:
    """The part of contexts that a path router with context ``sample`` sees."""
    seen = F.rms_norm(rows_MF[:, : 2 * inputs], (2 * inputs,), eps=1e-6)
    return F.pad(seen, (0, 1), value=1.0)


def context_rows(z_BSI: Tensor, history: int) -> Tensor:
    """Mean and standard deviation over tokens of a sample's inputs, and of its changes between snapshots, [B, F]."""
    z_BSNQ = z_BSI.unflatten(2, (history + 1, -1))
    changes_BSI = (z_BSNQ[:, :, 1:history] - z_BSNQ[:, :, : history - 1]).flatten(2)
    parts = []
    for values_BSI in (z_BSI, changes_BSI):
        std_BI, mean_BI = torch.std_mean(values_BSI, dim=1, correction=0)
        parts += [mean_BI, std_BI]
    return torch.cat(parts, dim=1)


@torch.no_grad()
def collect(
    latents: Path, model: ModelConfig, tokenizer: Path | None = None, weights: dict[str, float] | None = None
) -> Contexts:
    """Read the contexts of samples at equal distances among all training and validation samples.

    Args:
        weights: ``data.weights``; domains with weight 0 are left out.

    Raises:
        UserError: the latents cannot be read, are not finite, or are too short.
    """
    rows, domains, valid = [], [], []
    names: list[str] = []
    inputs = 0
    for split, most in SAMPLES.items():
        samples = LatentSamples(load_latents(latents, split, tokenizer), model.history, weights, model.strides)
        names = names or samples.domains
        for domain, size in enumerate(samples.sizes):
            count = min(size, most)
            for start in range(0, count, 32):
                chosen = range(start, min(start + 32, count))
                picks = [(domain, n * size // count) for n in chosen]
                batch = samples.batch(picks, draw_strides(samples, picks, seed=0, step=0))
                z_BSI = embedding_inputs(batch.history_BHCxyz, batch.geometry_BCxyz, model)
                inputs = z_BSI.shape[2]
                rows.append(context_rows(z_BSI, model.history))
                domains += [names.index(samples.domains[domain])] * len(chosen)
                valid += [split == "valid"] * len(chosen)
    rows_MF = torch.cat(rows)
    if not rows_MF.isfinite().all():
        raise UserError(f"latents {latents} have NaN or infinity: encode them again")
    return Contexts(rows_MF, torch.tensor(domains), torch.tensor(valid), names, inputs)


def join(first: Contexts, second: Contexts, apart: bool = False) -> Contexts:
    """The contexts of both.

    Args:
        apart: keep domains of the same name apart, those of ``second`` as ``name+``; otherwise they become one.
    """
    theirs = list(second.domains)
    while apart and (same := set(theirs) & set(first.domains)):
        theirs = [f"{name}+" if name in same else name for name in theirs]
    names = list(dict.fromkeys([*first.domains, *theirs]))
    moved_D = torch.tensor([names.index(name) for name in theirs])
    return Contexts(
        torch.cat([first.rows_MF, second.rows_MF]),
        torch.cat([first.domain_M, moved_D[second.domain_M]]),
        torch.cat([first.valid_M, second.valid_M]),
        names,
        first.inputs,
    )


def save(contexts: Contexts, path: Path) -> None:
    """Write contexts to a file."""
    tensors = {"rows": contexts.rows_MF, "domain": contexts.domain_M, "valid": contexts.valid_M.to(torch.uint8)}
    text = json.dumps({"domains": contexts.domains, "inputs": contexts.inputs})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"contexts": text})


def load(path: Path) -> Contexts:
    """Read a file of `save`."""
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["contexts"])
        rows_MF, domain_M, valid_M = (file.get_tensor(name) for name in ("rows", "domain", "valid"))
    return Contexts(rows_MF, domain_M, valid_M.bool(), facts["domains"], facts["inputs"])


def contexts_of(source: ModelSource) -> Contexts | None:
    """The contexts of a model's training data: those of an exported model, or read from a run's latents.

    A fine-tuned run has those of the model it began with beside its checkpoints, if they still hold. None: the model
    records none, and its latents are not here or cannot be read.
    """
    if source.exported:
        path = source.path / FILE
        return load(path) if path.exists() else None
    config = source.config
    try:
        latents = source.paths.latents
        if not (latents / "train.hdf5").exists():
            return None
        own = collect(latents, config.model, source.tokenizer_folder(), config.data.weights)
    except UserError:  # moved, damaged, or of other data by now
        return None
    before = Path(config.start or "", FILE)
    if not config.finetune or not before.is_file():
        return own
    return join(load(before), own, apart=config.finetune.train == "expert")
