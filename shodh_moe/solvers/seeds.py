"""Random streams: one per trajectory, independent of other trajectories and of the order of generation."""

from __future__ import annotations

import zlib

import numpy as np

# Splits number their trajectories from distant bases, so that a longer training split does not change the others.
SPLIT_BASE = {"train": 0, "valid": 1_000_000, "test": 2_000_000}


def trajectory_seed(seed: int, domain: str, trajectory: int) -> np.random.SeedSequence:
    """The seed of one trajectory from the dataset's seed, the domain's name (CRC-32) and the trajectory's number."""
    return np.random.SeedSequence([seed, zlib.crc32(domain.encode()), trajectory])
