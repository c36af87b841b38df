"""Implementations to compare with: textbook forms in plain torch, and DeepSpeed's functions.

Shapes: N tokens, D width, E experts, K capacity slots per expert; B batch, X Y Z space.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from shodh_moe.kernels import differentiation_matrix
from support.timing import Missing, first_line


def compiled(function: Callable[..., Any], leave_out: bool) -> Callable[..., Any] | Missing:
    """``function`` under torch.compile with fixed shapes. It is compiled at the first call."""
    if leave_out:
        return Missing("no compilation with --quick or --no-compile")
    return torch.compile(function, dynamic=False)


# --- gating -----------------------------------------------------------------------------------------------------------


class Routed(NamedTuple):
    gate_N: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    expert_N: Tensor
    slot_N: Tensor  # -1 where dropped
    kept_E: Tensor
    entropy_N: Tensor


def torch_gating(logits_NE: Tensor, capacity: int, drop_order: str) -> Routed:
    """Gating in textbook form: softmax, argmax, one-hot, running count (GShard, arXiv 2006.16668, algorithm 1)."""
    logits_NE = logits_NE.float()
    experts = logits_NE.shape[1]
    p_NE = F.softmax(logits_NE, dim=1)
    expert_N = logits_NE.argmax(dim=1)
    gate_N = p_NE.gather(1, expert_N[:, None]).squeeze(1)
    chosen_NE = F.one_hot(expert_N, experts)
    kept_NE = chosen_NE
    if drop_order == "probability":
        # Each expert's most probable tokens: the largest K of its column.
        top_KE = torch.topk(p_NE.detach() * chosen_NE, min(capacity, p_NE.shape[0]), dim=0).indices
        kept_NE = chosen_NE * torch.zeros_like(chosen_NE).scatter_(0, top_KE, 1)
    slot_NE = kept_NE.cumsum(dim=0) - 1
    kept_NE = kept_NE * (slot_NE < capacity)
    kept_N = kept_NE.sum(dim=1) > 0
    slot_N = torch.where(kept_N, (slot_NE * kept_NE).sum(dim=1), -1)
    balance_loss = experts * (p_NE.mean(dim=0) * chosen_NE.float().mean(dim=0)).sum()
    z_loss = torch.logsumexp(logits_NE, dim=1).square().mean()
    entropy_N = torch.special.entr(p_NE.detach()).sum(dim=1)
    return Routed(gate_N, balance_loss, z_loss, expert_N, slot_N, kept_NE.sum(dim=0), entropy_N)


def torch_cosine_logits(x_ND: Tensor, projection_RD: Tensor, prototypes_ER: Tensor, temperature: Tensor) -> Tensor:
    """<W x, P_e> / (|W x| |P_e|) / tau, one operation after the other."""
    q_NR = F.linear(x_ND.float(), projection_RD)
    return F.normalize(q_NR, dim=1) @ F.normalize(prototypes_ER, dim=1).T / temperature


class DeepSpeed:
    """DeepSpeed's functions for one process, called as its MOELayer calls them."""

    def __init__(self, module: Any):
        self.module = module

    def gating(self, logits_NE: Tensor, capacity_factor: float) -> tuple[Any, ...]:
        """Returns l_aux, capacity, experts, indices, locations, gates, counts; without random token selection."""
        return self.module.top1gating(logits_NE.float(), capacity_factor, 1, use_rts=False, sparse_routes=True)

    def slots(self, indices: Tensor, locations: Tensor, experts: int, capacity: int) -> Tensor:
        return self.module._route_slots(indices, locations, experts, capacity)

    def encode(self, x_ND: Tensor, slots: Tensor, experts: int, capacity: int) -> Tensor:
        return self.module._sparse_encode(x_ND, slots, experts, capacity)

    def decode(self, rows_EKD: Tensor, slots: Tensor, gates: Tensor, tokens: int) -> Tensor:
        return self.module._sparse_decode(rows_EKD.flatten(0, 1), slots, gates, tokens)


def deepspeed() -> DeepSpeed | Missing:
    """DeepSpeed's functions, or the reason why they are not available."""
    try:
        module = importlib.import_module("deepspeed.moe.sharded_moe")
    except Exception as error:  # a broken installation fails in many ways
        return Missing(f"deepspeed cannot be imported: {first_line(error)}")
    absent = [
        name for name in ("top1gating", "_route_slots", "_sparse_encode", "_sparse_decode") if name not in dir(module)
    ]
    return Missing(f"this deepspeed has no {', '.join(absent)}") if absent else DeepSpeed(module)


def deepspeed_call(function: Callable[[DeepSpeed, Any], Any]) -> Callable[[Any], Any] | Missing:
    """``function(deepspeed, inputs)`` as a call to time."""
    found = deepspeed()
    return found if isinstance(found, Missing) else lambda inputs: function(found, inputs)


# --- dispatch and combine ---------------------------------------------------------------------------------------------


def torch_dispatch(x_ND: Tensor, expert_N: Tensor, slot_N: Tensor, experts: int, capacity: int) -> Tensor:
    """Add each token to its row; dropped tokens go to an extra row that is cut off (no data-dependent shape)."""
    row_N = torch.where(slot_N >= 0, expert_N * capacity + slot_N, experts * capacity)
    rows = x_ND.new_zeros(experts * capacity + 1, x_ND.shape[1])
    return rows.index_add(0, row_N, x_ND)[:-1].view(experts, capacity, -1)


def torch_combine(
    rows_EKD: Tensor, expert_N: Tensor, slot_N: Tensor, gate_N: Tensor, shared_ND: Tensor | None = None
) -> Tensor:
    """Gather each token's row and scale it."""
    kept_N = slot_N >= 0
    row_N = torch.where(kept_N, expert_N * rows_EKD.shape[1] + slot_N, 0)
    scale_N1 = torch.where(kept_N, gate_N, 0.0)[:, None]
    y_ND = (rows_EKD.flatten(0, 1)[row_N] * scale_N1).to(rows_EKD.dtype)
    return y_ND if shared_ND is None else y_ND + shared_ND


def torch_dispatch_dropless(x_ND: Tensor, expert_N: Tensor) -> Tensor:
    return x_ND[torch.argsort(expert_N, stable=True)]


def torch_combine_dropless(rows_ND: Tensor, expert_N: Tensor, gate_N: Tensor) -> Tensor:
    order_N = torch.argsort(expert_N, stable=True)
    scaled_ND = (rows_ND * gate_N[order_N, None]).to(rows_ND.dtype)
    return torch.empty_like(rows_ND).index_copy(0, order_N, scaled_ND)


# --- curl -------------------------------------------------------------------------------------------------------------


def derivative_column(size: int, operator: str, spacing: float) -> Tensor:
    """First column of the circulant N x N derivative matrix, float64; ``staggered`` is the forward difference."""
    if operator == "spectral":
        return differentiation_matrix(size, "spectral", spacing, torch.float64)[:, 0]
    taps = {
        "central2": {1: 1 / 2, -1: -1 / 2},
        "central4": {1: 8 / 12, -1: -8 / 12, 2: -1 / 12, -2: 1 / 12},
        "staggered": {1: 1.0, 0: -1.0},
    }[operator]
    column = torch.zeros(size, dtype=torch.float64)
    for shift, weight in taps.items():
        column[-shift % size] += weight / spacing  # row j of the matrix reads point j + shift
    return column


def wider(dtype: torch.dtype) -> torch.dtype:
    """Dtype of arithmetic and result for a field of ``dtype``: torch.fft and conservation need at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cross(d: Callable[[Tensor, int], Tensor], a_B3XYZ: Tensor) -> Tensor:
    a_x, a_y, a_z = a_B3XYZ.unbind(1)
    return torch.stack((d(a_z, 1) - d(a_y, 2), d(a_x, 2) - d(a_z, 0), d(a_y, 0) - d(a_x, 1)), dim=1)


class FourierCurl:
    """Curl by rfftn and irfftn of all three components at once, with precomputed symbols.

    A circulant derivative is a product with its symbol in Fourier space, so this form works for every operator.
    """

    def __init__(self, shape: tuple[int, int, int], operator: str, spacing: float, dtype: torch.dtype, device: Any):
        self.shape = shape
        self.dtype = wider(dtype)
        self.symbols = []
        for axis, size in enumerate(shape):
            symbol = torch.fft.fft(derivative_column(size, operator, spacing))
            if operator != "staggered":
                symbol = 1j * symbol.imag  # antisymmetric: the real part is rounding
            symbol = symbol[: size // 2 + 1] if axis == 2 else symbol
            view = [1, 1, 1]
            view[axis] = -1
            self.symbols.append(symbol.view(view).to(device, self.dtype.to_complex()))

    def __call__(self, a_B3XYZ: Tensor) -> Tensor:
        a_hat = torch.fft.rfftn(a_B3XYZ.to(self.dtype), dim=(-3, -2, -1))
        u_hat = _cross(lambda f, axis: f * self.symbols[axis], a_hat)
        return torch.fft.irfftn(u_hat, s=self.shape, dim=(-3, -2, -1))


class MatrixCurl:
    """Curl by six products with dense derivative matrices."""

    def __init__(self, shape: tuple[int, int, int], operator: str, spacing: float, dtype: torch.dtype, device: Any):
        self.matrices = []
        for size in shape:
            column = derivative_column(size, operator, spacing)
            index = torch.arange(size)
            matrix = column[(index[:, None] - index[None, :]) % size]
            self.matrices.append(matrix.to(device=device, dtype=wider(dtype)))

    def __call__(self, a_B3XYZ: Tensor) -> Tensor:
        def d(f: Tensor, axis: int) -> Tensor:
            if axis == 0:
                return (self.matrices[0] @ f.flatten(-2)).view(f.shape)
            return self.matrices[1] @ f if axis == 1 else f @ self.matrices[2].T

        return _cross(d, a_B3XYZ.to(self.matrices[0].dtype))
