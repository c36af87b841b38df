"""Self-attention over latent tokens with QK-norm and rotary positions (DESIGN 3.4).

Shapes: B batch, S tokens per sample (on this rank), H heads, D model width, W head width, P = W / 2 pairs of features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh_moe.model.norm import make_norm
from shodh_moe.model.plan import Plan
from shodh_moe.model.routed_linear import RoutedLinear
from shodh_moe.parallel import ALONE, ContextParallel


def rotate(x_BHSW: Tensor, angles: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i+W/2}) by its token's angle; computes and returns float32 or wider [B, H, S, W].

    Args:
        angles: from `token_angles`, [S, P] or [B, 1, S, P].
    """
    x_BHSW = x_BHSW.to(torch.promote_types(x_BHSW.dtype, torch.float32))
    cos, sin = angles.cos().to(x_BHSW.dtype), angles.sin().to(x_BHSW.dtype)
    a, b = x_BHSW.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    """Full attention among the tokens of each sample, with torch's scaled_dot_product_attention.

    With context parallelism, each rank has the queries of its slab, and gathers the keys and values of all slabs.

    Args:
        dim: model width D.
        heads: H.
        norm: ``torch`` or ``apex`` (`available_norm`), for the norms of queries and keys.
        experts: number of paths with a part of their own in both projections; 0: none.
        rank: rank of that part; None: full matrices.
        shared: whether the projections also have a part for all paths.
        cp: which tokens of each sample this rank has.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        norm: str = "torch",
        experts: int = 0,
        rank: int | None = None,
        shared: bool = True,
        cp: ContextParallel = ALONE,
    ):
        super().__init__()
        self.heads, self.cp = heads, cp
        self.qkv = RoutedLinear(dim, 3 * dim, experts, bias=False, rank=rank, shared=shared)
        self.out = RoutedLinear(dim, dim, experts, bias=False, rank=rank, shared=shared)
        self.q_norm, self.k_norm = make_norm(dim // heads, norm), make_norm(dim // heads, norm)

    def forward(self, x_BSD: Tensor, angles: Tensor, plan: Plan | None = None) -> Tensor:
        """Outputs [B, S, D], in autocast's dtype under autocast.

        Args:
            angles: the tokens' positions, from `token_angles`.
            plan: the tokens' paths, if there are any.
        """
        b, s, d = x_BSD.shape
        q, k, v = self.qkv(x_BSD, plan).view(b, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        # Only the products are narrow under autocast, not norms and rotations. A fused norm needs input and weight in
        # one dtype.
        wide = self.q_norm.weight.dtype
        q, k = rotate(self.q_norm(q.to(wide)), angles), rotate(self.k_norm(k.to(wide)), angles)
        k = k.to(v.dtype)
        if self.cp.size > 1:
            k, v = self.cp.gather_tokens(torch.stack([k, v]), dim=3).unbind()
        y = F.scaled_dot_product_attention(q.to(v.dtype), k, v)
        return self.out(y.transpose(1, 2).reshape(b, s, d), plan)
