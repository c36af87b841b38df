"""`dispatch`, `combine` and their backward passes on a CPU, in one pass each over float32 or float64 rows.

Each row of the output is written by one thread, so the result does not depend on the number of threads.

Shapes: N tokens, D width, R rows, C choices. A token has C / N choices, each with a row: those of token 0, then those
of token 1, and so on. ``row_C`` is the row of each choice, -1 for none.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from shodh_moe.kernels.compiled import compiled, parallel_loops


@compiled()
def _rows_of(expert_C: Any, slot_C: Any, kept_E: Any, start_E: Any, end: int, most: int, row_C: Any) -> None:
    for c in range(len(row_C)):
        row_C[c] = -1
        if 0 <= expert_C[c] < len(kept_E) and 0 <= slot_C[c] < min(kept_E[expert_C[c]], most):
            row = start_E[expert_C[c]] + slot_C[c]
            if row < end:
                row_C[c] = row


@compiled()
def _copy(source_D: Any, out_D: Any) -> None:
    for d in range(len(out_D)):
        out_D[d] = source_D[d]


@compiled()
def _zero(out_D: Any) -> None:
    for d in range(len(out_D)):
        out_D[d] = 0


@compiled()
def _add_scaled(row_D: Any, gate: Any, term_D: Any, out_D: Any) -> None:
    for d in range(len(out_D)):
        out_D[d] = gate * row_D[d] + term_D[d]


@parallel_loops
def _fill_rows(x_ND: Any, source_R: Any, out_RD: Any, choices: int) -> None:
    for r in numba.prange(len(source_R)):
        if source_R[r] >= 0:
            _copy(x_ND[source_R[r] // choices], out_RD[r])
        else:
            _zero(out_RD[r])


@parallel_loops
def _gather(rows_RD: Any, row_C: Any, gate_C: Any, shared_ND: Any, y_ND: Any, scaled: bool, added: bool) -> None:
    choices = len(row_C) // max(len(y_ND), 1)
    for n in numba.prange(len(y_ND)):
        y_D, empty = y_ND[n], True
        for c in range(n * choices, (n + 1) * choices):
            if row_C[c] < 0:
                continue
            row_D = rows_RD[row_C[c]]
            if not empty:
                _add_scaled(row_D, gate_C[c] if scaled else y_D.dtype.type(1), y_D, y_D)
            elif not scaled:
                _copy(row_D, y_D)
            elif added:
                _add_scaled(row_D, gate_C[c], shared_ND[n], y_D)
            else:
                gate = gate_C[c]
                for d in range(len(y_D)):
                    y_D[d] = gate * row_D[d]
            empty = False
        if empty and added:
            _copy(shared_ND[n], y_D)
        elif empty:
            _zero(y_D)


# Allow reordering ("reassoc"): a sum in a fixed order could not be vectorised.
@compiled(fastmath={"contract", "nsz", "reassoc"})
def _scale_and_dot(dy_D: Any, row_D: Any, gate: Any, out_D: Any) -> Any:
    dot = gate * 0
    for d in range(len(dy_D)):
        dot += dy_D[d] * row_D[d]
        out_D[d] = gate * dy_D[d]
    return dot


@parallel_loops
def _combine_backward(dy_ND: Any, rows_RD: Any, source_R: Any, gate_C: Any, drows_RD: Any, dgate_C: Any) -> None:
    choices = len(gate_C) // max(len(dy_ND), 1)
    for r in numba.prange(len(source_R)):
        c = source_R[r]
        if c >= 0:
            dgate_C[c] = _scale_and_dot(dy_ND[c // choices], rows_RD[r], gate_C[c], drows_RD[r])
        else:
            _zero(drows_RD[r])


@compiled()
def _invert(row_C: Any, source_R: Any) -> None:
    source_R[:] = -1
    for c in range(len(row_C)):
        if row_C[c] >= 0:
            source_R[row_C[c]] = c


def _sources(row_C: Tensor, rows: int) -> np.ndarray:
    """The choice of each row, -1 for none."""
    source_R = np.empty(rows, np.int64)
    _invert(_flat(row_C), source_R)
    return source_R


def _flat(tensor: Tensor) -> np.ndarray:
    return _array(tensor).reshape(-1)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def rows_of(expert: Tensor, slot: Tensor, kept_E: Tensor, start_E: Tensor, end: int, most: int) -> Tensor:
    """The row of each choice, -1 if it has none: int64 in the shape of ``expert``.

    Args:
        start_E: the first row of each expert.
        end: number of rows.
        most: largest number of rows of one expert.
    """
    row = expert.new_empty(expert.shape, dtype=torch.int64)
    _rows_of(_flat(expert), _flat(slot), _array(kept_E), _array(start_E), end, most, row.view(-1).numpy())
    return row


def fill_rows(x_ND: Tensor, row_C: Tensor, out_RD: Tensor) -> None:
    """out[row] = x_n for each row of token n, zero in rows without a token."""
    choices = row_C.numel() // max(len(x_ND), 1)
    _fill_rows(_array(x_ND), _sources(row_C, out_RD.shape[0]), out_RD.numpy(), choices)


def gather(
    rows_RD: Tensor, row_C: Tensor, y_ND: Tensor, gate_C: Tensor | None = None, shared_ND: Tensor | None = None
) -> None:
    """y_n = [shared_n +] sum_j [gate_nj *] rows[row_nj]; ``shared_ND`` only with ``gate_C``."""
    rows, y = _array(rows_RD), y_ND.numpy()
    gate = rows[:0, 0] if gate_C is None else _flat(gate_C)
    shared = rows[:0] if shared_ND is None else _array(shared_ND)
    _gather(rows, _flat(row_C), gate, shared, y, gate_C is not None, shared_ND is not None)


def combine_backward(
    dy_ND: Tensor, rows_RD: Tensor, row_C: Tensor, gate_C: Tensor, drows_RD: Tensor, dgate_C: Tensor
) -> None:
    """drows[row_nj] = gate_nj * dy_n, zero in empty rows; dgate_nj = <dy_n, rows[row_nj]>, zero where dropped."""
    dgate_C.zero_()
    source_R = _sources(row_C, rows_RD.shape[0])
    _combine_backward(
        _array(dy_ND), _array(rows_RD), source_R, _flat(gate_C), drows_RD.numpy(), dgate_C.view(-1).numpy()
    )
