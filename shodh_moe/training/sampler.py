"""Which samples a rank sees at a step: a pure function of seed, step and rank, so resuming needs no state.

Every micro-batch holds every domain in equal numbers: a rank with one domain alone would overflow one expert
(DESIGN 3.5).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shodh_moe.errors import UserError


@lru_cache(maxsize=64)
def _order(seed: int, domain: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, domain, epoch]).permutation(size)


@dataclass(frozen=True)
class DomainSampler:
    """Draws ``batch_size`` samples a rank and step, equally from all domains, each domain epoch by epoch.

    ``domain_sizes`` are the numbers of samples per domain. Within a domain the global order depends on
    (seed, domain) alone, so the same samples come in the same steps whatever the number of ranks, as long as
    the global batch is the same.
    """

    domain_sizes: tuple[int, ...]
    batch_size: int
    seed: int
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % len(self.domain_sizes):
            raise UserError(
                f"training.batch_size {self.batch_size} is not divisible by the {len(self.domain_sizes)} domains "
                "of the dataset: every micro-batch mixes them equally"
            )

    def batch(self, step: int, rank: int) -> list[tuple[int, int]]:
        """(domain, index within the domain) of each sample of this rank in this micro-batch (``step``, from 0)."""
        share = self.batch_size // len(self.domain_sizes)
        samples = []
        for domain, size in enumerate(self.domain_sizes):
            start = (step * self.world_size + rank) * share
            for position in range(start, start + share):
                epoch, within = divmod(position, size)
                samples.append((domain, int(_order(self.seed, domain, epoch, size)[within])))
        return samples
