"""Random seeds: one per trajectory, independent of other trajectories and of the order of generation."""

from __future__ import annotations

import zlib

import numpy as np

# First trajectory number of each split, far apart, so that a longer training split does not change the others.
SPLIT_BASE = {"train": 0, "valid": 1_000_000, "test": 2_000_000}


def trajectory_seed(seed: int, domain: str, trajectory: int) -> np.random.SeedSequence:
    """Derive a trajectory's seed from the dataset's seed, the CRC-32 of its domain's name, and its number."""
    return np.random.SeedSequence([seed, zlib.crc32(domain.encode()), trajectory])
