"""Random symmetries: they keep divergence, energy and boundaries, and turn vectors along with space."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from shodh_moe.kernels import curl, divergence
from shodh_moe.tokenizer.symmetry import Symmetry

GRID = (6, 8, 8)
ALL = [
    Symmetry((sx, sy, sz), my, mz, swap)
    for (sx, sy, sz), my, mz, swap in itertools.product([(0, 0, 0), (1, 3, 5)], *[[False, True]] * 3)
]


def flow(grid: tuple[int, int, int] = GRID) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    velocity = curl(torch.randn(1, 3, *grid, generator=generator, dtype=torch.float64))
    rest = torch.randn(1, 2, *grid, generator=generator, dtype=torch.float64)
    return torch.cat([velocity, rest], dim=1)


@pytest.mark.parametrize("symmetry", ALL, ids=str)
def test_energy_and_divergence_are_kept(symmetry: Symmetry) -> None:
    fields = flow()
    moved = symmetry.apply(fields)
    assert moved.shape == fields.shape
    # The same numbers at other places, up to sign.
    torch.testing.assert_close(moved.abs().flatten().sort()[0], fields.abs().flatten().sort()[0], rtol=0, atol=0)
    assert moved[:, :3].square().sum() == pytest.approx(float(fields[:, :3].square().sum()))
    assert divergence(moved[:, :3]).abs().max() <= 1e-12 * moved.abs().max() * 10
    # Not by luck: a field that diverges keeps its divergence too, at the place it moved to.
    fields[:, 0] = fields[:, 3]
    before, after = divergence(fields[:, :3]), divergence(symmetry.apply(fields)[:, :3])
    carried = torch.cat([torch.zeros_like(fields[:, :3]), before[:, None], fields[:, 4:]], dim=1)
    torch.testing.assert_close(symmetry.apply(carried)[:, 3], after)


@pytest.mark.parametrize("symmetry", [s for s in ALL if s.shift == (0, 0, 0)], ids=str)
def test_mirrors_and_the_exchange_undo_themselves(symmetry: Symmetry) -> None:
    fields = flow()
    if symmetry.swap_yz and symmetry.mirror_y != symmetry.mirror_z:
        back = symmetry.apply(symmetry.apply(symmetry.apply(symmetry.apply(fields))))  # a quarter turn
        assert not torch.equal(symmetry.apply(symmetry.apply(fields)), fields)
    else:
        back = symmetry.apply(symmetry.apply(fields))
    assert torch.equal(back, fields)


def test_a_known_vector_turns_along() -> None:
    """One voxel with velocity (1, 2, 3)."""
    fields = torch.zeros(1, 5, *GRID)
    fields[0, :, 1, 2, 3] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    for symmetry, place, values in (
        (Symmetry(shift=(2, 0, 6)), (3, 2, 1), [1, 2, 3, 4, 5]),
        (Symmetry(mirror_y=True), (1, 5, 3), [1, -2, 3, 4, 5]),
        (Symmetry(mirror_z=True), (1, 2, 4), [1, 2, -3, 4, 5]),
        (Symmetry(swap_yz=True), (1, 3, 2), [1, 3, 2, 4, 5]),
        (Symmetry(mirror_y=True, swap_yz=True), (1, 3, 5), [1, 3, -2, 4, 5]),
    ):
        moved = symmetry.apply(fields)
        assert moved[(0, slice(None), *place)].tolist() == values, symmetry
        assert int((moved != 0).sum()) == 5


@pytest.mark.parametrize("periodic", list(itertools.product([False, True], repeat=3)))
def test_axes_that_do_not_wrap_are_never_moved(periodic: tuple[bool, bool, bool]) -> None:
    rng, seen = np.random.default_rng(0), set()
    for _ in range(200):
        s = Symmetry.draw(rng, GRID, periodic)
        assert [bool(shift) and not wraps for shift, wraps in zip(s.shift, periodic, strict=True)] == [False] * 3
        assert not (s.mirror_y and not periodic[1])
        assert not (s.mirror_z and not periodic[2])
        assert not (s.swap_yz and not (periodic[1] and periodic[2]))
        seen.add((s.mirror_y, s.mirror_z, s.swap_yz))
    assert len(seen) == 2 ** (periodic[1] + periodic[2] + (periodic[1] and periodic[2]))


def test_a_bed_stays_at_the_bottom() -> None:
    fields = torch.zeros(1, 5, *GRID)
    fields[:, 4, :, :, 0] = 1
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert torch.equal(Symmetry.draw(rng, GRID, (True, True, False)).apply(fields)[:, 4], fields[:, 4])


def test_unequal_sides_are_not_exchanged() -> None:
    rng = np.random.default_rng(0)
    assert not any(Symmetry.draw(rng, (8, 8, 16), (True, True, True)).swap_yz for _ in range(50))
