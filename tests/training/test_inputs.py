"""Ranks refuse a checkpoint that was trained on something else, with `auto` and as `--resume CHECKPOINT`."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import pytest

from shodh_moe.checkpoint import CheckpointReader
from shodh_moe.checkpoint.state import load_state, seal
from tests.training.launch import launch
from tests.training.synthetic import write_case

pytestmark = pytest.mark.distributed
WORKER = Path(__file__).with_name("worker_pretrain.py")
ORIGIN = {"tokenizer_sha256": "a" * 64, "data": "11111111", "stats_sha256": "b" * 64, "grid": [16, 16, 16], "copies": 2}


def record(folder: Path, **changes: object) -> None:
    for path in (folder / "latents").glob("*.hdf5"):
        with h5py.File(path, "r+") as file:
            file.attrs.update({**ORIGIN, **changes})


def train(folder: Path, name: str, resume: str = "auto", *settings: str) -> tuple[int, str]:
    done = launch(1, WORKER, str(folder), str(folder / name), resume, *settings)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A case with the run ``first``, stopped after 2 of 6 steps."""
    folder = write_case(tmp_path_factory.mktemp("inputs"))
    record(folder)
    code, output = train(folder, "first", "auto", "training.steps=2")
    assert code == 0, output
    return folder


def test_a_checkpoint_records_what_its_latents_were_made_from(folder: Path) -> None:
    assert CheckpointReader(folder / "first/checkpoints/2").state["inputs"] == ORIGIN


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokenizer_sha256": "c" * 64}, "the tokenizer (aaaaaaaaaaaa then, cccccccccccc now)"),
        ({"data": "22222222", "copies": 3}, "the data (11111111 then, 22222222 now), the number of latent copies (2"),
    ],
)
def test_a_checkpoint_of_other_inputs_is_refused_by_name(folder: Path, changes: dict[str, object], named: str) -> None:
    record(folder, **changes)
    shutil.rmtree(folder / "second", ignore_errors=True)
    shutil.copytree(folder / "first", folder / "second")
    checkpoint = str(folder / "first/checkpoints/2")
    for run, resume in (("second", "auto"), ("third", checkpoint)):
        code, output = train(folder, run, resume)
        assert code == 2, output
        assert "is refused: it was trained on something else" in output
        assert named in output
        assert not (folder / run / "checkpoints/3").exists()


def test_a_checkpoint_of_an_earlier_version_resumes_with_a_line(folder: Path) -> None:
    record(folder, data="33333333")
    old = Path(shutil.copytree(folder / "first", folder / "old")) / "checkpoints/2"
    state = {key: value for key, value in load_state(old).items() if key not in ("inputs", "sha256")}
    (old / "state.json").write_text(seal(state))
    code, output = train(folder, "old", "auto", "training.steps=3")
    assert code == 0, output
    assert "is of an earlier version and does not record its data and latents" in output
    assert f"from step 2 of {old}" in output
    assert CheckpointReader(folder / "old/checkpoints/3").state["inputs"]["data"] == "33333333"
