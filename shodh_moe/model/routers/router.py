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
    """The samples of one forward pass, as every layer and its router see them.

    Attributes:
        samples: B.
        domain_B: int64, number of each sample's domain; None: unknown.
    """

    samples: int = 1
    domain_B: Tensor | None = None

    def by_token(self, value_B: Tensor, tokens: int) -> Tensor:
        """Give each of ``tokens`` tokens its sample's value: [B, ...] -> [N, ...]."""
        return value_B.repeat_interleave(tokens // self.samples, dim=0)

    def sample_N(self, x_ND: Tensor) -> Tensor:
        """The sample that each token belongs to, int64 [N]."""
        return self.by_token(torch.arange(self.samples, device=x_ND.device), len(x_ND))


ONE_SAMPLE = Context()


class Slots(NamedTuple):
    """How many tokens an expert takes; the arguments of `kernels.top1_gating` that are not the router's choice."""

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
