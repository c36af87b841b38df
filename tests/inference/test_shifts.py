"""Predictions averaged over shifts of the flow: `shodh predict --average`."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from shodh_moe.base.boundaries import UNKNOWN_BOUNDARIES
from shodh_moe.base.errors import UserError
from shodh_moe.cli import main
from shodh_moe.data import open_trajectories, read_provenance, read_snapshots
from shodh_moe.inference import Model, load_model
from shodh_moe.inference.shifts import continue_shifted, patch_shifts
from shodh_moe.kernels import divergence
from tests.trained import HISTORY, make_run, two_trajectories


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with walls and a staggered grid; tests must not change it."""
    return make_run(tmp_path_factory.mktemp("shifts"), operator="staggered", walls="exact")


def given(run: Path) -> tuple[Model, torch.Tensor, torch.Tensor]:
    record = open_trajectories(next((run.parent.parent / "theirs/data/test").glob("*.hdf5")))[0]
    fields, solid = read_snapshots(record, 0, HISTORY)
    return load_model(run), torch.from_numpy(fields), torch.from_numpy(solid)


def first(model: Model, fields: torch.Tensor, solid: torch.Tensor, shifts: list[tuple[int, int, int]]) -> torch.Tensor:
    """Fields and conserved velocity of the first predicted snapshot, [7, X, Y, Z]."""
    with torch.no_grad():
        return torch.cat(next(continue_shifted(model, fields, solid, 1, UNKNOWN_BOUNDARIES, shifts)))


def test_shifts_are_different_and_evenly_spread() -> None:
    for count in (1, 2, 8, 64):
        shifts = patch_shifts(count, (True, False, True))
        assert shifts[0] == (0, 0, 0)
        assert len(set(shifts)) == count
        assert {y for _, y, _ in shifts} == {0}
    for axis in range(3):
        assert sorted(shift[axis] for shift in patch_shifts(8, (True, True, True))) == list(range(8))
    assert len(set(patch_shifts(64, (True, True, True)))) == 64
    assert sorted(patch_shifts(8, (False, True, False))) == [(0, y, 0) for y in range(8)]


@pytest.mark.parametrize(
    ("count", "periodic", "says"),
    [
        (2, (False, False, False), "not periodic along any axis: give a number from 1 to 1"),
        (9, (False, False, True), "periodic along z: give a number from 1 to 8"),
        (65, (True, False, True), "periodic along x, z: give a number from 1 to 64"),
        (-1, (True, True, True), "--average -1"),
    ],
)
def test_a_number_of_shifts_that_the_flow_does_not_have_is_refused(
    count: int, periodic: tuple[bool, bool, bool], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        patch_shifts(count, periodic)
    assert patch_shifts(1, periodic) == [(0, 0, 0)]


def test_the_mean_is_free_of_divergence_and_zero_in_solids(run: Path) -> None:
    model, fields, solid = given(run)
    shifts = patch_shifts(4, (True, True, True))
    mean = first(model, fields, solid, shifts)
    alone = [first(model, fields, solid, [shift]) for shift in shifts]
    assert (alone[0] - alone[1]).abs().max() > 1e-2, "the borders of patches matter"
    torch.testing.assert_close(mean, torch.stack(alone).mean(0), rtol=0, atol=1e-12)
    conserved = mean[4:]
    assert divergence(conserved[None], "staggered").abs().max() < 1e-12
    assert (mean[:, solid[0] == 1] == 0).all()


def test_a_mean_over_all_shifts_along_an_axis_moves_with_the_flow(run: Path) -> None:
    """Only the transformer still knows where the box begins, because its positions do not wrap around."""
    model, fields, solid = given(run)

    def change(shifts: list[tuple[int, int, int]]) -> float:
        moved = first(model, fields.roll(3, -3), solid.roll(3, -3), shifts).roll(-3, -3)
        return float((moved - first(model, fields, solid, shifts)).square().mean().sqrt())

    assert change(patch_shifts(8, (True, False, False))) < 0.2 * change([(0, 0, 0)])


def test_predict_writes_the_mean(run: Path, tmp_path: Path) -> None:
    flow = two_trajectories(tmp_path / "flow.hdf5", run.parent.parent / "theirs")
    arguments = ["predict", "--checkpoint", str(run), "--input", str(flow), "--steps", "2", "--no-paraview"]
    output = tmp_path / "out.hdf5"
    assert main([*arguments, "--average", "2", "--output", str(output), "--dtype", "float64"]) == 0
    model = load_model(run)
    for row, record in enumerate(open_trajectories(flow)):
        fields, solid = (torch.from_numpy(values) for values in read_snapshots(record, 0, HISTORY))
        expected = first(model, fields, solid, [(0, 0, 0), (4, 4, 4)])
        with h5py.File(output) as file:
            velocity = np.moveaxis(file["t1_fields/velocity"][row, 0], -1, 0)
            faces = np.moveaxis(file["t1_fields/velocity_face"][row, 0], -1, 0)
        np.testing.assert_allclose(velocity, expected[:3], rtol=0, atol=1e-12)
        np.testing.assert_allclose(faces, expected[4:], rtol=0, atol=1e-12)
    assert read_provenance(output)["average"] == 2
