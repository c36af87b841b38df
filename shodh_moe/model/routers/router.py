"""The protocol of routers.

Shapes: B samples, N tokens (the same number from each sample, sample by sample), M rows of D features that the router
scores, E experts. Mostly a row is a token; with path routing a row can stand for a sample or a window of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from shodh_moe.config import RouterConfig
from shodh_moe.kernels import Gating, topk_gating


@dataclass(frozen=True)
class Context:
    """Facts about the samples of one forward pass, which every layer passes to its router.

    Attributes:
        samples: number of samples B.
        domain_B: int64, number of each sample's domain; None if unknown.
        drop: whether experts drop tokens beyond their capacity outside training as well.
    """

    samples: int = 1
    domain_B: Tensor | None = None
    drop: bool = False

    def by_row(self, value_B: Tensor, rows: int) -> Tensor:
        """Give each of ``rows`` rows, the same number from each sample, its sample's value: [B, ...] -> [M, ...]."""
        return value_B.repeat_interleave(rows // self.samples, dim=0)

    def sample_M(self, x_MD: Tensor) -> Tensor:
        """Number of the sample that each row belongs to, int64 [M]."""
        return self.by_row(torch.arange(self.samples, device=x_MD.device), len(x_MD))


ONE_SAMPLE = Context()


class Slots(NamedTuple):
    """Arguments of `kernels.topk_gating` that are the same for every router.

    Attributes:
        capacity: largest number of tokens that an expert takes from this rank.
        drop_order: which tokens an overfull expert keeps (``model.moe.drop_order``).
        check_finite: whether to raise if a logit is not finite.
        row_N: number of the row whose logits decide for each token, int64; None: row n decides for token n.
        top_k: number of experts per token.
    """

    capacity: int
    drop_order: str = "position"
    check_finite: bool = True
    row_N: Tensor | None = None
    top_k: int = 1


def choose(logits_ME: Tensor, slots: Slots, bias_E: Tensor | None = None) -> Gating:
    """Route the N tokens by the logits of their rows; see `Router` for ``bias_E``."""
    logits_NE = logits_ME if slots.row_N is None else logits_ME.index_select(0, slots.row_N)
    return topk_gating(logits_NE, slots.capacity, slots.drop_order, bias_E, slots.check_finite, slots.top_k)


def balancing_bias(num_experts: int, config: RouterConfig) -> Tensor | None:
    """The initial ``bias_E`` of a `Router`."""
    return torch.zeros(num_experts) if config.balance == "bias" else None


class Router(Protocol):
    """A module that gives each token an expert and a slot there, in float32 (float64 stays float64) under autocast.

    Its constructor takes (dim, num_experts, RouterConfig), where dim is the number of features D.

    Attributes:
        bias_E: added to the experts' probabilities for the choice only, a buffer that training changes and checkpoints
            hold; None unless ``router.balance`` is bias.
    """

    bias_E: Tensor | None

    @property
    def temperature(self) -> Tensor | None:
        """Softmax temperature, one element, without gradient; None if the router has none."""

    def __call__(self, x_MD: Tensor, context: Context, slots: Slots) -> Gating:
        """Route the tokens; see `kernels.topk_gating` for the result and what is raised."""

    def start(self, x_MD: Tensor, seed: int) -> None:
        """Set the initial weights from the rows of training samples, or keep them. The last feature of a row is 1."""

    def parameters(self) -> Iterator[nn.Parameter]: ...
