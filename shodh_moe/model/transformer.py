"""The latent transformer predicts the next latent from the last H latents and the geometry latent (DESIGN 3.3, 3.4).

Shapes: B batch, H history, C latent channels, x y z latent grid (of this rank's slab), S tokens per sample (on this
rank), I = (H + 1) C patch^3 inputs of a token's embedding, D model width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shodh_moe.base.parameters import mark, marks
from shodh_moe.config import ModelConfig, MoEConfig
from shodh_moe.model.attention import Attention
from shodh_moe.model.boundaries import BoundaryEmbedding, periodic_axes
from shodh_moe.model.feed_forward import make_feed_forward
from shodh_moe.model.film import Film, modulate
from shodh_moe.model.inputs import embedding_inputs, history_scale, token_grid, unpatchify
from shodh_moe.model.moe import MoE
from shodh_moe.model.norm import make_norm
from shodh_moe.model.path import Features, PathRouter
from shodh_moe.model.plan import Plan
from shodh_moe.model.positions import token_angles
from shodh_moe.model.routed_linear import RoutedLinear
from shodh_moe.model.routers import Context, Router
from shodh_moe.model.routing import Routing
from shodh_moe.model.stride import StrideEmbedding
from shodh_moe.parallel import ALONE, ContextParallel, ExpertParallel


class Prediction(NamedTuple):
    """The result of a forward pass.

    Attributes:
        latent_BCxyz: the predicted next latents.
        routing: each layer's routing of the B * S tokens, sample by sample; [] for a dense model.
    """

    latent_BCxyz: Tensor
    routing: list[Routing]


# Initial scale of what a branch adds to the residual stream, whose embedding has an RMS near 1.
BRANCH_SCALE = 0.3


class Block(nn.Module):
    """Attention and a feed-forward block, each after a norm and, with ``model.norms`` sandwich, before another one."""

    def __init__(self, config: ModelConfig, ep: ExpertParallel, seed: int, layer: int, norm: str, cp: ContextParallel):
        super().__init__()
        self.attention_norm, self.moe_norm = make_norm(config.dim, norm), make_norm(config.dim, norm)
        self.attention_out_norm: nn.Module | None = None
        self.moe_out_norm: nn.Module | None = None
        if config.norms == "sandwich":
            self.attention_out_norm = make_norm(config.dim, norm, BRANCH_SCALE)
            self.moe_out_norm = make_norm(config.dim, norm, BRANCH_SCALE)
        paths, rank = attention_paths(config.moe)
        shared = config.moe.shared_linear or not (paths and rank is None)
        self.attention = Attention(config.dim, config.heads, norm, paths, rank, shared, cp)
        for module in (self.attention_norm, self.attention):
            for parameter in module.parameters():
                if marks(parameter).group == "rest":
                    mark(parameter, group="attention")
        self.moe = make_feed_forward(config.dim, config.moe, ep, seed, layer)

    def forward(
        self, x_BSD: Tensor, angles: Tensor, context: Context, plan: Plan | None
    ) -> tuple[Tensor, Routing | None]:
        y_BSD = self.attention(self.attention_norm(x_BSD), angles, plan)
        if self.attention_out_norm is not None:
            y_BSD = self.attention_out_norm(y_BSD.to(x_BSD.dtype))
        x_BSD = x_BSD + y_BSD
        y_ND, routing = self.moe(self.moe_norm(x_BSD).flatten(0, 1), context, plan)
        if self.moe_out_norm is not None:
            y_ND = self.moe_out_norm(y_ND)
        return x_BSD + y_ND.view_as(x_BSD), routing


class LatentTransformer(nn.Module):
    """z[t+s] = z[t] + f(z[t-(H-1)s], ..., z[t], geometry, s), where f is zero before training and s is the time stride.

    With ``model.moe.scope`` path, one decision per token, made from the inputs of the embedding, selects an expert in
    every layer and the expert's own part of the embedding, the head and, if configured, the attention.

    The weights do not depend on the grid of the latents, so a network takes latents of any sizes that `require_size`
    accepts. With ``model.boundaries`` it is told what the faces of the box are, and with ``model.positions``
    periodic_aware the positions along periodic axes close on themselves; both need ``boundary_B32`` in the context.

    Args:
        config: the ``model`` section of a config.
        latent_channels: C.
        seed: determines the initial weights, at every expert-parallel size.
        ep: which experts this rank holds.
        norm: ``torch`` or ``apex`` (`available_norm`).
        activation_checkpointing: store only each block's input during training; the backward pass recomputes the
            block, including its exchanges between ranks.
        cp: which slab of each sample this rank has; its inputs and outputs are those of the slab.
    """

    def __init__(
        self,
        config: ModelConfig,
        latent_channels: int,
        seed: int,
        ep: ExpertParallel,
        norm: str = "torch",
        activation_checkpointing: bool = False,
        cp: ContextParallel = ALONE,
    ):
        super().__init__()
        self.config, self.activation_checkpointing, self.cp = config, activation_checkpointing, cp
        torch.manual_seed(seed)
        voxels = config.patch**3
        inputs = (config.history + 1) * latent_channels * voxels
        routed = config.moe.num_experts if config.moe.scope == "path" else 0
        self.path = PathRouter(inputs, config.moe, ep, cp) if routed else None
        self.film = Film(Features(inputs, config.moe, cp), config.dim) if config.film else None
        torch.manual_seed(seed)  # again, because the router's draws depend on the number of experts
        shared = not routed or config.moe.shared_linear
        self.embed = RoutedLinear(inputs, config.dim, routed, shared=shared)
        self.boundaries = BoundaryEmbedding(config.dim, cp) if config.boundaries else None
        self.blocks = nn.ModuleList(Block(config, ep, seed, layer, norm, cp) for layer in range(config.depth))
        self.norm = make_norm(config.dim, norm)
        self.head = RoutedLinear(config.dim, latent_channels * voxels, routed, shared=shared, zero=True)
        # With a single stride there is nothing to tell.
        self.stride = StrideEmbedding(config.strides, config.dim) if len(config.strides) > 1 else None

    @property
    def moe_layers(self) -> list[MoE]:
        """The MoE layers in order; [] for a dense model."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    @property
    def routers(self) -> list[Router]:
        """The router of each MoE layer; with scope path, the same one for all."""
        if self.path is not None:
            return [self.path.router] * len(self.moe_layers)
        return [layer.router for layer in self.moe_layers if layer.router is not None]

    def trained_buffers(self) -> dict[str, Tensor]:
        """Return the buffers that training changes and checkpoints hold, by name: the routers' balancing biases."""
        parameters = {name for name, _ in self.named_parameters()}
        return {name: tensor for name, tensor in self.state_dict().items() if name not in parameters}

    def embedding_inputs(self, history_BHCxyz: Tensor, geometry_BCxyz: Tensor) -> Tensor:
        """Return the tokens before the embedding, [B, S, (H + 1) C patch^3]."""
        return embedding_inputs(history_BHCxyz, geometry_BCxyz, self.config, self.cp)

    def lasting_plan(
        self, history_BHCxyz: Tensor, geometry_BCxyz: Tensor, context: Context | None = None
    ) -> Plan | None:
        """Return the paths that samples keep while they are predicted on from these latents; arguments as `forward`.

        None without paths, and if they are not chosen by sample: what one token contains moves on.
        """
        if self.path is None or self.config.moe.router.context != "sample":
            return None
        grid = token_grid(geometry_BCxyz, self.config.patch)
        z_BSI = self.embedding_inputs(history_BHCxyz, geometry_BCxyz)
        return self.path(z_BSI, grid, context or Context(len(history_BHCxyz)))

    def forward(
        self,
        history_BHCxyz: Tensor,
        geometry_BCxyz: Tensor,
        context: Context | None = None,
        plan: Plan | None = None,
    ) -> Prediction:
        """Predict the next latents.

        Args:
            history_BHCxyz: the last H latents, the newest last.
            geometry_BCxyz: the geometry latents.
            context: the samples' number, domains, time strides and boundaries; None if they are unknown.
            plan: paths of an earlier `lasting_plan` for the same samples; None: choose them.

        Raises:
            UserError: ``model.patch`` does not divide the grid, or ``model.moe.router.window`` the grid of tokens; or
                outside training, if the model was not trained with a sample's stride.
            ValueError: the network is told boundaries, and the context has none.
        """
        context = context or Context(len(history_BHCxyz))
        grid = token_grid(geometry_BCxyz, self.config.patch)
        z_BSI = self.embedding_inputs(history_BHCxyz, geometry_BCxyz)
        if plan is None and self.path is not None:
            plan = self.path(z_BSI, grid, context)
        # The residual stream stays as wide as the latents under autocast.
        x_BSD = self.embed(z_BSI, plan).to(history_BHCxyz.dtype)
        if self.stride is not None:
            x_BSD = x_BSD + self.stride(context)[:, None]
        periodic_B3 = None
        if self.config.told_boundaries:
            if context.boundary_B32 is None:
                raise ValueError("the network is told boundaries: give the context boundary_B32")
            if self.boundaries is not None:
                x_BSD = x_BSD + self.boundaries(context.boundary_B32, grid)
            if self.config.positions == "periodic_aware":
                periodic_B3 = periodic_axes(context.boundary_B32)
        angles = token_angles(grid, self.config.dim // self.config.heads, x_BSD.device, periodic_B3, self.cp)
        first, last = self.film(z_BSI, grid) if self.film is not None else (None, None)
        x_BSD = x_BSD if first is None else modulate(x_BSD, first)
        routing = []
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            # The random state need not be preserved, since blocks draw no random numbers.
            x_BSD, layer_routing = (
                checkpoint(block, x_BSD, angles, context, plan, use_reentrant=False, preserve_rng_state=False)
                if recompute
                else block(x_BSD, angles, context, plan)
            )
            if layer_routing is not None:
                routing.append(layer_routing)
        x_BSD = self.norm(x_BSD)
        change_BSD = self.head(x_BSD if last is None else modulate(x_BSD, last), plan)
        latest_BCxyz = history_BHCxyz[:, -1]
        change_BCxyz = unpatchify(change_BSD, self.config.patch, latest_BCxyz.shape)
        if self.config.scale_history:
            change_BCxyz = change_BCxyz * history_scale(history_BHCxyz, self.cp)
        return Prediction(latest_BCxyz + change_BCxyz, routing)


def attention_paths(config: MoEConfig) -> tuple[int, int | None]:
    """Number of paths with their own part in the attention's projections, and the rank of that part (None: full)."""
    own = config.scope == "path" and config.attention != "shared"
    return (config.num_experts if own else 0), (config.attention_rank if config.attention == "low_rank" else None)
