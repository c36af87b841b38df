"""Expert swap: send a domain's tokens to another domain's expert, and measure the factor by which its error grows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shodh_moe.audit.windows import all_windows, latent_errors
from shodh_moe.base.parameters import marks
from shodh_moe.model import LatentTransformer
from shodh_moe.tokenizer.latents import LatentSamples

Pair = tuple[int, int]


@contextmanager
def exchanged(transformer: LatentTransformer, pairs: Sequence[Pair | None]) -> Iterator[None]:
    """Within the block, exchange the weights of a pair of experts in each MoE layer; None leaves a layer unchanged.

    Tokens that chose one expert of a pair are processed by the other, with the same gate. If all layers exchange the
    same pair, as in all layers of a model with path routing, the paths' own embeddings, attentions and heads are
    exchanged as well. On exit, even after an error, every weight is restored bit for bit.
    """
    weights = [
        (weight, pair)
        for layer, pair in zip(transformer.moe_layers, pairs, strict=True)
        if pair
        for weight in layer.experts.parameters()
    ]
    if len(set(pairs)) == 1 and pairs[0]:
        paths = [p for p in transformer.parameters() if marks(p).per_expert and not marks(p).sharded]
        weights += [(weight, pairs[0]) for weight in paths]
    done = []
    try:
        for weight, pair in weights:
            _exchange(weight, pair)
            done.append((weight, pair))
        yield
    finally:
        for weight, pair in done:
            _exchange(weight, pair)


@torch.no_grad()
def _exchange(weight: Tensor, pair: Pair) -> None:
    weight[list(pair)] = weight[list(reversed(pair))]


def swap_growth(
    transformer: LatentTransformer,
    samples: LatentSamples,
    routing: dict[str, Any] | None,
    batch_size: int,
    count: int | None = None,
) -> dict[str, dict[str, Any]] | None:
    """Factor by which a domain's latent error grows when its tokens go to another domain's expert, gates unchanged.

    In each layer, the majority experts of the domain and of another domain exchange their tokens. The other domain is
    the first by name whose majority expert in this layer is a different one. Later layers route the changed tokens that
    they receive.

    Args:
        transformer: the model in evaluation mode, with all experts in this process.
        routing: `heldout_routing` of the same samples, which gives the majority experts.
        count: number of evenly spread windows to use from each domain; None uses all.

    Returns:
        ``{domain: {"layers", "all"}}``: latent MSE with the swap over that without it. ``layers`` has one value per
        layer (None if all domains have the same majority expert there); ``all`` is that of the swap in all layers at
        once (None if no layer can be swapped). None for a dense model.
    """
    if not transformer.moe_layers or routing is None:
        return None
    growth = {}
    for number, domain in enumerate(samples.domains):
        windows = [window for window in all_windows(samples, count) if window[0] == number]
        before = latent_errors(transformer, samples, batch_size, windows)[domain]["latent_mse"]
        pairs = [_pair(layer["majority_expert"], domain) for layer in routing["layers"]]
        single = [[pair if at == layer else None for at, pair in enumerate(pairs)] for layer in range(len(pairs))]
        found: list[float | None] = []
        for plan in (*single, pairs):
            if not any(plan):
                found.append(None)
                continue
            with exchanged(transformer, plan):
                after = latent_errors(transformer, samples, batch_size, windows)[domain]["latent_mse"]
            found.append(after / before)
        growth[domain] = {"layers": found[:-1], "all": found[-1]}
    return growth


def _pair(majority: dict[str, int], domain: str) -> Pair | None:
    """The domain's majority expert and the first different one of another domain; None if all are the same."""
    own = majority[domain]
    return next(((own, majority[other]) for other in sorted(majority) if majority[other] != own), None)
