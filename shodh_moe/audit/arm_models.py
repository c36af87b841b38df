"""The networks that the audit compares: what each arm changes in the model of the audit's base config.

The base model is the mixture with one path per token. An arm is a function from the base config and a number of experts
to a model. To add an arm, add an entry to `ARMS`, and its name to the sets in `arms` that train it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shodh_moe.config import Config, ModelConfig
from shodh_moe.runs.plan import count_parameters

SINGLE = "single"


def with_moe(model: ModelConfig, **changes: Any) -> ModelConfig:
    """Change settings of ``model.moe``; those of the router under ``router``."""
    router = model.moe.router.model_copy(update=changes.pop("router", {}))
    return model.model_copy(update={"moe": model.moe.model_copy(update={**changes, "router": router})})


def mixture(base: Config, experts: int) -> ModelConfig:
    """The base model with this number of experts."""
    return with_moe(base.model, num_experts=experts)


def one_expert(base: Config, experts: int) -> ModelConfig:
    """A dense network of the mixture's active size: the mixture with a single expert, which takes every token."""
    return with_moe(base.model, num_experts=1, top_k=1)


def wider_experts(base: Config, experts: int) -> ModelConfig:
    """A dense network of the mixture's total size, all of it active, with wider feed-forward blocks."""
    wanted, dense = parameters(base, mixture(base, experts)), one_expert(base, experts)
    width, size = base.model.moe.expert_hidden, parameters(base, dense)
    per_unit = parameters(base, with_moe(dense, expert_hidden=width + 1)) - size
    return with_moe(dense, expert_hidden=width + round((wanted - size) / per_unit))


def wider_model(base: Config, experts: int) -> ModelConfig:
    """A dense network of the mixture's total size, all of it active, that is wider in every part."""
    wanted, dense = parameters(base, mixture(base, experts)), one_expert(base, experts)
    first, step = base.model.dim, 2 * base.model.heads

    def widened(dim: int) -> ModelConfig:
        hidden = round(base.model.moe.expert_hidden * dim / first)
        return with_moe(dense.model_copy(update={"dim": dim}), expert_hidden=hidden)

    dim = first
    while parameters(base, widened(dim)) < wanted:
        dim += step
    return min((widened(max(dim - step, first)), widened(dim)), key=lambda one: abs(parameters(base, one) - wanted))


def router_in_each_layer(base: Config, experts: int) -> ModelConfig:
    """The mixture with a router in each layer, which sees the layer's tokens and learns at the full rate."""
    router = {"lr_scale": 1.0, "commitment_weight": 0.0}
    return with_moe(base.model, num_experts=experts, scope="layer", attention="shared", router=router)


def told(base: Config, experts: int) -> ModelConfig:
    """A dense network without paths that is told what the path router sees (`model.film`)."""
    return one_expert(base, experts).model_copy(update={"film": True})


def oracle(base: Config, experts: int) -> ModelConfig:
    """The mixture, routed by the sample's domain with gate 1."""
    return with_moe(base.model, num_experts=experts, top_k=1, router={"kind": "oracle", "balance": "loss"})


def frozen_random(base: Config, experts: int) -> ModelConfig:
    """The mixture with a random router that does not learn."""
    return with_moe(base.model, num_experts=experts, router={"frozen": True, "start": "random", "balance": "loss"})


def random_start(base: Config, experts: int) -> ModelConfig:
    """The mixture with a router that learns from a random start, at the full rate."""
    return with_moe(base.model, num_experts=experts, router={"start": "random", "lr_scale": 1.0})


def no_shared(base: Config, experts: int) -> ModelConfig:
    """The mixture whose paths share nothing but norms and biases, with experts as wide as all of a token's together."""
    hidden = base.model.moe.expert_hidden * (1 + base.model.moe.shared_experts)
    return with_moe(base.model, num_experts=experts, shared_experts=0, expert_hidden=hidden, shared_linear=False)


def shared_expert(base: Config, experts: int) -> ModelConfig:
    """The mixture with one more expert for all paths; all experts are narrower instead, by half if there was none."""
    shared = base.model.moe.shared_experts + 1
    hidden = base.model.moe.expert_hidden * shared // (shared + 1)
    return with_moe(base.model, num_experts=experts, shared_experts=shared, expert_hidden=hidden)


def shared_attention(base: Config, experts: int) -> ModelConfig:
    """The mixture whose paths share the attention."""
    return with_moe(base.model, num_experts=experts, attention="shared")


def by_window(base: Config, experts: int) -> ModelConfig:
    """The mixture with one decision for each window of a sample."""
    return with_moe(base.model, num_experts=experts, router={"context": "window"})


def by_token(base: Config, experts: int) -> ModelConfig:
    """The mixture with one decision for each token, made from the sample and the token."""
    return with_moe(base.model, num_experts=experts, router={"context": "both"})


@dataclass(frozen=True)
class Arm:
    """One kind of network.

    Attributes:
        words: its name in tables and figures.
        model: makes its model from the audit's base config and the number of experts.
        question: what comparing the mixture with it answers; None if the comparison gives no verdict.
        rate_of: the arm whose learning rate it is trained with; None: one that is chosen for it.
    """

    words: str
    model: Callable[[Config, int], ModelConfig]
    question: str | None = None
    rate_of: str | None = None


# In the order of the tables.
ARMS = {
    "moe": Arm("mixture", mixture),
    "layer": Arm("router in each layer", router_in_each_layer, "Does it help to decide once for all layers?"),
    "dense_active": Arm("dense, same active", one_expert),
    "dense_total": Arm(
        "dense, same total", wider_experts, "Is it the routing, and not the number of parameters?", "dense_active"
    ),
    "dense_wide": Arm("dense, same total, wide", wider_model, "Is it the routing, and not the width?", "dense_active"),
    "film": Arm("dense, told the context", told, "Is it the routing, and not the knowledge of the context?"),
    "oracle": Arm("oracle routing", oracle, "Is learned routing as good as routing by domain?", rate_of="moe"),
    "random": Arm("random routing", frozen_random, "Does it matter that the routing is learned?", rate_of="moe"),
    "random_start": Arm(
        "random start", random_start, "Does it matter that the router starts from k-means?", rate_of="moe"
    ),
    "no_shared": Arm("no shared parts", no_shared, "Do shared parts matter?", rate_of="moe"),
    "shared_expert": Arm(
        "shared expert", shared_expert, "Does it matter that experts share no hidden units?", rate_of="moe"
    ),
    "shared_attention": Arm(
        "shared attention", shared_attention, "Does it matter that each path has its attention?", rate_of="moe"
    ),
    "window": Arm("decision by window", by_window, rate_of="moe"),
    "both": Arm("decision by token", by_token, rate_of="moe"),
    SINGLE: Arm("alone", one_expert),
}


def parameters(base: Config, model: ModelConfig) -> int:
    """Number of parameters of a model, on the latents of the base config."""
    return count_parameters(base.model_copy(update={"model": model}), 1).total
