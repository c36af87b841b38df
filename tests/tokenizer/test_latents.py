"""The latent cache: encoded trajectories, their symmetries, and refused files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.config import TokenizerConfig
from shodh_moe.data import list_trajectories, read_snapshots
from shodh_moe.data.symmetry import Symmetry
from shodh_moe.tokenizer import Tokenizer, encoding, load_tokenizer
from shodh_moe.tokenizer.encoding import encode_dataset
from shodh_moe.tokenizer.latents import LatentSamples, load_latents
from shodh_moe.tokenizer.tokenizer import tokenizer_sha256
from tests.tiny import CONFIG, GRID, write_dataset

CHANNELS = CONFIG["tokenizer"]["latent_channels"]


def save_tokenizer(folder: Path, seed: int, grid: tuple[int, ...] = GRID, **settings: object) -> Path:
    """Make an untrained tokenizer, which can encode like a trained one."""
    torch.manual_seed(seed)
    folder.mkdir()
    Tokenizer(TokenizerConfig.model_validate({**CONFIG["tokenizer"], **settings}), list(grid)).save(folder)
    return folder


def encode(folder: Path, symmetries: str = "all", copies: int = 4) -> Path:
    """Encode ``folder``/theirs with its tokenizer ``tok``."""
    cache = folder / "latents" / symmetries
    cache.mkdir(parents=True)
    tokenizer = load_tokenizer(folder / "tok")
    encode_dataset(
        tokenizer, folder / "theirs", GRID, cache, copies, 0, symmetries=symmetries, tokenizer_folder=folder / "tok"
    )
    return cache


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataset, tokenizer and latents, which tests must not change."""
    folder = tmp_path_factory.mktemp("latents")
    write_dataset(folder / "theirs")
    save_tokenizer(folder / "tok", 0)
    encode(folder)
    return folder


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    """A copy of the latents."""
    return Path(shutil.copytree(made / "latents" / "all", tmp_path / "cache"))


def test_a_cache_records_its_sources(made: Path) -> None:
    with h5py.File(made / "latents" / "all" / "test.hdf5") as file:
        attributes = dict(file.attrs)
    assert attributes.pop("grid").tolist() == list(GRID)
    assert len(attributes.pop("stats_sha256")) == 64
    assert attributes == {
        "tokenizer_sha256": tokenizer_sha256(made / "tok"),
        "tokenizer": str(made / "tok"),
        "dataset": str(made / "theirs"),
        "latent_channels": CHANNELS,
        "copies": 4,
        "symmetries": "all",
        "seed": 0,
    }


@pytest.mark.parametrize("which", ["shifts", "cube"])
def test_copies_are_the_flow_under_their_recorded_symmetries(made: Path, which: str) -> None:
    cache = encode(made, which)
    train = load_latents(cache, "train", made / "tok")
    record = list_trajectories(made / "theirs", "train")[0]
    fields_T4XYZ, solid_1XYZ = (torch.from_numpy(values) for values in read_snapshots(record))
    fields_T5XYZ = torch.cat([fields_T4XYZ, solid_1XYZ.expand(len(fields_T4XYZ), -1, -1, -1, -1)], 1)
    of_first = [one for one in train if one.source == record.path.name]
    assert [one.copy for one in of_first] == [0, 1, 2, 3]
    drawn = []
    for one in of_first:
        parts = {key: tuple(one.z.parent.attrs[key].tolist()) for key in ("shift", "mirror", "order")}
        drawn.append(Symmetry(**parts))
        with torch.no_grad():
            moved = drawn[-1].apply(fields_T5XYZ)
            torch.testing.assert_close(one.read(), load_tokenizer(made / "tok").encode(moved))
        assert one.solid_fraction_xyz[0, 0, 0] == pytest.approx(float(moved[0, 4, :8, :8, :8].mean()), abs=1e-6)
    assert len(set(drawn)) == 4
    assert drawn[0] == Symmetry()
    plain = Symmetry()
    for symmetry in drawn:
        assert symmetry.shift == plain.shift if which == "cube" else symmetry == Symmetry(symmetry.shift)


def test_a_trajectory_is_encoded_in_parts_of_a_few_snapshots(
    made: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "BATCH", 2)
    (tmp_path / "parts").mkdir()
    encode_dataset(load_tokenizer(made / "tok"), made / "theirs", GRID, tmp_path / "parts", copies=4, seed=0)
    for whole, parts in zip(load_latents(cache, "train"), load_latents(tmp_path / "parts", "train"), strict=True):
        torch.testing.assert_close(whole.read(), parts.read())


def test_only_training_trajectories_have_copies(made: Path) -> None:
    for split, copies in (("train", 4), ("valid", 1), ("test", 1)):
        found = load_latents(made / "latents" / "all", split, made / "tok")
        assert [one.copy for one in found] == [*range(copies)] * 2


def test_a_domain_with_weight_0_is_ignored(made: Path) -> None:
    everything = load_latents(made / "latents" / "all", "train")
    both = LatentSamples(everything, 2)
    one = LatentSamples(everything, 2, {both.domains[0]: 0, both.domains[1]: 3})
    assert (one.domains, one.sizes, one.streams, one.weights) == (both.domains[1:], both.sizes[1:], (1,), (3.0,))
    for alone, shared in zip(one.batch([(0, 3)])[:3], both.batch([(1, 3)])[:3], strict=True):
        assert torch.equal(alone, shared)
    with pytest.raises(UserError, match="every domain of the dataset has weight 0"):
        LatentSamples(everything, 2, dict.fromkeys(both.domains, 0.0))
    with pytest.raises(UserError, match="wake: the dataset has only"):
        LatentSamples(everything, 2, {"wake": 1.0})


def test_a_rank_reads_only_its_slab(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = LatentSamples(load_latents(made / "latents" / "all", "train"), 2)
    read: list[int] = []
    original = h5py.Dataset.__getitem__
    whole = samples.batch([(0, 0), (1, 3)])
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda z, key: _noted(original(z, key), read))
    slab = samples.batch([(0, 0), (1, 3)], slab=slice(1, 2))
    for part, all_of_it in zip(slab[:3], whole[:3], strict=True):
        assert torch.equal(part, all_of_it[..., 1:2, :, :])
    assert sum(read) == (whole.history_BHCxyz.numel() + whole.target_BCxyz.numel()) // 2


def _noted(values: np.ndarray, read: list[int]) -> np.ndarray:
    read.append(values.size)
    return values


def test_latents_of_another_tokenizer_are_refused(made: Path, cache: Path, tmp_path: Path) -> None:
    other = save_tokenizer(tmp_path / "other", 1)
    with pytest.raises(UserError) as raised:
        load_latents(cache, "train", other)
    message = str(raised.value)
    for folder in (made / "tok", other):
        assert str(folder) in message
        assert str(tokenizer_sha256(folder))[:12] in message
    assert f"delete {cache} and run `shodh tokenizer encode` again" in message
    assert "\n" not in message
    # Without a tokenizer there is nothing to compare with.
    assert load_latents(cache, "train")
    assert load_latents(cache, "train", tmp_path / "removed")


def test_latents_of_other_channels_are_refused(cache: Path, tmp_path: Path) -> None:
    other = save_tokenizer(tmp_path / "other", 0, latent_channels=8)
    with pytest.raises(UserError, match=r"16 channels, were made with .* makes 8: delete"):
        load_latents(cache, "test", other)


def test_a_tokenizer_trained_on_another_grid_makes_the_same_latents(cache: Path, tmp_path: Path) -> None:
    """Its weights, and so its hash, do not depend on the grid."""
    other = save_tokenizer(tmp_path / "other", 0, (16, 16, 32))
    assert load_latents(cache, "test", other)[0].z.shape[2:] == (2, 2, 2)


def edit(name: str, values: np.ndarray) -> Callable[[Path], None]:
    """Return a function that replaces an HDF5 dataset of the second trajectory."""

    def change(path: Path) -> None:
        with h5py.File(path, "a") as file:
            group = file[sorted(file)[1]]
            del group[name]
            group[name] = values

    return change


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def unnamed(path: Path) -> None:
    with h5py.File(path, "a") as file:
        del file.attrs["tokenizer_sha256"]


def hostile(path: Path) -> None:
    with h5py.File(path, "a") as file:
        next(iter(file.values())).attrs["domain"] = "x/../y"


def empty(path: Path) -> None:
    h5py.File(path, "w").close()


def not_a_group(path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["a"] = 1.0


Z = np.zeros((5, CHANNELS, 2, 2, 2), np.float32)


@pytest.mark.parametrize(("damage", "message"), [
    (edit("z", Z[:0]), "wild.hdf5.0000.0000 has no snapshots"),
    (edit("z", Z[:, :8]), "wild.hdf5.0000.0000 has 8 channels on [2, 2, 2]"),
    (edit("z", Z[..., :1]), "has 16 channels on [2, 2, 1]"),
    (edit("z", np.float32(1)), "has no shape"),
    (edit("geometry", np.full_like(Z[0], np.nan)), "the geometry of wild.hdf5.0000.0000 is not finite"),
    (edit("geometry", Z[0, :8]), "a geometry of 8 channels"),
    (cut, "cannot read latents"),
    (lambda path: path.write_bytes(b"no HDF5"), "cannot read latents"),
    (Path.unlink, "cannot read latents"),
    (not_a_group, "cannot read latents"),
    (hostile, "domain 'x/../y' is not at most 100 letters"),
    (unnamed, "were made with an unknown tokenizer"),
    (empty, "hold no trajectory"),
])  # fmt: skip
def test_damaged_files_are_refused(made: Path, cache: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(cache / "test.hdf5")
    with pytest.raises(UserError) as raised:
        load_latents(cache, "test", made / "tok")
    assert message in str(raised.value)
    assert f"delete {cache} and run" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_latents_that_are_not_finite_are_not_written(made: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(made / "tok")
    tokenizer.latent_std_C[3] = 0
    with pytest.raises(UserError, match=r"calm\.hdf5: the latents of snapshots 0 to 4 of trajectory 0 are not finite"):
        encode_dataset(tokenizer, made / "theirs", GRID, tmp_path, 1, 0)


@torch.no_grad()
@pytest.mark.parametrize("walls", ["none", "exact"])
def test_all_fluid_and_all_solid_grids(walls: str) -> None:
    torch.manual_seed(0)
    settings = {**CONFIG["tokenizer"], "operator": "staggered", "walls": walls}
    tokenizer = Tokenizer(TokenizerConfig.model_validate(settings), list(GRID)).eval()
    fields_B5XYZ = torch.randn(2, 5, *GRID)
    fields_B5XYZ[:, 4] = torch.tensor([0.0, 1.0])[:, None, None, None]
    fields_B5XYZ[1, :3] = 0
    solid_B1XYZ = fields_B5XYZ[:, 4:]
    z_BCxyz, geometry_BCxyz = tokenizer.encode(fields_B5XYZ), tokenizer.encode_geometry(solid_B1XYZ)
    assert z_BCxyz.isfinite().all()
    assert geometry_BCxyz.isfinite().all()
    velocity_B3XYZ, pressure_B1XYZ, _ = tokenizer.decode(z_BCxyz, solid_B1XYZ, torch.float64)
    assert pressure_B1XYZ.isfinite().all()
    assert velocity_B3XYZ[0].abs().max() > 0
    assert velocity_B3XYZ[1].abs().max() == 0, "where all is solid nothing moves"
