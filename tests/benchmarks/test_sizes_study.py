"""The study of other grids, with tiny models."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from shodh_moe.config import Config
from shodh_moe.runs import pipeline
from tests.tiny import CONFIG
from tests.training.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600), pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, importable: None) -> list[str]:
    """The test runs in a folder with the study's config, with ranks that start fast; returns the folders trained."""
    monkeypatch.chdir(tmp_path)
    flow = {"trajectories": {"train": 2, "valid": 1, "test": 1}, "spinup_steps": 4, "steps_per_snapshot": 4}
    tiny = {**CONFIG, "data": {**CONFIG["data"], "domains": {"open_channel": flow, "porous_media": None}}}
    Path("tiny.yaml").write_text(yaml.safe_dump({**tiny, "parallel": {"processes": 1}}))
    tree = {
        "base": "tiny.yaml",
        "folder": "study",
        "grids": [[24, 16, 16], [16, 16, 32]],
        "own": [[24, 16, 16]],
        "trajectories": {"train": 1, "valid": 1, "test": 2},
        "variants": {"plain": [], "told": ["model.boundaries=true", "model.positions=periodic_aware"]},
    }
    Path("study.yaml").write_text(yaml.safe_dump(tree))
    trained: list[str] = []

    def ranks(config: Config, run: Path, resume: str, module: str, finished: Callable[[], bool]) -> int:
        trained.append(f"{run.parent.name}/{run.name.split('-')[0]}")
        script = ROOT / f"{module.replace('.', '/')}.py"
        words = ("--config", str(run / "config.yaml"), "--resume", resume, "--stop-file", str(run / "stop"))
        done = launch(1, script, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.returncode

    monkeypatch.setattr(pipeline, "launch_ranks", ranks)
    return trained


def _run(*words: str) -> dict[str, Any]:
    module = importlib.import_module("studies.sizes")
    assert module.main(["--config", "study.yaml", *words]) == 0
    return json.loads(Path("study/sizes.json").read_text())


def test_the_study_measures_every_grid_once_and_resumes(
    launched: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = _run()
    seen = [(row["model"], row["trained_on"], row["grid"]) for row in found["rows"]]
    grids = [[16, 16, 16], [24, 16, 16], [16, 16, 32]]
    expected = [(variant, grids[0], grid) for variant in ("plain", "told") for grid in grids]
    assert seen == [*expected, ("own_24x16x16", grids[1], grids[1])]
    # Both variants have one tokenizer, since they differ in the model alone.
    assert launched == ["tokenizer/tiny", "runs/plain", "runs/told", "tokenizer/tiny", "runs/own_24x16x16"]
    still = {}
    for row in found["rows"]:
        (one,) = row["domains"].values()
        assert one["rollout_nrmse"][0] > 0
        # All models of a grid are measured on the same data.
        assert (
            still.setdefault(tuple(row["grid"]), one["rollout_nrmse_persistence"]) == one["rollout_nrmse_persistence"]
        )
    assert len({tuple(one) for one in still.values()}) == 3
    out = capsys.readouterr().out
    assert out.count("| persistence |") == 3
    assert "| 24x16x16 | open_channel | own_24x16x16 | 24x16x16 |" in out
    assert _run()["rows"] == found["rows"]
    assert len(launched) == 5


def test_grids_that_the_model_does_not_take_are_refused(launched: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module("studies.sizes")
    assert module.main(["--config", "study.yaml", "grids=[[20, 16, 16]]", "own=[]"]) == 2
    assert "grids has [20, 16, 16], not a multiple of 8" in capfd.readouterr().err
    assert module.main(["--config", "study.yaml", "grids=[[32, 16, 16]]"]) == 2
    assert "own has [24, 16, 16], which is not among grids" in capfd.readouterr().err
    assert not launched
