"""Data generation: the files and their content, resumed and parallel runs, statistics, and errors."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml

from shodh_moe.base.errors import EXIT_DONE, EXIT_REQUEUE, EXIT_USER_ERROR, UserError
from shodh_moe.base.files import sha256
from shodh_moe.config import DataConfig
from shodh_moe.data import FieldStats, generate, list_trajectories, read_provenance, read_trajectory
from shodh_moe.data.hdf5 import _Sink
from shodh_moe.runs.generate_data import main
from tests.tiny import quiet, write_config

ROOT = Path(__file__).resolve().parents[2]
TRAJECTORIES = {"train": 2, "valid": 1, "test": 1}
FAST = {"spinup_steps": 4, "steps_per_snapshot": 4, "trajectories": TRAJECTORIES}


def config(**changes: Any) -> DataConfig:
    domains = {"open_channel": FAST, "porous_media": {**FAST, "grain": 3.0}}
    return DataConfig.model_validate({"grid": [16, 16, 16], "snapshots": 3, "domains": domains, **changes})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(config(), tmp_path_factory.mktemp("generated"), quiet)


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def files(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*.hdf5"))}


def test_folder_has_the_promised_files_and_nothing_else(dataset: Path) -> None:
    names = {str(path.relative_to(dataset)) for path in dataset.rglob("*") if path.is_file()}
    expected = {"stats.yaml", "dataset.yaml"}
    for split, count in TRAJECTORIES.items():
        expected |= {f"data/{split}/{d}_{i:04d}.hdf5" for d in ("open_channel", "porous_media") for i in range(count)}
    assert names == expected


def test_file_follows_the_schema(dataset: Path) -> None:
    for path in dataset.rglob("*.hdf5"):
        with h5py.File(path) as file:
            check_schema(file)


def is_flag(value: object) -> bool:
    return isinstance(value, np.bool_)


def check_schema(file: h5py.File) -> None:
    """Check the rules of the_well that apply to our files (REFERENCE: schema)."""
    attrs = file.attrs
    assert attrs["dataset_name"] == "quickstart"
    assert attrs["grid_type"] == "cartesian"
    assert attrs["n_spatial_dims"] == 3
    assert attrs["n_trajectories"] == 1
    scalars = file["scalars"]
    assert list(attrs["simulation_parameters"]) == list(scalars.attrs["field_names"])
    for name in scalars.attrs["field_names"]:
        assert name in attrs
        assert scalars[name].shape == ()
        assert is_flag(scalars[name].attrs["sample_varying"])
        assert is_flag(scalars[name].attrs["time_varying"])
    dimensions = file["dimensions"]
    axes = list(dimensions.attrs["spatial_dims"])
    assert axes == ["x", "y", "z"]
    time = dimensions["time"][:]
    assert time.dtype == np.float32
    assert np.ptp(np.diff(time)) == 0
    for name in ("time", *axes):
        assert dimensions[name].ndim == 1
        assert is_flag(dimensions[name].attrs["sample_varying"])
        assert is_flag(dimensions[name].attrs["time_varying"])
    grid = tuple(len(dimensions[axis]) for axis in axes)
    for order, names in enumerate((["pressure", "solid"], ["velocity"], [])):
        group = file[f"t{order}_fields"]
        assert list(group.attrs["field_names"]) == names
        for name in names:
            field = group[name]
            varying = (1,) + ((len(time),) if field.attrs["time_varying"] else ())
            assert field.shape == varying + grid + (3,) * order
            assert field.dtype == np.float32
            assert field.attrs["dim_varying"].dtype == bool
            assert field.attrs["dim_varying"].all()
            assert is_flag(field.attrs["sample_varying"])
            assert field.attrs["sample_varying"]
    assert not file["t0_fields/solid"].attrs["time_varying"]
    for boundary in file["boundary_conditions"].values():
        assert boundary.attrs["bc_type"] in {"WALL", "OPEN", "PERIODIC"}
        (axis,) = boundary.attrs["associated_dims"]
        assert boundary["mask"].shape == dimensions[axis].shape
        assert boundary["mask"].dtype == bool
        assert isinstance(boundary.attrs["associated_fields"], np.ndarray)


def test_the_well_reads_the_folder(dataset: Path) -> None:
    well = pytest.importorskip("the_well.data")
    normalization = pytest.importorskip("the_well.data.normalization")
    data = well.WellDataset(
        path=str(dataset),
        well_split_name="train",
        use_normalization=True,
        normalization_type=normalization.RMSNormalization,
    )
    assert len(data) == 4 * 2
    sample = data[0]
    assert sample["input_fields"].shape == (1, 16, 16, 16, 4)
    assert sample["constant_fields"].shape == (16, 16, 16, 1)
    assert sample["boundary_conditions"].tolist() == [[2, 2], [2, 2], [0, 0]]
    assert data[7]["boundary_conditions"].tolist() == [[2, 2]] * 3
    plain = well.WellDataset(path=str(dataset), well_split_name="train")[0]
    ours = read_trajectory(list_trajectories(dataset, "train")[0])
    np.testing.assert_array_equal(plain["input_fields"][0, ..., 0], ours.pressure_T1XYZ[0, 0])
    np.testing.assert_array_equal(np.moveaxis(plain["input_fields"][0, ..., 1:].numpy(), -1, 0), ours.velocity_T3XYZ[0])


def test_provenance_describes_the_simulation(dataset: Path) -> None:
    provenance = read_provenance(dataset / "data/valid/porous_media_0000.hdf5")
    assert provenance["label"] == "synthetic"
    assert "lattice units" in str(provenance["units"])
    assert provenance["seed"] == 0
    assert provenance["complete"]
    parameters = provenance["parameters"]
    assert isinstance(parameters, dict)
    assert parameters["reynolds"] > 0
    assert 0 < parameters["mach"] < 0.6


def test_a_second_run_keeps_complete_files_and_regenerates_missing_ones(copy: Path) -> None:
    before = files(copy)
    (copy / "data/train/open_channel_0001.hdf5").unlink()
    torn = copy / "data/valid/porous_media_0000.hdf5"
    torn.write_bytes(torn.read_bytes()[:20_000])
    old, fresh = (copy / f"data/train/.open_channel_0001.hdf5.{pid}.tmp" for pid in (98, 99))
    for leftover in (old, fresh):
        leftover.write_bytes(b"left by a killed run")
    os.utime(old, (0, 0))
    stats = (copy / "stats.yaml").read_bytes()
    generate(config(), copy, quiet)
    assert fresh.exists(), "a fresh one may belong to a run beside this one"
    assert not old.exists()
    after = files(copy)
    regenerated = {"data/train/open_channel_0001.hdf5", "data/valid/porous_media_0000.hdf5"}
    assert set(after) == set(before)
    assert {name for name in before if before[name] != after[name]} == regenerated
    assert (copy / "stats.yaml").read_bytes() == stats, "the remade files hold the same bits"


def test_the_summary_states_mach_reynolds_and_units(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = yaml.safe_load((copy / "dataset.yaml").read_text())
    assert summary["label"] == "synthetic"
    assert list(summary["domains"]) == ["open_channel", "porous_media"]
    for name, domain in summary["domains"].items():
        assert domain["trajectories"] == TRAJECTORIES
        assert domain["snapshots"] == 4 * 3
        assert domain["time_steps_between_snapshots"] == 4
        assert domain["viscosity"] == config().domains.model_dump()[name]["viscosity"]
        for key in ("reynolds", "mach"):
            of_files = [read_provenance(path)[key] for path in sorted(copy.glob(f"data/*/{name}_*.hdf5"))]
            assert domain[key] == [min(of_files), max(of_files)]
    assert "dt = viscosity * dx^2 / nu" in summary["units"]["time_step"]
    assert "rho * (dx / dt)^2" in summary["units"]["pressure"]
    generate(config(), copy, quiet)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["[data]", "domain", "trajectories", "viscosity", "Reynolds", "number", "Mach", "number"]
    assert [line.split()[1:4] for line in lines[1:]] == [["open_channel", "4", "0.005"], ["porous_media", "4", "0.02"]]


def test_a_run_killed_half_way_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: Path) -> None:
    done = 0

    def interrupted(iterable: Any, desc: str, total: int) -> Any:
        nonlocal done
        for item in iterable:
            done += 1
            if done == 3:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        generate(config(), tmp_path, interrupted)
    kept = files(tmp_path)
    assert kept
    assert not (tmp_path / "stats.yaml").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    generate(config(), tmp_path, quiet)
    assert kept.items() <= files(tmp_path).items()
    assert (tmp_path / "stats.yaml").read_bytes() == (dataset / "stats.yaml").read_bytes()


def test_trajectories_do_not_depend_on_their_number(dataset: Path, tmp_path: Path) -> None:
    fewer = config(
        domains={
            "open_channel": None,
            "porous_media": {**FAST, "grain": 3.0, "trajectories": {**TRAJECTORIES, "train": 1}},
        }
    )
    generate(fewer, tmp_path, quiet)
    for name in ("data/train/porous_media_0000.hdf5", "data/test/porous_media_0000.hdf5"):
        assert (
            read_trajectory(tmp_path / name).velocity_T3XYZ.tobytes()
            == read_trajectory(dataset / name).velocity_T3XYZ.tobytes()
        )


@pytest.mark.parametrize(("flows", "parallel"), [(1, False), (2, False), (1, True)])
def test_files_do_not_depend_on_threads(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flows: int, parallel: bool
) -> None:
    """One flow at a time, two at a time, and one that uses all threads give the same bytes."""
    monkeypatch.setattr("shodh_moe.data.generation.simulation_threads", lambda config, cores: flows)
    monkeypatch.setattr("shodh_moe.data.generation._is_large", lambda config: parallel)
    generate(config(), tmp_path, quiet)
    assert made(tmp_path) == made(dataset)


def test_splits_and_domains_share_no_trajectory(dataset: Path) -> None:
    flows = {read_trajectory(path).velocity_T3XYZ.tobytes() for path in dataset.rglob("*.hdf5")}
    assert len(flows) == 8


def test_another_seed_regenerates_every_file(copy: Path) -> None:
    before = files(copy)
    generate(config(seed=1), copy, quiet)
    assert all(before[name] != mtime for name, mtime in files(copy).items())


def test_unexpected_files_are_refused(copy: Path) -> None:
    (copy / "data/test/other.hdf5").write_bytes(b"x")
    with pytest.raises(UserError, match=r"other\.hdf5.*data\.name"):
        generate(config(), copy, quiet)


def test_statistics_are_those_of_the_training_split(dataset: Path) -> None:
    train = [read_trajectory(record) for record in list_trajectories(dataset, "train")]
    stats = yaml.safe_load((dataset / "stats.yaml").read_text())
    u = np.concatenate([t.velocity_T3XYZ for t in train]).astype(np.float64)
    p = np.concatenate([t.pressure_T1XYZ for t in train]).astype(np.float64)
    dp = np.concatenate([np.diff(t.pressure_T1XYZ.astype(np.float64), axis=0) for t in train])
    np.testing.assert_allclose(stats["rms"]["velocity"], np.sqrt((u**2).mean((0, 2, 3, 4))), rtol=1e-10)
    np.testing.assert_allclose(stats["mean"]["velocity"], u.mean((0, 2, 3, 4)), rtol=1e-8, atol=1e-14)
    np.testing.assert_allclose(stats["std"]["pressure"], p.std(), rtol=1e-10)
    np.testing.assert_allclose(stats["rms_delta"]["pressure"], np.sqrt((dp**2).mean()), rtol=1e-5)
    assert set(stats["mean_delta"]) == {"velocity", "pressure"}
    assert "solid" in stats["std"]
    loaded = FieldStats.load(dataset)
    np.testing.assert_allclose(
        [loaded.velocity_rms, loaded.pressure_rms], [np.sqrt((u**2).mean()), np.sqrt((p**2).mean())]
    )


def test_statistics_ignore_the_other_splits(copy: Path) -> None:
    before = (copy / "stats.yaml").read_bytes()
    with h5py.File(copy / "data/valid/open_channel_0000.hdf5", "r+") as file:
        file["t1_fields/velocity"][:] = 100.0
    generate(config(), copy, quiet)
    assert (copy / "stats.yaml").read_bytes() == before


@pytest.mark.parametrize("text", ["", "a: [", "rms: {velocity: [1, 1, 1]}", "rms: {velocity: .nan, pressure: 1}"])
def test_bad_statistics_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "stats.yaml").write_text(text)
    with pytest.raises(UserError, match=r"stats\.yaml"):
        FieldStats.load(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        FieldStats.load(tmp_path / "nowhere")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(UserError, match=r"need 0\.00\d* GB but .* free"):
        generate(config(), tmp_path / "new", quiet)
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fills_up_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    monkeypatch.setattr("shodh_moe.data.generation.available_cores", lambda: 1)  # one flow at a time, in order
    with pytest.raises(UserError, match=r"cannot write .*open_channel_0000\.hdf5: no space left"):
        generate(config(), tmp_path, quiet)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be_created_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot write"):
        generate(config(), tmp_path, quiet)


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """Fill a small disk in a mount namespace: HDF5, not Python, hits the failure in the middle of a file."""
    mount = f"mount -t tmpfs -o size=8m none {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here; the injected errors stand in")
    script = f"""
import os
from pathlib import Path
from shodh_moe.base.command import exit_code
from tests.data.test_generate import config, filling
from shodh_moe.data import generate, open_trajectories
folder = Path({str(tmp_path)!r}) / "set"
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # one flow after the other
code = exit_code(lambda: generate(config(), folder, filling(folder)))
left = [path for path in folder.rglob("*") if path.is_file() and path.name != "filler"]
print("code", code, "whole", sum(len(open_trajectories(path)) for path in left if path.suffix == ".hdf5"), len(left))
(folder / "filler").unlink()
generate(config(), folder, lambda iterable, desc, total: iterable)
print("made", len(list(folder.glob("data/*/*.hdf5"))), (folder / "stats.yaml").exists())
"""
    (tmp_path.parent / "full.py").write_text(script)
    command = f"{mount} && exec {sys.executable} {tmp_path.parent / 'full.py'}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ended, made = [line for line in done.stdout.splitlines() if not line.startswith("[data]")]
    _, code, _, whole, left = ended.split()
    assert int(code) == EXIT_USER_ERROR
    assert (whole, left) == ("2", "2"), "the remaining files are complete, and there are no others"
    assert made == "made 8 True"
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"error: cannot write {tmp_path}/set/data/"), done.stderr
    assert "no space left on the disk" in done.stderr


def filling(folder: Path) -> Any:
    """A progress callback that leaves room for half a file on the disk once two files exist."""

    def progress(iterable: Any, desc: str, total: int) -> Any:
        for number, item in enumerate(iterable, 1):
            if number == 2:
                free = shutil.disk_usage(folder).free
                (folder / "filler").write_bytes(bytes(free - 100_000))
            yield item

    return progress


# Corrupted writes.


def corrupt_writes(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Make every write to a new file store ``change(bytes)``."""
    write = _Sink.write
    monkeypatch.setattr(_Sink, "write", lambda self, data: write(self, memoryview(change(bytearray(data)))))


def test_a_file_with_corrupted_values_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flip_bit(block: bytearray) -> bytearray:
        if len(block) > 16**3 * 4:  # a field
            block[len(block) // 2] ^= 1
        return block

    corrupt_writes(monkeypatch, flip_bit)
    with pytest.raises(UserError, match=r"_000\d\.hdf5 is not correct when read back .*other values"):
        generate(config(), tmp_path, quiet)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_file_whose_bytes_are_lost_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt_writes(monkeypatch, lambda block: bytearray(len(block)))
    with pytest.raises(UserError, match=r"_000\d\.hdf5 is not correct when read back .*not an HDF5 file"):
        generate(config(), tmp_path, quiet)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_config_without_domains_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no domain"):
        generate(config(domains={"open_channel": None, "porous_media": None}), tmp_path, quiet)


# Parts, as in a job array.


def run_part(here: Path, *arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        return main(["--config", "tiny.yaml", *arguments])


def made(here: Path) -> dict[str, str]:
    return {str(p.relative_to(here)): sha256(p) for p in sorted((here / "data").rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of the files that tests/tiny.py's config generates, by name."""
    here = tmp_path_factory.mktemp("whole")
    write_config(here)
    assert run_part(here) == EXIT_DONE
    return made(here)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    write_config(tmp_path)
    return tmp_path


@pytest.mark.parametrize("of", [2, 3, 12])
def test_parts_in_any_order_make_the_same_files(
    here: Path, whole: dict[str, str], of: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in reversed(range(of)):
        assert run_part(here, "--part", str(part), "--of", str(of)) == EXIT_DONE
        left = 8 - len(list(here.rglob("*.hdf5")))
        assert list(here.rglob("stats.yaml")) == [] or not left
        assert (f"{left} of 8 trajectories are still missing" in capsys.readouterr().out) == bool(left)
    assert made(here) == whole
    assert run_part(here, "--part", "0", "--of", str(of)) == EXIT_DONE
    assert "[data] unchanged" in capsys.readouterr().out
    assert made(here) == whole


def test_each_task_of_srun_generates_one_part(
    here: Path, whole: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("PMI_SIZE", "2")
    for task in ("0", "1"):
        monkeypatch.setenv("SLURM_PROCID", task)
        assert not list(here.rglob("stats.yaml"))
        assert run_part(here) == EXIT_DONE
    assert made(here) == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "4", "--of", "4"], "--part 4 --of 4: parts are numbered from 0 to 3"),
        (["--part", "-1", "--of", "4"], "--part -1 --of 4: parts are numbered from 0 to 3"),
        (["--part", "0", "--of", "0"], "--part 0 --of 0"),
        (["--part", "1"], "--part and --of belong together"),
        (["--of", "2"], "--part and --of belong together"),
    ],
)
def test_invalid_parts_are_refused(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run_part(here, *arguments) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (here / "data").exists()


def test_the_estimate_generates_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_part(here, "--estimate") == EXIT_DONE
    out = capsys.readouterr().out
    assert out.startswith("[data] 8 trajectories, 40 snapshots of 16^3: a minute or so on th"), out
    assert re.search(r", 4\.\d MB \(.* free\)$", out), out
    assert run_part(here, "--estimate", "--part", "0", "--of", "4") == EXIT_DONE
    assert capsys.readouterr().out.startswith("[data] 2 of 8 trajectories, 10 snapshots")
    assert run_part(here, "--estimate", "data.path=.") == EXIT_USER_ERROR
    assert not (here / "data").exists()


def test_the_estimate_is_printed_before_a_small_disk_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    assert run_part(here, "--estimate") == EXIT_USER_ERROR
    output = capsys.readouterr()
    assert "40 snapshots of 16^3" in output.out
    assert "8 trajectories need 0.00 GB but" in output.err


def start(here: Path, *settings: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "launch" / "generate_data.py"), "--config", "tiny.yaml", *settings]
    return subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.distributed
def test_two_generators_may_share_a_folder(here: Path, whole: dict[str, str]) -> None:
    for process in [start(here), start(here)]:
        out, error = process.communicate(timeout=100)
        assert process.returncode == EXIT_DONE, out + error
    assert made(here) == whole


@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_a_part_at_once_with_the_requeue_exit_code(here: Path, number: signal.Signals) -> None:
    endless = "data.domains.porous_media.spinup_steps=100000000"
    process = start(here, "--part", "0", "--of", "2", endless)
    deadline = time.monotonic() + 60
    while not list(here.glob("data/*/data/train/open_channel_0000.hdf5")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    out, error = process.communicate(timeout=10)
    assert process.returncode == EXIT_REQUEUE, out + error
    assert "stopped by a signal: run the same command to resume" in out
