"""Which samples a rank sees at a step: a pure function of seed, step and rank, so resuming needs no state.

Every micro-batch holds every domain, in equal numbers or in those that the weights give: a rank with one domain alone
would overflow one expert (DESIGN 3.5).
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
    """Draws ``batch_size`` samples a rank and step from all domains, each domain epoch by epoch.

    ``domain_sizes`` are the numbers of samples per domain. Within a domain the global order depends on
    (seed, stream) alone, so the same samples come in the same steps whatever the number of ranks, as long as
    the global batch is the same and divides by domain in the same way.

    ``weights`` say how the micro-batch divides among the domains (see `shares`); None: equally. ``streams`` are the
    numbers of the domains' random streams; None: 0, 1, ...: a domain has the same order whatever others are left out.

    Raises:
        UserError: the micro-batch cannot be divided so.
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
        """Samples of each domain in every micro-batch; they sum to ``batch_size``."""
        if self.weights is not None:
            return shares(self.batch_size, self.weights)
        if self.batch_size % len(self.domain_sizes):
            raise UserError(
                f"training.batch_size {self.batch_size} is not divisible by the {len(self.domain_sizes)} domains "
                "of the dataset: every micro-batch mixes them equally"
            )
        return (self.batch_size // len(self.domain_sizes),) * len(self.domain_sizes)

    def batch(self, step: int, rank: int) -> list[tuple[int, int]]:
        """(domain, index within the domain) of each sample of this rank in this micro-batch (``step``, from 0)."""
        samples = []
        streams = self.streams or range(len(self.domain_sizes))
        for domain, (size, share) in enumerate(zip(self.domain_sizes, self.shares, strict=True)):
            start = (step * self.world_size + rank) * share
            for position in range(start, start + share):
                epoch, within = divmod(position, size)
                samples.append((domain, int(_order(self.seed, streams[domain], epoch, size)[within])))
        return samples


def shares(batch_size: int, weights: Sequence[float]) -> tuple[int, ...]:
    """``batch_size`` divided in proportion to ``weights`` by largest remainder; the first of equals gets more.

    A domain with a positive weight gets one sample at least, one with weight 0 none.

    Raises:
        UserError: a weight is negative or not finite, all are zero, or there are more domains than samples.
    """
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise UserError(f"data.weights must be numbers from 0 on, one at least above 0, not {list(weights)}")
    used = [n for n, weight in enumerate(weights) if weight > 0]
    if len(used) > batch_size:
        raise UserError(
            f"training.batch_size {batch_size} is less than the {len(used)} domains with a weight above 0: "
            "every micro-batch holds each of them; raise it, or set data.weights of some to 0"
        )
    largest = max(weights)  # divided by first: the sum of huge weights is still a number
    total = sum(weight / largest for weight in weights)
    exact = {n: batch_size * (weights[n] / largest) / total for n in used}
    counts = {n: max(math.floor(exact[n]), 1) for n in used}
    while (left := batch_size - sum(counts.values())) != 0:
        step = 1 if left > 0 else -1
        # Where it moves a count nearest to what was asked for; a domain keeps its only sample.
        movable = [n for n in used if counts[n] + step >= 1]
        counts[max(movable, key=lambda n: (step * (exact[n] - counts[n]), -n))] += step
    return tuple(counts.get(n, 0) for n in range(len(weights)))


def domain_weights(weights: Mapping[str, float] | None, domains: Sequence[str]) -> tuple[float, ...] | None:
    """``data.weights`` in the order of ``domains``, 1 for a domain that it leaves out; None if it is not given.

    Raises:
        UserError: a weight is for a domain that the dataset does not have.
    """
    if not weights:
        return None
    unknown = sorted(set(weights) - set(domains))
    if unknown:
        raise UserError(f"data.weights.{unknown[0]}: the dataset has only {', '.join(domains)}: correct the name")
    if all(weights.get(domain, 1) == 0 for domain in domains):
        raise UserError("data.weights: every domain of the dataset has weight 0: give one more than that")
    return tuple(float(weights.get(domain, 1)) for domain in domains)
