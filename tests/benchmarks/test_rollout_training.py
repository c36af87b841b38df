"""The study of training for rollouts, in miniature: real runs of a few steps, resumed, and its table."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from shodh_moe.audit.config import AuditConfig
from shodh_moe.config.load import load_config_of
from shodh_moe.inference.loading import find_source, load_source
from shodh_moe.tokenizer.latents import load_latents
from tests.audit.tiny import tree

ROOT = Path(__file__).resolve().parents[2]
CHOSEN = ["unroll 2, through time", "history 4"]


@pytest.fixture
def script(importable: None) -> ModuleType:
    return importlib.import_module("studies.rollout_training")


def test_every_variant_is_a_run_of_its_own(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    audit = load_config_of(AuditConfig, ROOT / "configs" / "audit" / "cpu.yaml")
    study = script.Study(audit, 5e-3, script.SEEDS, script.STEPS, list(script.VARIANTS))
    configs = study.configs()
    assert len({config.name for config in configs}) == len(configs) == 11 * 3
    assert study.longest == 4
    assert {config.windows["train"].snapshots for config in configs} <= set(range(audit.base.data.snapshots + 1))
    changed = {name: study.config(name, 1000) for name in script.VARIANTS}
    assert changed["unroll 4, push-forward"].training.unroll == 4
    assert changed["unroll 2, through time"].training.unroll_gradient == "through"
    assert changed["strides 1, 2, 3"].model.strides == [1, 2, 3]
    assert all(config.training.learning_rate == 5e-3 for config in configs)


def test_the_table_compares_with_the_base(script: ModuleType) -> None:
    def row(*values: float) -> dict:
        return {"diverged": 0, "cpu_seconds": 9.0, "domains": {"open_channel": {"seeds": [], "mean": list(values)}}}

    rows = {
        "as configured": row(0.1, 0.2),
        "persistence": {"domains": {"open_channel": [0.5, 0.6]}},
        "noise 0.05": {**row(0.11, 0.15), "diverged": 1},
        "history 4": {"diverged": 3, "domains": {}},
    }
    assert script.markdown(rows, [1, 3]).splitlines() == [
        "| open channel | step 1 | step 3 | CPU s |",
        "|---|---|---|---|",
        "| as configured | 0.1000 | 0.2000 | 9 |",
        "| noise 0.05 (1 diverged) | 0.1100 +10.0% | 0.1500 -25.0% | 9 |",
        "| history 4 | diverged | diverged | |",
        "| persistence | 0.5000 | 0.6000 | |",
    ]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_it_trains_measures_and_resumes(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = tree(tmp_path)
    settings["base"]["data"]["snapshots"] = 8
    settings["base"]["model"]["moe"] = {"expert_hidden": 16}
    (tmp_path / "audit.yaml").write_text(yaml.safe_dump(settings))
    words = ["--config", "audit.yaml", "--json", "results.json", "--seeds", "5", "--variants", *CHOSEN]
    assert script.main([*words, "--steps", "1", "10"]) == 2
    assert "a history of 4 and 10 steps need 14: raise base.data.snapshots" in capfd.readouterr().err
    words += ["--steps", "1", "3"]
    assert script.main(words) == 0
    written = (tmp_path / "results.json").read_text(), (tmp_path / "results.md").read_text()
    rows = json.loads(written[0])["rows"]
    assert [name for name in rows if name != "persistence"] == CHOSEN
    audit = load_config_of(AuditConfig, tmp_path / "audit.yaml")
    study = script.Study(audit, 5e-3, [5], [1, 3], CHOSEN)
    config = study.config("history 4", 5)
    model = load_source(find_source(script.last_checkpoint(config)))
    latents = Path(script.resolve_paths(config).latents)
    for latent in load_latents(latents, "valid"):
        if latent.domain not in audit.domains:
            continue
        # The first predicted snapshot is number 4 or 5, whatever the history of the variant.
        z = latent.read()
        still = [float((z[start - 1] - z[start + 2]).square().mean()) for start in (4, 5)]
        assert rows["persistence"]["domains"][latent.domain][1] == pytest.approx(sum(still) / 2, rel=1e-4)
        history = torch.stack([z[start - 4 : start] for start in (4, 5)])
        with torch.no_grad():
            one = model.transformer(history, latent.geometry_Cxyz.expand(2, -1, -1, -1, -1)).latent_BCxyz
        error = float((one - z[4:6]).square().mean())
        assert rows["history 4"]["domains"][latent.domain]["mean"][0] == pytest.approx(error, rel=1e-4)
    capfd.readouterr()
    assert script.main(words) == 0  # nothing is left to do
    assert "CPU s (" not in capfd.readouterr().out
    assert (tmp_path / "results.md").read_text() == written[1]
