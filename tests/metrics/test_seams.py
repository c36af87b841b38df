"""Measures of seams on errors whose seams are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shodh_moe.metrics.seams import block_power, face_jumps


def white(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def ratio(pairs: Tensor) -> list[float]:
    own, others = pairs
    return (own / others).tolist()


def test_an_error_without_blocks_has_no_seams() -> None:
    error = white(3, 32, 32, 32)
    assert ratio(face_jumps(error)) == pytest.approx([1, 1, 1], abs=0.05)
    assert ratio(block_power(error)) == pytest.approx([1, 1, 1], abs=0.1)


def test_random_steps_along_one_axis() -> None:
    """A mean squared jump is that of the noise, 2, plus that of the steps, 13.5 at the faces of blocks."""
    heights = torch.tensor([0.0, 3.0, 1.0, 5.0], dtype=torch.float64)
    steps = heights.repeat_interleave(8).view(1, 1, 32, 1).expand(1, 16, 32, 16)
    pairs = face_jumps(steps + 1e-9 * white(1, 16, 32, 16))
    assert float(pairs[0, 1]) == pytest.approx((9 + 4 + 16 + 25) / 4)
    assert float(pairs[1, 1]) == pytest.approx(0, abs=1e-16)
    assert ratio(face_jumps(steps + white(1, 16, 32, 16)))[1] == pytest.approx(1 + 13.5 / 2, rel=0.05)
    assert ratio(face_jumps(steps + white(1, 16, 32, 16)))[::2] == pytest.approx([1, 1], abs=0.1)
    # A step function has no power at multiples of its blocks' wave number.
    assert float(block_power(steps)[0, 1]) == pytest.approx(0, abs=1e-25)
    assert float(block_power(steps)[1, 1]) > 0.01


def test_a_pattern_that_all_blocks_share() -> None:
    tooth = torch.arange(32, dtype=torch.float64).remainder(8) - 3.5
    error = tooth.view(1, 32, 1, 1).expand(1, 32, 16, 16)
    own, others = block_power(error)[:, 0].tolist()
    # Parseval: all power, 5.25, is in the waves 4, 8, 12 and 16; the first three count twice in a whole spectrum.
    last = float((tooth * (-1.0) ** torch.arange(32)).mean()) ** 2
    assert 2 * (own - last) + last == pytest.approx(5.25)
    assert others == pytest.approx(0, abs=1e-25)
    assert ratio(block_power(error + 0.1 * white(1, 32, 16, 16)))[0] > 100
    assert face_jumps(error)[:, 0].tolist() == pytest.approx([49, 1])


def test_leading_axes_are_kept_and_each_error_is_its_own() -> None:
    errors = white(2, 3, 1, 16, 24, 8)
    for measure in (face_jumps, block_power):
        found = measure(errors)
        assert found.shape == (2, 3, 2, 3)
        torch.testing.assert_close(found[1, 2], measure(errors[1, 2]), equal_nan=True)
    assert block_power(errors)[..., 2].isnan().all(), "a single block along z"
    assert not block_power(errors)[..., :2].isnan().any()


def test_an_axis_without_whole_blocks_is_refused() -> None:
    for measure in (face_jumps, block_power):
        with pytest.raises(ValueError, match="12 cells does not consist of blocks of 8"):
            measure(white(1, 16, 12, 16))
