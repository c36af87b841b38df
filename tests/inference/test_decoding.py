"""Decoding latents to a dataset: contents of its files, conservation of mass, and refusals."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml

from shodh_moe.cli import main
from shodh_moe.config import Config
from shodh_moe.config.paths import resolve_paths
from shodh_moe.data import open_trajectories, read_provenance, read_trajectory
from shodh_moe.inference import decoding
from shodh_moe.inference.decoding import decode_latents
from shodh_moe.kernels import divergence
from shodh_moe.tokenizer import Tokenizer, load_tokenizer
from shodh_moe.tokenizer.encoding import encode_dataset
from shodh_moe.tokenizer.latents import load_latents
from shodh_moe.tokenizer.tokenizer import tokenizer_sha256
from shodh_moe.tokenizer.walls import to_centres
from tests.tiny import CONFIG, GRID, refused, tree, write_dataset
from tests.trained import two_trajectories

SPLITS = ("train", "valid", "test")


def make(folder: Path, **settings: str) -> Path:
    """Make an untrained tokenizer and its latents of ``folder``/theirs in ``folder``; return their config."""
    named = {"path": str(folder / "tok"), "root": str(folder / "tokenizers"), "latent_copies": 2, **settings}
    values = {
        **CONFIG,
        "data": {"name": "theirs", "path": str(folder / "theirs"), "grid": list(GRID)},
        "tokenizer": {**CONFIG["tokenizer"], **named},
    }
    config = Config.model_validate(values)
    torch.manual_seed(0)
    (folder / "tok").mkdir()
    Tokenizer(config.tokenizer, list(GRID)).save(folder / "tok")
    encode(config)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def encode(config: Config) -> None:
    paths = resolve_paths(config)
    paths.latents.mkdir(parents=True)
    tokenizer = load_tokenizer(paths.tokenizer)
    encode_dataset(tokenizer, paths.dataset, GRID, paths.latents, 2, 0, tokenizer_folder=paths.tokenizer)


def config_in(folder: Path) -> Config:
    return Config.model_validate(yaml.safe_load((folder / "config.yaml").read_text()))


def with_two_trajectories(folder: Path) -> None:
    """A dataset with two trajectories in one of its test files."""
    write_dataset(folder / "theirs")
    both = two_trajectories(folder / "two.hdf5", folder / "theirs")
    both.replace(folder / "theirs" / "data" / "test" / "calm.hdf5")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A staggered tokenizer with walls; tests must not change it."""
    folder = tmp_path_factory.mktemp("decode")
    with_two_trajectories(folder)
    make(folder, operator="staggered", walls="exact")
    return folder


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "most"), [("float64", 1e-13), ("float32", 1e-5)])
def test_the_files_contain_the_decoded_latents(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str, most: float
) -> None:
    output = tmp_path / "out"
    arguments = ["--config", str(made / "config.yaml"), "--output", str(output), "--dtype", dtype]
    assert main(["tokenizer", "decode", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(tree(output)) == ["data", "data/test", "data/test/calm.hdf5", "data/test/wild.hdf5"]
    latents = load_latents(resolve_paths(config_in(made)).latents, "test")
    tokenizer = load_tokenizer(made / "tok")
    assert [one.source for one in latents] == ["calm.hdf5", "calm.hdf5", "wild.hdf5"]
    for one in latents:
        path = output / "data" / "test" / one.source
        given = read_trajectory(open_trajectories(made / "theirs" / "data" / "test" / one.source)[one.sample])
        solid_T1XYZ = torch.from_numpy(given.solid_1XYZ).expand(5, -1, -1, -1, -1)
        flow = tokenizer.decode(one.read(), solid_T1XYZ, getattr(torch, dtype))
        with h5py.File(path) as file:
            velocity, faces, pressure = (
                torch.from_numpy(file[name][one.sample])
                for name in ("t1_fields/velocity", "t1_fields/velocity_face", "t0_fields/pressure")
            )
            assert {v.dtype for v in (velocity, faces, pressure)} == {getattr(torch, dtype)}
            assert file["t1_fields"].attrs["field_names"].tolist() == ["velocity", "velocity_face"]
            assert "lower face" in file["t1_fields/velocity_face"].attrs["location"]
            assert file["dimensions/time"].shape[-1] == 5
            assert file["scalars/reynolds"][...].size == open_trajectories(path)[-1].sample + 1
        scale = float(flow.velocity_B3XYZ.abs().max())
        tolerance = {"rtol": 0.0, "atol": 2e-5 * scale}
        torch.testing.assert_close(velocity.movedim(-1, 1), flow.velocity_B3XYZ, **tolerance)
        torch.testing.assert_close(faces.movedim(-1, 1), flow.conserved_B3XYZ, **tolerance)
        torch.testing.assert_close(pressure, flow.pressure_B1XYZ[:, 0].to(pressure.dtype), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(velocity.movedim(-1, 1), to_centres(faces.movedim(-1, 1)))
        assert (velocity.movedim(-1, 1) * solid_T1XYZ == 0).all()
        assert scale > 1e-3
    for line, name in zip(lines, ("calm.hdf5", "wild.hdf5"), strict=True):
        path = output / "data" / "test" / name
        with h5py.File(path) as file:
            faces_B3XYZ = torch.from_numpy(file["t1_fields/velocity_face"][:]).double().flatten(0, 1).movedim(-1, 1)
        div_BXYZ = divergence(faces_B3XYZ, "staggered")
        measured = float((div_BXYZ.square().mean() / faces_B3XYZ.square().sum(1).mean()).sqrt())
        assert 0 < measured < most
        provenance = read_provenance(path)
        assert provenance.pop("divergence_rms_relative") == pytest.approx(measured)
        units, written = provenance.pop("units"), provenance.pop("package_version")
        assert "lattice" in str(units)
        assert written
        assert provenance == {
            "label": "reconstruction",
            "tokenizer_sha256": tokenizer_sha256(made / "tok"),
            "divergence_operator": "staggered",
            "walls": "exact",
            "decoder": "helmholtz",
            "dtype": dtype,
            "input": name,
            "complete": True,
        }
        assert str(path) in line
        assert float(re.findall(r"= (\S+) \(staggered", line)[0]) == pytest.approx(measured, rel=0.1)


def test_only_the_original_copy_of_training_trajectories_is_decoded(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode_latents(config_in(made), "train", tmp_path / "whole", "float64")
    monkeypatch.setattr(decoding, "VOXELS", 2 * GRID[0] * GRID[1] * GRID[2])
    decode_latents(config_in(made), "train", tmp_path / "parts", "float64")
    for name in ("calm.hdf5", "wild.hdf5"):
        files = [tmp_path / folder / "data" / "train" / name for folder in ("whole", "parts")]
        with h5py.File(files[0]) as whole, h5py.File(files[1]) as parts:
            assert whole["t1_fields/velocity"].shape == (1, 5, *GRID, 3)
            np.testing.assert_allclose(whole["t1_fields/velocity"], parts["t1_fields/velocity"], atol=1e-5)
            given = read_trajectory(made / "theirs" / "data" / "train" / name)
            np.testing.assert_array_equal(whole["t0_fields/solid"][0], given.solid_1XYZ[0])


def copied(made: Path, folder: Path) -> Config:
    """Copy everything to ``folder``, where tests may change it, and return the config."""
    for name in ("theirs", "tok"):
        shutil.copytree(made / name, folder / name)
    text = (made / "config.yaml").read_text().replace(str(made), str(folder))
    (folder / "config.yaml").write_text(text)
    config = config_in(folder)
    shutil.copytree(resolve_paths(config_in(made)).latents, resolve_paths(config).latents)
    return config


def refuse(capfd: pytest.CaptureFixture[str], folder: Path, *messages: str) -> None:
    """Check that the command is refused with these messages and writes nothing."""
    before = tree(folder)
    arguments = ["--config", str(folder / "config.yaml"), "--output", str(folder / "out")]
    refused(capfd, "tokenizer", "decode", *arguments, says=messages)
    assert tree(folder) == before


def test_an_existing_output_is_refused(made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    copied(made, tmp_path)
    (tmp_path / "out").mkdir()
    refuse(capfd, tmp_path, f"--output {tmp_path / 'out'} exists", "give a new folder")


def test_latents_of_a_retrained_tokenizer_are_refused(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = copied(made, tmp_path)
    stale = resolve_paths(config).latents
    tokenizer = load_tokenizer(tmp_path / "tok")
    tokenizer.latent_mean_C += 1
    tokenizer.save(tmp_path / "tok")
    # Latents are found by the hash of the config's tokenizer: pretend that a user moved them there.
    shutil.copytree(stale, resolve_paths(config).latents)
    says = (
        "were made with tokenizer",
        str(tokenizer_sha256(made / "tok"))[:12],
        f"delete {resolve_paths(config).latents}",
    )
    refuse(capfd, tmp_path, *says)


def test_latents_of_other_data_are_refused(made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = copied(made, tmp_path)
    latents = resolve_paths(config).latents
    path = tmp_path / "theirs" / "data" / "test" / "wild.hdf5"
    with h5py.File(path, "a") as file:
        file["t0_fields/solid"][0, 0, 0, 0] = 1 - file["t0_fields/solid"][0, 0, 0, 0]
    latents = latents.rename(resolve_paths(config).latents)
    refuse(capfd, tmp_path, f"{path} has other solids")
    path.rename(path.with_name("calmer.hdf5"))
    latents.rename(resolve_paths(config).latents)
    refuse(capfd, tmp_path, "5 snapshots of trajectory 0 of wild.hdf5", "no such trajectory")


def test_a_full_disk_leaves_no_files(
    made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(made, tmp_path)

    def full(*arguments: object) -> float:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(decoding, "_fill", full)
    refuse(capfd, tmp_path, f"cannot write {tmp_path}/out/data/test/calm.hdf5: no space left on the disk")
    monkeypatch.setattr(decoding, "free_bytes", lambda folder: 1000)
    refuse(capfd, tmp_path, "needs 0.00172 GB, 1e-06 GB are free", "--dtype float32")


@pytest.mark.parametrize("settings", [{"operator": "spectral", "walls": "none"}, {"operator": "central2"}])
def test_all_fluid_and_all_solid_grids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, str]
) -> None:
    write_dataset(tmp_path / "theirs", snapshots=3)
    for split in SPLITS:
        for name, share in (("calm", 0.0), ("wild", 1.0)):
            with h5py.File(tmp_path / "theirs" / "data" / split / f"{name}.hdf5", "a") as file:
                file["t0_fields/solid"][:] = share
                file["t1_fields/velocity"][:] *= 1 - share
    make(tmp_path, **settings)
    decode_latents(config_in(tmp_path), "test", tmp_path / "out", "float64")
    fluid, solid = capsys.readouterr().out.splitlines()
    assert 0 < float(re.findall(r"= (\S+) \(", fluid)[0]) < 1e-13
    assert re.findall(r"= (\S+) \(", solid) == ["0.0e+00"]
    for name in ("calm", "wild"):
        decoded = read_trajectory(tmp_path / "out" / "data" / "test" / f"{name}.hdf5")
        assert np.isfinite(decoded.pressure_T1XYZ).all()
        assert (np.abs(decoded.velocity_T3XYZ).max() > 0) == (name == "calm")
        with h5py.File(tmp_path / "out" / "data" / "test" / f"{name}.hdf5") as file:
            assert list(file["t1_fields"]) == ["velocity"]
