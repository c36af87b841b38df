"""Move tokens into their experts' slots and back: `dispatch` and `combine`.

Shapes: N tokens, D width, E experts, K capacity slots per expert, J experts per token, R rows (E * K of them, or N * J
dropless). With J > 1 the tensors ``expert_N``, ``slot_N`` and ``gate_N`` are [N, J], and a token has J rows.

Rows have two forms. With a capacity they are [E, K, D], and the token in slot s of expert e is at row e * K + s.
Dropless they are [N * J, D], sorted by expert, and that token is at row start_e + s, where ``start_E`` is the exclusive
running sum of ``kept_E``.

The routing is that of `topk_gating`: the kept tokens of expert e fill its slots 0..kept_E[e]-1 without gaps, and a
dropped token has slot -1. A token whose expert or slot is out of range (expert outside 0..E-1, slot outside
0..kept_E[e]-1 or beyond the capacity) counts as dropped. If the routing has gaps or gives a slot to two tokens, the
contents of those rows are undefined, but nothing outside the rows is ever accessed.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from shodh_moe.kernels.backend import use_reference, use_triton
from shodh_moe.kernels.gating import MAX_EXPERTS

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)


def dispatch(x_ND: Tensor, expert_N: Tensor, slot_N: Tensor, kept_E: Tensor, capacity: int | None) -> Tensor:
    """Copy each kept token to its row; rows without a token are zero.

    Args:
        x_ND: tokens, float32, bfloat16, float16 or float64.
        expert_N: the expert of each token, int64 or int32.
        slot_N: the token's slot at that expert, or -1 if it was dropped, int64 or int32.
        kept_E: number of tokens that each expert kept, int64 or int32.
        capacity: slots per expert, K; None is dropless.

    Returns:
        rows in the dtype of ``x_ND``: [E, K, D] with a capacity; dropless [N * J, D], sorted by expert.

    Raises:
        ValueError: a wrong shape, dtype or device, a capacity below 1 or more than 256 experts.
    """
    _expect("x_ND", x_ND, (None, None), FLOATS, x_ND.device)
    _check_routing(expert_N, slot_N, kept_E, x_ND.shape[0], x_ND.device)
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity must be at least 1, or None for dropless, not {capacity}")
    return _dispatch(x_ND, expert_N, slot_N, kept_E, capacity)


def combine(
    rows: Tensor, expert_N: Tensor, slot_N: Tensor, gate_N: Tensor, kept_E: Tensor, shared_ND: Tensor | None = None
) -> Tensor:
    """y_n = shared_n + sum_j gate_nj * rows[row_nj]: [N, D] in the dtype of ``rows`` (DESIGN 3.4, 3.5).

    A dropped token gets only the shared experts' output, or zero without one. bfloat16 and float16 are multiplied and
    added in float32 and rounded once.

    Args:
        rows: [E, K, D], or [N * J, D] dropless, in the order of `dispatch`; float32, bfloat16, float16 or float64.
        expert_N: the expert of each token, int64 or int32.
        slot_N: the token's slot at that expert, or -1 if it was dropped, int64 or int32.
        gate_N: the scale of each token, float32 (float64 with float64 rows).
        kept_E: number of tokens that each expert kept, int64 or int32.
        shared_ND: output of the shared experts, in the dtype of ``rows``; None for none.

    Raises:
        ValueError: a wrong shape, dtype or device, or more than 256 experts.
    """
    if rows.ndim not in (2, 3):
        raise ValueError(f"rows must be [E, K, D] or [N, D], not of shape {tuple(rows.shape)}")
    tokens = expert_N.shape[0] if expert_N.ndim else 0
    leading = (expert_N.numel(),) if rows.ndim == 2 else (kept_E.numel(), None)
    _expect("rows", rows, (*leading, None), FLOATS, rows.device)
    if rows.ndim == 3 and rows.shape[1] < 1:
        raise ValueError(f"rows must hold at least one slot per expert, not be of shape {tuple(rows.shape)}")
    _check_routing(expert_N, slot_N, kept_E, tokens, rows.device)
    _expect("gate_N", gate_N, tuple(expert_N.shape), (_wide(rows.dtype),), rows.device)
    if shared_ND is not None:
        _expect("shared_ND", shared_ND, (tokens, rows.shape[-1]), (rows.dtype,), rows.device)
    return _combine(rows, expert_N, slot_N, gate_N, kept_E, shared_ND)


def _check_routing(expert_N: Tensor, slot_N: Tensor, kept_E: Tensor, tokens: int, device: torch.device) -> None:
    choices = (tokens, None) if expert_N.ndim == 2 and expert_N.shape[1] else (tokens,)
    _expect("expert_N", expert_N, choices, INTEGERS, device)
    _expect("slot_N", slot_N, tuple(expert_N.shape), INTEGERS, device)
    _expect("kept_E", kept_E, (None,), INTEGERS, device)
    if not 1 <= kept_E.shape[0] <= MAX_EXPERTS:
        raise ValueError(f"kept_E must hold 1 to {MAX_EXPERTS} experts, not {kept_E.shape[0]}")


def _expect(
    name: str, tensor: Tensor, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Raise ValueError for a wrong shape, dtype or device; None in ``shape`` allows any size."""
    sizes = list(tensor.shape)
    fits = len(sizes) == len(shape) and all(want in (None, size) for want, size in zip(shape, sizes, strict=True))
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must have shape [{wanted}], not {sizes}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, not {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors, not on {tensor.device}")


# --- custom ops -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("shodh::dispatch", mutates_args=())
def _dispatch(x_ND: Tensor, expert_N: Tensor, slot_N: Tensor, kept_E: Tensor, capacity: int | None) -> Tensor:
    if use_triton(x_ND):
        from shodh_moe.kernels import dispatch_triton

        return dispatch_triton.dispatch(x_ND, expert_N, slot_N, kept_E, capacity)
    rows = x_ND.new_empty(_rows_shape(x_ND, expert_N, kept_E, capacity))
    row_N, rows_RD = _row_of_tokens(expert_N, slot_N, kept_E, capacity), _flat(rows)
    if passes := _compiled(rows):
        passes.fill_rows(x_ND, row_N, rows_RD)
    else:
        rows_RD.copy_(_select(_by_choice(x_ND, row_N), _sources(row_N, rows_RD.shape[0])))
    return rows


@_dispatch.register_fake
def _(x_ND: Tensor, expert_N: Tensor, slot_N: Tensor, kept_E: Tensor, capacity: int | None) -> Tensor:
    return x_ND.new_empty(_rows_shape(x_ND, expert_N, kept_E, capacity))


def _rows_shape(x_ND: Tensor, expert_N: Tensor, kept_E: Tensor, capacity: int | None) -> tuple[int, ...]:
    width = x_ND.shape[1]
    return (expert_N.numel(), width) if capacity is None else (kept_E.shape[0], capacity, width)


@torch.library.custom_op("shodh::dispatch_backward", mutates_args=())
def _dispatch_backward(drows: Tensor, expert_N: Tensor, slot_N: Tensor, kept_E: Tensor) -> Tensor:
    """dx_n = sum_j drows[row_nj], without the rows of dropped choices."""
    if use_triton(drows):
        from shodh_moe.kernels import dispatch_triton

        return dispatch_triton.gather(drows, expert_N, slot_N, kept_E)
    row_N = _row_of_tokens(expert_N, slot_N, kept_E, _capacity(drows))
    if not (passes := _compiled(drows)):
        dx = _select(_flat(drows), row_N.flatten())
        return dx if row_N.ndim == 1 else _over_choices(dx.to(_wide(dx.dtype)), row_N).to(dx.dtype)
    dx_ND = drows.new_empty(expert_N.shape[0], drows.shape[-1])
    passes.gather(_flat(drows), row_N, dx_ND)
    return dx_ND


@_dispatch_backward.register_fake
def _(drows: Tensor, expert_N: Tensor, slot_N: Tensor, kept_E: Tensor) -> Tensor:
    return drows.new_empty(expert_N.shape[0], drows.shape[-1])


@torch.library.custom_op("shodh::combine", mutates_args=())
def _combine(
    rows: Tensor, expert_N: Tensor, slot_N: Tensor, gate_N: Tensor, kept_E: Tensor, shared_ND: Tensor | None
) -> Tensor:
    if use_triton(rows):
        from shodh_moe.kernels import dispatch_triton

        return dispatch_triton.gather(rows, expert_N, slot_N, kept_E, gate_N, shared_ND)
    row_N = _row_of_tokens(expert_N, slot_N, kept_E, _capacity(rows))
    if passes := _compiled(rows):
        y_ND = rows.new_empty(expert_N.shape[0], rows.shape[-1])
        passes.gather(_flat(rows), row_N, y_ND, gate_N, shared_ND)
        return y_ND
    y_ND = _select(_flat(rows), row_N.flatten()).to(gate_N.dtype) * gate_N.reshape(-1, 1)
    y_ND = torch.where((row_N >= 0).view(-1, 1), y_ND, 0)  # the gate of a dropped token may be NaN
    y_ND = _over_choices(y_ND, row_N)
    return (y_ND if shared_ND is None else y_ND + shared_ND).to(rows.dtype)


@_combine.register_fake
def _(
    rows: Tensor, expert_N: Tensor, slot_N: Tensor, gate_N: Tensor, kept_E: Tensor, shared_ND: Tensor | None
) -> Tensor:
    return rows.new_empty(expert_N.shape[0], rows.shape[-1])


@torch.library.custom_op("shodh::combine_backward", mutates_args=())
def _combine_backward(
    dy_ND: Tensor, rows: Tensor, expert_N: Tensor, slot_N: Tensor, gate_N: Tensor, kept_E: Tensor
) -> tuple[Tensor, Tensor]:
    """drows[row_nj] = gate_nj * dy_n, zero in empty rows; dgate_nj = <dy_n, rows[row_nj]>, zero where dropped."""
    if use_triton(rows):
        from shodh_moe.kernels import dispatch_triton

        return dispatch_triton.combine_backward(dy_ND, rows, expert_N, slot_N, gate_N, kept_E)
    row_N = _row_of_tokens(expert_N, slot_N, kept_E, _capacity(rows))
    rows_RD = _flat(rows)
    if passes := _compiled(rows):
        drows, dgate_N = rows.new_empty(rows.shape), gate_N.new_empty(gate_N.shape)
        passes.combine_backward(dy_ND, rows_RD, row_N, gate_N, _flat(drows), dgate_N)
        return drows, dgate_N
    dy = _by_choice(dy_ND.to(gate_N.dtype), row_N)
    dgate_N = (dy * _select(rows_RD, row_N.flatten())).sum(dim=1).view(row_N.shape)
    dgate_N = torch.where(row_N >= 0, dgate_N, 0)
    drows_RD = _select(dy * gate_N.reshape(-1, 1), _sources(row_N, rows_RD.shape[0]))
    return drows_RD.to(rows.dtype).view(rows.shape), dgate_N


@_combine_backward.register_fake
def _(
    dy_ND: Tensor, rows: Tensor, expert_N: Tensor, slot_N: Tensor, gate_N: Tensor, kept_E: Tensor
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), gate_N.new_empty(gate_N.shape)


# --- autograd -------------------------------------------------------------------------------------------------------


def _save_dispatch(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, expert_N, slot_N, kept_E, _ = inputs
    ctx.save_for_backward(expert_N, slot_N, kept_E)


def _dispatch_grad(ctx, drows: Tensor):  # type: ignore[no-untyped-def]
    return _dispatch_backward(drows, *ctx.saved_tensors), None, None, None, None


def _save_combine(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:5])


def _combine_grad(ctx, dy_ND: Tensor):  # type: ignore[no-untyped-def]
    drows = dgate_N = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
        drows, dgate_N = _combine_backward(dy_ND, *ctx.saved_tensors)
    return drows, None, None, dgate_N, None, dy_ND if ctx.needs_input_grad[5] else None


_dispatch.register_autograd(_dispatch_grad, setup_context=_save_dispatch)
_combine.register_autograd(_combine_grad, setup_context=_save_combine)


# --- reference ------------------------------------------------------------------------------------------------------


def _capacity(rows: Tensor) -> int | None:
    return rows.shape[1] if rows.ndim == 3 else None


def _flat(rows: Tensor) -> Tensor:
    """View the rows as [R, D]."""
    return rows.flatten(0, 1) if rows.ndim == 3 else rows


def _row_of_tokens(expert_N: Tensor, slot_N: Tensor, kept_E: Tensor, capacity: int | None) -> Tensor:
    """The row of each token, -1 if it has none: int64 in the shape of ``expert_N``."""
    most = expert_N.numel() if capacity is None else capacity
    kept_E = kept_E.long().clamp(0, most)
    experts = kept_E.shape[0]
    if capacity is None:
        start_E, end = kept_E.cumsum(0) - kept_E, most
    else:
        start_E, end = torch.arange(experts, device=kept_E.device) * capacity, experts * capacity
    if passes := _compiled_integers(expert_N):
        return passes.rows_of(expert_N, slot_N, kept_E, start_E, end, most)
    known_N = (expert_N >= 0) & (expert_N < experts)
    expert_N = torch.where(known_N, expert_N, 0).long()
    row_N = start_E[expert_N] + slot_N
    return torch.where(known_N & (slot_N >= 0) & (slot_N < kept_E[expert_N]) & (row_N < end), row_N, -1)


def _sources(row_N: Tensor, rows: int) -> Tensor:
    """The token of each row, with J > 1 the choice n J + j, -1 if it has none: int64 [R]."""
    row_N = row_N.flatten()
    token_N = torch.arange(row_N.numel(), device=row_N.device)
    # Tokens without a row write to an extra entry that is cut off.
    return row_N.new_full((rows + 1,), -1).scatter_(0, torch.where(row_N >= 0, row_N, rows), token_N)[:rows]


def _by_choice(values_ND: Tensor, row_N: Tensor) -> Tensor:
    """Repeat each token's values for each of its choices: [N * J, D]."""
    return values_ND if row_N.ndim == 1 else values_ND.repeat_interleave(row_N.shape[1], dim=0)


def _over_choices(values: Tensor, row_N: Tensor) -> Tensor:
    """Sum over each token's choices: [N * J, D] -> [N, D]."""
    return values if row_N.ndim == 1 else values.view(*row_N.shape, -1).sum(dim=1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def _select(values: Tensor, index_C: Tensor) -> Tensor:
    """``values[index[c]]``, zero where the index is negative."""
    if values.shape[0] == 0:
        return values.new_zeros(index_C.shape[0], *values.shape[1:])
    chosen = values.index_select(0, index_C.clamp(min=0))
    # Select zeros instead of multiplying by zero, because values may be infinite or NaN.
    return torch.where((index_C >= 0).view(-1, *[1] * (values.ndim - 1)), chosen, 0)


def _compiled(rows: Tensor) -> ModuleType | None:
    """The compiled CPU passes, if they support these rows."""
    return _compiled_integers(rows) if rows.dtype in (torch.float32, torch.float64) else None


def _compiled_integers(index: Tensor) -> ModuleType | None:
    """The compiled CPU passes, which support every index."""
    if index.device.type != "cpu" or use_reference():
        return None
    from shodh_moe.kernels import dispatch_cpu  # imported here: a GPU does not need numba

    return dispatch_cpu
