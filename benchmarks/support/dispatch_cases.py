"""Cases of benchmarks/dispatch.py, the bytes and FLOP they need, and gating + dispatch + combine as one call.

Shapes: N tokens, D width, E experts, K capacity slots per expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from shodh_moe.kernels import Gating, combine, dispatch, topk_gating
from support.gating_cases import checks_finite, logits_of
from support.peers import DeepSpeed, torch_combine, torch_dispatch, torch_gating
from support.timing import BOTH, FORWARD


class Case(NamedTuple):
    """Sizes of one problem; ``capacity`` None is dropless."""

    tokens: int
    width: int
    experts: int
    dtype: torch.dtype
    capacity: int | None

    def record(self) -> dict[str, Any]:
        found = self._asdict() | {"dtype": str(self.dtype)[6:]}
        return found | {"capacity": "dropless" if self.capacity is None else self.capacity}

    def rows_shape(self) -> tuple[int, ...]:
        return (self.tokens, self.width) if self.capacity is None else (self.experts, self.capacity, self.width)


def route(case: Case, seed: int, device: torch.device) -> Gating:
    logits_NE = logits_of(case.tokens, case.experts, seed, device, torch.float32)
    return topk_gating(logits_NE, case.tokens if case.capacity is None else case.capacity)


def movement_bytes(case: Case, kept: int, shared: bool) -> dict[str, dict[str, int]]:
    """Minimal bytes by operation and pass. A token is D numbers; empty rows must be written as zeros.

    dispatch reads the kept tokens and, for each token, 16 bytes of expert and slot, and writes all rows. Its backward
    pass reads the kept rows and the 16 bytes, and writes N tokens.
    combine reads the kept rows, the gates (4 bytes), the 16 bytes and any shared output, and writes N tokens. Its
    backward pass reads kept tokens of dy, kept rows, gates and the 16 bytes, and writes all rows and gate gradients.
    """
    token = case.width * case.dtype.itemsize
    all_tokens, all_rows = case.tokens * token, (case.experts * (case.capacity or 0) or case.tokens) * token
    kept_bytes, index, gate = kept * token, 16 * case.tokens, 4 * case.tokens
    dispatched = kept_bytes + index + all_rows
    combined = kept_bytes + index + gate + all_tokens * (2 if shared else 1)
    return {
        "dispatch": {FORWARD: dispatched, BOTH: dispatched + kept_bytes + index + all_tokens},
        "combine": {FORWARD: combined, BOTH: combined + 2 * kept_bytes + index + 2 * gate + all_rows},
    }


def movement_flops(case: Case, kept: int, shared: bool) -> dict[str, dict[str, int]]:
    """FLOP by operation and pass. dispatch only copies.

    combine takes a multiplication per number, and an addition if there is a shared output; its backward pass takes a
    multiplication for the rows and a multiply-add for the gate.
    """
    numbers = kept * case.width
    forward = numbers * (2 if shared else 1)
    return {"dispatch": {FORWARD: 0, BOTH: 0}, "combine": {FORWARD: forward, BOTH: forward + 3 * numbers}}


def slots_of(ds: DeepSpeed, case: Case, g: Gating) -> Tensor:
    """Convert the routing ``g`` to DeepSpeed's form, as its MOELayer does with its gate's result."""
    indices = torch.where(g.slot_N >= 0, g.expert_N, -1).to(torch.int32)[None]
    return ds.slots(indices, g.slot_N.to(torch.int32)[None], case.experts, case.capacity or 0)


Inputs = dict[str, Any]


def together_inputs(case: Case, seed: int, device: torch.device) -> Inputs:
    logits_NE = logits_of(case.tokens, case.experts, seed, device, torch.float32).requires_grad_()
    x_ND, grad_ND = (torch.randn(case.tokens, case.width, device=device).to(case.dtype) for _ in range(2))
    return {"x": x_ND.requires_grad_(), "logits": logits_NE, "grads": (grad_ND, torch.tensor(0.01, device=device))}


def together_ours(i: Inputs, case: Case) -> tuple[Tensor, ...]:
    g = topk_gating(i["logits"], case.capacity or 0, check_finite=checks_finite(i["x"].device))
    rows_EKD = dispatch(i["x"], g.expert_N, g.slot_N, g.kept_E, case.capacity)
    return combine(rows_EKD, g.expert_N, g.slot_N, g.gate_N, g.kept_E), g.balance_loss


def together_deepspeed(ds: DeepSpeed, i: Inputs, case: Case, factor: float) -> tuple[Tensor, ...]:
    """The lines of MOELayer.forward without the experts and the exchange between ranks."""
    l_aux, capacity, experts, indices, locations, gates, _ = ds.gating(i["logits"], factor)
    capacity = int(capacity)
    slots = ds.slots(indices, locations, experts, capacity)
    rows_EKD = ds.encode(i["x"], slots, experts, capacity)
    return ds.decode(rows_EKD, slots, gates, case.tokens), l_aux


def together_torch(x_ND: Tensor, logits_NE: Tensor, capacity: int) -> tuple[Tensor, ...]:
    g = torch_gating(logits_NE, capacity, "position")
    rows_EKD = torch_dispatch(x_ND, g.expert_N, g.slot_N, logits_NE.shape[1], capacity)
    return torch_combine(rows_EKD, g.expert_N, g.slot_N, g.gate_N), g.balance_loss
