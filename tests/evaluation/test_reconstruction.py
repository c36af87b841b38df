"""`shodh tokenizer evaluate`: its numbers equal a direct computation, and invalid requests are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from shodh_moe.cli import main
from shodh_moe.config import Config
from shodh_moe.data import FieldStats, list_trajectories, read_trajectory
from shodh_moe.evaluation import reconstruction
from shodh_moe.evaluation.reconstruction import PROJECTIONS, evaluate_tokenizer, spread
from shodh_moe.kernels import divergence
from shodh_moe.kernels.differentiation import OPERATORS
from shodh_moe.metrics.fields import band_errors, nrmse, vrmse
from shodh_moe.metrics.seams import block_power, face_jumps
from shodh_moe.tokenizer import Tokenizer, load_tokenizer
from shodh_moe.tokenizer.encoding import trajectory_fields
from shodh_moe.tokenizer.tokenizer import tokenizer_sha256
from shodh_moe.tokenizer.walls import to_faces
from tests.tiny import CONFIG, refused, tree, write_dataset

GRID = (16, 8, 24)
SNAPSHOTS = 3
WALLS = [(operator, "none") for operator in OPERATORS]
WALLS += [(operator, walls) for operator in OPERATORS[1:] for walls in ("ramp", "exact")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), GRID, SNAPSHOTS)


def config_of(data: Path, folder: Path, **tokenizer: Any) -> Config:
    settings = {**CONFIG["tokenizer"], "batch_size": 2, "path": str(folder), **tokenizer}
    data_settings = {"name": "theirs", "path": str(data), "grid": list(GRID)}
    return Config.model_validate({**CONFIG, "data": data_settings, "tokenizer": settings})


def make(data: Path, folder: Path, **settings: Any) -> Config:
    """Save a tokenizer with random weights and the statistics of the data; return the config that names it."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    config = config_of(data, folder, **settings)
    tokenizer = Tokenizer(config.tokenizer, list(GRID))
    stats = FieldStats.load(data)
    tokenizer.velocity_rms.fill_(stats.velocity_rms)
    tokenizer.pressure_rms.fill_(stats.pressure_rms)
    tokenizer.save(folder)
    return config


@pytest.mark.parametrize(("operator", "walls"), WALLS)
def test_every_decoder_is_divergence_free_and_zero_in_solids(
    data: Path, tmp_path: Path, operator: str, walls: str
) -> None:
    config = make(data, tmp_path / "tok", operator=operator, walls=walls, batch_size=SNAPSHOTS)
    result = evaluate_tokenizer(config, "test")
    assert "projected" not in result
    assert result["trained_on_other_data"] is False
    for domain in ("calm", "wild"):
        found = result["domains"][domain]
        own = found["divergence"].pop(operator)
        assert 0 < own["float64"]["rms_relative"] < 1e-13
        assert own["float64"]["rms_relative"] < own["float32"]["rms_relative"] < 1e-5
        assert own["float64"]["max"] >= own["float64"]["rms"] > 0
        if operator == "central2":  # also free of staggered divergence, since its faces are means of two centres
            assert found["divergence"].pop("staggered")["float64"]["rms_relative"] < 1e-13
        assert found["divergence"].keys() == set(OPERATORS) - {operator, operator == "central2" and "staggered"}
        assert min(other["float64"]["rms_relative"] for other in found["divergence"].values()) > 1e-4
        solid = found["solid_velocity"]
        if walls == "none":
            assert 1 > solid["max_relative"] / 10 > solid["rms_relative"] / 10 > 0
        else:
            assert solid == {"rms_relative": 0.0, "max_relative": 0.0, "max": 0.0}


def test_the_numbers_equal_a_direct_computation(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tok"
    result = evaluate_tokenizer(make(data, folder, operator="staggered", walls="none"), "valid")
    assert json.loads((folder / "evaluation.json").read_text()) == result
    tokenizer, stats = load_tokenizer(folder), FieldStats.load(data)
    for record in list_trajectories(data, "valid"):
        fields = trajectory_fields(read_trajectory(record))
        found = result["domains"][record.domain]
        with torch.no_grad():
            flow = tokenizer.decode(tokenizer.encode(fields), fields[:, 4:], torch.float64)
        u, p, true = flow.velocity_B3XYZ, flow.pressure_B1XYZ.double(), fields.double()
        expected = {
            "velocity_vrmse": vrmse(u, true[:, :3]).mean(),
            "pressure_vrmse": vrmse(p, true[:, 3:4]).mean(),
            "velocity_nrmse": nrmse(u, true[:, :3]).mean(),
            "velocity_mse": ((u - true[:, :3]) / stats.velocity_rms).square().mean(),
            "pressure_mse": ((p - true[:, 3:4]) / stats.pressure_rms).square().mean(),
        }
        assert {key: found[key] for key in expected} == pytest.approx(
            {k: float(v) for k, v in expected.items()}, rel=1e-5
        )
        for name, values, truth in (("velocity", u, true[:, :3]), ("pressure", p, true[:, 3:4])):
            assert found["band_errors"][name] == pytest.approx(band_errors(values, truth).mean(0).tolist(), rel=1e-5)
            for what, measure in (("jumps", face_jumps), ("power", block_power)):
                own, others = measure(values - truth).mean(0)
                # Along y the grid has a single block, which has no neighbouring wave numbers.
                ratios = [None if value.isnan() else pytest.approx(float(value), rel=1e-5) for value in own / others]
                assert list(found["seams"][name][what].values()) == ratios
        speed = u.square().sum(1).mean().sqrt()
        central = divergence(u, "central2")
        reported = found["divergence"]["central2"]["float64"]
        rms = float(central.square().mean().sqrt())
        assert (reported["rms"], reported["rms_relative"]) == pytest.approx((rms, rms / float(speed)), rel=1e-5)
        assert reported["max"] == pytest.approx(float(central.abs().max()), rel=1e-5)
        inside = u.square().sum(1).sqrt()[fields[:, 4] == 1]
        assert found["solid_velocity"] == pytest.approx(
            {
                "rms_relative": float(inside.square().mean().sqrt() / speed),
                "max_relative": float(inside.max() / speed),
                "max": float(inside.max()),
            },
            rel=1e-5,
        )
        assert (found["n_snapshots"], found["n_snapshots_of_split"]) == (SNAPSHOTS, SNAPSHOTS)
        assert found["ms_per_sample"].keys() == {"encode", "decode"}
        assert min(found["ms_per_sample"].values()) > 0
    assert (result["split"], result["dataset"], result["tokenizer"]) == ("valid", str(data), str(folder))
    assert result["sha256"] == tokenizer_sha256(folder)
    assert result["parameters"] == sum(p.numel() for p in tokenizer.parameters())
    names = ("operator", "walls", "decoder", "divergence_weight", "latent_channels", "widths")
    assert [result["settings"][name] for name in names] == ["staggered", "none", "helmholtz", 0.0, 16, [8, 8, 8]]


def test_a_direct_decoder_is_also_measured_after_projection(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate_tokenizer(
        make(data, tmp_path / "tok", decoder="direct", walls="none"), "test", tmp_path / "out" / "a.json"
    )
    assert json.loads((tmp_path / "out/a.json").read_text()) == result
    assert not (tmp_path / "tok/evaluation.json").exists()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * (1 + len(PROJECTIONS)) + 1
    assert lines[-1] == f"[tokenizer] {tmp_path / 'out/a.json'}"
    (record,) = (r for r in list_trajectories(data, "test") if r.domain == "calm")
    fields = trajectory_fields(read_trajectory(record))
    tokenizer = load_tokenizer(tmp_path / "tok")
    with torch.no_grad():
        u = tokenizer.decode(tokenizer.encode(fields), fields[:, 4:]).velocity_B3XYZ.double()
    raw = result["domains"]["calm"]
    for operator in OPERATORS:
        on = to_faces(u) if operator == "staggered" else u
        rms = float(divergence(on, operator).square().mean().sqrt())
        assert raw["divergence"][operator]["float64"]["rms"] == pytest.approx(rms, rel=1e-5)
        assert raw["divergence"][operator]["float64"]["rms_relative"] > 1e-3
    assert raw["solid_velocity"]["max"] == 0
    assert list(result["projected"]) == [f"{walls}/{operator}" for walls, operator in PROJECTIONS]
    for walls, operator in PROJECTIONS:
        for domain in ("calm", "wild"):
            found = result["projected"][f"{walls}/{operator}"][domain]
            assert found.keys() == raw.keys() - {"n_snapshots_of_split"}
            own = found["divergence"][operator]
            assert own["float64"]["rms_relative"] < 1e-13
            assert own["float32"]["rms_relative"] < 1e-5
            assert (found["solid_velocity"]["max"] == 0) == (walls == "exact")
            assert found["ms_per_sample"].keys() == {"project"}
            # Only the velocity is projected.
            direct = result["domains"][domain]
            assert found["pressure_vrmse"] == pytest.approx(direct["pressure_vrmse"], rel=1e-6)
            assert found["velocity_vrmse"] != direct["velocity_vrmse"]
    # Of the raw velocity the projection keeps what is free of divergence: the nearest such field.
    with torch.no_grad():
        k = np.meshgrid(*[np.fft.fftfreq(n, 1 / n) * 2 * np.pi / n for n in GRID], indexing="ij")
        kept = np.array([np.where(np.abs(a) > np.pi - 1e-9, 0, a) for a in k])  # no derivative of the Nyquist modes
    spectrum = np.fft.fftn(u.numpy(), axes=(2, 3, 4))
    square = (kept**2).sum(0)
    along = np.einsum("cxyz,bcxyz->bxyz", kept, spectrum) / np.where(square > 0, square, 1)
    spectrum = np.where((square > 0) | (np.indices(GRID).sum(0) == 0), spectrum - kept[None] * along[:, None], 0)
    expected = torch.from_numpy(np.fft.ifftn(spectrum, axes=(2, 3, 4)).real)
    errors = vrmse(expected, fields[:, :3].double())
    assert result["projected"]["none/spectral"]["calm"]["velocity_vrmse"] == pytest.approx(
        float(errors.mean()), rel=1e-5
    )


def test_at_most_a_given_number_of_evenly_spread_snapshots_is_used(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert spread(list(range(9)), 3) == [0, 4, 8]
    assert spread([5, 6], 2) == [5, 6]
    many = spread(list(range(1000)), 64)
    assert (len(set(many)), many[0], many[-1]) == (64, 0, 999)
    assert set(np.diff(many)) == {15, 16}
    monkeypatch.setattr(reconstruction, "MOST", 2)
    result = evaluate_tokenizer(make(data, tmp_path / "tok"), "test")
    assert [(f["n_snapshots"], f["n_snapshots_of_split"]) for f in result["domains"].values()] == [(2, 3)] * 2
    assert result["snapshots"] == "at most 2 of a domain, evenly spread"


def test_a_domain_without_solids_has_no_velocity_there() -> None:
    rows = [{name: torch.ones(()) for name in ("velocity_vrmse", "pressure_vrmse", "velocity_nrmse")}]
    rows[0] |= {name: torch.ones(()) for name in ("velocity_mse", "pressure_mse")}
    rows[0] |= {name: torch.ones(3) for name in ("velocity_bands", "pressure_bands")}
    rows[0] |= {f"{name}_{what}": torch.ones(2, 3) for name in ("velocity", "pressure") for what in ("jumps", "power")}
    rows[0] |= {f"{operator}/{dtype}": torch.zeros(3) for operator in OPERATORS for dtype in ("float32", "float64")}
    for solid, expected in (([0.0, 0, 0, 1], None), ([0.0, 5, 0, 0], 0.0)):  # no solids; a blocked box at rest
        found = reconstruction._summary([{**rows[0], "solid": torch.tensor(solid)}])
        assert set(found["solid_velocity"].values()) == {expected}
        assert found["divergence"]["spectral"]["float64"]["rms_relative"] == 0


def test_a_tokenizer_trained_on_other_data_is_reported(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make(data, tmp_path / "tok")
    tokenizer = load_tokenizer(tmp_path / "tok")
    tokenizer.pressure_rms.mul_(1.001)
    tokenizer.save(tmp_path / "tok")
    assert evaluate_tokenizer(config, "test")["trained_on_other_data"] is True
    assert "was trained on other data" in capsys.readouterr().out.splitlines()[0]


def test_invalid_requests_are_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make(data, tmp_path / "tok")
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config.model_dump()))
    command = ["tokenizer", "evaluate", "--config", str(path)]
    before = tree(tmp_path)
    empty = ["tokenizer.path=null", f"tokenizer.root={tmp_path / 'none'}"]
    refused(capfd, *command, *empty, says=("no finished tokenizer", "shodh tokenizer train"))
    refused(capfd, *command, "data.grid=[16,16,16]", says=("has grid [16, 8, 24], not [16, 16, 16]",))
    refused(capfd, *command, "--output", str(tmp_path), says=("is a folder",))
    with pytest.raises(SystemExit):
        main([*command, "--split", "all"])
    assert "invalid choice" in capfd.readouterr().err
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "tok")
    refused(capfd, *command, says=("cannot write to", "permission denied", "--output"))
    monkeypatch.undo()
    assert tree(tmp_path) == before
    assert main([*command, "--split", "valid"]) == 0
    assert json.loads((tmp_path / "tok/evaluation.json").read_text())["split"] == "valid"
