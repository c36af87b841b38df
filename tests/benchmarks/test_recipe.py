"""The study of the mixture's recipe: its runs and its table, on made-up records."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from shodh_moe.audit.arms import tuning_runs
from shodh_moe.audit.config import AuditConfig
from shodh_moe.audit.outcome import last_checkpoint, run_folder
from shodh_moe.config import Config
from shodh_moe.config.load import load_config_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(importable: None) -> ModuleType:
    return importlib.import_module("studies.recipe")


@pytest.fixture
def audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AuditConfig:
    monkeypatch.chdir(tmp_path)
    return load_config_of(AuditConfig, ROOT / "configs" / "audit" / "cpu.yaml")


RATES = {"moe": 5e-3, "dense_active": 5e-3, "single:open_channel": 2.5e-3, "single:porous_media": 1e-2}


@pytest.mark.parametrize("table", ["recipe", "parts"])
def test_every_variant_is_a_run_of_its_own(script: ModuleType, audit: AuditConfig, table: str) -> None:
    made = list(script.configs(audit, table, RATES))
    assert len({config.name for _, _, config in made}) == len(made)
    experts = {set_name: config.model.moe.num_experts for set_name, _, config in made}
    assert experts == {"main": 2, "four": 4}


def test_a_variant_changes_what_it_names(script: ModuleType, audit: AuditConfig) -> None:
    recipe = {name: config for set_name, name, config in script.configs(audit, "recipe", RATES) if set_name == "main"}
    assert recipe["loss mse"].training.loss == "mse"
    assert recipe["as configured"].training.loss == audit.base.training.loss == "domain"
    parts = {name: config for set_name, name, config in script.configs(audit, "parts", RATES) if set_name == "main"}
    experts = parts["experts by label"].model.moe
    assert (experts.scope, experts.router.kind) == ("layer", "oracle")
    assert not parts["and no part that all samples use"].model.moe.shared_linear
    rates = {name: config.training.learning_rate for name, config in parts.items()}
    assert rates["the same, twice the rate"] == 2 * rates["and no part that all samples use"] == 1e-2


def test_models_of_one_domain_have_their_own_rates(script: ModuleType, audit: AuditConfig) -> None:
    found = {
        next(domain for domain, weight in config.data.weights.items() if weight): config.training.learning_rate
        for set_name, name, config in script.configs(audit, "parts", RATES)
        if name == "a model for each domain"
    }
    first = RATES["single:open_channel"]
    assert found == {
        "open_channel": first, "porous_media": 1e-2, "obstacle_wake": first, "decaying_turbulence": first
    }  # fmt: skip


def test_the_audits_own_runs_are_not_trained_again(script: ModuleType, audit: AuditConfig) -> None:
    tuned = {run.name for tried in tuning_runs(audit).values() for runs in tried.values() for run in runs}
    parts = [config.name for set_name, _, config in script.configs(audit, "parts", RATES) if set_name == "main"]
    assert sum(name in tuned for name in parts) == 2 * 4  # seeds of the mixture, the dense model and one of each domain


def write_records(config: Config, error: float) -> None:
    domains = [domain for domain, weight in config.data.weights.items() if weight]
    last_checkpoint(config).mkdir(parents=True)
    (last_checkpoint(config) / "state.json").write_text("{}")
    routing = {"load": {domain: [0.25, 0.75] for domain in domains}, "mean_gate": dict.fromkeys(domains, 0.9)}
    errors = {"latent_mse": dict.fromkeys(domains, error), "latent_mse_persistence": dict.fromkeys(domains, 1.0)}
    records = [{"kind": "train", "step": 600, "routing": [routing]}, {"kind": "valid", "step": 600, **errors}]
    (run_folder(config) / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))


def test_the_table_compares_with_its_first_row(script: ModuleType, audit: AuditConfig) -> None:
    for _, name, config in script.configs(audit, "recipe", RATES):
        if name == "loss sample" and config.seed == audit.tuning_seeds[0]:
            (run_folder(config) / "nonfinite").mkdir(parents=True)
            (run_folder(config) / "nonfinite" / "3.json").write_text("{}")
        else:
            write_records(config, 0.12 if name == "loss mse" else 0.1)
    rows = script.summarise(audit, "recipe", RATES)
    assert rows["main"]["loss sample"]["diverged"] == 1
    table = script.markdown(rows)
    assert "| as configured | 0.1000 (0.75, 0.90) | 0.1000 (0.75, 0.90) |" in table
    assert "| loss mse | 0.1200 +20.0% (0.75, 0.90) |" in table


def test_a_summary_of_runs_that_were_not_trained_is_refused(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert script.main(["--summary-only", "--json", str(tmp_path / "recipe.json")]) == 2
    assert "has no validation record: repeat the command that trains its runs" in capsys.readouterr().err


def test_models_of_one_domain_fill_one_row(script: ModuleType, audit: AuditConfig) -> None:
    for _, name, config in script.configs(audit, "parts", RATES):
        write_records(config, 0.1 if name == "a model for each domain" else 0.11)
    rows = script.summarise(audit, "parts", RATES)
    assert set(rows["main"]["a model for each domain"]) == {"diverged", "open_channel", "porous_media"}
    assert "| experts by label | 0.1100 +10.0% (0.75, 0.90) | 0.1100 +10.0% (0.75, 0.90) |" in script.markdown(rows)
