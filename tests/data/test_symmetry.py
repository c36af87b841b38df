"""Random symmetries form a group, turn vectors together with space, and map solutions to solutions."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shodh_moe.data import TrajectoryRecord
from shodh_moe.data.symmetry import Symmetry, allowed, apply_each, draw_copies
from shodh_moe.kernels import curl, divergence
from shodh_moe.solvers import LatticeBoltzmann

GRID = (6, 8, 8)
CUBE = (6, 6, 6)
EVERYWHERE = (True, True, True)
ALL = allowed(CUBE, EVERYWHERE, forced=False)
SYMMETRIES = st.builds(
    Symmetry,
    shift=st.tuples(*[st.integers(0, 5)] * 3),
    mirror=st.tuples(*[st.booleans()] * 3),
    order=st.permutations(range(3)).map(tuple),
)


def fields_of(velocity_B3XYZ: Tensor, scalar_B1XYZ: Tensor | None = None) -> Tensor:
    """Velocity with a pressure and a solid mask, whose values all differ."""
    if scalar_B1XYZ is None:
        scalar_B1XYZ = velocity_B3XYZ.square().sum(1, keepdim=True)
    return torch.cat([velocity_B3XYZ, scalar_B1XYZ, 2 * scalar_B1XYZ], dim=1)


def random(grid: tuple[int, int, int] = CUBE, seed: int = 1) -> Tensor:
    return torch.randn(1, 3, *grid, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parity(symmetry: Symmetry) -> int:
    """1 for a rotation, -1 for a symmetry that turns a right hand into a left one."""
    matrix = np.eye(3)[list(symmetry.order)] * np.where(symmetry.mirror, -1, 1)
    return round(np.linalg.det(matrix))


def test_an_undriven_cube_has_48_symmetries() -> None:
    assert len({symmetry.apply(fields_of(random())).numpy().tobytes() for symmetry in ALL}) == 48
    assert sum(parity(symmetry) for symmetry in ALL) == 0


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("grid", [CUBE, (6, 6, 4)])
@pytest.mark.parametrize("periodic", [EVERYWHERE, (True, True, False), (False, True, True)])
def test_the_symmetries_of_a_flow_form_a_group(
    grid: tuple[int, int, int], periodic: tuple[bool, ...], forced: bool
) -> None:
    group = allowed(grid, periodic, forced)
    fields = fields_of(random(grid))
    images = {symmetry.apply(fields).numpy().tobytes() for symmetry in group}
    assert len(images) == len(group)
    for a, b in itertools.product(group[:6], group):
        assert b.apply(a.apply(fields)).numpy().tobytes() in images


@settings(max_examples=40, deadline=None)
@given(symmetry=SYMMETRIES, other=SYMMETRIES)
def test_every_symmetry_has_an_inverse_and_keeps_all_values(symmetry: Symmetry, other: Symmetry) -> None:
    fields = fields_of(random())
    moved = symmetry.apply(fields)
    assert moved.shape == fields.shape
    torch.testing.assert_close(moved.abs().flatten().sort()[0], fields.abs().flatten().sort()[0], rtol=0, atol=0)
    power = moved
    for _ in range(1000):  # powers of an element of a finite group return to the identity
        if torch.equal(power, fields):
            break
        power = symmetry.apply(power)
    assert torch.equal(power, fields)
    both = apply_each([symmetry, other], torch.cat([fields, fields]))
    assert torch.equal(both, torch.cat([symmetry.apply(fields), other.apply(fields)]))


@settings(max_examples=60, deadline=None)
@given(symmetry=SYMMETRIES)
def test_vectors_turn_with_space(symmetry: Symmetry) -> None:
    """The divergence transforms as a scalar and the curl as a pseudovector, which mirrors reverse."""
    velocity = random()
    moved = symmetry.apply(fields_of(velocity, divergence(velocity)[:, None]))
    torch.testing.assert_close(divergence(moved[:, :3]), moved[:, 3])
    turned = symmetry.apply(fields_of(curl(velocity)))[:, :3]
    torch.testing.assert_close(curl(moved[:, :3]), parity(symmetry) * turned)


def test_a_known_vector_turns_with_space() -> None:
    """One voxel with velocity (1, 2, 3)."""
    fields = torch.zeros(1, 5, *GRID)
    fields[0, :, 1, 2, 3] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    cube = fields[..., :6, :6].contiguous()
    for symmetry, place, values in (
        (Symmetry(shift=(2, 0, 6)), (3, 2, 1), [1, 2, 3, 4, 5]),
        (Symmetry(mirror=(False, True, False)), (1, 5, 3), [1, -2, 3, 4, 5]),
        (Symmetry(mirror=(False, False, True)), (1, 2, 4), [1, 2, -3, 4, 5]),
        (Symmetry(order=(0, 2, 1)), (1, 3, 2), [1, 3, 2, 4, 5]),
        (Symmetry(mirror=(False, True, False), order=(0, 2, 1)), (1, 3, 5), [1, 3, -2, 4, 5]),
        (Symmetry(mirror=(True, False, False)), (4, 2, 3), [-1, 2, 3, 4, 5]),
    ):
        moved = symmetry.apply(fields)
        assert moved[(0, slice(None), *place)].tolist() == values, symmetry
        assert int((moved != 0).sum()) == 5
    turn = Symmetry(shift=(1, 0, 0), mirror=(True, False, False), order=(1, 2, 0)).apply(cube)
    assert turn[0, :, 2, 3, 3].tolist() == [2, 3, -1, 4, 5]


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("periodic", list(itertools.product([False, True], repeat=3)))
def test_walls_and_the_drive_keep_their_directions(periodic: tuple[bool, bool, bool], forced: bool) -> None:
    rng, seen = np.random.default_rng(0), set()
    for _ in range(600):
        drawn = Symmetry.draw(rng, CUBE, periodic, forced)
        for axis in range(3):
            if not periodic[axis]:
                assert (drawn.shift[axis], drawn.mirror[axis], drawn.order[axis]) == (0, False, axis)
        assert not (forced and (drawn.mirror[0] or drawn.order[0] != 0))
        seen.add((drawn.mirror, drawn.order))
    # Every allowed symmetry is drawn.
    assert seen == {(symmetry.mirror, symmetry.order) for symmetry in allowed(CUBE, periodic, forced)}


@pytest.mark.parametrize(("periodic", "forced", "count"), [
    (EVERYWHERE, False, 48), (EVERYWHERE, True, 8), ((True, True, False), True, 2), ((True, True, False), False, 8),
    ((False, False, False), False, 1),
])  # fmt: skip
def test_number_of_allowed_symmetries(periodic: tuple[bool, bool, bool], forced: bool, count: int) -> None:
    assert len(allowed(CUBE, periodic, forced)) == count


def test_a_bed_stays_at_the_bottom() -> None:
    fields = torch.zeros(1, 5, *GRID)
    fields[:, 4, :, :, 0] = 1
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert torch.equal(Symmetry.draw(rng, GRID, (True, True, False)).apply(fields)[:, 4], fields[:, 4])


def test_unequal_sides_are_not_exchanged() -> None:
    rng = np.random.default_rng(0)
    assert all(Symmetry.draw(rng, (8, 10, 16), EVERYWHERE, False).order == (0, 1, 2) for _ in range(50))
    assert {Symmetry.draw(rng, (8, 8, 16), EVERYWHERE, False).order for _ in range(50)} == {(0, 1, 2), (1, 0, 2)}


def test_a_trajectory_without_a_stated_drive_keeps_x() -> None:
    record, rng = TrajectoryRecord(Path("a"), 0, "d", 1, CUBE, EVERYWHERE), np.random.default_rng(0)
    drawn = [Symmetry.draw_for(rng, record) for _ in range(50)]
    assert all(symmetry.order[0] == 0 and not symmetry.mirror[0] for symmetry in drawn)


def record(periodic: tuple[bool, bool, bool] = EVERYWHERE, forced: bool = True) -> TrajectoryRecord:
    return TrajectoryRecord(Path("a"), 0, "d", 1, CUBE, periodic, forced)


def test_shifts_and_cube_symmetries_can_be_drawn_separately() -> None:
    for which in ("all", "shifts", "cube"):
        rng = np.random.default_rng(0)
        drawn = [Symmetry.draw_for(rng, record(), which) for _ in range(60)]
        assert (len({one.shift for one in drawn}) > 1) == (which != "cube")
        assert (len({(one.mirror, one.order) for one in drawn}) > 1) == (which != "shifts")


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("periodic", [EVERYWHERE, (True, True, False), (False, False, False)])
def test_copies_are_distinct_symmetries_of_the_flow(periodic: tuple[bool, bool, bool], forced: bool) -> None:
    trajectory = record(periodic, forced)
    group = allowed(CUBE, periodic, forced)
    for which, most in (("all", 60), ("shifts", 60), ("cube", len(group))):
        drawn = draw_copies([3, 1], trajectory, 60, which)
        assert drawn == draw_copies([3, 1], trajectory, 60, which)
        assert drawn[0] == Symmetry()
        assert len(set(drawn)) == len(drawn) <= most
        # A shorter draw is a prefix of a longer one.
        assert draw_copies([3, 1], trajectory, 2, which) == drawn[:2]
        assert {Symmetry(mirror=one.mirror, order=one.order) for one in drawn} <= set(group)
        assert all(wraps or not shift for one in drawn for shift, wraps in zip(one.shift, periodic, strict=True))
    assert set(draw_copies([3, 1], trajectory, 60, "cube")) == set(group), "without replacement, until none is left"
    assert draw_copies([3, 1], trajectory, 1) == [Symmetry()]
    if len(group) > 2:
        assert draw_copies([3, 1], trajectory, 3, "cube") != draw_copies([3, 2], trajectory, 3, "cube")


def test_copies_under_all_symmetries_equal_those_of_earlier_versions() -> None:
    rngs = [np.random.default_rng([0, 2, copy]) for copy in (1, 2, 3)]
    assert draw_copies([0, 2], record(), 4) == [Symmetry(), *(Symmetry.draw_for(rng, record()) for rng in rngs)]


def test_draws_of_driven_flows_equal_those_of_earlier_versions() -> None:
    """Trainings that started with them can resume, and cached latents remain valid."""
    rng = np.random.default_rng(7)
    drawn = [Symmetry.draw(rng, GRID, periodic) for periodic in (EVERYWHERE, (True, True, False), EVERYWHERE)]
    assert drawn == [
        Symmetry((5, 5, 5), (False, False, True), (0, 2, 1)),
        Symmetry((5, 2, 0), (False, True, False)),
        Symmetry((5, 0, 3), (False, True, True), (0, 2, 1)),
    ]


def flow(velocity_3XYZ: np.ndarray, solid_XYZ: np.ndarray, force: np.ndarray, steps: int = 12) -> Tensor:
    """Run a few solver steps from this start; return velocity, pressure and mask, [1, 5, X, Y, Z]."""
    solver = LatticeBoltzmann(solid_XYZ, 0.05, dtype=np.float64)
    solver.set_velocity(velocity_3XYZ)
    solver.run(np.tile(force, (steps, 1)))
    return torch.from_numpy(np.concatenate([solver.velocity(), solver.pressure()[None], solid_XYZ[None]]))[None]


def start(solid_XYZ: np.ndarray) -> np.ndarray:
    """A smooth random flow around solid voxels, large enough to be strongly nonlinear."""
    velocity_3XYZ = 0.05 * curl(random()).numpy()[0]
    velocity_3XYZ[:, solid_XYZ] = 0
    return velocity_3XYZ


def turned_force(symmetry: Symmetry, force: np.ndarray) -> np.ndarray:
    return (np.where(symmetry.mirror, -1, 1) * force)[list(symmetry.order)]


@pytest.mark.parametrize("number", range(0, 48, 5))
def test_a_symmetry_maps_a_solution_to_a_solution(number: int) -> None:
    """Solving from a transformed start equals transforming the solution, with solids and a driving force."""
    shift = (1, 4, 2)
    symmetry = Symmetry(shift, ALL[number].mirror, ALL[number].order)
    solid_XYZ = np.random.default_rng(2).random(CUBE) < 0.15
    begin = fields_of(torch.from_numpy(start(solid_XYZ))[None], torch.from_numpy(solid_XYZ * 1.0)[None, None])
    force = np.array([2e-3, 5e-4, -1e-3])
    after = flow(begin[0, :3].numpy(), solid_XYZ, force)
    moved = symmetry.apply(begin)[0]
    expected = flow(moved[:3].numpy(), moved[3].numpy() > 0.5, turned_force(symmetry, force))
    assert (after[0, :3] - begin[0, :3]).abs().max() > 1e-3, "something happens in these steps"
    torch.testing.assert_close(symmetry.apply(after), expected, rtol=0, atol=1e-12)


def test_a_symmetry_that_reverses_the_drive_changes_the_flow() -> None:
    """A driven flow keeps x because its mirror image is not a solution under the same drive."""
    mirror, solid_XYZ = Symmetry(mirror=(True, False, False)), np.zeros(CUBE, bool)
    begin, force = fields_of(torch.from_numpy(start(solid_XYZ))[None]), np.array([2e-3, 0.0, 0.0])
    after, expected = (flow(v.numpy(), solid_XYZ, force) for v in (begin[0, :3], mirror.apply(begin)[0, :3]))
    assert (mirror.apply(after) - expected).abs().max() > 1e-2
