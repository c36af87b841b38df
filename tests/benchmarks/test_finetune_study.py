"""The studies of fine-tuning and of unlike inputs, from a tiny model that is there already."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from shodh_moe.cli import main
from shodh_moe.config import Config
from shodh_moe.runs import pipeline
from tests.tiny import FLOW, write_dataset
from tests.trained import GRID, SNAPSHOTS, make_run, push
from tests.training.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600), pytest.mark.slow]

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"
PATHS = {"moe": {"expert_hidden": 16, "scope": "path", "num_experts": 2}}
launched: list[str] = []


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base model and the config of a study."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        push(write_dataset(folder / "theirs", GRID, SNAPSHOTS), {"calm": 4.0, "wild": 8.0})
        run = make_run(folder, PATHS, start=True)
        (folder / "study").mkdir()
        assert main(["checkpoint", "export", str(run), "--output", "study/base_model"]) == 0
    tree = {
        "base": str(run / "config.yaml"),
        "folder": "study",
        "domain": "open_channel",
        "settings": {key: value for key, value in FLOW.items() if key != "trajectories"},
        "snapshots": 5,
        "trajectories": {"train": 2, "valid": 1, "test": 1},
        "counts": [1],
        "ways": ["expert", "same_tokenizer"],
        "steps": 2,
        "learning_rates": {"all": 0.001, "expert": 0.001, "lora": 0.001},
        "seed": 0,
        "held_out": ["open_channel"],
        "held_out_trajectories": 1,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.fixture(autouse=True)
def here(study: Path, monkeypatch: pytest.MonkeyPatch, importable: None) -> None:
    monkeypatch.chdir(study)

    def ranks(config: Config, run: Path, resume: str, module: str, finished: Callable[[], bool]) -> int:
        launched.append(str(run))
        done = launch(1, SCRIPT, "--config", str(run / "config.yaml"), "--resume", resume)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.returncode

    monkeypatch.setattr(pipeline, "launch_ranks", ranks)


def run(script: str, *words: str) -> dict[str, Any]:
    module = importlib.import_module(f"studies.{script}")
    assert module.main(["--config", "study.yaml", *words]) == 0
    return json.loads(Path("study", f"{script}.json").read_text())


def test_the_study_trains_every_way_once_and_resumes(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("finetune")
    rows = {(row["way"], row["count"]): row for row in found["rows"]}
    assert list(rows) == [("base", 0), ("expert", 1), ("same_tokenizer", 1)]
    assert [Path(path).name for path in launched] == ["expert_1", "same_tokenizer_1"]
    for row in rows.values():
        (new,) = row["new"].values()
        assert len(new["rollout_nrmse"]) == 2
        assert ("old" in row) == (row["way"] != "same_tokenizer")
    assert rows["expert", 1]["old_weights_equal"]
    assert rows["expert", 1]["old"] == rows["base", 0]["old"]
    assert rows["expert", 1]["new"] != rows["base", 0]["new"]
    assert "| persistence |" in capsys.readouterr().out
    again = run("finetune")
    assert len(launched) == 2
    assert again["rows"] == found["rows"]


def test_unlike_measures_held_out_domains(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("unlike")
    assert set(found["auroc"]) == {"warning", "router's best cosine"}
    assert found["auroc"]["warning"]["open_channel"] == 1  # a flow that is a hundred times slower
    assert found["noticed"]["open_channel"] == 1
    assert found["usual_samples"] == 2 * (SNAPSHOTS - 2)
    assert "false alarms" in capsys.readouterr().out


def test_a_way_needs_its_learning_rate(capfd: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module("studies.finetune")
    assert module.main(["--config", "study.yaml", "learning_rates={all: 0.001}"]) == 2
    assert "learning_rates has no entry expert" in capfd.readouterr().err
