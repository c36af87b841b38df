"""Configs of the forecast benchmark: those that make no sense are refused in one line, the shipped ones fit."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from shodh_moe.base.results import write_result
from shodh_moe.cli import main as shodh
from shodh_moe.config.load import load_config_of
from shodh_moe.forecast.config import ForecastConfig
from shodh_moe.forecast.data import periods
from shodh_moe.forecast.ours import require_fitting
from shodh_moe.forecast.plan import base_key, trials
from tests.forecast.tiny import LIBRARY, PEERS, tree
from tests.tiny import refused, write_dataset

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "forecast"


def write(folder: Path, content: dict[str, Any]) -> str:
    path = folder / "odd.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": [1, 1]}, "must be one or more different numbers"),
        ({"learning_rates": [2e-3, 1e-3]}, "learning rates of ours"),
        ({"learning_rates": [1e-3, 2e-3]}, "unet has 1 learning rates to try and ours 2: give all equally many trials"),
        ({"tokenizer_share": 1.0}, "must be above 0 and below 1"),
        (
            {"steps": 5},
            "base.data.snapshots 6 is too few for base.model.history 2 and a forecast of 5 steps: make it 7",
        ),
        ({"peers": {**PEERS, "dpot": {"width": 9, "heads": 2}}}, "width 9 is not divisible by heads 2"),
        ({"peers": {**PEERS, "fn": {}}}, "unknown key 'peers.fn'; the nearest valid key is 'peers.fno'"),
    ],
)
def test_configs_that_make_no_sense_are_refused(
    changes: dict[str, Any], words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    refused(capfd, "bench", "forecast", "--config", write(tmp_path, tree(tmp_path, **changes)), says=(words,))
    assert [one.name for one in tmp_path.iterdir()] == ["odd.yaml"]


def test_a_given_tokenizer_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its training would not count."""
    content = tree(tmp_path)
    content["base"]["tokenizer"]["path"] = str(tmp_path)
    says = ("base.tokenizer.path must be null",)
    refused(capfd, "bench", "forecast", "--config", write(tmp_path, content), says=says)


def test_short_trajectories_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = write_dataset(tmp_path / "given", snapshots=4)
    content = tree(tmp_path)
    content["base"]["data"] = {"name": "given", "path": str(given), "grid": [16, 16, 16]}
    content["base"]["tokenizer"]["root"] = str(tmp_path / "tokenizers")
    says = ("has 4 snapshots, too few for base.model.history 2 and a forecast of 3 steps: give trajectories of 5",)
    refused(capfd, "bench", "forecast", "--config", write(tmp_path, content), says=says)
    assert periods(ForecastConfig.model_validate(content).base) == {}


def test_a_missing_library_is_named_with_its_extra(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "neuralop", None)
    config = write(tmp_path, tree(tmp_path, peers={**PEERS, **LIBRARY}))
    refused(
        capfd, "bench", "forecast", "--config", config, says=("neuraloperator", "extra `forecast`", "peers.fno=null")
    )


def test_too_little_time_is_refused_before_the_first_training(tmp_path: Path) -> None:
    bench = ForecastConfig.model_validate(tree(tmp_path))
    times = {"tokenizer": {"step": 0.1, "rest": 0.5}, "encoding": 1.0, "pretraining": {"step": 0.1, "rest": 0.5}}
    file = bench.folder / "calibration.json"
    write_result(file, base_key(bench), times)
    require_fitting(bench)
    for stage, changes, words in (
        (
            "tokenizer",
            {"rest": 3.0},
            r"our tokenizer .* take 3\.4 s, but only 3\.3 s are allowed: raise seconds or tok",
        ),
        ("pretraining", {"rest": 3.5}, r"our pretraining .* raise seconds, or lower tokenizer_share"),
        ("pretraining", {"rest": 1.7}, r"our pretraining .* 2\.1 s, but only 1\.9 s .* raise trial_seconds"),
    ):
        write_result(file, base_key(bench), {**times, stage: {"step": 0.1, **changes}})
        with pytest.raises(Exception, match=words):
            require_fitting(bench)


def minutes(bench: ForecastConfig) -> float:
    """Minutes of all trials and trainings."""
    each = [
        len(trials(bench, model)) * bench.trial_seconds + len(bench.seeds) * bench.seconds for model in bench.models
    ]
    return sum(each) / 60


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_comment_counts_the_trainings(path: Path) -> None:
    bench = load_config_of(ForecastConfig, path)
    comment = " ".join(line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    models, seeds = len(bench.models), len(bench.seeds)
    assert f"{3 * models} trials and {seeds * models} trainings, " in comment
    stated = re.search(r"trainings, ([\d.]+) (minutes|hours) together", comment)
    assert stated
    assert float(stated[1]) * (60 if stated[2] == "hours" else 1) == pytest.approx(minutes(bench), abs=0.05)
    assert all(len(bench.rates(model)) == 3 for model in bench.models)
    assert periods(bench.base) == {"open_channel": 16.0, "porous_media": 10.0}


def test_the_shipped_bench_leaves_a_quarter_of_the_hour() -> None:
    assert minutes(load_config_of(ForecastConfig, CONFIGS / "grid32.yaml")) <= 45


def test_the_help_shows_an_example(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        shodh(["bench", "forecast", "--help"])
    assert "configs/forecast/grid32.yaml" in capfd.readouterr().out
