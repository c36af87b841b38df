"""A run, a tokenizer or latents whose inputs have changed are refused by name, before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml

from shodh_moe.base.errors import UserError
from shodh_moe.checkpoint import CheckpointWriter
from shodh_moe.checkpoint.state import load_state, seal
from shodh_moe.cli import main
from shodh_moe.config import Config
from shodh_moe.config.inputs import difference, recorded_inputs, tokenizer_inputs
from shodh_moe.config.load import load_config
from shodh_moe.config.paths import Paths, resolve_paths
from shodh_moe.runs import pipeline
from shodh_moe.runs.checks import check
from shodh_moe.tokenizer import Tokenizer
from shodh_moe.tokenizer.encoding import latent_inputs
from shodh_moe.tokenizer.latents import inputs_of_latents
from shodh_moe.tokenizer.tokenizer import tokenizer_sha256
from tests.tiny import refused, tree, write_config, write_dataset


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    return tmp_path


@pytest.fixture
def given(here: Path) -> Config:
    """A config of given data, with its tokenizer, latents and a checkpoint."""
    write_dataset(here / "theirs")
    settings = load_config("tiny.yaml", ["data.path=theirs", "parallel.processes=1"])
    (here / "tiny.yaml").write_text(yaml.safe_dump(settings.model_dump()))
    make_tokenizer(settings)
    pipeline.make_latents(settings, resolve_paths(settings))
    save_checkpoint(settings)
    return settings


def make_tokenizer(config: Config, seed: int = 0) -> Paths:
    """Write an untrained tokenizer, with the record of one that has been trained."""
    paths = resolve_paths(config)
    torch.manual_seed(seed)
    paths.tokenizer.mkdir(parents=True, exist_ok=True)
    Tokenizer(config.tokenizer, config.data.grid).save(paths.tokenizer, tokenizer_inputs(config, paths))
    return paths


def save_checkpoint(config: Config) -> Path:
    """Write the checkpoint of the last step, with a single weight, and the config of the run."""
    paths = resolve_paths(config)
    facts = {"config": config.model_dump(), "inputs": latent_inputs(config, paths)}
    facts["tokenizer_sha256"] = tokenizer_sha256(paths.tokenizer)
    writer = CheckpointWriter(paths.run / "checkpoints", 0, 1, 1, 0, "test")
    writer.save(config.training.steps, [], {}, {}, facts)
    writer.finish()
    (paths.run / "config.yaml").write_text(yaml.safe_dump(config.model_dump()))
    return paths.run / "checkpoints" / str(config.training.steps)


def rewrite_state(checkpoint: Path, *forget: str) -> None:
    """Remove entries from a checkpoint's state, as if an earlier version had written it."""
    state = {key: value for key, value in load_state(checkpoint).items() if key not in (*forget, "sha256")}
    (checkpoint / "state.json").write_text(seal(state))


def change_one_value(here: Path) -> None:
    with h5py.File(here / "theirs/data/train/calm.hdf5", "r+") as file:
        file["t1_fields/velocity"][0, 3, 1, 1, 1, 0] += 1e-3


def change_statistics(here: Path) -> None:
    stats = yaml.safe_load((here / "theirs/stats.yaml").read_text())
    stats["rms"]["pressure"] *= 2
    (here / "theirs/stats.yaml").write_text(yaml.safe_dump(stats))


def train_another_tokenizer(here: Path) -> None:
    make_tokenizer(load_config("tiny.yaml"), seed=1)
    shutil.rmtree(next(here.glob("tokenizers/*/latents")))


CHANGES = [
    (change_one_value, "the data ("),
    (change_statistics, "the statistics of the data ("),
    (train_another_tokenizer, "the tokenizer ("),
]


def test_a_run_with_the_same_inputs_is_unchanged(given: Config, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("make_data", "make_tokenizer", "make_latents", "pretrain"):
        getattr(pipeline, stage)(given, resolve_paths(given))
    said = [line.partition(",")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert said == ["[data] given", "[tokenizer] unchanged", "[latents] unchanged", "[pretrain] unchanged"]
    check(given, resolve_paths(given))


@pytest.mark.parametrize("command", [("run",), ("pretrain",), ("evaluate",), ("tokenizer", "train")])
@pytest.mark.parametrize(("change", "named"), CHANGES)
def test_a_run_is_refused_once_an_input_has_changed(
    given: Config,
    capfd: pytest.CaptureFixture[str],
    command: tuple[str, ...],
    change: Callable[[Path], None],
    named: str,
) -> None:
    change(Path())
    before = tree(Path())
    says = ("checkpoint runs/tiny/checkpoints/4 is refused", named, "choose another name")
    refused(capfd, *command, "--config", "tiny.yaml", says=says)
    assert tree(Path()) == before


def test_another_name_trains_on_the_changed_data(given: Config) -> None:
    change_one_value(Path())
    other = given.model_copy(update={"name": "other"})
    check(other, resolve_paths(other))


@pytest.mark.parametrize(
    ("version", "named"),
    [
        (
            "shodh_moe.tokenizer.encoding.LATENTS_VERSION",
            "the version of the code that encodes latents (2 then, 99 now)",
        ),
        ("shodh_moe.config.inputs.SOLVER_VERSION", "the version of the code that generates data (1.1 then, 1.99 now)"),
    ],
)
def test_a_run_is_refused_by_a_version_that_makes_other_data_or_latents(
    here: Path, monkeypatch: pytest.MonkeyPatch, version: str, named: str
) -> None:
    generated = load_config("tiny.yaml", ["parallel.processes=1"])
    make_tokenizer(generated)
    save_checkpoint(generated)
    check(generated, resolve_paths(generated))
    monkeypatch.setattr(version, 99)
    with pytest.raises(UserError) as error:
        check(generated, resolve_paths(generated))
    assert named in str(error.value)


def test_a_run_is_refused_by_another_geometry_in_the_same_file(here: Path) -> None:
    solid = np.zeros((16, 16, 16), np.uint8)
    solid[4:9, 4:9, 4:9] = 1
    np.save("rock.npy", solid)
    settings = "data.domains.porous_media.geometry_file={path: rock.npy, solid_value: 1, periodic: true}"
    generated = load_config("tiny.yaml", ["parallel.processes=1", settings])
    paths = make_tokenizer(generated)
    save_checkpoint(generated)
    check(generated, paths)
    solid[0, 0, 0] = 1
    np.save("rock.npy", solid)
    assert resolve_paths(generated) == paths, "no setting has changed"
    with pytest.raises(UserError, match=r"runs/tiny/checkpoints/4 is refused.* the data \("):
        check(generated, paths)
    with pytest.raises(UserError, match=r"tokenizer .* was trained on something else.* the data \("):
        pipeline.make_tokenizer(generated, paths)


def test_latents_are_never_unchanged_after_their_data_have(here: Path) -> None:
    """Generated data have the same folder if the code or a geometry file changes, so their latents have too."""
    generated = load_config("tiny.yaml", ["parallel.processes=1"])
    paths = make_tokenizer(generated)
    write_dataset(paths.dataset)
    pipeline.make_latents(generated, paths)
    recorded = inputs_of_latents(paths.latents)
    assert recorded == json.loads(json.dumps({**latent_inputs(generated, paths), "latent_channels": 16}))
    write_dataset(paths.dataset, snapshots=6)
    for stage in (pipeline.make_latents, pipeline.pretrain):
        with pytest.raises(UserError, match=r"latents .* were made from something else.*the statistics of the data \("):
            stage(generated, paths)


def test_checkpoints_of_earlier_versions_are_refused_only_for_another_tokenizer(
    given: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = resolve_paths(given).run / "checkpoints/4"
    rewrite_state(checkpoint, "inputs")
    assert main(["pretrain", "--config", "tiny.yaml"]) == 0
    train_another_tokenizer(Path())
    refused(capfd, "run", "--config", "tiny.yaml", says=("is refused", "the tokenizer ("))
    rewrite_state(checkpoint, "inputs", "tokenizer_sha256")
    check(given, resolve_paths(given))


def test_a_record_compares_only_what_both_know() -> None:
    now: dict[str, Any] = {"data": "b", "grid": [1, 2, 3], "tokenizer_sha256": "c" * 64, "seed": 0}
    assert difference(now, now) == ""
    assert difference({}, now) == difference(now, {}) == difference({"data": ""}, now) == ""
    assert difference({**now, "data": "a"}, now) == "the data (a then, b now)"
    assert difference({**now, "tokenizer_sha256": "d" * 64, "seed": 1}, now) == (
        "the tokenizer (dddddddddddd then, cccccccccccc now), the seed of latent copies (1 then, 0 now)"
    )
    assert difference({**now, "foreign": 1}, now) == ""
    assert recorded_inputs({"tokenizer_sha256": "a"}) == {"tokenizer_sha256": "a"}
    assert recorded_inputs({"tokenizer_sha256": "a", "inputs": {"data": "b"}}) == {"data": "b"}
