"""Bad data, tokenizers and folders give exit code 2, one line on stderr, and no partial files."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml

from shodh_moe.cli import main
from shodh_moe.config import TokenizerConfig
from shodh_moe.data import generation, is_complete
from shodh_moe.runs import pipeline
from shodh_moe.tokenizer import Tokenizer
from tests.tiny import CONFIG, config, refused, shodh, tree, write_config, write_dataset


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a config in it."""
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def sound_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("theirs"))


@pytest.fixture
def dataset(sound_dataset: Path, here: Path) -> Path:
    """An existing dataset that a test may damage."""
    return Path(shutil.copytree(sound_dataset, here / "theirs"))


def save_tokenizer(folder: Path, grid: list[int]) -> Path:
    folder.mkdir()
    Tokenizer(TokenizerConfig.model_validate(CONFIG["tokenizer"]), grid).save(folder)
    return folder


@pytest.fixture
def tokenizer(here: Path) -> Path:
    return save_tokenizer(here / "tok", [16, 16, 16])


# Layouts.


@pytest.mark.parametrize(
    ("ranks", "slabs", "says"),
    [
        (4, 4, "parallel.context_size 4 does not divide the 2 tokens along the first axis"),
        (3, 2, "parallel.context_size 2 does not divide the world size 3: set it to 1"),
    ],
)
def test_slabs_that_do_not_fit_are_refused(
    here: Path, capfd: pytest.CaptureFixture[str], ranks: int, slabs: int, says: str
) -> None:
    settings = (f"parallel.processes={ranks}", f"parallel.context_size={slabs}")
    refused(capfd, "run", "--config", "tiny.yaml", *settings, says=(says,))
    refused(capfd, "plan", "--config", "tiny.yaml", *settings, says=(says,))


# Data files.


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def nan_in_velocity(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["t1_fields/velocity"][0, 1, 2, 3, 4, 0] = np.nan


def other_fields(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.move("t1_fields/velocity", "t1_fields/magnetic_field")


def other_domain(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["domain"] = "unheard_of"


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, "truncated: copy or generate it again"),
        (empty, "is empty (0 bytes)"),
        (nan_in_velocity, "velocity of snapshot 1 has values that are not finite"),
        (other_fields, "has no t1_fields/velocity"),
    ],
)
def test_a_bad_data_file_is_found_before_training(
    dataset: Path, capfd: pytest.CaptureFixture[str], split: str, damage: Callable[[Path], None], says: str
) -> None:
    path = dataset / "data" / split / "wild.hdf5"
    damage(path)
    before = tree(dataset.parent)
    refused(capfd, "run", "--config", "tiny.yaml", "data.path=theirs", says=(f"data/{split}/wild.hdf5", says))
    assert tree(dataset.parent) == before


def test_a_missing_data_file_or_split_is_named(dataset: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ("run", "--config", "tiny.yaml", "data.path=theirs")
    (dataset / "data/test/wild.hdf5").unlink()
    refused(capfd, *arguments, says=("theirs/data/test", "domains calm", "training split calm, wild"))
    (dataset / "data/test/calm.hdf5").unlink()
    refused(capfd, *arguments, says=("no HDF5 files in theirs/data/test",))
    (dataset / "stats.yaml").unlink()
    refused(capfd, *arguments, says=("theirs/stats.yaml does not exist",))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.grid=[32, 16, 16]", ("has grid [16, 16, 16], not [32, 16, 16]", "set data.grid")),
        ("model.history=5", ("has 5 snapshots, too few for model.history 5, which needs 6: lower that",)),
        ("model.strides=[1, 4]", ("too few for model.history 2 with model.strides 4, which needs 9",)),
        ("training.unroll=4", ("too few for model.history 2 with training.unroll 4, which needs 6",)),
        ("training.batch_size=3", ("training.batch_size 3", "2 domains")),
    ],
)
def test_a_dataset_that_does_not_fit_the_config_is_refused(
    dataset: Path, capfd: pytest.CaptureFixture[str], override: str, says: tuple[str, ...]
) -> None:
    before = tree(dataset.parent)
    refused(capfd, "run", "--config", "tiny.yaml", "data.path=theirs", override, says=says)
    assert tree(dataset.parent) == before


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("training.unroll=4",), ("model.history 2 with training.unroll 4 needs 6 snapshots", "the 5 snapshots")),
        (("model.strides=[3]",), ("model.history 2 with model.strides 3 needs 7 snapshots", "raise data.snapshots")),
        (("model.strides=[2, 1]",), ("model.strides", "different numbers in increasing order")),
        (("model.strides=[]",), ("model.strides", "one or more")),
        (("evaluation.stride=2",), ("evaluation.stride 2 is not among model.strides [1]", "or add it there")),
        (("training.unroll=0",), ("training.unroll", "greater than 0")),
        (("training.history_noise=-0.1",), ("training.history_noise", "greater than or equal to 0")),
        (("training.unroll_gradient=first",), ("training.unroll_gradient", "'last' or 'through'")),
    ],
)
def test_samples_that_no_trajectory_can_have_are_refused_before_data_are_made(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    overrides: tuple[str, ...],
    says: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    before = tree(tmp_path)
    refused(capfd, "run", "--config", "tiny.yaml", *overrides, says=says)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("attribute", ["domain", "dataset_name"])
@pytest.mark.parametrize(
    "name", ["x/../../../../escaped", "..", "\x1b[2Jwild", "wild\nerror: no", "<script>", "w" * 101]
)
def test_a_domain_whose_name_is_no_part_of_a_file_name_is_refused(
    dataset: Path, capfd: pytest.CaptureFixture[str], attribute: str, name: str
) -> None:
    for path in dataset.glob("data/*/wild.hdf5"):
        with h5py.File(path, "r+") as file:
            del file.attrs["domain"]
            file.attrs[attribute] = name
    before = tree(dataset.parent)
    says = ("wild.hdf5", f"attribute {attribute} is ", "letters, digits")
    assert "\x1b" not in refused(capfd, "run", "--config", "tiny.yaml", "data.path=theirs", says=says)
    refused(capfd, "data", "preview", "theirs", "--output", "pictures", says=says)
    for command in ("check", "info"):
        assert main(["data", command, "theirs"]) == 2
        shown = capfd.readouterr().out
        assert f"attribute {attribute} is " in shown
        assert "\x1b" not in shown
        assert "\nerror: no" not in shown
    assert tree(dataset.parent) == before


@pytest.mark.parametrize("where", ["object", "attribute", "value", "link", "file name"])
def test_escape_bytes_of_a_dataset_do_not_reach_the_terminal(
    dataset: Path, capfd: pytest.CaptureFixture[str], where: str
) -> None:
    path = dataset / "data/train/wild.hdf5"
    with h5py.File(path, "r+") as file:
        if where == "object":
            file["scalars/\x1b[2Jviscosity"] = 1.0
        elif where == "attribute":
            file.attrs["\x1b[2Jversion"] = 1
        elif where == "link":
            file["link"] = h5py.SoftLink("/\x1b[2J")
        elif where == "value":
            file["provenance"].attrs["source"] = file["provenance"].attrs["units"] = "\x1b[2J simulated"
            file["boundary_conditions/x_periodic"].attrs["bc_type"] = "\x1b[2J"
    if where == "file name":
        path.rename(dataset / "data/train/\x1b[2Jwild.hdf5")
    for command in ("check", "info", "preview"):
        output = ("--output", "pictures") if command == "preview" else ()
        main(["data", command, "theirs", *output])
        out, err = capfd.readouterr()
        assert "\x1b" not in out + err.replace("\x1b[A", ""), command
        assert out + err
    assert "\\x1b" in out + err or where == "value"


def test_a_domain_in_only_one_split_is_refused(dataset: Path, capfd: pytest.CaptureFixture[str]) -> None:
    other_domain(dataset / "data/valid/wild.hdf5")
    refused(
        capfd,
        "data",
        "generate",
        "--config",
        "tiny.yaml",
        "data.path=theirs",
        says=("valid", "unheard_of", "calm, wild"),
    )


def test_a_sound_dataset_is_accepted_and_not_changed(dataset: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = tree(dataset)
    assert shodh("data", "generate", "data.path=theirs") == 0
    assert tree(dataset) == before


@pytest.mark.parametrize("damage", [remove, truncate, empty])
def test_a_damaged_generated_file_is_regenerated(here: Path, damage: Callable[[Path], None]) -> None:
    assert shodh("data", "generate") == 0
    made = next(here.glob("data/tiny-*"))
    before = tree(made)
    damage(made / "data/train/porous_media_0001.hdf5")
    assert not is_complete(config().data, made)
    assert shodh("data", "generate") == 0
    after = tree(made)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"data/train/porous_media_0001.hdf5", "stats.yaml", "manifest.json"}


def test_ctrl_c_while_generating_keeps_the_finished_files(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, run = [], generation.simulate_and_write

    def interrupt(job: Any, *arguments: object) -> Path:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(job.path)
        return run(job, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "simulation_threads", lambda config, cores: 1)
        patch.setattr(generation, "simulate_and_write", interrupt)
        assert shodh("data", "generate") == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted: no partial files are left")
    assert not list(here.rglob("manifest.json"))
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*.hdf5")}
    assert len(before) == 3
    assert shodh("data", "generate") == 0
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert len(list(here.rglob("*.hdf5"))) == 8


# Tokenizers.


def test_a_grid_that_patches_do_not_divide_is_refused(dataset: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_tokenizer(dataset.parent / "tok", [16, 16, 32])
    before = tree(dataset.parent)
    says = ("data.grid is [16, 16, 16], not a multiple of 24", "the nearest sizes are [24, 24, 24]", "model.patch 3")
    refused(capfd, "run", "--config", "tiny.yaml", "data.path=theirs", "tokenizer.path=tok", "model.patch=3", says=says)
    assert tree(dataset.parent) == before


def test_a_missing_start_is_refused(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = tree(here)
    refused(
        capfd, "run", "--config", "tiny.yaml", "start=nowhere", says=("start: nowhere is not a run folder", "or null")
    )
    assert tree(here) == before


@pytest.mark.parametrize("link", ["runs", "data", "tokenizers", "runs/tiny"])
def test_a_link_to_nothing_is_refused_before_any_work(here: Path, capfd: pytest.CaptureFixture[str], link: str) -> None:
    (here / link).parent.mkdir(exist_ok=True)
    (here / link).symlink_to(here / "scratch that is gone")
    before = tree(here)
    says = (f"{link} is a link to {here}/scratch that is gone, which does not exist", "create that folder")
    refused(capfd, "run", "--config", "tiny.yaml", says=says)
    assert tree(here) == before


def rewrite(key: str, value: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "tokenizer.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    return damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (rewrite("fields", ["velocity", "pressure", "density"]), ("velocity, pressure, density", "set tokenizer.path")),
        (rewrite("grid", None), ("tokenizer.json is damaged",)),
        (rewrite("config", {"latent_chanels": 3}), ("tokenizer.json is damaged or of another version",)),
        (lambda folder: (folder / "tokenizer.json").write_text('{"config"'), ("tokenizer.json is damaged",)),
        (lambda folder: truncate(folder / "tokenizer.safetensors"), ("tokenizer.safetensors is damaged",)),
        (lambda folder: (folder / "tokenizer.json").unlink(), ("holds no finished tokenizer", "shodh tokenizer train")),
    ],
)
def test_an_unusable_tokenizer_is_refused(
    dataset: Path,
    tokenizer: Path,
    capfd: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    says: tuple[str, ...],
) -> None:
    damage(tokenizer)
    before = tree(dataset.parent)
    refused(capfd, "run", "--config", "tiny.yaml", "data.path=theirs", "tokenizer.path=tok", says=says)
    assert tree(dataset.parent) == before


def test_latents_of_a_given_tokenizer_are_stored_outside_its_folder(dataset: Path, tokenizer: Path) -> None:
    before = tree(tokenizer)
    settings = ["data.path=theirs", "tokenizer.path=tok"]
    assert shodh("tokenizer", "encode", *settings) == 0
    assert tree(tokenizer) == before
    (cached,) = dataset.parent.glob("tokenizers/*/latents/*")
    # A different tokenizer in the same place has different latents.
    shutil.rmtree(tokenizer)
    save_tokenizer(tokenizer, [16, 16, 16])
    assert shodh("tokenizer", "encode", *settings) == 0
    assert len(list(dataset.parent.glob("tokenizers/*/latents/*"))) == 2
    assert cached.exists()


def test_a_damaged_latent_cache_is_named(dataset: Path, tokenizer: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = ["data.path=theirs", "tokenizer.path=tok"]
    assert shodh("tokenizer", "encode", *settings) == 0
    (path,) = dataset.parent.glob("tokenizers/*/latents/*/valid.hdf5")
    truncate(path)
    for command in (["tokenizer", "encode"], ["pretrain"]):
        refused(capfd, *command, "--config", "tiny.yaml", *settings, says=("valid.hdf5", "delete", "run again"))


# Folders that cannot be written.


def test_a_run_folder_of_another_config_names_the_keys(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pipeline.claim_run_folder(config())
    before = tree(here)
    says = ("runs/tiny", "model.moe.num_experts (2 there, 4 here)", "training.steps (4 there, 9 here)", "--name")
    changed = ["training.steps=9", "model.moe.num_experts=4", "evaluation.rollout_steps=1"]
    error = refused(capfd, "run", "--config", "tiny.yaml", *changed, says=says)
    assert "rollout_steps" not in error
    assert tree(here) == before
    # Layout, logging and kernel libraries do not change the trained model.
    layout = {"parallel": {"ep_size": 1, "zero_stage": 2}, "telemetry": {"every": 3}}
    pipeline.claim_run_folder(config(**layout, training={**CONFIG["training"], "keep_last": 5}), write=False)
    # A key added after the run started has its default value there.
    stored = yaml.safe_load((here / "runs/tiny/config.yaml").read_text())
    del stored["telemetry"], stored["training"]["precision"]
    (here / "runs/tiny/config.yaml").write_text(yaml.safe_dump(stored))
    pipeline.claim_run_folder(config(), write=False)
    (here / "runs/tiny/config.yaml").write_text("half: [")
    refused(capfd, "run", "--config", "tiny.yaml", says=("runs/tiny/config.yaml is damaged", "--name"))


@pytest.mark.parametrize("key", ["runs", "data.root", "tokenizer.root"])
def test_a_folder_below_a_file_is_refused(here: Path, capfd: pytest.CaptureFixture[str], key: str) -> None:
    (here / "file").write_text("")
    refused(capfd, "run", "--config", "tiny.yaml", f"{key}=file/x", says=("file/x", "a file stands", "another folder"))
    assert set(tree(here)) == {"tiny.yaml", "file"}


@pytest.mark.parametrize("key", ["runs", "data.root", "tokenizer.root"])
def test_a_folder_without_write_permission_is_refused(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """Simulates users other than root, who may write anywhere."""
    (here / "locked").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "locked")
    says = ("locked/x", "permission denied; choose another folder")
    refused(capfd, "run", "--config", "tiny.yaml", f"{key}=locked/x", says=says)
    assert set(tree(here)) == {"tiny.yaml", "locked"}


@pytest.mark.parametrize(
    ("error", "says"),
    [(OSError(errno.ENOSPC, "No space left on device"), "no space left"), (PermissionError(13, "x"), "permission")],
)
@pytest.mark.parametrize("command", ["data generate", "tokenizer train", "tokenizer encode", "pretrain"])
def test_a_disk_that_fills_up_during_a_stage_leaves_no_files(
    dataset: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    error: OSError,
    says: str,
) -> None:
    settings = {
        "data generate": [],
        "tokenizer train": ["data.path=theirs"],
        "tokenizer encode": ["data.path=theirs", "tokenizer.path=tok"],
        "pretrain": ["data.path=theirs", "tokenizer.path=tok"],
    }[command]
    if command == "pretrain":
        assert shodh("tokenizer", "encode", *settings) == 0
    before = {name for name in tree(dataset.parent) if (dataset.parent / name).is_file()}

    def full(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("os.fsync", full)
    capsys.readouterr()
    assert shodh(*command.split(), *settings) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if not line.startswith(("simulating", "encode latents"))] == lines[-1:]
    assert lines[-1].startswith("error: cannot write ")
    assert says in lines[-1]
    assert {name for name in tree(dataset.parent) if (dataset.parent / name).is_file()} == before


@pytest.mark.parametrize("size", [16, 48])
def test_a_full_file_system(dataset: Path, tokenizer: Path, size: int) -> None:
    """HDF5, not Python, reports that a file system of a few KB is full, before the first latents or after some."""
    (dataset.parent / "small").mkdir()
    mount = f"mount -t tmpfs -o size={size}k none small"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here; the injected errors stand in")
    command = f"{sys.executable} -m shodh_moe.cli tokenizer encode --config tiny.yaml data.path=theirs"
    script = f"{mount} && {command} tokenizer.path=tok tokenizer.root=small; echo $?; find small -type f"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["2"], (
        done.stdout + done.stderr
    )  # only the exit code, and no file names after it
    lines = [line for line in done.stderr.splitlines() if not line.startswith("encode latents: ")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: cannot write small/")
    assert "no space left on the disk" in lines[0]
