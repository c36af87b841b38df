"""Upcycling: a dense model becomes a mixture with paths that starts with the same outputs.

The dense weights become the shared parts. Each path's own parts are added to them (DESIGN 3.4) and start with a product
that is zero: W_e = 0 in the embedding and the head, and experts whose ``down`` projection is 0. So the outputs do not
depend on the router. The experts' hidden units are those of the dense network, as in sparse upcycling (arXiv
2212.05055).

Shapes: E experts, D model width, F hidden width of an expert.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import require_writable
from shodh_moe.config import ModelConfig
from shodh_moe.inference.contexts import Contexts, contexts_of
from shodh_moe.inference.export import write_export
from shodh_moe.inference.loading import find_source, load_source, weights_sha256
from shodh_moe.inference.model import Model
from shodh_moe.model import LatentTransformer
from shodh_moe.parallel import ExpertParallel

Attention = Literal["shared", "low_rank", "own"]


def upcycle(
    path: Path, experts: int, output: Path, attention: Attention = "shared", tokenizer: Path | None = None
) -> Path:
    """Make a mixture from a dense model, write it as an exported model to the new folder ``output``, and return it.

    The router starts from k-means of the contexts of the model's training data, as before the first step of a training.

    Args:
        path: a run, a checkpoint or an exported model.
        experts: number of paths, E.
        attention: ``model.moe.attention`` of the mixture.
        tokenizer: folder of the model's tokenizer, if its config no longer leads to it.

    Raises:
        UserError: the model is not dense or records no contexts, ``experts`` is out of range, or ``output`` exists.
    """
    if output.exists():
        raise UserError(f"{output} exists: give --output a new folder, or remove it")
    require_writable(output.parent)
    source = find_source(path, tokenizer)
    dense = source.config.model
    if dense.moe.num_experts or dense.film:
        what = "film" if dense.film else f"{dense.moe.num_experts} experts already"
        raise UserError(f"{path} has {what}: upcycling begins with a dense model (model.moe.num_experts 0)")
    if experts < 2:
        raise UserError(f"--experts {experts}: a mixture has at least 2 paths")
    tree = dense.model_dump()
    # The dense weights become the parts that all paths use. In a dense model `shared_linear` has no effect.
    tree["moe"] |= {"num_experts": experts, "scope": "path", "attention": attention, "shared_linear": True}
    tree["moe"]["router"] |= {"kind": "cosine", "context": "sample"}
    try:
        model = ModelConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--experts {experts}: {first['msg']}") from None
    known = contexts_of(source)
    if known is None:
        raise UserError(
            f"{path} records no contexts of its training data, from which the router starts: export it again in the "
            "folder in which it was trained"
        )
    trained = load_source(source)
    transformer = upcycled(trained, model, known, source.config.seed)
    made = replace(trained, transformer=transformer, weights_sha256=weights_sha256(transformer.state_dict()))
    config = source.config.model_copy(update={"model": model})
    write_export(output, replace(source, config=config), made, known)
    return output


@torch.no_grad()
def upcycled(trained: Model, model: ModelConfig, known: Contexts, seed: int) -> LatentTransformer:
    """Return a mixture with the outputs of a dense model.

    Args:
        model: section ``model`` of the mixture.
        known: contexts from which the router starts.
        seed: of k-means, and of low-rank parts of the attention.
    """
    tokenizer, dense = trained.tokenizer, trained.transformer
    made = LatentTransformer(model, tokenizer.config.latent_channels, seed, ExpertParallel()).eval()
    weights = dense.state_dict()
    own = {name: torch.zeros_like(tensor) for name, tensor in made.state_dict().items() if name not in weights}
    for name, tensor in made.state_dict().items():
        if name.startswith("path.") or name.endswith("narrow_EIQ"):  # widen_EQO is zero
            own[name] = tensor
        elif name.endswith("experts.gate_up_LDF"):
            shared = weights[name.replace("experts.gate_up_LDF", "shared.0.gate_up.weight")]
            own[name] = shared.T.expand_as(tensor).clone()
    made.load_state_dict(weights | own)
    assert made.path is not None
    made.path.router.start(known.of_router()[~known.valid_M], seed)
    return made
