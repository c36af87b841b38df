"""The study of seams, on tokenizers that are there already."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from shodh_moe.config.load import load_config
from shodh_moe.config.paths import resolve_paths
from shodh_moe.tokenizer import Tokenizer
from tests.tiny import write_config, write_dataset

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("studies.seams")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_it_evaluates_each_variant_once(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    data = f"data.path={write_dataset(tmp_path / 'theirs')}"
    for settings in ([], ["tokenizer.patches=overlapping"]):
        config = load_config("tiny.yaml", [data, "seed=0", *settings])
        Tokenizer(config.tokenizer, config.data.grid).save(resolve_paths(config).tokenizer)
    words = ["--config", "tiny.yaml", "--seeds", "0", "--variants", "overlapping,base", "--json", "seams.json", data]
    assert script.main(words) == 0
    assert "[overlapping-0] evaluated" in capsys.readouterr().out
    found = json.loads(Path("seams.json").read_text())
    assert found["split"] == "valid"
    for variants in found["summary"].values():
        assert list(variants) == ["base", "overlapping"]
        for row in variants.values():
            assert {"velocity VRMSE", "pressure, high band", "velocity, steps", "parameters"} <= row.keys()
            assert row["velocity, steps"]["n"] == 1
    assert found["summary"].keys() == {"calm", "wild"}
    assert Path("seams.md").read_text().count("| overlapping |") == 2
    assert script.main(words) == 0
    assert "evaluated" not in capsys.readouterr().out, "finished runs are skipped"


def test_a_row_has_the_mean_and_range_over_seeds(script: ModuleType) -> None:
    row = {"velocity VRMSE": script.estimate([0.25, 0.75]), "parameters": script.estimate([100, 100])}
    text = script.markdown({"open_channel": {"base": row}}, "valid")
    assert "### open channel" in text
    assert "| base | 0.5 (0.25 to 0.75) | 100 |" in text


def test_an_unknown_variant_and_missing_results_are_refused(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    with pytest.raises(SystemExit):
        script.main(["--variants", "seamless"])
    assert "'seamless' is not one of base, overlapping" in capsys.readouterr().err
    assert script.main(["--config", "tiny.yaml", "--summary-only", "--json", "out.json"]) == 2
    assert "holds no evaluation of these variants: run without --summary-only" in capsys.readouterr().err
