"""What training draws anew for each sample of a step: its time stride and the noise on its history.

The draws depend on the seed, the step and the sample, not on the rank or micro-batch that holds it. So every number of
ranks has the same ones, and resuming needs no state.

Shapes: B samples, H history, C latent channels, x y z latent grid (of this rank's slab).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shodh_moe.model.inputs import history_rms
from shodh_moe.parallel import ALONE, ContextParallel
from shodh_moe.tokenizer.latents import WHOLE, LatentSamples

# Numbers of the random streams, far from those of `DomainSampler`, which are numbers of domains.
STRIDE, NOISE = 2**31, 2**31 + 1


def draw_strides(samples: LatentSamples, picks: list[tuple[int, int]], seed: int, step: int) -> list[int]:
    """Draw a stride for each sample, evenly from those with which it fits into its trajectory.

    Args:
        picks: the samples as (domain, index within the domain).
        step: optimizer step.
    """
    if len(samples.strides) == 1:
        return samples.strides * len(picks)
    fitting = [samples.fitting_strides(*pick) for pick in picks]
    return [
        int(_generator(samples, seed, STRIDE, step, pick).choice(strides))
        for pick, strides in zip(picks, fitting, strict=True)
    ]


def draw_noise(
    samples: LatentSamples, picks: list[tuple[int, int]], seed: int, step: int, slab: slice = WHOLE
) -> Tensor:
    """Draw Gaussian noise of standard deviation 1 for the history of each sample, float32 [B, H, C, x, y, z].

    Args:
        picks, step: as in `draw_strides`.
        slab: part of the x axis to return; the noise is drawn for whole samples.
    """
    shape = (samples.history, *samples.trajectories[0].z.shape[1:])
    drawn = [_generator(samples, seed, NOISE, step, pick).standard_normal(shape, np.float32) for pick in picks]
    return torch.from_numpy(np.stack([noise_HCxyz[:, :, slab] for noise_HCxyz in drawn]))


def add_noise(history_BHCxyz: Tensor, noise_BHCxyz: Tensor, share: float, cp: ContextParallel = ALONE) -> Tensor:
    """Add noise to the history of samples (collective if ranks have slabs of them).

    Args:
        noise_BHCxyz: from `draw_noise`, on the history's device and in its dtype.
        share: its standard deviation over the root mean square of the sample's history, ``training.history_noise``.
        cp: which slab of each sample this rank has.
    """
    size_B = share * history_rms(history_BHCxyz, cp)
    return history_BHCxyz + noise_BHCxyz * size_B.view(-1, 1, 1, 1, 1, 1)


def _generator(samples: LatentSamples, seed: int, stream: int, step: int, pick: tuple[int, int]) -> np.random.Generator:
    domain, index = pick
    return np.random.default_rng([seed, stream, step, samples.streams[domain], index])
