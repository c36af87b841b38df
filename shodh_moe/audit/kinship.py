"""Which domains share experts, and how well each domain fares on the experts of the others."""

from __future__ import annotations

import math
from typing import Any

import torch

from shodh_moe.audit.swap import exchanged
from shodh_moe.audit.windows import all_windows, latent_errors
from shodh_moe.model import LatentTransformer
from shodh_moe.tokenizer.latents import LatentSamples


@torch.no_grad()
def growth_on_experts(
    transformer: LatentTransformer,
    samples: LatentSamples,
    routing: dict[str, Any] | None,
    batch_size: int,
    count: int | None = None,
) -> dict[str, list[float]] | None:
    """Factor by which a domain's latent error grows when another expert takes the place of its majority expert.

    The experts exchange their weights in all layers (`exchanged`), and with path routing their whole paths. Gates stay.

    Args:
        routing: `heldout_routing` of the same samples, which gives the majority experts.
        count: number of evenly spread windows to use from each domain; None uses all.

    Returns:
        by domain, a factor for each expert, 1 for its own. None for a dense model, and if the layers differ in a
        domain's majority expert.
    """
    if routing is None:
        return None
    experts, found = transformer.config.moe.num_experts, {}
    for number, domain in enumerate(samples.domains):
        own = {layer["majority_expert"][domain] for layer in routing["layers"]}
        if len(own) > 1:
            return None
        (expert,) = own
        windows = [window for window in all_windows(samples, count) if window[0] == number]
        errors = []
        for other in range(experts):
            pair = None if other == expert else (expert, other)
            with exchanged(transformer, [pair] * len(routing["layers"])):
                errors.append(latent_errors(transformer, samples, batch_size, windows)[domain]["latent_mse"])
        found[domain] = [error / errors[expert] for error in errors]
    return found


def majority_of(routing: dict[str, Any]) -> dict[str, int]:
    """The expert of most tokens of each domain, in the first layer."""
    return dict(routing["layers"][0]["majority_expert"])


def groups(majority: dict[str, int]) -> list[list[str]]:
    """The domains that share an expert, one sorted list for each expert in use."""
    by_expert: dict[int, list[str]] = {}
    for domain in sorted(majority):
        by_expert.setdefault(majority[domain], []).append(domain)
    return sorted(by_expert.values())


def distances(growth: dict[str, list[float]], majority: dict[str, int]) -> list[list[float]]:
    """How far apart the domains are: the mean logarithm of the two factors by which errors grow on each other's expert.

    0 for domains that share an expert. Symmetric, in the order of ``growth``, at least 0.
    """
    domains = list(growth)

    def distance(a: str, b: str) -> float:
        logs = [math.log(max(growth[one][majority[other]], 1.0)) for one, other in ((a, b), (b, a))]
        return sum(logs) / 2

    return [[0.0 if a == b else distance(a, b) for b in domains] for a in domains]
