"""Loss-free balancing: a bias of each expert that moves the router's choices (arXiv 2408.15664, 2412.19437).

Shapes: L layers, E experts.
"""

from __future__ import annotations

import torch

from shodh_moe.model import Routing
from shodh_moe.model.routers import Router
from shodh_moe.parallel import sum_over_ranks


@torch.no_grad()
def update_biases(routers: list[Router], passes: list[list[Routing]], rate: float) -> None:
    """Move the router's choices from experts with more than the mean load of a step to the others (collective).

    bias_e += rate * sign(mean load - load_e), where the load counts the choices of all ranks before dropping. The
    counts are integers, so the biases do not depend on how the tokens are distributed over ranks.

    Args:
        routers: the router of each layer; with path routing the same one, which is updated once.
        passes: the routing of each layer, for each micro-batch of the step.
        rate: ``model.moe.router.bias_rate``.
    """
    load_LE = torch.stack([torch.stack([layer.routed_E for layer in routing]) for routing in passes]).sum(0)
    load_LE = sum_over_ranks(load_LE)
    for router, load_E in dict(zip(routers, load_LE, strict=True)).items():
        assert router.bias_E is not None
        load_E = load_E[: len(router.bias_E)]  # experts that fine-tuning added have no bias
        router.bias_E.add_(rate * torch.sign(load_E.sum() - len(load_E) * load_E).to(router.bias_E.dtype))
