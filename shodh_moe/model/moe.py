"""Sparse mixture of experts, sharded over an expert-parallel group (DESIGN 3.4, 3.5, 7).

Shapes: N local tokens, D model width, E experts, L local experts, K slots per expert and rank, G ranks, R rows that
the ranks of the group send to this one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shodh_moe.base.parameters import mark
from shodh_moe.config import MoEConfig
from shodh_moe.kernels import Gating, combine, dispatch, expert_capacity
from shodh_moe.model.experts import Experts, shared_experts, sum_outputs, to_autocast
from shodh_moe.model.routers import ONE_SAMPLE, Context, Slots, make_router
from shodh_moe.model.routing import Routing, routing_of
from shodh_moe.parallel import ExpertParallel, all_to_all, start_all_to_all


class MoE(nn.Module):
    """y = sum_j Shared_j(h) + p_e * Expert_e(h), where e is the router's choice and p_e its probability.

    In capacity mode, during training, each expert takes at most ``capacity_factor * N / E`` tokens from each rank; the
    remaining tokens pass through the shared experts only. In dropless mode, and always outside training, experts take
    every token that chose them. The shared experts run while the tokens travel to the routed experts.
    """

    def __init__(self, dim: int, config: MoEConfig, ep: ExpertParallel, seed: int, layer: int):
        super().__init__()
        self.config, self.ep, self.layer = config, ep, layer
        self.router = make_router(config.router, dim, config.num_experts)
        for parameter in self.router.parameters():
            mark(parameter, group="router")
        self.shared = shared_experts(dim, config)
        self.experts = Experts(dim, config.expert_hidden, ep.local_experts(config.num_experts), seed, layer)
        self.drop_in_eval = False  # evaluation turns this on to count what the training capacity would drop

    def forward(self, x_ND: Tensor, context: Context = ONE_SAMPLE) -> tuple[Tensor, Routing]:
        """See `FeedForwardBlock`."""
        c = self.config
        tokens = x_ND.shape[0]
        # If one rank raised alone, the others would wait for it in the exchange forever.
        check_finite = not self.training and self.ep.size == 1
        (rows_ND,) = to_autocast(x_ND)  # narrow before they travel: half the bytes
        if not c.dropless and (self.training or self.drop_in_eval):
            capacity = expert_capacity(tokens, c.num_experts, c.capacity_factor, c.min_capacity)
            self.ep.check_same_tokens(tokens, capacity, x_ND.device)
            gating = self.router(x_ND, context, Slots(capacity, c.drop_order, check_finite))
            y_ND = self._with_capacity(rows_ND, gating, capacity)
        else:
            gating = self.router(x_ND, context, Slots(tokens, c.drop_order, check_finite))
            y_ND = self._dropless(rows_ND, gating)
        return y_ND.to(x_ND.dtype), routing_of(gating)

    def _with_capacity(self, x_ND: Tensor, gating: Gating, capacity: int) -> Tensor:
        """Send ``capacity`` slots to every expert, filled or not."""
        experts, width = self.config.num_experts, x_ND.shape[1]
        slots_EKD = dispatch(x_ND, gating.expert_N, gating.slot_N, gating.kept_E, capacity)
        blocks_GLKD = slots_EKD.view(self.ep.size, -1, capacity, width)
        in_flight = start_all_to_all(blocks_GLKD, self.ep, layer=self.layer, direction="dispatch")
        shared_ND = sum_outputs(self.shared, x_ND)
        # A CPU can skip slots without a token; on a GPU, reading the counts would wait for the device.
        filled_LG = self.ep.exchange_counts(gating.kept_E, self.layer).T if x_ND.device.type == "cpu" else None
        local_LTD = in_flight.wait().transpose(0, 1).reshape(-1, self.ep.size * capacity, width)
        done_LTD = self.experts(local_LTD, filled_LG)
        back_GLKD = done_LTD.view(-1, self.ep.size, capacity, width).transpose(0, 1)
        back_GLKD = all_to_all(back_GLKD, self.ep, layer=self.layer, direction="combine")
        slots_EKD = back_GLKD.reshape(experts, capacity, width)
        return combine(slots_EKD, gating.expert_N, gating.slot_N, gating.gate_N, gating.kept_E, shared_ND)

    def _dropless(self, x_ND: Tensor, gating: Gating) -> Tensor:
        """Send every expert only the tokens that chose it."""
        rows_ND = dispatch(x_ND, gating.expert_N, gating.slot_N, gating.kept_E, None)
        if self.ep.size == 1:
            shared_ND, rows_ND = sum_outputs(self.shared, x_ND), self.experts.grouped(rows_ND, gating.kept_E)
            return combine(rows_ND, gating.expert_N, gating.slot_N, gating.gate_N, gating.kept_E, shared_ND)
        received_GL = self.ep.exchange_counts(gating.kept_E, self.layer)
        send, receive = gating.kept_E.view(self.ep.size, -1).sum(1).tolist(), received_GL.sum(1).tolist()
        in_flight = start_all_to_all(rows_ND, self.ep, send, receive, self.layer, "dispatch")
        shared_ND = sum_outputs(self.shared, x_ND)
        # Rows arrive sorted by rank, then by expert; the experts need them sorted by expert, then by rank.
        local_L = torch.arange(received_GL.shape[1], device=x_ND.device)
        expert_R = torch.repeat_interleave(local_L.repeat(self.ep.size), received_GL.flatten())
        order_R = torch.argsort(expert_R, stable=True)
        done_RD = self.experts.grouped(in_flight.wait()[order_R], received_GL.sum(0))
        rows_ND = all_to_all(done_RD[torch.argsort(order_R)], self.ep, receive, send, self.layer, "combine")
        return combine(rows_ND, gating.expert_N, gating.slot_N, gating.gate_N, gating.kept_E, shared_ND)
