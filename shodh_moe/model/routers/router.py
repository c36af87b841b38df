"""The protocol of routers.

Shapes: B samples, N tokens (the same number from each sample, sample by sample), D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from shodh_moe.kernels import Gating


@dataclass(frozen=True)
class Context:
    """Facts about the samples of one forward pass, which every layer passes to its router.

    Attributes:
        samples: number of samples B.
        domain_B: int64, number of each sample's domain; None if unknown.
    """

    samples: int = 1
    domain_B: Tensor | None = None

    def by_token(self, value_B: Tensor, tokens: int) -> Tensor:
        """Give each of ``tokens`` tokens its sample's value: [B, ...] -> [N, ...]."""
        return value_B.repeat_interleave(tokens // self.samples, dim=0)

    def sample_N(self, x_ND: Tensor) -> Tensor:
        """Number of the sample that each token belongs to, int64 [N]."""
        return self.by_token(torch.arange(self.samples, device=x_ND.device), len(x_ND))


ONE_SAMPLE = Context()


class Slots(NamedTuple):
    """Arguments of `kernels.top1_gating` that are the same for every router.

    Attributes:
        capacity: largest number of tokens that an expert takes from this rank.
        drop_order: which tokens an overfull expert keeps (``model.moe.drop_order``).
        check_finite: whether to raise if a logit is not finite.
    """

    capacity: int
    drop_order: str = "position"
    check_finite: bool = True


class Router(Protocol):
    """A module that gives each token an expert and a slot there, in float32 (float64 stays float64) under autocast.

    Its constructor takes (dim, num_experts, RouterConfig).
    """

    @property
    def temperature(self) -> Tensor | None:
        """Softmax temperature, one element, without gradient; None if the router has none."""

    def __call__(self, x_ND: Tensor, context: Context, slots: Slots) -> Gating:
        """Route the tokens; see `kernels.top1_gating` for the result and what is raised."""

    def parameters(self) -> Iterator[nn.Parameter]: ...
