"""Path routing: one decision per token and forward pass, made from the inputs of the embedding (DESIGN 3.5).

Shapes: B samples, S tokens per sample, N = B S tokens, I inputs of a token's embedding, M rows that the router scores
(samples, windows or tokens), F features of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh_moe.base.errors import UserError
from shodh_moe.config import MoEConfig
from shodh_moe.model.plan import Plan, follow_plan, make_plan
from shodh_moe.model.routers import Context, make_router
from shodh_moe.parallel import ExpertParallel


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
        grid: numbers of tokens along x, y and z.
        config: ``model.moe``.

    Attributes:
        width: F.

    Raises:
        UserError: the window does not divide the grid.
    """

    window_S: Tensor
    order_S: Tensor

    def __init__(self, inputs: int, grid: list[int], config: MoEConfig):
        super().__init__()
        self.context = config.router.context
        self.width = {"sample": 2, "window": 2, "token": 1, "both": 3}[self.context] * inputs + 1
        self.windows = 1
        if self.context == "window":
            require_window(config, grid)
            window = config.router.window
            axes = [torch.arange(size) // window for size in grid]
            nx, ny, nz = (size // window for size in grid)
            window_S = (axes[0][:, None, None] * ny + axes[1][:, None]) * nz + axes[2]
            self.register_buffer("window_S", window_S.flatten(), persistent=False)
            self.register_buffer("order_S", torch.argsort(self.window_S, stable=True), persistent=False)
            self.windows = nx * ny * nz  # known without the values, for a model without memory

    def forward(self, z_BSI: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the rows, float32 or wider [M, F], and the number of each token's row, int64 [N].

        The second is None if every token has a row of its own.
        """
        z_BSI = z_BSI.to(torch.promote_types(z_BSI.dtype, torch.float32))
        samples, tokens, _ = z_BSI.shape
        sample_B = torch.arange(samples, device=z_BSI.device)
        if self.context == "sample":
            return _with_one(_mean_and_std(z_BSI)), sample_B.repeat_interleave(tokens)
        if self.context == "window":
            windows = z_BSI[:, self.order_S].view(samples * self.windows, -1, z_BSI.shape[2])
            return _with_one(_mean_and_std(windows)), (sample_B[:, None] * self.windows + self.window_S).flatten()
        token_NI = _unit_rms(z_BSI.flatten(0, 1))
        if self.context == "token":
            return _with_one(token_NI), None
        sample_NF = _mean_and_std(z_BSI).repeat_interleave(tokens, dim=0)
        return _with_one(torch.cat([sample_NF, token_NI], dim=1)), None


class PathRouter(nn.Module):
    """Chooses each token's path: the expert that it visits in every layer, with that expert's embedding and head.

    Args:
        inputs: I.
        grid: numbers of tokens along x, y and z.
        config: ``model.moe``.
        ep: which experts this rank holds.

    Raises:
        UserError: the window does not divide the grid.
    """

    def __init__(self, inputs: int, grid: list[int], config: MoEConfig, ep: ExpertParallel):
        super().__init__()
        self.config, self.ep = config, ep
        self.features = Features(inputs, grid, config)
        self.router = make_router(config.router, self.features.width, config.num_experts)

    def forward(self, z_BSI: Tensor, context: Context) -> Plan:
        """Plan the paths of all tokens (collective, unless the context has a decision that is local)."""
        with torch.autocast(z_BSI.device.type, enabled=False):
            x_MF, row_N = self.features(z_BSI)
            if context.decision is not None:
                assert row_N is not None
                return follow_plan(self.router, x_MF, context, context.decision, self.ep, row_N)
            return make_plan(self.router, x_MF, context, self.config, self.ep, self.training, row_N=row_N)

    def decide(self, z_BSI: Tensor, context: Context) -> Plan:
        """Choose the paths of all tokens as `forward` does, but without other ranks; the plan cannot be carried out."""
        with torch.autocast(z_BSI.device.type, enabled=False):
            x_MF, row_N = self.features(z_BSI)
            return make_plan(self.router, x_MF, context, self.config, ExpertParallel(), self.training, row_N=row_N)


def require_window(config: MoEConfig, grid: list[int]) -> None:
    """Raise `UserError` if the router's windows do not divide a grid of tokens."""
    window = config.router.window
    used = config.num_experts and config.scope == "path" and config.router.context == "window"
    if used and any(size % window for size in grid):
        raise UserError(
            f"model.moe.router.window {window} does not divide the grid of tokens {grid}: choose a divisor of its sizes"
        )


def _mean_and_std(z_MSI: Tensor) -> Tensor:
    """Mean and standard deviation over the tokens S of each row, scaled to an RMS of 1: [M, 2 I]."""
    std_MI, mean_MI = torch.std_mean(z_MSI, dim=1, correction=0)
    return _unit_rms(torch.cat([mean_MI, std_MI], dim=1))


def _unit_rms(x_MF: Tensor) -> Tensor:
    return F.rms_norm(x_MF, x_MF.shape[1:], eps=1e-6)


def _with_one(x_MF: Tensor) -> Tensor:
    """Append a feature that is 1, so that a linear projection of the features can subtract their mean."""
    return F.pad(x_MF, (0, 1), value=1.0)
