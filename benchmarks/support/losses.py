"""Train a small network that uses every kernel for some steps, and print its losses as JSON.

    SHODH_KERNELS=reference python benchmarks/support/losses.py [--device cpu|cuda] [--steps 20] [--json FILE]

`benchmarks/gpu.py` runs it with SHODH_KERNELS=triton and with SHODH_KERNELS=reference, and compares the losses, which
must agree closely for the same seed. It runs without DeepSpeed.
Shapes: N tokens, D width, E experts, K capacity slots per expert, F hidden width, G grid points along an axis.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shodh_moe.base.command import OneLineParser, exit_code
from shodh_moe.base.files import write_text
from shodh_moe.kernels import combine, cosine_topk_gating, curl, dispatch, expert_capacity
from shodh_moe.kernels.backend import describe

EXPERTS, ROUTING = 4, 16


class Net(nn.Module):
    """Values on a grid -> tokens of 8 points -> one MoE layer -> vector potential -> velocity."""

    def __init__(self, grid: int, width: int):
        super().__init__()
        self.grid, self.width = grid, width
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) / math.sqrt(shape[-2]))

        self.embed, self.head = weight(24, width), weight(width, 24)
        self.projection, self.prototypes = weight(ROUTING, width), weight(EXPERTS, ROUTING)
        self.temperature = nn.Parameter(torch.full((1,), 0.2))
        self.up, self.down = weight(EXPERTS, width, 2 * width), weight(EXPERTS, 2 * width, width)

    def forward(self, field_3GGG: Tensor) -> tuple[Tensor, Tensor]:
        n = self.grid // 2
        blocks = field_3GGG.view(3, n, 2, n, 2, n, 2).permute(1, 3, 5, 0, 2, 4, 6).reshape(n**3, 24)
        x_ND = blocks @ self.embed
        capacity = expert_capacity(n**3, EXPERTS, 1.25, 4)
        g = cosine_topk_gating(x_ND, self.projection, self.prototypes, self.temperature, capacity, "probability")
        rows_EKD = dispatch(x_ND, g.expert_N, g.slot_N, g.kept_E, capacity)
        done_EKD = torch.bmm(F.silu(torch.bmm(rows_EKD, self.up)), self.down)
        y_ND = combine(done_EKD, g.expert_N, g.slot_N, g.gate_N, g.kept_E, x_ND)
        a_3GGG = (y_ND @ self.head).view(n, n, n, 3, 2, 2, 2).permute(3, 0, 4, 1, 5, 2, 6).reshape(field_3GGG.shape)
        u_3GGG = curl(a_3GGG[None], None, "spectral", 2 * math.pi / self.grid)[0]
        return u_3GGG, 0.01 * g.balance_loss + 1e-3 * g.z_loss


def train(device: torch.device, grid: int, width: int, steps: int) -> list[float]:
    """Train the network to reproduce divergence-free fields. Returns the loss of every step."""
    net = Net(grid, width).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        phase = torch.rand(3, generator=generator) * 2 * math.pi
        x = torch.arange(grid) * (2 * math.pi / grid)
        # Arnold-Beltrami-Childress flow with random phases: smooth and divergence-free.
        sx, sy, sz = (torch.sin(x + p) for p in phase)
        cx, cy, cz = (torch.cos(x + p) for p in phase)
        field = torch.stack(
            (
                sz[None, None, :] + cy[None, :, None].expand(grid, grid, grid),
                sx[:, None, None] + cz[None, None, :].expand(grid, grid, grid),
                sy[None, :, None] + cx[:, None, None].expand(grid, grid, grid),
            )
        ).to(device)
        u_3GGG, auxiliary = net(field)
        loss = F.mse_loss(u_3GGG, field) + auxiliary
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--grid", type=int, default=32, help="points along each axis, even")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch finds no CUDA device")
    if options.grid % 2 or not 4 <= options.grid <= 256:
        parser.error(f"--grid must be even and from 4 to 256, not {options.grid}")

    def work() -> None:
        # Otherwise a GPU rounds products outside the kernels to tf32, which would hide differences between kernels.
        torch.set_float32_matmul_precision("highest")
        device = torch.device(options.device)
        found = {"kernels": describe(device), "losses": train(device, options.grid, options.width, options.steps)}
        print(json.dumps(found))
        if options.json:
            write_text(options.json, json.dumps(found, indent=1) + "\n")

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
