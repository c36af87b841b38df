"""Sparse mixture of experts, sharded over an expert-parallel group (DESIGN 3.4, 3.5, 7).

Shapes: N local tokens, D model width, E experts, L local experts, K slots per expert and rank, G ranks.
"""

from __future__ import annotations

from torch import Tensor, nn

from shodh_moe.config import MoEConfig
from shodh_moe.model.experts import Experts, shared_experts, sum_outputs, to_autocast
from shodh_moe.model.plan import Plan, make_plan
from shodh_moe.model.routers import ONE_SAMPLE, Context, Router, make_router
from shodh_moe.model.routing import Routing
from shodh_moe.parallel import ExpertParallel, all_to_all, start_all_to_all


class MoE(nn.Module):
    """y = sum_j Shared_j(h) + sum_e p_e * Expert_e(h) over the router's ``top_k`` choices e, with probability p_e each.

    With ``model.moe.scope`` layer, the block has a router, which sees the block's own tokens. With scope path it
    follows the plan that the network made for all layers.

    In capacity mode, during training, each expert takes at most ``capacity_factor * top_k * N / E`` tokens from each
    rank; a token that none of its experts takes passes through the shared experts only. In dropless mode, and always
    outside training, experts take every token that chose them. The shared experts run while the tokens travel to the
    routed experts.
    """

    def __init__(self, dim: int, config: MoEConfig, ep: ExpertParallel, seed: int, layer: int):
        super().__init__()
        self.config, self.ep, self.layer = config, ep, layer
        self.router: Router | None = None
        if config.scope == "layer":
            self.router = make_router(config.router, dim, config.num_experts)
        self.shared = shared_experts(dim, config)
        self.experts = Experts(dim, config.expert_hidden, ep.local_experts(config.num_experts), seed, layer)

    def forward(self, x_ND: Tensor, context: Context = ONE_SAMPLE, plan: Plan | None = None) -> tuple[Tensor, Routing]:
        """See `FeedForwardBlock`."""
        if self.router is not None:
            plan = make_plan(self.router, x_ND, context, self.config, self.ep, self.training, self.layer)
        assert plan is not None  # with scope path, the network makes it
        routing, plan = plan.routing, plan.by_place
        (rows_ND,) = to_autocast(x_ND)  # narrow before they travel: half the bytes
        y_ND = self._dropless(rows_ND, plan) if plan.capacity is None else self._with_capacity(rows_ND, plan)
        return y_ND.to(x_ND.dtype), routing

    def _with_capacity(self, x_ND: Tensor, plan: Plan) -> Tensor:
        """Send ``capacity`` slots to every expert, filled or not."""
        capacity, width = plan.capacity, x_ND.shape[1]
        assert capacity is not None
        blocks_GLKD = plan.dispatch(x_ND).view(self.ep.size, -1, capacity, width)
        in_flight = start_all_to_all(blocks_GLKD, self.ep, layer=self.layer, direction="dispatch")
        shared_ND = sum_outputs(self.shared, x_ND)
        local_LTD = in_flight.wait().transpose(0, 1).reshape(-1, self.ep.size * capacity, width)
        filled_LG = None if plan.received_GL is None else plan.received_GL.T
        done_LTD = self.experts(local_LTD, filled_LG)
        back_GLKD = done_LTD.view(-1, self.ep.size, capacity, width).transpose(0, 1)
        back_GLKD = all_to_all(back_GLKD, self.ep, layer=self.layer, direction="combine")
        return plan.combine(back_GLKD.reshape(-1, capacity, width), shared_ND)

    def _dropless(self, x_ND: Tensor, plan: Plan) -> Tensor:
        """Send every expert only the tokens that chose it."""
        rows_ND = plan.dispatch(x_ND)
        if self.ep.size == 1 or plan.local:
            shared_ND = sum_outputs(self.shared, x_ND)
            count_L = plan.gating.kept_E.view(self.ep.size, -1)[self.ep.rank]
            return plan.combine(self.experts.grouped(rows_ND, count_L), shared_ND)
        assert plan.received_GL is not None
        send, receive = plan.splits
        in_flight = start_all_to_all(rows_ND, self.ep, send, receive, self.layer, "dispatch")
        shared_ND = sum_outputs(self.shared, x_ND)
        # Rows arrive sorted by rank, then by expert; the experts need them sorted by expert, then by rank.
        by_expert, by_rank = plan.order
        done_RD = self.experts.grouped(in_flight.wait()[by_expert], plan.received_GL.sum(0))
        rows_ND = all_to_all(done_RD[by_rank], self.ep, receive, send, self.layer, "combine")
        return plan.combine(rows_ND, shared_ND)
