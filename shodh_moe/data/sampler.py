"""Choose each rank's samples at each step: a pure function of seed, step and rank, so resuming needs no state.

Every micro-batch contains every domain, in equal or in weighted numbers: a rank with a single domain would overflow
one expert (DESIGN 3.5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from shodh_moe.base.errors import UserError


@lru_cache(maxsize=64)
def _order(seed: int, stream: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, stream, epoch]).permutation(size)


@dataclass(frozen=True)
class DomainSampler:
    """Draw ``batch_size`` samples per rank and step from all domains, epoch by epoch in each domain.

    Within a domain the global order depends only on (seed, stream). So each step has the same samples for any number of
    ranks, as long as the global batch has the same size and is divided among the domains in the same way.

    Args:
        domain_sizes: number of samples in each domain.
        batch_size: samples per rank and step.
        weights: relative number of samples of each domain in a micro-batch (see `shares`); None: equal numbers.
        streams: number of each domain's random stream, so that a domain keeps its order if others are left out;
            None: 0, 1, ...

    Raises:
        UserError: the micro-batch cannot be divided as asked.
    """

    domain_sizes: tuple[int, ...]
    batch_size: int
    seed: int
    world_size: int = 1
    weights: tuple[float, ...] | None = None
    streams: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _ = self.shares

    @cached_property
    def shares(self) -> tuple[int, ...]:
        """Number of samples of each domain in every micro-batch; they sum to ``batch_size``."""
        if self.weights is not None:
            return shares(self.batch_size, self.weights)
        if self.batch_size % len(self.domain_sizes):
            raise UserError(
                f"training.batch_size {self.batch_size} is not divisible by the {len(self.domain_sizes)} domains "
                "of the dataset: every micro-batch mixes them equally"
            )
        return (self.batch_size // len(self.domain_sizes),) * len(self.domain_sizes)

    def batch(self, step: int, rank: int) -> list[tuple[int, int]]:
        """List (domain, index within the domain) of each sample in a rank's micro-batch ``step`` (from 0)."""
        samples = []
        streams = self.streams or range(len(self.domain_sizes))
        for domain, (size, share) in enumerate(zip(self.domain_sizes, self.shares, strict=True)):
            start = (step * self.world_size + rank) * share
            for position in range(start, start + share):
                epoch, within = divmod(position, size)
                samples.append((domain, int(_order(self.seed, streams[domain], epoch, size)[within])))
        return samples


def shares(batch_size: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Divide ``batch_size`` in proportion to ``weights`` by largest remainder; ties go to the first domain.

    A domain with a positive weight gets at least one sample, and a domain with weight 0 none.

    Raises:
        UserError: a weight is negative or not finite, all are zero, or there are more domains than samples.
    """
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise UserError(f"data.weights must be numbers >= 0, at least one of them > 0, not {list(weights)}")
    used = [n for n, weight in enumerate(weights) if weight > 0]
    if len(used) > batch_size:
        raise UserError(
            f"training.batch_size {batch_size} is less than the {len(used)} domains with a weight above 0: "
            "every micro-batch contains each of them; raise batch_size, or set some data.weights to 0"
        )
    largest = max(weights)  # normalise first: the sum of huge weights would overflow
    total = sum(weight / largest for weight in weights)
    exact = {n: batch_size * (weights[n] / largest) / total for n in used}
    counts = {n: max(math.floor(exact[n]), 1) for n in used}
    while (left := batch_size - sum(counts.values())) != 0:
        step = 1 if left > 0 else -1
        # Change the count that is farthest from its exact share, but keep at least one sample.
        movable = [n for n in used if counts[n] + step >= 1]
        counts[max(movable, key=lambda n: (step * (exact[n] - counts[n]), -n))] += step
    return tuple(counts.get(n, 0) for n in range(len(weights)))


def domain_weights(weights: Mapping[str, float] | None, domains: Sequence[str]) -> tuple[float, ...] | None:
    """Return ``data.weights`` in the order of ``domains``, 1 for domains not listed; None if no weights are given.

    Raises:
        UserError: a weight names a domain that the dataset does not have, or all weights are 0.
    """
    if not weights:
        return None
    unknown = sorted(set(weights) - set(domains))
    if unknown:
        raise UserError(f"data.weights.{unknown[0]}: the dataset has only {', '.join(domains)}: correct the name")
    if all(weights.get(domain, 1) == 0 for domain in domains):
        raise UserError("data.weights: every domain of the dataset has weight 0: give at least one a weight above 0")
    return tuple(float(weights.get(domain, 1)) for domain in domains)
