"""The study of the mixture's recipe: its runs and its table, on made-up records."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from shodh_moe.audit.config import AuditConfig
from shodh_moe.audit.outcome import last_checkpoint, run_folder
from shodh_moe.config.load import load_config_of

ROOT = Path(__file__).resolve().parents[2]
DOMAINS = {"main": ["open_channel", "porous_media"]}


@pytest.fixture
def script(importable: None) -> ModuleType:
    return importlib.import_module("studies.recipe")


@pytest.fixture
def audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AuditConfig:
    monkeypatch.chdir(tmp_path)
    return load_config_of(AuditConfig, ROOT / "configs" / "audit" / "cpu.yaml")


def test_every_variant_is_a_run_of_its_own(script: ModuleType, audit: AuditConfig) -> None:
    made = list(script.configs(audit, 5e-3))
    assert len({config.name for _, _, config in made}) == len(made)
    experts = {set_name: config.model.moe.num_experts for set_name, _, config in made}
    assert experts == {"main": 2, "four": 4}
    losses = {name: config.training.loss for _, name, config in made}
    assert losses["loss mse"] == "mse"
    assert losses[script.UNCHANGED] == audit.base.training.loss == "domain"


def test_the_table_compares_with_the_recipe_as_configured(script: ModuleType, audit: AuditConfig) -> None:
    for set_name, name, config in script.configs(audit, 5e-3):
        error = {script.UNCHANGED: 0.1, "loss mse": 0.12}.get(name, 0.1)
        domains = [d for d, weight in config.data.weights.items() if weight]
        assert set_name == "four" or domains == DOMAINS["main"]
        folder = run_folder(config)
        if name == "loss sample" and config.seed == audit.tuning_seeds[0]:
            (folder / "nonfinite").mkdir(parents=True)
            (folder / "nonfinite" / "3.json").write_text("{}")
            continue
        last_checkpoint(config).mkdir(parents=True)
        (last_checkpoint(config) / "state.json").write_text("{}")
        routing = {"load": {domain: [0.25, 0.75] for domain in domains}, "mean_gate": dict.fromkeys(domains, 0.9)}
        errors = {"latent_mse": dict.fromkeys(domains, error), "latent_mse_persistence": dict.fromkeys(domains, 1.0)}
        records = [{"kind": "train", "step": 600, "routing": [routing]}, {"kind": "valid", "step": 600, **errors}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    rows = script.summarise(audit, 5e-3)
    assert rows["main"]["loss sample"]["diverged"] == 1
    table = script.markdown(rows)
    assert "| as configured | 0.1000 (0.75, 0.90) | 0.1000 (0.75, 0.90) |" in table
    assert "| loss mse | 0.1200 +20.0% (0.75, 0.90) |" in table
