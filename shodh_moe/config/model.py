"""The ``model`` section.

A key has ``changes="model"`` if it determines the shapes of the weights, or if the same weights would predict something
else with another value even when no token is dropped. The other keys only affect training.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from shodh_moe.base.section import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section, setting
from shodh_moe.config.routers import check_kind

# Limits of the gating kernels (kernels/gating.py and cosine_gating.py, not imported because they need torch).
MAX_EXPERTS = 256
MAX_CHOICES = 8
MAX_ROUTING_WIDTH = 128


class RouterConfig(Section):
    """The soft-semantic router (DESIGN 3.5)."""

    kind: Annotated[str, BeforeValidator(check_kind)] = setting(
        "cosine",
        changes="model",
        description="scores of the experts; oracle: a control that sends every token to the expert of its domain",
    )
    frozen: bool = setting(False, changes="run", description="a control that keeps the router's initial weights")
    context: Literal["sample", "window", "token", "both"] = setting(
        "sample",
        changes="model",
        description="with scope path, what decides a token's path: its sample, its window, the token, or sample and "
        "token",
    )
    window: Positive = setting(
        2, changes="model", description="with context window, its size in tokens along each axis"
    )
    start: Literal["kmeans", "random"] = setting(
        "kmeans",
        changes="run",
        description="with scope path, the router before the first step: from k-means of training contexts, or random",
    )
    dim: int = setting(
        16,
        changes="model",
        gt=0,
        le=MAX_ROUTING_WIDTH,
        description="width of the projection whose cosine similarity scores the experts",
    )
    lr_scale: PositiveFloat = setting(
        0.03,
        changes="run",
        description="learning rate of the router, relative to that of the other parameters; with scope layer 1 unless "
        "given",
    )
    temperature: PositiveFloat = setting(0.1, changes="run", description="initial tau")
    min_temperature: PositiveFloat = setting(0.01, changes="model", description="lower bound of tau")
    balance: Literal["loss", "global", "bias"] = setting(
        "loss",
        changes="model",
        description="what evens out the experts' load: a loss of each rank's micro-batch; the same with the counts of "
        "all ranks; or, without a loss, a bias of each expert that only moves decisions",
    )
    bias_rate: PositiveFloat = setting(
        1e-3, changes="run", description="with balance bias, how much a step changes a bias; probabilities are 0 to 1"
    )
    balance_weight: NonNegativeFloat = setting(
        0.01, changes="run", description="weight of the load-balancing loss, as a share of the prediction loss"
    )
    z_weight: NonNegativeFloat = setting(
        1e-3, changes="run", description="weight of the router's z-loss, as a share of the prediction loss"
    )
    commitment_weight: NonNegativeFloat = setting(
        0.3,
        changes="run",
        description="weight of -log p of the chosen expert, as a share of the prediction loss, which keeps decisions "
        "clear; with scope layer 0 unless given",
    )
    added: list[Positive] = setting(
        [],
        changes="model",
        description="one entry for each of the last experts that fine-tuning added (docs/finetune.md): the number of "
        "domains that its samples are told apart from",
    )

    @model_validator(mode="after")
    def _check_balance(self) -> RouterConfig:
        control = "kind oracle" if self.kind == "oracle" else "frozen true" if self.frozen else None
        if self.balance == "bias" and control:
            raise ValueError(f"balance bias would change the decisions of the control {control}: set balance to loss")
        return self


class MoEConfig(Section):
    """The sparse feed-forward block (DESIGN 3.4)."""

    num_experts: int = setting(
        2,
        changes="model",
        ge=0,
        le=MAX_EXPERTS,
        description="number of routed experts; 0: none, and the shared experts form a dense network",
    )
    top_k: int = setting(
        1, changes="model", ge=1, le=MAX_CHOICES, description="number of routed experts that a token visits"
    )
    scope: Literal["path", "layer"] = setting(
        "path",
        changes="model",
        before="layer",
        description="path: one decision per token for embedding, all layers and head; layer: a router in each layer",
    )
    attention: Literal["shared", "low_rank", "own"] = setting(
        "own",
        changes="model",
        description="whether each path adds its own part to the attention's projections; with scope layer shared",
    )
    attention_rank: Positive = setting(16, changes="model", description="rank of that part with attention low_rank")
    expert_hidden: Positive = setting(512, changes="model", description="hidden width of an expert")
    shared_experts: NonNegative = setting(
        0, changes="model", description="number of experts that see every token, besides the routed ones"
    )
    shared_linear: bool = setting(
        True,
        changes="model",
        description="with scope path, embedding, head and attention (if own) also have a part that all paths use",
    )
    dropless: bool = setting(
        True, changes="run", description="no capacity limit: experts take all their tokens, however uneven the load"
    )
    capacity_factor: PositiveFloat = setting(
        1.25, changes="run", description="capacity of an expert relative to an even load"
    )
    min_capacity: Positive = setting(4, changes="run", description="smallest capacity of an expert in tokens")
    drop_order: Literal["position", "probability"] = setting(
        "position", changes="run", description="order in which tokens claim an expert's capacity"
    )
    router: RouterConfig = RouterConfig()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_scope_layer(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or tree.get("scope") != "layer":
            return tree
        router = tree.get("router", {})
        if isinstance(router, RouterConfig):
            router = router.model_dump(exclude_unset=True)
        if isinstance(router, dict):
            router = {"lr_scale": 1.0, "commitment_weight": 0.0, **router}
        return {"attention": "shared", **tree, "router": router}

    @model_validator(mode="after")
    def _check_experts(self) -> MoEConfig:
        if not self.num_experts and not self.shared_experts:
            raise ValueError("num_experts and shared_experts are both 0: a block needs at least one expert")
        if (added := self.router.added) and (self.scope == "layer" or len(added) >= self.num_experts or self.top_k > 1):
            raise ValueError(f"router.added {added} needs scope path, top_k 1 and more experts than it has entries")
        if self.num_experts and self.top_k > self.num_experts:
            raise ValueError(
                f"top_k {self.top_k} is more than num_experts {self.num_experts}: set top_k to at most that"
            )
        if self.top_k > 1 and self.router.kind == "oracle":
            raise ValueError(f"top_k {self.top_k}: router.kind oracle knows one expert for each domain: set top_k to 1")
        if self.scope == "layer" and self.attention != "shared":
            raise ValueError(f"attention {self.attention} needs paths: set scope to path, or attention to shared")
        return self


class ModelConfig(Section):
    """The latent transformer (DESIGN 3.4)."""

    dim: Positive = setting(128, changes="model", description="width of a token")
    depth: Positive = setting(4, changes="model", description="number of blocks")
    heads: Positive = setting(4, changes="model", description="attention heads per block")
    patch: Positive = setting(1, changes="model", description="latent cells per token along each axis")
    history: Positive = setting(2, changes="model", description="snapshots from which the model predicts the next one")
    strides: list[Positive] = setting(
        [1],
        changes="model",
        description="time strides, in snapshots, between the snapshots of a sample and to the one that it predicts; a "
        "training sample draws one of them, and the model is told which",
    )
    scale_history: bool = setting(
        False,
        changes="model",
        description="divide each sample's history by its root mean square, and multiply the predicted change by it",
    )
    norms: Literal["pre", "sandwich"] = setting(
        "sandwich",
        changes="model",
        before="pre",
        description="pre: RMS norms before attention and feed-forward blocks; sandwich: also after them, which keeps "
        "the residual stream bounded at high learning rates",
    )
    film: bool = setting(
        False,
        changes="model",
        description="a control without a choice of paths: scale and shift the embedding's output and the head's input "
        "by what a path router would see",
    )
    moe: MoEConfig = MoEConfig()

    @model_validator(mode="after")
    def _check_strides(self) -> ModelConfig:
        if not self.strides or self.strides != sorted(set(self.strides)):
            raise ValueError(f"strides {self.strides} must be one or more different numbers in increasing order")
        return self

    @model_validator(mode="after")
    def _check_heads(self) -> ModelConfig:
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"dim {self.dim} must divide into {self.heads} heads of even width")
        if self.film and self.moe.num_experts > 1:
            raise ValueError("film is a control for dense networks: set moe.num_experts to 0 or 1, or film to false")
        if self.dim // self.heads < 6:
            raise ValueError(f"head width {self.dim // self.heads} is too small for 3D rotary positions (>= 6)")
        return self
