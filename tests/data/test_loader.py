"""The reader returns the values that the library reads, in the requested order, from any kind of file."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.data import direct, list_trajectories, open_trajectories, read_snapshots, write_trajectory
from shodh_moe.data import loader as module
from shodh_moe.data.direct import find_places
from shodh_moe.data.loader import Snapshots, mixed_batches, read_batches
from shodh_moe.data.sampler import DomainSampler
from shodh_moe.solvers import Simulation

T, GRID = 3, (8, 16, 8)
LARGE = (48, 40, 40)


def written(folder: Path, domain: str, index: int, grid: tuple[int, int, int] = GRID) -> Path:
    rng = np.random.default_rng(index)
    simulation = Simulation(
        velocity_T3XYZ=rng.standard_normal((T, 3, *grid)).astype(np.float32),
        pressure_TXYZ=rng.standard_normal((T, *grid)).astype(np.float32),
        solid_XYZ=rng.random(grid) < 0.3,
        lid=False,
        time_T=np.arange(T, dtype=np.float32),
        parameters={"viscosity": 0.1, "target_speed": 0.1, "reynolds": 1.0, "mach": 0.1},
    )
    path = folder / "data" / "train" / f"{domain}_{index:04d}.hdf5"
    write_trajectory(path, simulation, dataset_name="test", domain=domain, provenance={})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    for index, domain in enumerate(["calm", "wild", "calm", "wild", "wild"]):
        written(folder, domain, index)
    return folder


@pytest.fixture
def snapshots(folder: Path) -> Snapshots:
    return Snapshots(list_trajectories(folder, "train"))


def expected(snapshots: Snapshots, index: int) -> np.ndarray:
    number, snapshot = divmod(index, T)
    fields_T4XYZ, solid_1XYZ = read_snapshots(snapshots.records[number], snapshot, snapshot + 1)
    return np.concatenate([fields_T4XYZ[0], solid_1XYZ])


def test_each_snapshot_equals_what_the_library_reads(snapshots: Snapshots) -> None:
    assert len(snapshots) == 5 * T
    for _ in range(2):  # first by the library, then directly
        batch = snapshots.batch(range(5 * T))
        assert (batch.dtype, batch.shape) == (torch.float32, (5 * T, 5, *GRID))
        np.testing.assert_array_equal(batch, np.stack([expected(snapshots, index) for index in range(5 * T)]))


def test_indices_map_to_domains_and_records(snapshots: Snapshots) -> None:
    assert snapshots.domains == ["calm", "wild"]
    assert snapshots.sizes == (2 * T, 3 * T)
    assert snapshots.of_domain(0) == list(range(2 * T))
    assert snapshots.indices([(1, 0), (0, 2), (1, 8)]) == [2 * T, 2, 5 * T - 1]
    assert snapshots.labels([0, 2 * T]).tolist() == [0, 1]
    assert snapshots.record(T).path.name == "calm_0002.hdf5"
    for index in (-1, 5 * T):
        with pytest.raises(IndexError):
            snapshots.record(index)
    with pytest.raises(UserError, match="wild"):
        Snapshots(snapshots.records, domains=["calm"])


def test_the_library_is_used_only_for_the_first_read(snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshots.batch([0, 1, 2])

    def never(*arguments: object) -> None:
        raise AssertionError

    for name in ("read_snapshots", "find_places"):
        monkeypatch.setattr(module, name, never)
    assert torch.equal(snapshots.batch([0, 1, 2]), before)


@pytest.mark.parametrize("grid", [LARGE, (3, 5, 7)])
def test_snapshots_larger_than_a_block(
    tmp_path: Path, grid: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "_BLOCK", 3 * 2**10)
    data = Snapshots(open_trajectories(written(tmp_path, "d", 0, grid)))
    for _ in range(2):
        np.testing.assert_array_equal(data.batch([1])[0], expected(data, 1))


def batches_of(snapshots: Snapshots, start: int, count: int, **options: Any) -> list[torch.Tensor]:
    sampler = DomainSampler(snapshots.sizes, 4, seed=5, weights=(1, 3))
    return list(islice(read_batches(snapshots, mixed_batches(sampler, snapshots, start=start), **options), count))


@pytest.mark.parametrize("options", [{"workers": 1}, {"workers": 3}, {"workers": 2, "ahead": 0}, {"workers": 8}])
def test_the_order_does_not_depend_on_the_workers(snapshots: Snapshots, options: dict[str, int]) -> None:
    reference, got = batches_of(snapshots, 0, 12), batches_of(snapshots, 0, 12, **options)
    assert all(torch.equal(a, b) for a, b in zip(reference, got, strict=True))
    assert len({batch.numpy().tobytes() for batch in reference}) > 6


def test_batches_resume_at_any_step(snapshots: Snapshots) -> None:
    whole, rest = batches_of(snapshots, 0, 10, workers=2), batches_of(snapshots, 7, 3, workers=1)
    assert all(torch.equal(a, b) for a, b in zip(whole[7:], rest, strict=True))


def test_every_batch_mixes_the_domains_by_weight(snapshots: Snapshots) -> None:
    sampler = DomainSampler(snapshots.sizes, 4, seed=5, weights=(1, 3))
    for indices in islice(mixed_batches(sampler, snapshots), 10):
        assert snapshots.labels(indices).tolist() == [0, 1, 1, 1]


def test_reading_ahead_is_limited(snapshots: Snapshots) -> None:
    asked: list[int] = []
    batches = ([asked.append(step) or step % 15] for step in range(100))
    reader = read_batches(snapshots, batches, workers=2, ahead=3)
    for step in range(5):
        next(reader)
        assert asked[-1] == step + 3
    reader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-snapshots")]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_is_named_when_its_batch_is_read(tmp_path: Path, workers: int) -> None:
    good, bad = (written(tmp_path, "d", index) for index in range(2))
    data = Snapshots(list_trajectories(tmp_path, "train"))
    with h5py.File(bad, "r+") as file:
        file["t1_fields/velocity"][0, 1, 2, 3, 4, 0] = np.nan
    reader = read_batches(data, [[0, 1], [2, T], [T, T + 1]], workers)
    next(reader), next(reader)
    with pytest.raises(UserError, match=rf"{bad.name}: velocity of snapshot 1 has values that are not finite"):
        next(reader)
    assert good.exists()


@pytest.fixture
def read_once(tmp_path: Path) -> tuple[Path, Snapshots]:
    path = written(tmp_path, "d", 0)
    data = Snapshots(open_trajectories(path))
    data.batch([0, 1])
    return path, data


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.1e18])
@pytest.mark.parametrize("field", ["t1_fields/velocity", "t0_fields/pressure"])
def test_each_value_is_checked(read_once: tuple[Path, Snapshots], value: float, field: str) -> None:
    """The value changes in place and the modification time stays, as only a broken disk does it."""
    path, data = read_once
    times = os.stat(path)
    with h5py.File(path, "r+") as file:
        file[field][(0, 1, 7, 15, 7, *(2,) * (field[1] == "1"))] = value
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match=rf"{field[10:]} of snapshot 1 has values"):
        data.batch([1])


def test_values_just_within_the_limits_pass(read_once: tuple[Path, Snapshots]) -> None:
    path, data = read_once
    with h5py.File(path, "r+") as file:
        file["t1_fields/velocity"][0, 1] = -9.99e17
        file["t0_fields/pressure"][0, 1] = -1e-45
    assert (data.batch([1])[0, :3] == np.float32(-9.99e17)).all()
    assert (data.batch([1])[0, 3] < 0).all()


def test_a_changed_file_is_read_again(read_once: tuple[Path, Snapshots]) -> None:
    path, data = read_once
    before = data.batch([1])
    with h5py.File(path, "r+") as file:
        file["t1_fields/velocity"][...] = 7
        file["t0_fields/solid"][...] = 1
    assert (data.batch([1])[0, :3] == 7).all()
    assert (data.batch([1])[0, 4] == 1).all()
    os.replace(written(path.parent, "other", 0), path)
    assert torch.equal(data.batch([1]), before)
    path.write_bytes(path.read_bytes()[:30_000])
    with pytest.raises(UserError, match="truncated"):
        data.batch([1])
    path.unlink()
    with pytest.raises(UserError, match="does not exist"):
        data.batch([1])


def stored(**layout: Any) -> Callable[[Path], None]:
    """Return a function that stores a file's velocity and pressure with other dataset options."""

    def rewrite(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            for name in ("t1_fields/velocity", "t0_fields/pressure"):
                values = file[name][()]
                options = {**layout, "chunks": layout["chunks"](values.shape)} if "chunks" in layout else layout
                del file[name]
                file.create_dataset(name, data=values, **options)

    return rewrite


def two_trajectories(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        for name in ("t1_fields/velocity", "t0_fields/pressure", "t0_fields/solid"):
            values = file[name][()]
            del file[name]
            file[name] = np.concatenate([values + 1, values])


def no_solid(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["t0_fields/solid"]


def half_solid(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["t0_fields/solid"][0, 0] = 0.5


@pytest.mark.parametrize(
    ("change", "is_direct"),
    [
        (stored(chunks=lambda shape: (1, 1, *shape[2:])), True),
        (stored(chunks=lambda shape: (1, 1, 2, *shape[3:])), True),
        (stored(chunks=lambda shape: (1, 1, 3, *shape[3:])), False),
        (stored(chunks=lambda shape: (1, 2, *shape[2:])), False),
        (stored(chunks=lambda shape: (1, 1, 4, 4, *shape[4:])), False),
        (stored(compression="gzip"), False),
        (stored(chunks=lambda shape: (1, 1, *shape[2:]), fletcher32=True), False),
        (stored(dtype=">f4"), False),
        (stored(dtype="f8"), False),
        (two_trajectories, True),
        (no_solid, True),
        (half_solid, True),
    ],
)  # fmt: skip
def test_any_storage_layout_is_read(tmp_path: Path, change: Callable[[Path], None], is_direct: bool) -> None:
    path = written(tmp_path, "d", 3)
    change(path)
    data = Snapshots(open_trajectories(path))
    assert (find_places(data.records[-1]) is not None) == is_direct
    for _ in range(2):
        for index in range(len(data)):
            np.testing.assert_array_equal(data.batch([index])[0], expected(data, index))


def test_memory_of_cached_masks_is_bounded(snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MASK_BUDGET_BYTES", 2 * int(np.prod(GRID)) // 8)
    reference = snapshots.batch(range(5 * T))
    assert len(snapshots._masks._kept) == 2
    assert torch.equal(snapshots.batch(range(5 * T)), reference)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_does_not_grow(tmp_path: Path, workers: int) -> None:
    """Keeping a tenth of each batch would exceed the limit: there are 200 batches of 1.5 MB."""
    written(tmp_path, "d", 0, LARGE)
    data = Snapshots(list_trajectories(tmp_path, "train"))
    reader = read_batches(data, ([step % T] for step in range(300)), workers)
    for _ in islice(reader, 100):
        pass
    before, files = resident_bytes(), len(os.listdir("/proc/self/fd"))
    for _ in reader:
        pass
    assert resident_bytes() - before < 2**24
    assert len(os.listdir("/proc/self/fd")) <= files
