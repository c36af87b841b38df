"""`dispatch`, `combine` and their backward passes on a CPU, in one pass each over float32 or float64 rows.

Each row of the output is written by one thread, so the result does not depend on the number of threads.

Shapes: N tokens, D width, R rows. ``row_N`` is the row of each token, -1 for none.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from torch import Tensor

from shodh_moe.kernels.compiled import compiled, parallel_loops


@compiled()
def _copy(source_D: Any, out_D: Any) -> None:
    for d in range(len(out_D)):
        out_D[d] = source_D[d]


@compiled()
def _zero(out_D: Any) -> None:
    for d in range(len(out_D)):
        out_D[d] = 0


@parallel_loops
def _fill_rows(x_ND: Any, source_R: Any, out_RD: Any) -> None:
    for r in numba.prange(len(source_R)):
        if source_R[r] >= 0:
            _copy(x_ND[source_R[r]], out_RD[r])
        else:
            _zero(out_RD[r])


@parallel_loops
def _gather(rows_RD: Any, row_N: Any, gate_N: Any, shared_ND: Any, y_ND: Any, scaled: bool, added: bool) -> None:
    for n in numba.prange(len(row_N)):
        y_D = y_ND[n]
        if row_N[n] < 0:
            if added:
                _copy(shared_ND[n], y_D)
            else:
                _zero(y_D)
            continue
        row_D = rows_RD[row_N[n]]
        if not scaled:
            _copy(row_D, y_D)
        elif added:
            gate, shared_D = gate_N[n], shared_ND[n]
            for d in range(len(y_D)):
                y_D[d] = gate * row_D[d] + shared_D[d]
        else:
            gate = gate_N[n]
            for d in range(len(y_D)):
                y_D[d] = gate * row_D[d]


# Allow reordering ("reassoc"): a sum in a fixed order could not be vectorised.
@compiled(fastmath={"contract", "nsz", "reassoc"})
def _scale_and_dot(dy_D: Any, row_D: Any, gate: Any, out_D: Any) -> Any:
    dot = gate * 0
    for d in range(len(dy_D)):
        dot += dy_D[d] * row_D[d]
        out_D[d] = gate * dy_D[d]
    return dot


@parallel_loops
def _combine_backward(dy_ND: Any, rows_RD: Any, source_R: Any, gate_N: Any, drows_RD: Any, dgate_N: Any) -> None:
    for r in numba.prange(len(source_R)):
        n = source_R[r]
        if n >= 0:
            dgate_N[n] = _scale_and_dot(dy_ND[n], rows_RD[r], gate_N[n], drows_RD[r])
        else:
            _zero(drows_RD[r])


@compiled()
def _invert(row_N: Any, source_R: Any) -> None:
    source_R[:] = -1
    for n in range(len(row_N)):
        if row_N[n] >= 0:
            source_R[row_N[n]] = n


def _sources(row_N: Tensor, rows: int) -> np.ndarray:
    """The token of each row, -1 for none."""
    source_R = np.empty(rows, np.int64)
    _invert(row_N.numpy(), source_R)
    return source_R


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def fill_rows(x_ND: Tensor, row_N: Tensor, out_RD: Tensor) -> None:
    """out[row_n] = x_n, zero in rows without a token."""
    _fill_rows(_array(x_ND), _sources(row_N, out_RD.shape[0]), out_RD.numpy())


def gather(
    rows_RD: Tensor, row_N: Tensor, y_ND: Tensor, gate_N: Tensor | None = None, shared_ND: Tensor | None = None
) -> None:
    """y_n = [shared_n +] [gate_n *] rows[row_n]; ``shared_ND`` only with ``gate_N``."""
    rows, y = _array(rows_RD), y_ND.numpy()
    gate = rows[:0, 0] if gate_N is None else _array(gate_N)
    shared = rows[:0] if shared_ND is None else _array(shared_ND)
    _gather(rows, row_N.numpy(), gate, shared, y, gate_N is not None, shared_ND is not None)


def combine_backward(
    dy_ND: Tensor, rows_RD: Tensor, row_N: Tensor, gate_N: Tensor, drows_RD: Tensor, dgate_N: Tensor
) -> None:
    """drows[row_n] = gate_n * dy_n, zero in empty rows; dgate_n = <dy_n, rows[row_n]>, zero for a dropped token."""
    dgate_N.zero_()
    source_R = _sources(row_N, rows_RD.shape[0])
    _combine_backward(_array(dy_ND), _array(rows_RD), source_R, _array(gate_N), drows_RD.numpy(), dgate_N.numpy())
