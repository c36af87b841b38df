"""Overlapping blocks: an orthogonal map whose windows span 16 cells and have no steps."""

from __future__ import annotations

import math

import pytest
import torch

from shodh_moe.tokenizer.lapped import overlap, rotation, separate


@pytest.mark.parametrize("grid", [(8, 8, 8), (16, 8, 24)])
def test_separate_is_the_inverse_and_the_transpose(grid: tuple[int, int, int]) -> None:
    x, y = torch.randn(2, 2, 4, *grid, dtype=torch.float64)
    turned = overlap(x)
    torch.testing.assert_close(separate(turned), x, rtol=0, atol=1e-14)
    assert float(turned.square().sum()) == pytest.approx(float(x.square().sum()))
    assert float((turned * y).sum()) == pytest.approx(float((x * separate(y)).sum()))
    assert not torch.allclose(turned, x, atol=0.1)


def test_a_block_sees_16_cells_of_each_axis_and_wraps_around() -> None:
    x = torch.zeros(1, 1, 32, 8, 8, dtype=torch.float64, requires_grad=True)
    overlap(x)[0, 0, :8, 4, 4].sum().backward()
    assert x.grad is not None
    seen = x.grad[0, 0].flatten(1).abs().sum(1) > 1e-12
    assert seen.nonzero().flatten().tolist() == [*range(12), *range(28, 32)]


def test_the_window_is_that_of_vorbis() -> None:
    """Vorbis I specification, 4.3.1: w_n = sin(pi/2 sin^2(pi (n + 1/2) / 16)) for windows of 16."""
    window = [math.sin(math.pi / 2 * math.sin(math.pi * (n + 0.5) / 16) ** 2) for n in range(8)]
    matrix = rotation(torch.zeros((), dtype=torch.float64))
    # The cells after a border are the first ones of their block, whose window rises from the block before.
    assert matrix.diagonal()[4:].tolist() == pytest.approx(window[4:])
    assert matrix.flip(1).diagonal()[4:].tolist() == pytest.approx(window[3::-1])


def test_a_jump_at_a_border_becomes_smooth() -> None:
    """A change of one block's values moves the field smoothly: no step at a border is larger than those inside."""
    y = torch.zeros(1, 1, 32, 8, 8, dtype=torch.float64)
    y[:, :, 8:16] = 1.0
    plain, smooth = y[0, 0, :, 0, 0], separate(y)[0, 0].mean((1, 2))
    assert float(plain.diff().abs().max()) == 1.0
    assert (smooth != 0).nonzero().flatten().tolist() == list(range(4, 20))
    assert float(smooth.diff()[7].abs()) < float(smooth.diff().abs().max())
