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

from shodh_moe.base.tensors import count_classes
from shodh_moe.config import RouterConfig
from shodh_moe.kernels import Gating, topk_gating
from shodh_moe.kernels.gating import assign_slots


class Decision(NamedTuple):
    """Paths of samples that an earlier call of the router has chosen, on this rank or on another.

    Attributes:
        expert_B: the expert of each sample, int64.
        kept_BS: whether the expert takes the token, bool; None: it takes all.
        local: whether this rank holds the experts of all its samples, and so does every other rank of the group.
    """

    expert_B: Tensor
    kept_BS: Tensor | None = None
    local: bool = True


@dataclass(frozen=True)
class Context:
    """Facts about the samples of one forward pass, which every layer passes to its router.

    Attributes:
        samples: number of samples B.
        domain_B: int64, number of each sample's domain; None if unknown.
        drop: whether experts drop tokens beyond their capacity outside training as well.
        decision: the samples' paths, if they are known already; the path router then only computes their gates.
        stride_B: int64, each sample's time stride, one of ``model.strides``; None: the first of them for all samples.
        boundary_B32: int64, code of each face of each sample's box, see `shodh_moe.base.boundaries`. Only networks that
            are told boundaries need it.
    """

    samples: int = 1
    domain_B: Tensor | None = None
    drop: bool = False
    decision: Decision | None = None
    stride_B: Tensor | None = None
    boundary_B32: Tensor | None = None

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
        decision: the tokens' experts, if they are chosen already. There is then one row for each sample.
        top_k: number of experts per token.
    """

    capacity: int
    drop_order: str = "position"
    check_finite: bool = True
    row_N: Tensor | None = None
    decision: Decision | None = None
    top_k: int = 1


def choose(logits_ME: Tensor, slots: Slots, bias_E: Tensor | None = None) -> Gating:
    """Route the N tokens by the logits of their rows; see `Router` for ``bias_E``."""
    if slots.decision is not None:
        return follow(logits_ME, slots)
    logits_NE = logits_ME if slots.row_N is None else logits_ME.index_select(0, slots.row_N)
    return topk_gating(logits_NE, slots.capacity, slots.drop_order, bias_E, slots.check_finite, slots.top_k)


def balancing_bias(num_experts: int, config: RouterConfig) -> Tensor | None:
    """The initial ``bias_E`` of a `Router`."""
    return torch.zeros(num_experts) if config.balance == "bias" else None


def follow(logits_ME: Tensor, slots: Slots) -> Gating:
    """Give the tokens the experts of ``slots.decision``, and their gates by the logits.

    The router's losses are zero: they belong to the call that decided.
    """
    decision, row_N = slots.decision, slots.row_N
    assert decision is not None
    assert row_N is not None
    experts = logits_ME.shape[1]
    gate_N = logits_ME.softmax(1).gather(1, decision.expert_B[:, None]).squeeze(1)[row_N]
    expert_N = decision.expert_B[row_N]
    kept_N = torch.ones_like(expert_N, dtype=torch.bool) if decision.kept_BS is None else decision.kept_BS.flatten()
    # Dropped tokens form a class of their own, so that kept tokens fill their slots without gaps.
    class_N = torch.where(kept_N, expert_N, experts)
    count_C = count_classes(class_N, experts + 1)
    slot_N = assign_slots(class_N, gate_N, count_C, len(class_N), "position")
    logsumexp_N, none = logits_ME.detach().logsumexp(1)[row_N], gate_N.new_zeros(())
    return Gating(
        gate_N=gate_N,
        expert_N=expert_N,
        slot_N=torch.where(kept_N, slot_N, -1),
        routed_E=count_classes(expert_N, experts),
        kept_E=count_C[:experts],
        entropy_N=torch.zeros_like(logsumexp_N),
        balance_loss=none,
        z_loss=none,
        logsumexp_N=logsumexp_N,
        mean_p_E=gate_N.new_zeros(experts),
    )


class Router(Protocol):
    """A module that gives each token an expert and a slot there, in float32 (float64 stays float64) under autocast.

    Its constructor takes (dim, num_experts, RouterConfig), where dim is the number of features D.
    """

    @property
    def bias_E(self) -> Tensor | None:
        """Added to the experts' probabilities for the choice only, a buffer that training changes and checkpoints hold.

        None unless ``router.balance`` is bias. Experts that fine-tuning added have none.
        """

    @property
    def temperature(self) -> Tensor | None:
        """Softmax temperature, one element, without gradient; None if the router has none."""

    def __call__(self, x_MD: Tensor, context: Context, slots: Slots) -> Gating:
        """Route the tokens; see `kernels.topk_gating` for the result and what is raised."""

    def start(self, x_MD: Tensor, seed: int) -> None:
        """Set the initial weights from the rows of training samples, or keep them. The last feature of a row is 1."""

    def parameters(self) -> Iterator[nn.Parameter]: ...
