"""Path routing: one decision per token and forward pass, made from the inputs of the embedding (DESIGN 3.5).

Shapes: B samples, S tokens per sample (on this rank), N = B S tokens, I inputs of a token's embedding, M rows that the
router scores (samples, windows or tokens), F features of a row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh_moe.base.errors import UserError
from shodh_moe.config import MoEConfig
from shodh_moe.model.inputs import TokenGrid
from shodh_moe.model.plan import Plan, follow_plan, make_plan
from shodh_moe.model.routers import Context, make_router
from shodh_moe.parallel import ALONE, ContextParallel, ExpertParallel


class Features(nn.Module):
    """What is known of a token before the embedding, in rows that the router scores.

    By ``model.moe.router.context``, a row is made of

        sample   mean and standard deviation of the embedding inputs over all tokens of the sample
        window   the same over the token's window of ``router.window`` tokens along each axis
        token    the token's embedding inputs
        both     those of sample, then those of token

    each scaled to an RMS of 1, and a last feature that is 1. All tokens of a sample (or window) share one row.

    Args:
        inputs: I.
        config: ``model.moe``.
        cp: which tokens of each sample this rank has.

    Attributes:
        width: F.
    """

    def __init__(self, inputs: int, config: MoEConfig, cp: ContextParallel = ALONE):
        super().__init__()
        self.inputs, self.cp = inputs, cp
        self.context, self.window = config.router.context, config.router.window
        self.width = {"sample": 2, "window": 2, "token": 1, "both": 3}[self.context] * inputs + 1

    def forward(self, z_BSI: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor | None]:
        """Return the rows, float32 or wider [M, F], and the number of each token's row, int64 [N].

        The second is None if every token has a row of its own.

        Args:
            grid: numbers of tokens along x, y and z on this rank.

        Raises:
            UserError: the window does not divide the grid.
        """
        z_BSI = z_BSI.to(torch.promote_types(z_BSI.dtype, torch.float32))
        samples, tokens, _ = z_BSI.shape
        sample_B = torch.arange(samples, device=z_BSI.device)
        if self.context == "sample":
            return _with_one(_mean_and_std(z_BSI, self.cp)), sample_B.repeat_interleave(tokens)
        if self.context == "window":
            _require_windows(self.window, grid)
            window_S = _windows(grid, self.window, z_BSI.device)
            count = math.prod(grid) // self.window**3
            windows = z_BSI[:, torch.argsort(window_S, stable=True)].view(samples * count, -1, z_BSI.shape[2])
            x_MF = _with_one(_mean_and_std(windows, ALONE))  # no slab cuts a window
            return x_MF, (sample_B[:, None] * count + window_S).flatten()
        token_NI = _unit_rms(z_BSI.flatten(0, 1))
        if self.context == "token":
            return _with_one(token_NI), None
        sample_NF = _mean_and_std(z_BSI, self.cp).repeat_interleave(tokens, dim=0)
        return _with_one(torch.cat([sample_NF, token_NI], dim=1)), None


class PathRouter(nn.Module):
    """Chooses each token's path: the expert that it visits in every layer, with that expert's embedding and head.

    Args:
        inputs: I.
        config: ``model.moe``.
        ep: which experts this rank holds.
        cp: which tokens of each sample this rank has.
    """

    def __init__(self, inputs: int, config: MoEConfig, ep: ExpertParallel, cp: ContextParallel = ALONE):
        super().__init__()
        self.config, self.ep = config, ep
        self.features = Features(inputs, config, cp)
        self.router = make_router(config.router, self.features.width, config.num_experts)

    def forward(self, z_BSI: Tensor, grid: TokenGrid, context: Context) -> Plan:
        """Plan the paths of all tokens (collective, unless the context has a decision that is local).

        Args:
            grid: numbers of tokens along x, y and z.

        Raises:
            UserError: the window does not divide the grid.
        """
        with torch.autocast(z_BSI.device.type, enabled=False):
            x_MF, row_N = self.features(z_BSI, grid)
            if context.decision is not None:
                assert row_N is not None
                return follow_plan(self.router, x_MF, context, context.decision, self.ep, row_N)
            return make_plan(self.router, x_MF, context, self.config, self.ep, self.training, row_N=row_N)

    def decide(self, z_BSI: Tensor, grid: TokenGrid, context: Context) -> Plan:
        """Choose the paths of all tokens as `forward` does, but no rank learns how many tokens it will receive.

        The plan therefore cannot be carried out.
        """
        with torch.autocast(z_BSI.device.type, enabled=False):
            x_MF, row_N = self.features(z_BSI, grid)
            return make_plan(self.router, x_MF, context, self.config, ExpertParallel(), self.training, row_N=row_N)


def _windows(grid: TokenGrid, window: int, device: torch.device) -> Tensor:
    """Number of each token's window, int64 [S]."""
    axes = [torch.arange(size, device=device) // window for size in grid]
    _, ny, nz = (size // window for size in grid)
    return ((axes[0][:, None, None] * ny + axes[1][:, None]) * nz + axes[2]).flatten()


def _require_windows(window: int, grid: TokenGrid) -> None:
    """Raise `UserError` if windows do not divide a grid of tokens."""
    if any(size % window for size in grid):
        raise UserError(
            f"model.moe.router.window {window} does not divide the grid of tokens {list(grid)}: choose a divisor of "
            "its sizes"
        )


def _mean_and_std(z_MSI: Tensor, cp: ContextParallel) -> Tensor:
    """Mean and standard deviation over each row's tokens on all ranks of ``cp``, scaled to an RMS of 1: [M, 2 I]."""
    std_MI, mean_MI = cp.std_and_mean(z_MSI)
    return _unit_rms(torch.cat([mean_MI, std_MI], dim=1))


def _unit_rms(x_MF: Tensor) -> Tensor:
    return F.rms_norm(x_MF, x_MF.shape[1:], eps=1e-6)


def _with_one(x_MF: Tensor) -> Tensor:
    """Append a feature that is 1, so that a linear projection of the features can subtract their mean."""
    return F.pad(x_MF, (0, 1), value=1.0)
