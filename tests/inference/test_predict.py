"""Predict from a user's own file: the files written, equality with the model's rollout, and refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from shodh_moe.base.files import sha256
from shodh_moe.cli import main
from shodh_moe.data import open_trajectories, read_provenance, read_snapshots, read_trajectory
from shodh_moe.inference import model as inference_model
from shodh_moe.inference.loading import find_source, load_source
from shodh_moe.inference.rollout import decode
from shodh_moe.kernels import divergence
from shodh_moe.metrics.fields import nrmse, vrmse
from tests.tiny import refused, tree
from tests.trained import GRID, HISTORY, SNAPSHOTS, make_run, two_trajectories


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder; tests must not change it."""
    return make_run(tmp_path_factory.mktemp("predict"))


@pytest.fixture
def flow(run: Path, tmp_path: Path) -> Path:
    """A file with two trajectories, in an empty folder."""
    return two_trajectories(tmp_path / "flow.hdf5", run.parent.parent / "theirs")


def predict(run: Path, flow: Path, *more: str, steps: int = 2) -> Path:
    """Run the command, which must succeed."""
    output = flow.with_name("out.hdf5")
    arguments = ["--checkpoint", str(run), "--input", str(flow), "--steps", str(steps), "--output", str(output)]
    assert main(["predict", *arguments, *more]) == 0
    return output


@torch.no_grad()
def expected(run: Path, flow: Path, sample: int, start: int, steps: int) -> torch.Tensor:
    """Return the rollout as an array [steps, 4, X, Y, Z], float64."""
    model = load_source(find_source(run))
    fields, solid = (torch.from_numpy(a) for a in read_snapshots(open_trajectories(flow)[sample], start, start + 2))
    z = [model.tokenizer.encode(torch.cat([one, solid])[None]) for one in fields]
    geometry = model.tokenizer.encode_geometry(solid[None])
    plan = model.transformer.lasting_plan(torch.stack(z, dim=1), geometry)
    for _ in range(steps):
        z.append(model.transformer(torch.stack(z[-2:], dim=1), geometry, plan=plan).latent_BCxyz)
    return torch.cat([decode(model.tokenizer, one, solid) for one in z[2:]])


def test_the_file_reads_back_as_the_rollout(run: Path, flow: Path) -> None:
    output = predict(run, flow, steps=4)
    records = open_trajectories(output, GRID)
    assert [(r.sample, r.domain, r.n_snapshots) for r in records] == [(0, "calm", 4), (1, "calm", 4)]
    assert records[0].periodic == open_trajectories(flow)[0].periodic == (True, True, True)
    for sample, record in enumerate(records):
        got, given = read_trajectory(record), read_trajectory(open_trajectories(flow)[sample])
        want = expected(run, flow, sample, 0, 4)
        np.testing.assert_allclose(got.velocity_T3XYZ, want[:, :3], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got.pressure_T1XYZ, want[:, 3:], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(got.solid_1XYZ, given.solid_1XYZ)
        # The prediction changes: it is neither persistence nor a repeated field.
        moved = np.concatenate([given.velocity_T3XYZ[1:2], got.velocity_T3XYZ])
        assert np.abs(np.diff(moved, axis=0)).max(axis=(1, 2, 3, 4)).min() > 1e-3


def test_time_scalars_and_provenance(run: Path, flow: Path) -> None:
    output = predict(run, flow, "--start", "1")
    with h5py.File(output) as file, h5py.File(flow) as given:
        assert file["dimensions/time"][:].tolist() == [3.0, 4.0]
        assert file["dimensions/time"].dtype == np.float32
        assert file.attrs["n_trajectories"] == 2
        assert file.attrs["dataset_name"] == "theirs"
        assert file["scalars/reynolds"][:].tolist() == [1.0, 2.0]
        assert file["scalars/viscosity"][()] == given["scalars/viscosity"][()]
        assert set(file["boundary_conditions"]) == set(given["boundary_conditions"])
        np.testing.assert_array_equal(file["dimensions/z"], given["dimensions/z"])
    provenance = read_provenance(output)
    expected_provenance = {
        "label": "prediction",
        "input": "flow.hdf5",
        "input_sha256": sha256(flow),
        "start": 1,
        "steps": 2,
        "given_snapshots": HISTORY,
        "checkpoint_step": 7,
        "divergence_operator": "spectral",
        "curl_dtype": "float64",
    }
    assert {key: provenance[key] for key in expected_provenance} == expected_provenance
    assert len(str(provenance["checkpoint_weights_sha256"])) == 64
    assert "lattice units" in str(provenance["units"])


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("float64", 1e-14)])
def test_the_stored_velocity_is_divergence_free(run: Path, flow: Path, dtype: str, limit: float) -> None:
    output = predict(run, flow, "--dtype", dtype)
    with h5py.File(output) as file:
        assert file["t1_fields/velocity"].dtype == file["t0_fields/pressure"].dtype == dtype
        velocity = torch.from_numpy(np.moveaxis(file["t1_fields/velocity"][0], -1, 1)).double()
    rms = divergence(velocity, "spectral").square().mean().sqrt() / velocity.square().sum(1).mean().sqrt()
    assert 0 < rms < limit


def test_frames_before_the_start_are_ignored(run: Path, flow: Path) -> None:
    late = read_trajectory(predict(run, flow, "--start", "2", "--sample", "1"))
    np.testing.assert_allclose(late.velocity_T3XYZ, expected(run, flow, 1, 2, 2)[:, :3], rtol=1e-5, atol=1e-6)


def test_one_trajectory_can_be_selected(run: Path, flow: Path) -> None:
    everything = read_trajectory(open_trajectories(predict(run, flow))[1])
    flow.with_name("out.hdf5").unlink()
    (record,) = open_trajectories(predict(run, flow, "--sample", "1"))
    alone = read_trajectory(record)
    np.testing.assert_array_equal(alone.velocity_T3XYZ, everything.velocity_T3XYZ)
    np.testing.assert_array_equal(alone.solid_1XYZ, everything.solid_1XYZ)
    with h5py.File(flow.with_name("out.hdf5")) as file:
        assert file["scalars/reynolds"][:].tolist() == [2.0]


def test_paraview_files_contain_the_same_values(run: Path, flow: Path) -> None:
    output = predict(run, flow)
    names = {path.name for path in flow.parent.iterdir()}
    assert names == {"flow.hdf5", "out.hdf5", "out.trajectory0.vtkhdf", "out.trajectory1.vtkhdf"}
    ours = read_trajectory(open_trajectories(output)[1])
    with h5py.File(flow.with_name("out.trajectory1.vtkhdf")) as file:
        root = file["VTKHDF"]
        assert root["Steps/Values"][:].tolist() == [2.0, 3.0]
        assert root.attrs["Origin"].tolist() == [0.5, 0.5, 0.5]
        assert root.attrs["Spacing"].tolist() == [1.0, 1.0, 1.0]
        velocity_NZYX3 = root["PointData/velocity"][:]
        np.testing.assert_array_equal(velocity_NZYX3.transpose(0, 4, 3, 2, 1), ours.velocity_T3XYZ)
        np.testing.assert_array_equal(root["PointData/solid"][0].T, ours.solid_1XYZ[0])
    predict(run, flow, "--sample", "0", "--no-paraview", "--overwrite")
    assert not flow.with_name("out.vtkhdf").exists()


def test_errors_are_measured_against_the_input(run: Path, flow: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predict(run, flow, "--sample", "0", steps=5)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line[:6].strip().isdigit()]
    truth = torch.from_numpy(read_trajectory(open_trajectories(flow)[0]).velocity_T3XYZ)
    model = expected(run, flow, 0, 0, 3)[:, :3]
    assert len(rows) == SNAPSHOTS - HISTORY
    for step, row in enumerate(rows):
        target, still = truth[HISTORY + step], truth[HISTORY - 1]
        pairs = [(measure, u) for measure in (nrmse, vrmse) for u in (model[step], still.double())]
        expected_row = [step + 1, HISTORY + step, *(float(measure(u, target.double())) for measure, u in pairs)]
        assert [float(word) for word in row] == pytest.approx(expected_row, abs=6e-5)
    assert "divergence of the velocity, spectral operator" in lines[-2]
    assert lines[-1] == f"[predict] {flow.with_name('out.hdf5')}: 1 x 5 snapshots"


def test_without_later_frames_only_the_divergence_is_printed(
    run: Path, flow: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(run, flow, "--start", str(SNAPSHOTS - HISTORY))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("divergence of the velocity")


def cut(path: Path, name: str) -> None:
    with h5py.File(path, "a") as file:
        del file[name]


def uneven(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["dimensions/time"][2] = 2.5


def stretched(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["dimensions/y"][:] *= 2


def other_grid(path: Path) -> None:
    with h5py.File(path, "a") as file:
        for name in ("t0_fields/pressure", "t1_fields/velocity", "t0_fields/solid"):
            values = file[name][..., :8, :] if name.startswith("t1") else file[name][..., :8]
            del file[name]
            file[name] = values


def nothing_is_wrong(path: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("damage", "more", "messages"),
    [
        (other_grid, [], ("grid [16, 8, ", "[16, 8, 24]", "resample")),
        (lambda path: cut(path, "t1_fields/velocity"), [], ("no t1_fields/velocity",)),
        (lambda path: cut(path, "t0_fields/pressure"), [], ("no t0_fields/pressure",)),
        (lambda path: cut(path, "dimensions/time"), [], ("no dimensions/time",)),
        (uneven, [], ("dimensions/time", "constant time step")),
        (stretched, [], ("cubic cells",)),
        (lambda path: path.write_bytes(b""), [], ("is empty",)),
        (lambda path: path.unlink(), [], ("does not exist",)),
        (nothing_is_wrong, ["--start", "4"], ("has 5 snapshots", "needs 2 from --start 4")),
        (nothing_is_wrong, ["--start", "-1"], ("--start -1",)),
        (nothing_is_wrong, ["--sample", "2"], ("trajectories 0 to 1",)),
        (nothing_is_wrong, ["--steps", "0"], ("--steps 0", "at least 1")),
        (nothing_is_wrong, ["--output", "out.vtk"], ("out.vtk", ".hdf5")),
        (nothing_is_wrong, ["--checkpoint", "nowhere"], ("no folder nowhere",)),
        (nothing_is_wrong, ["--checkpoint", "."], ("no checkpoint and no exported model",)),
        (nothing_is_wrong, ["--tokenizer", "nowhere"], ("nowhere", "--tokenizer")),
    ],
)
def test_invalid_input_gives_one_line_and_no_files(
    run: Path,
    flow: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    more: list[str],
    messages: tuple[str, ...],
) -> None:
    monkeypatch.chdir(flow.parent)
    damage(flow)
    before = tree(flow.parent)
    arguments = ["--checkpoint", str(run), "--input", "flow.hdf5", "--steps", "2", "--output", "out.hdf5"]
    refused(capfd, "predict", *arguments, *more, says=messages)
    assert tree(flow.parent) == before


def test_existing_files_are_kept_without_overwrite(run: Path, flow: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["predict", "--checkpoint", str(run), "--input", str(flow), "--steps", "1", "--sample", "0"]
    refused(capfd, *arguments, "--output", str(flow), "--overwrite", says=("is the input",))
    for name in ("out.hdf5", "out.vtkhdf"):
        path = flow.with_name(name)
        path.write_text("mine")
        refused(capfd, *arguments, "--output", str(flow.with_name("out.hdf5")), says=(f"{path} exists", "--overwrite"))
        assert path.read_text() == "mine"
        path.unlink()
    flow.with_name("out.hdf5").write_text("mine")
    assert len(open_trajectories(predict(run, flow, "--overwrite"))) == 2


def test_a_diverging_prediction_leaves_no_files(
    run: Path, flow: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def exploding(_: object, history: torch.Tensor, *more: object) -> Iterator[torch.Tensor]:
        yield history[:, -1]
        yield history[:, -1] * float("nan")

    monkeypatch.setattr(inference_model, "rollout", exploding)
    arguments = ["--checkpoint", str(run), "--input", str(flow), "--output", str(flow.with_name("out.hdf5"))]
    capfd.readouterr()
    assert main(["predict", *arguments, "--steps", "3"]) == 2
    assert "trajectory 0 is no longer finite at step 2" in capfd.readouterr().err
    assert [path.name for path in flow.parent.iterdir()] == ["flow.hdf5"]


def test_run_checkpoint_and_export_predict_the_same(run: Path, flow: Path) -> None:
    export = flow.with_name("export")
    assert main(["checkpoint", "export", str(run), "--output", str(export)]) == 0
    found = []
    for source in (run, run / "checkpoints", run / "checkpoints" / "7", export):
        output = predict(source, flow, "--sample", "0", "--no-paraview", "--overwrite", steps=1)
        found.append((read_trajectory(output).velocity_T3XYZ, read_provenance(output)["checkpoint_weights_sha256"]))
    for velocity, weights in found[1:]:
        np.testing.assert_array_equal(velocity, found[0][0])
        assert weights == found[0][1]


def test_the_well_reads_the_prediction(run: Path, flow: Path) -> None:
    well = pytest.importorskip("the_well.data")
    output = predict(run, flow, steps=3)
    folder = flow.parent / "predicted" / "data" / "test"
    folder.mkdir(parents=True)
    output.rename(folder / "a.hdf5")
    data = well.WellDataset(path=str(flow.parent / "predicted"), well_split_name="test", use_normalization=False)
    assert len(data) == 2 * 2
    sample = data[2]
    ours = read_trajectory(open_trajectories(folder / "a.hdf5")[1])
    np.testing.assert_array_equal(
        np.moveaxis(sample["input_fields"][0, ..., 1:].numpy(), -1, 0), ours.velocity_T3XYZ[0]
    )
    np.testing.assert_array_equal(sample["constant_fields"][..., 0], ours.solid_1XYZ[0])
