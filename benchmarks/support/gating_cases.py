"""Inputs of the gating benchmarks, and the bytes and FLOP that gating needs.

Shapes: N tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

CAPACITY_FACTOR = 1.25


def logits_of(tokens: int, experts: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random logits that favour some experts: at capacity factor 1.25, 2 to 8 % of the tokens are dropped."""
    generator = torch.Generator().manual_seed(seed)
    favour_E = 0.15 * torch.randn(experts, generator=generator)
    return (torch.randn(tokens, experts, generator=generator) + favour_E).to(device, dtype)


def checks_finite(device: torch.device) -> bool:
    """Whether the model's router checks logits in training: not on a GPU, where the check would wait for the device."""
    return device.type == "cpu"


def gating_bytes(tokens: int, experts: int, itemsize: int) -> dict[str, int]:
    """Minimal traffic by pass, in bytes.

    Forward reads the logits and writes expert (8), slot (8), gate (4) and entropy (4) of each token.
    Backward reads the logits, gate gradient (4) and expert (8), and writes the logit gradient.
    """
    forward = tokens * (experts * itemsize + 24)
    return {"forward": forward, "both": forward + tokens * (2 * experts * itemsize + 12)}


def gating_flops(tokens: int, experts: int) -> dict[str, int]:
    """FLOP by pass.

    Forward, 7 per logit: max, subtract, exp, add (softmax), multiply-add (entropy), add (mean probability).
    Backward, 6 per logit: subtract, exp, 2 multiply-adds.
    """
    return {"forward": 7 * tokens * experts, "both": 13 * tokens * experts}
