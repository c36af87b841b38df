"""What training draws anew for each sample of a step: its time stride and the noise on its history.

The draws depend on the seed, the step and the sample, not on the rank or micro-batch that holds it. So every number of
ranks has the same ones, and resuming needs no state.

Shapes: B samples, H history, C latent channels, x y z latent grid.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shodh_moe.tokenizer.latents import LatentSamples

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
    samples: LatentSamples, picks: list[tuple[int, int]], history_BHCxyz: Tensor, share: float, seed: int, step: int
) -> Tensor | None:
    """Draw Gaussian noise for the history of each sample, on the CPU and in the dtype of the history.

    Args:
        picks, step: as in `draw_strides`.
        history_BHCxyz: the samples' history, on the CPU.
        share: standard deviation over the root mean square of the sample's history, ``training.history_noise``.

    Returns:
        None without noise.
    """
    if not share:
        return None
    shape = history_BHCxyz.shape[1:]
    drawn = [_generator(samples, seed, NOISE, step, pick).standard_normal(shape, np.float32) for pick in picks]
    rms_B = history_BHCxyz.square().flatten(1).mean(1).sqrt()
    return torch.from_numpy(np.stack(drawn)).to(history_BHCxyz.dtype) * (share * rms_B).view(-1, *[1] * len(shape))


def _generator(samples: LatentSamples, seed: int, stream: int, step: int, pick: tuple[int, int]) -> np.random.Generator:
    domain, index = pick
    return np.random.default_rng([seed, stream, step, samples.streams[domain], index])
