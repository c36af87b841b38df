"""k-means with several starts, by SciPy."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

STARTS = 10


def kmeans(x_MR: Tensor, clusters: int, seed: int) -> Tensor:
    """Centres of the best of several runs of k-means++ by mean distance, float64 [K, R]; K <= clusters.

    K is less than ``clusters`` only if there are fewer distinct rows. The same seed gives the same centres.

    Args:
        x_MR: the rows, on a CPU.
    """
    from scipy.cluster.vq import kmeans2

    rows = np.ascontiguousarray(x_MR.double().numpy())
    clusters = min(clusters, len(np.unique(rows, axis=0)))
    best, smallest = rows[:clusters], np.inf
    for start in range(STARTS):
        generator = np.random.default_rng([seed, start])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # an empty cluster: another start does better
            centres, label = kmeans2(rows, clusters, iter=30, minit="++", seed=generator)
        distance = float(np.square(rows - centres[label]).sum(1).mean())
        if distance < smallest and len(np.unique(label)) == clusters:
            best, smallest = centres, distance
    return torch.from_numpy(np.ascontiguousarray(best))
