"""The latent transformer predicts the next latent from the last H latents and the geometry latent (DESIGN 3.3, 3.4).

Shapes: B batch, H history, C latent channels, x y z latent grid, S tokens per sample, D model width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shodh_moe.base.errors import UserError
from shodh_moe.base.parameters import mark_all
from shodh_moe.config import ModelConfig
from shodh_moe.model.attention import Attention
from shodh_moe.model.feed_forward import make_feed_forward
from shodh_moe.model.moe import MoE
from shodh_moe.model.norm import make_norm
from shodh_moe.model.routers import Context
from shodh_moe.model.routing import Routing
from shodh_moe.parallel import ExpertParallel


class Prediction(NamedTuple):
    """The result of a forward pass.

    Attributes:
        latent_BCxyz: the predicted next latents.
        routing: each layer's routing of the B * S tokens, sample by sample; [] for a dense model.
    """

    latent_BCxyz: Tensor
    routing: list[Routing]


class Block(nn.Module):
    """Pre-norm attention, then a pre-norm feed-forward block."""

    def __init__(self, config: ModelConfig, grid: list[int], ep: ExpertParallel, seed: int, layer: int, norm: str):
        super().__init__()
        self.attention_norm, self.moe_norm = make_norm(config.dim, norm), make_norm(config.dim, norm)
        self.attention = Attention(config.dim, config.heads, grid, norm)
        for module in (self.attention_norm, self.attention):
            mark_all(module, group="attention")
        self.moe = make_feed_forward(config.dim, config.moe, ep, seed, layer)

    def forward(self, x_BSD: Tensor, context: Context) -> tuple[Tensor, Routing | None]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD))
        y_ND, routing = self.moe(self.moe_norm(x_BSD).flatten(0, 1), context)
        return x_BSD + y_ND.view_as(x_BSD), routing


class LatentTransformer(nn.Module):
    """z[t+1] = z[t] + f(z[t-H+1..t], geometry), where f is zero before training.

    Args:
        config: the ``model`` section of a config.
        latent_channels: C.
        latent_grid: sizes x, y, z.
        seed: determines the initial weights, at every expert-parallel size.
        ep: which experts this rank holds.
        norm: ``torch`` or ``apex`` (`available_norm`).
        activation_checkpointing: store only each block's input during training; the backward pass recomputes the
            block, including its exchanges between ranks.

    Raises:
        UserError: ``model.patch`` does not divide the grid.
    """

    def __init__(
        self,
        config: ModelConfig,
        latent_channels: int,
        latent_grid: list[int],
        seed: int,
        ep: ExpertParallel,
        norm: str = "torch",
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        for size in latent_grid:
            if size % config.patch:
                raise UserError(f"latent grid {latent_grid} is not divisible by model.patch {config.patch}")
        self.config, self.activation_checkpointing = config, activation_checkpointing
        torch.manual_seed(seed)
        grid = [size // config.patch for size in latent_grid]
        voxels = config.patch**3
        self.embed = nn.Linear((config.history + 1) * latent_channels * voxels, config.dim)
        self.blocks = nn.ModuleList(Block(config, grid, ep, seed, layer, norm) for layer in range(config.depth))
        self.norm = make_norm(config.dim, norm)
        self.head = nn.Linear(config.dim, latent_channels * voxels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def moe_layers(self) -> list[MoE]:
        """The MoE layers in order; [] for a dense model."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    def forward(self, history_BHCxyz: Tensor, geometry_BCxyz: Tensor, context: Context | None = None) -> Prediction:
        """Predict the next latents.

        Args:
            history_BHCxyz: the last H latents, the newest last.
            geometry_BCxyz: the geometry latents.
            context: the samples' number and domains; None if the domains are unknown.
        """
        context = context or Context(len(history_BHCxyz))
        x_BCxyz = torch.cat([history_BHCxyz.flatten(1, 2), geometry_BCxyz], dim=1)
        # The residual stream stays as wide as the latents under autocast.
        x_BSD = self.embed(patchify(x_BCxyz, self.config.patch)).to(history_BHCxyz.dtype)
        routing = []
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            # The random state need not be preserved, since blocks draw no random numbers.
            x_BSD, layer_routing = (
                checkpoint(block, x_BSD, context, use_reentrant=False, preserve_rng_state=False)
                if recompute
                else block(x_BSD, context)
            )
            if layer_routing is not None:
                routing.append(layer_routing)
        change_BSD = self.head(self.norm(x_BSD))
        latest_BCxyz = history_BHCxyz[:, -1]
        return Prediction(latest_BCxyz + unpatchify(change_BSD, self.config.patch, latest_BCxyz.shape), routing)


def patchify(x_BCxyz: Tensor, patch: int) -> Tensor:
    """Turn cubes of ``patch``^3 latents into tokens [B, S, C patch^3], last grid axis fastest."""
    b, c, nx, ny, nz = x_BCxyz.shape
    p = patch
    x = x_BCxyz.reshape(b, c, nx // p, p, ny // p, p, nz // p, p)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, (nx // p) * (ny // p) * (nz // p), c * p**3)


def unpatchify(x_BSC: Tensor, patch: int, shape: torch.Size) -> Tensor:
    """Inverse of `patchify`; ``shape`` is that of the latents, [B, C, x, y, z]."""
    b, c, nx, ny, nz = shape
    p = patch
    x = x_BSC.view(b, nx // p, ny // p, nz // p, c, p, p, p)
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(shape)
