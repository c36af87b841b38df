"""A model predicts flows on grids that it was not trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.cli import main
from shodh_moe.data import open_dataset
from shodh_moe.data.dataset import Fields, Source
from shodh_moe.inference import load_model
from shodh_moe.inference.model import Model
from shodh_moe.kernels import divergence
from tests.tiny import refused, write_dataset
from tests.trained import SNAPSHOTS, make_run

TOLD = {"boundaries": True, "positions": "periodic_aware"}
PERIODIC = (("periodic", "periodic"),) * 3
OPEN = (("open", "open"),) * 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported models that are told boundaries (``model``) or not (``plain``), and a dataset of 24 x 16 x 8 cells."""
    folder = tmp_path_factory.mktemp("sizes")
    for name, keys in (("model", TOLD), ("plain", {})):
        run = make_run(folder / name, keys, operator="staggered", walls="exact")
        assert main(["checkpoint", "export", str(run), "--output", str(folder / name / "model")]) == 0
    write_dataset(folder / "other", (24, 16, 8), SNAPSHOTS)
    return folder


def _flow(grid: tuple[int, int, int], boundaries: Any = PERIODIC) -> Fields:
    g = torch.Generator().manual_seed(0)
    solid = (torch.rand(1, *grid, generator=g) < 0.1).float()
    velocity = torch.randn(2, 3, *grid, generator=g) * (1 - solid)
    tensors = {"velocity": velocity, "pressure": torch.randn(2, 1, *grid, generator=g), "solid": solid}
    return Fields(tensors, Source(boundaries=boundaries))


def _waken(model: Model) -> Model:
    """Give the vectors of boundaries values, which are zero before training."""
    assert model.transformer.boundaries is not None
    for parameter in model.transformer.boundaries.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("grid", [(48, 32, 32), (64, 64, 64)])
def test_mass_is_conserved_on_other_grids(made: Path, grid: tuple[int, int, int]) -> None:
    model = load_model(made / "model/model")
    predicted = model.forecast(_flow(grid), steps=1)
    face_N3XYZ = predicted["velocity_face"]
    assert face_N3XYZ.shape == (1, 3, *grid)
    assert face_N3XYZ.square().mean().sqrt() > 1e-3
    assert divergence(face_N3XYZ, model.operator).abs().max() < 1e-12
    assert (predicted["velocity"] * predicted["solid"]).abs().max() == 0


def test_a_flow_that_is_shifted_by_a_token_is_predicted_shifted(made: Path) -> None:
    """Tokenizer, network and projection together, along each axis of a periodic box."""
    model, flow = _waken(load_model(made / "model/model")), _flow((16, 24, 32))
    predicted = model.forecast(flow, steps=2)["velocity"]
    for axis in (-3, -2, -1):
        shifted = Fields({name: tensor.roll(8, axis) for name, tensor in flow.items()}, flow.source)
        again = model.forecast(shifted, steps=2)["velocity"].roll(-8, axis)
        assert (again - predicted).square().mean().sqrt() < 1e-5 * predicted.square().mean().sqrt()
    opened = model.forecast(_flow((16, 24, 32), OPEN), steps=2)["velocity"]
    assert (opened - predicted).square().mean().sqrt() > 1e-3 * predicted.square().mean().sqrt()


def test_boundaries_reach_the_network_from_the_file(made: Path, tmp_path: Path) -> None:
    model = _waken(load_model(made / "model/model"))
    flow = open_dataset(made / "other", "test")[0, :2]
    assert flow.source.boundaries == PERIODIC
    told = model.forecast(flow, 1)["velocity"]
    assert torch.equal(told, model.forecast(Fields(dict(flow), Source(boundaries=PERIODIC)), 1)["velocity"])
    assert not torch.equal(told, model.forecast(dict(flow), 1)["velocity"])  # a plain dictionary states none


def _predict(model: Path, flow: Path, output: Path, *more: str) -> list[str]:
    words = ["--checkpoint", str(model), "--input", str(flow), "--steps", "2", "--output", str(output)]
    return ["predict", *words, *more]


def test_the_command_predicts_another_grid_and_says_so(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flow, output = made / "other/data/test/calm.hdf5", tmp_path / "out.hdf5"
    assert main(_predict(made / "model/model", flow, output)) == 0
    error = capfd.readouterr().err
    assert f"{flow} has grid [24, 16, 8], " in error
    assert "was trained on [16, 8, 24]: expect larger errors" in error
    with h5py.File(output) as file:
        assert file["t1_fields/velocity"].shape == (1, 2, 24, 16, 8, 3)
    expected = load_model(made / "model/model").forecast(open_dataset(flow)[0, :2], 2)["velocity"]
    torch.testing.assert_close(open_dataset(output)[0]["velocity"], expected.float())


def test_a_file_without_boundaries_is_predicted_with_a_warning(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flow = tmp_path / "flow.hdf5"
    flow.write_bytes((made / "other/data/test/calm.hdf5").read_bytes())
    with h5py.File(flow, "a") as file:
        del file["boundary_conditions/x_periodic"]
    warning = "does not state the boundaries of all faces, which the model is told: add boundary_conditions"
    assert main(_predict(made / "model/model", flow, tmp_path / "out.hdf5")) == 0
    assert warning in capfd.readouterr().err
    assert main(_predict(made / "plain/model", flow, tmp_path / "plain.hdf5")) == 0
    assert warning not in capfd.readouterr().err


def test_an_exported_model_is_evaluated_on_another_grid(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = made / "model/model"
    words = ["--config", str(model / "config.yaml"), "--checkpoint", str(model), "--output", "measured"]
    data = [f"data.path={made / 'other'}", "data.grid=[24, 16, 8]", "data.name=other"]
    assert main(["evaluate", *words, *data]) == 0
    domains = json.loads(Path("measured/metrics.json").read_text())["domains"]
    assert set(domains) == {"calm", "wild"}
    assert all(one["n_tokens"] == 3 * (3 * 2 * 1) for one in domains.values())
    # It is the error of the forecast of the same file, whose boundaries the latents record.
    trajectory = open_dataset(made / "other", "test")[0]
    predicted = load_model(model).forecast(Fields({k: v[:2] if k != "solid" else v for k, v in trajectory.items()},
                                                  trajectory.source), 1)["velocity"][0]  # fmt: skip
    error = (predicted - trajectory["velocity"][2]).square().sum() / trajectory["velocity"][2].double().square().sum()
    assert domains["calm"]["rollout_nrmse"][0] == pytest.approx(float(error.sqrt()), rel=1e-4)


def _cut(flow: Fields, size: int) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in flow.items():
        yield name, tensor[..., :size]


def test_sizes_that_do_not_fit_are_refused(made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = load_model(made / "model/model")
    with pytest.raises(
        UserError, match=r"\[16, 16, 20\], not a multiple of 8 .* are \[16, 16, 16\] and \[16, 16, 24\]"
    ):
        model.forecast(dict(_cut(_flow((16, 16, 24)), 20)), 1)
    flow = tmp_path / "flow.hdf5"
    flow.write_bytes((made / "other/data/test/calm.hdf5").read_bytes())
    with h5py.File(flow, "a") as file:
        for name in ("t1_fields/velocity", "t0_fields/pressure", "t0_fields/solid", "dimensions/x"):
            axis = {"t1": 2, "t0": 1 if name.endswith("solid") else 2, "di": 0}[name[:2]]
            values = file[name][()].take(range(20), axis)
            del file[name]
            file[name] = values
    says = ("has grid [20, 16, 8], not a multiple of 8", "the nearest sizes are [16, 16, 8] and [24, 16, 8]")
    refused(capfd, *_predict(made / "model/model", flow, tmp_path / "out.hdf5"), says=says)


def test_latents_of_an_earlier_version_lack_what_the_model_needs(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = made / "model/model"
    data = [f"data.path={made / 'other'}", "data.grid=[24, 16, 8]", "data.name=other", "tokenizer.root=cache"]
    config = ["--config", str(model / "config.yaml"), *data]
    assert main(["tokenizer", "encode", *config, "name=other"]) == 0
    for path in Path("cache").rglob("*.hdf5"):
        with h5py.File(path, "a") as file:
            for group in file.values():
                del group.attrs["boundaries"]
    says = ("do not record the boundaries that model.boundaries needs", "shodh tokenizer encode")
    refused(capfd, "evaluate", *config, "--checkpoint", str(model), "--output", "measured", says=says)
