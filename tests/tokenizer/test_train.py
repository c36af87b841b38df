"""Training the tokenizer: where it starts, what its statistics count, and that a break changes no bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shodh_moe.config import TokenizerConfig
from shodh_moe.data import TrajectoryRecord, list_trajectories
from shodh_moe.data.loader import Snapshots
from shodh_moe.data.sampler import DomainSampler
from shodh_moe.errors import UserError
from shodh_moe.tokenizer import Tokenizer, latents, load_tokenizer
from shodh_moe.tokenizer import train as training
from shodh_moe.tokenizer.latents import encode_dataset, load_latents
from shodh_moe.tokenizer.train import draw, drawn_batches, reconstruction_errors, start_from_principal_components
from tests.tiny import CONFIG, config, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    training.train_tokenizer(config(), dataset, folder)
    return folder


def same(a: Path, b: Path) -> bool:
    ours, theirs = load_file(a / "tokenizer.safetensors"), load_file(b / "tokenizer.safetensors")
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def snapshots(dataset: Path) -> Snapshots:
    return Snapshots(list_trajectories(dataset, "train"))


def low_rank(grid: tuple[int, int, int] = (16, 16, 16)) -> Snapshots:
    """Stand-in for a dataset: patches of velocity and pressure from a space of 6 dimensions, no solids."""
    generator = torch.Generator().manual_seed(5)
    basis = torch.randn(6, 4, 8, 8, 8, generator=generator)

    class Fields(Snapshots):
        def read(self, index: int, out_5XYZ: np.ndarray) -> None:
            weights = torch.randn(6, 2, 2, 2, generator=torch.Generator().manual_seed(index))
            out_5XYZ[:4] = torch.einsum("rcijk,rxyz->cxiyjzk", basis, weights).reshape(4, *grid)
            out_5XYZ[4] = 0

    return Fields([TrajectoryRecord(Path("none"), 0, "d", 8, grid)])


def test_principal_components_reconstruct_a_field_of_low_rank() -> None:
    """Not periodic, so never shifted: the patches span 6 dimensions, and 16 channels hold them all."""
    data = low_rank()
    tokenizer = Tokenizer(TokenizerConfig.model_validate(CONFIG["tokenizer"]), [16, 16, 16])
    fields = data.batch(range(8))

    def error() -> float:
        raw, pressure = tokenizer.decoder(tokenizer.encoder(fields), fields[:, 4:])
        return float(
            (torch.cat([raw, pressure], dim=1) - fields[:, :4]).square().mean() / fields[:, :4].square().mean()
        )

    with torch.no_grad():
        assert error() > 0.1
        start_from_principal_components(tokenizer, data, seed=0)
        assert error() < 1e-8
    assert not tokenizer.geometry_basis_CP.any(), "without solids the geometry has no component"


def test_the_start_is_deterministic_signs_included(dataset: Path) -> None:
    states = []
    for seed in (0, 1):  # of the initial weights, which the start must overwrite
        torch.manual_seed(seed)
        tokenizer = Tokenizer(config().tokenizer, [16, 16, 16])
        start_from_principal_components(tokenizer, snapshots(dataset), seed=0)
        states.append({k: v.clone() for k, v in tokenizer.state_dict().items()})
    for name in ("encoder.project.weight", "decoder.patches.weight", "geometry_basis_CP", "geometry_mean_P"):
        assert states[0][name].abs().sum() > 0
        assert torch.equal(states[0][name], states[1][name])
    rows = states[0]["encoder.project.weight"].flatten(1)
    assert (rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all(), "the largest entry is positive"
    torch.testing.assert_close(rows @ rows.T, torch.eye(16), atol=1e-5, rtol=0)


def test_one_unvarying_geometry_gives_no_noise(dataset: Path) -> None:
    """All training masks alike: only rounding is left to scale up, and it must not be."""

    class AllSolid(Snapshots):
        def read(self, index: int, out_5XYZ: np.ndarray) -> None:
            super().read(index, out_5XYZ)
            out_5XYZ[4] = 1

    data = AllSolid(list_trajectories(dataset, "train"))
    tokenizer = Tokenizer(config().tokenizer, [16, 16, 16])
    start_from_principal_components(tokenizer, data, seed=0)
    assert tokenizer.encode_geometry(torch.ones(1, 1, 16, 16, 16)).abs().max() < 1e-3


def test_it_learns(dataset: Path) -> None:
    """A few steps from the same start lower the error of the snapshots they train on."""
    data = snapshots(dataset)
    torch.manual_seed(0)
    tokenizer = Tokenizer(config().tokenizer, [16, 16, 16])
    fields = data.batch(range(4))
    tokenizer.velocity_rms.copy_(fields[:, :3].square().mean().sqrt())
    tokenizer.pressure_rms.copy_(fields[:, 3].square().mean().sqrt())
    optimizer = torch.optim.AdamW(training._learning_rate_groups(tokenizer, 1e-3))
    losses = []
    for _ in range(8):
        velocity, pressure = reconstruction_errors(tokenizer, fields)
        loss = velocity.mean() + pressure.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_training_leaves_what_the_next_stage_needs(trained: Path) -> None:
    assert load_tokenizer(trained).grid == [16, 16, 16]
    log = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in log] == [("train", 2), ("valid", 2), ("train", 3), ("valid", 3)]
    assert set(log[1]["velocity_mse"]) == {"calm", "wild"}


def test_latents_of_the_training_split_have_mean_0_and_deviation_1(dataset: Path, trained: Path) -> None:
    tokenizer, data = load_tokenizer(trained), snapshots(dataset)
    with torch.no_grad():
        z = tokenizer.encode(data.batch(range(len(data)))).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(z.mean(1), torch.zeros(16).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(1, unbiased=False), torch.ones(16).double(), atol=1e-4, rtol=0)


def break_off(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    def dies(iterable: Iterable[int], desc: str, total: int) -> Iterator[int]:
        for step in iterable:
            if step == after:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(training, "progress", dies)


def test_a_break_changes_no_bit_and_other_splits_no_statistic(
    dataset: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the checkpoint of step 2; and meanwhile valid and test became other flows."""
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    for split in ("valid", "test"):
        for path in (copy / "data" / split).iterdir():
            with h5py.File(path, "r+") as file:
                file["t1_fields/velocity"][...] = 100.0
                file["t0_fields/pressure"][...] = -100.0
    folder = tmp_path / "broken"
    with monkeypatch.context() as patch:
        break_off(patch, after=2)
        with pytest.raises(KeyboardInterrupt):
            training.train_tokenizer(config(), copy, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint"]
    seen: list[int] = []
    monkeypatch.setattr(training, "progress", lambda steps, desc, total: (seen.append(s) or s for s in steps))
    training.train_tokenizer(config(), copy, folder)
    assert seen == [2], "it goes on after the checkpoint"
    assert same(folder, trained)
    lines = [(folder / "metrics.jsonl").read_text().splitlines(), (trained / "metrics.jsonl").read_text().splitlines()]
    assert lines[0][0::2] == lines[1][0::2], "the log of the training split is the same too"
    assert lines[0][1::2] != lines[1][1::2], "and that of the other splits is not"


def test_the_log_is_the_same_where_checkpoints_fall_between_its_lines(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "start_from_principal_components", lambda *arguments: None)
    settings = config(tokenizer={**CONFIG["tokenizer"], "log_every": 3, "checkpoint_every": 2, "steps": 3})
    training.train_tokenizer(settings, dataset, tmp_path / "whole")
    with monkeypatch.context() as patch:
        break_off(patch, after=2)
        with pytest.raises(KeyboardInterrupt):
            training.train_tokenizer(settings, dataset, tmp_path / "broken")
    training.train_tokenizer(settings, dataset, tmp_path / "broken")
    assert (tmp_path / "broken/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_refused_by_name(dataset: Path, trained: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "copy"))
    path = folder / "checkpoint" / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=rf"checkpoint/{name} is damaged: delete .*checkpoint to start again"):
        training.train_tokenizer(config(), dataset, folder)


def test_a_loss_that_is_not_finite_names_the_key(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "start_from_principal_components", lambda *arguments: None)
    settings = config(tokenizer={**CONFIG["tokenizer"], "learning_rate": 1e30, "checkpoint_every": 9})
    with pytest.raises(UserError, match=r"not finite at step 2: lower tokenizer\.learning_rate"):
        training.train_tokenizer(settings, dataset, tmp_path / "bad")
    assert not (tmp_path / "bad" / "tokenizer.json").exists()


@torch.no_grad()
def test_cached_latents_are_those_of_the_encoder(dataset: Path, trained: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(trained)
    encode_dataset(tokenizer, dataset, tmp_path, copies=3, seed=0)
    train, test = load_latents(tmp_path, "train"), load_latents(tmp_path, "test")
    assert [t.domain for t in train] == ["calm"] * 3 + ["wild"] * 3
    assert [(t.domain, t.source, t.snapshots) for t in test] == [("calm", "calm.hdf5", 5), ("wild", "wild.hdf5", 5)]
    data = snapshots(dataset)
    torch.testing.assert_close(train[0].read(1, 3), tokenizer.encode(data.batch([1, 2])))
    assert len({t.read().numpy().tobytes() for t in train[:3]}) == 3, "the copies are other flows"
    solid = data.batch([0])[0, 4]
    assert float(train[0].solid_fraction_xyz[0, 1, 0]) == pytest.approx(float(solid[:8, 8:, :8].mean()))


def test_training_snapshots_come_under_random_symmetries(dataset: Path) -> None:
    data = snapshots(dataset)
    draws = [draw(data, None, 4, seed=0, step=step) for step in range(3)]
    assert draws == [draw(data, None, 4, seed=0, step=step) for step in range(3)], "a step alone decides"
    assert len({tuple(picks) for picks, _ in draws}) == 3
    for (picks, symmetries), fields in zip(draws, drawn_batches(data, draws, "cpu"), strict=True):
        assert len(set(picks)) == len(set(symmetries)) == 4
        plain = data.batch(picks)
        assert not torch.equal(fields, plain)
        torch.testing.assert_close(fields.abs().flatten(1).sort()[0], plain.abs().flatten(1).sort()[0])


def test_weights_mix_the_domains_of_a_batch(dataset: Path) -> None:
    data = snapshots(dataset)
    sampler = DomainSampler(data.sizes, 4, seed=0, weights=(3, 1))
    drawn = [data.labels(draw(data, sampler, 4, seed=0, step=step)[0]).tolist() for step in range(3)]
    assert drawn == [[0, 0, 0, 1]] * 3


def test_a_trajectory_is_encoded_in_parts_of_a_few_snapshots(
    dataset: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("whole", 5), ("parts", 2)):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(latents, "BATCH", size)
        encode_dataset(load_tokenizer(trained), dataset, tmp_path / name, copies=2, seed=0)
    pairs = zip(*(load_latents(tmp_path / name, "train") for name in ("whole", "parts")), strict=True)
    for whole, parts in pairs:
        torch.testing.assert_close(whole.read(), parts.read())
        assert torch.equal(whole.geometry_Cxyz, parts.geometry_Cxyz)
