"""Choice of the learning rate, resuming, verdict, tables and measures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.base.results import write_result
from shodh_moe.data import list_trajectories
from shodh_moe.forecast.baselines import persistence
from shodh_moe.forecast.config import ForecastConfig
from shodh_moe.forecast.data import flows
from shodh_moe.forecast.errors import rollout_errors
from shodh_moe.forecast.forecasters import Forecast, of_fields
from shodh_moe.forecast.page import sections
from shodh_moe.forecast.plan import Training, chosen_rate, finals, finished, key, trials
from shodh_moe.forecast.run import report
from shodh_moe.forecast.summary import domain_summary
from shodh_moe.forecast.verdict import verdict
from shodh_moe.report import page
from tests.forecast.tiny import PEERS, tree
from tests.tiny import write_dataset

RATES = [1e-3, 2e-3, 4e-3]


def with_rates(folder: Path, **changes: Any) -> ForecastConfig:
    peers = {name: peer and {**peer, "learning_rates": RATES} for name, peer in PEERS.items()}
    return ForecastConfig.model_validate(tree(folder, learning_rates=RATES, peers=peers, seeds=[0, 1], **changes))


def end(bench: ForecastConfig, training: Training, error: float) -> None:
    write_result(training.folder(bench) / "outcome.json", key(bench, training), {"validation_error": error})


def test_the_rate_with_the_smallest_validation_error_is_chosen(tmp_path: Path) -> None:
    bench = with_rates(tmp_path)
    with pytest.raises(UserError, match="holds no finished training: run `shodh bench forecast`"):
        chosen_rate(bench, "unet")
    for training, error in zip(trials(bench, "unet"), (0.5, 0.3, math.inf), strict=True):
        end(bench, training, error)
    assert chosen_rate(bench, "unet") == 2e-3
    assert [one.name for one in finals(bench, "unet")] == ["unet-0", "unet-1"]
    for training in trials(bench, "unet"):
        end(bench, training, math.nan)
    with pytest.raises(UserError, match="all trials of unet diverged: give lower learning rates"):
        chosen_rate(bench, "unet")


def test_without_a_choice_there_is_no_trial(tmp_path: Path) -> None:
    bench = ForecastConfig.model_validate(tree(tmp_path))
    assert trials(bench, "unet") == []
    assert chosen_rate(bench, "unet") == 1e-3


def test_a_training_counts_only_with_its_own_settings(tmp_path: Path) -> None:
    bench, training = with_rates(tmp_path), Training("unet", 2e-3, seed=0)
    assert not finished(bench, training)
    end(bench, training, 0.3)
    assert finished(bench, training)
    assert not finished(bench, Training("unet", 4e-3, seed=0))
    assert not finished(with_rates(tmp_path, seconds=9.0), training)
    assert not finished(with_rates(tmp_path, trial_seconds=1.0), Training("unet", 2e-3, 0, trial=True))
    assert finished(with_rates(tmp_path, trial_seconds=1.0), training)  # a trial's time is not its own
    content = tree(tmp_path, learning_rates=RATES, seeds=[0])
    content["base"]["training"]["batch_size"] = 2  # of our model only
    content["peers"] = {name: peer and {**peer, "learning_rates": RATES} for name, peer in PEERS.items()}
    assert finished(ForecastConfig.model_validate(content), training)
    content["base"]["data"]["seed"] = 1
    assert not finished(ForecastConfig.model_validate(content), training)
    (training.folder(bench) / "outcome.json").write_text("{")
    assert not finished(bench, training)


def test_the_report_names_a_missing_result(tmp_path: Path) -> None:
    bench = ForecastConfig.model_validate(tree(tmp_path))
    with pytest.raises(UserError, match=r"ours-3 holds no finished training|ours-3\.json is missing"):
        report(bench)


def model(errors: list[float | None], trained: bool = True, **more: Any) -> dict[str, Any]:
    """A model of a summary with these velocity errors in the one domain."""
    spread = {"mean": errors, "low": errors, "high": errors}
    domain = {
        "nrmse": {"velocity": spread, "pressure": spread},
        "vrmse": {"velocity": spread, "pressure": spread},
        "band_errors": [[0.1, 0.2, 0.3]] * len(errors),
        "band_energy": [[1.0, 0.9, 0.5]] * len(errors),
        "solid_velocity": [0.0] * len(errors),
        "divergence": 1e-9,
        "divergence_true": 1e-3,
        "forecasts": 4,
    }
    facts = {
        "seeds": [0, 1],
        "learning_rate": 2e-3,
        "trials": {"0.001": 0.5, "0.002": 0.4, "0.004": None},
        "parameters": {"total": 1234},
        "diverged": [],
        "steps": [100, 110],
        "samples": [400, 440],
        "seconds": [8.0, 8.1],
        "stages": [None, None],
        "cost": [{"seconds": 0.5, "memory_bytes": 2**20}] * 2,
    }
    return {**(facts if trained else {}), "domains": {"open_channel": domain}, **more}


def test_the_verdict_says_first_where_a_peer_wins() -> None:
    models = {
        "ours": model([0.1, 0.2, 0.5, 0.6]),
        "fno": model([0.2, 0.3, 0.4, 0.7]),
        "unet": model([0.3, 0.4, 0.6, 0.3]),
        "persistence": model([0.2, 0.1, 0.1, 0.9], trained=False),
    }
    fno, unet, persistence = verdict(models, 4)
    assert fno == "In open channel, FNO has a smaller velocity error than our model at step 3: 0.400 against 0.500."
    assert unet == "In open channel, U-Net has a smaller velocity error than our model at step 4: 0.300 against 0.600."
    assert persistence.endswith("than our model at steps 2 to 3: 0.100 against 0.500 at step 3.")


def test_the_verdict_names_baselines_after_a_win_over_all_networks() -> None:
    models = {"ours": model([0.1, 0.2]), "fno": model([0.2, None]), "persistence": model([0.3, 0.1], trained=False)}
    first, second = verdict(models, 2)
    assert first == "Our model has a smaller velocity error than every other network at each of the 2 steps."
    assert second.startswith("In open channel, persistence has a smaller velocity error")


def test_the_verdict_is_short_where_our_model_wins_everywhere() -> None:
    models = {"ours": model([0.1, 0.2]), "fno": model([0.2, 0.3]), "persistence": model([0.3, 0.4], trained=False)}
    assert verdict(models, 2) == [
        "Our model has the smallest velocity error of all at each of the 2 steps in open channel."
    ]
    models["ours"] = model([0.1, None])  # a forecast that blew up is never the best
    assert "FNO has a smaller velocity error than our model at step 2" in verdict(models, 2)[0]


def test_the_tables_show_what_was_measured() -> None:
    models = {"ours": model([0.1, 0.2]), "fno": model([0.2, None]), "persistence": model([0.3, 0.4], trained=False)}
    summary = {
        "verdict": ["A sentence."],
        "models": models,
        "steps": 2,
        "history": 2,
        "seconds": 8.0,
        "trial_seconds": 2.0,
        "threads": 2,
        "operator": "staggered",
        "periods": {},
        "grid": [16, 16, 16],
    }
    text = page.markdown(sections(summary))
    assert text.startswith("## Verdict\n\nA sentence.")
    assert "Each had 8 s of training on 2 threads, 2 seeds" in text
    assert "took longer" not in text
    assert "| FNO | 0.200 [0.200, 0.200] | blew up |" in text
    assert "| persistence | 0.300 | 0.400 |" in text
    assert "| our model | 1,234 | 100 to 110 | 400 to 440 | 8 | - | - |" in text
    assert "| our model | 0.002 | 0.4 | yes |" in text
    assert "| our model | 0.004 | diverged |  |" in text
    models["ours"]["seconds"] = [8.0, 9.0]
    models["ours"]["learning_rate"] = 1e-3
    text = page.markdown(sections(summary))
    assert "Our model took longer: up to 9 s." in text
    assert "| our model | 0.001 | 0.5 | yes, the smallest tried |" in text


def test_measures_are_means_over_seeds() -> None:
    def one(error: float | None) -> dict[str, Any]:
        bands = {"band_errors": [[0.2, 0.4]], "band_energy": [[1.0, 0.5]], "solid_velocity": None, "forecasts": 3}
        own = {name: {"rms_relative": 0.5, "rms": 1.0, "max": 2.0} for name in ("divergence", "divergence_true")}
        return {"nrmse": {"velocity": [0.1, error]}, "vrmse": {"velocity": [0.2, 0.2]}, **bands, **own}

    found = domain_summary([one(0.2), one(0.4)])
    assert found["nrmse"]["velocity"]["mean"] == pytest.approx([0.1, 0.3])
    assert (found["nrmse"]["velocity"]["low"][1], found["nrmse"]["velocity"]["high"][1]) == (0.2, 0.4)
    assert found["band_errors"] == [pytest.approx([0.2, 0.4])]
    assert (found["solid_velocity"], found["divergence"]) == (None, 0.5)
    assert domain_summary([one(0.2), one(None)])["nrmse"]["velocity"]["mean"] == [0.1, None]


def test_measures_of_a_perfect_and_of_a_doubled_forecast(tmp_path: Path) -> None:
    records = list_trajectories(write_dataset(tmp_path, snapshots=6, domains=("calm",)), "test")
    truth = {len(flow.fields_T4XYZ): true for flow, true in flows(records[0], 2, 3, 2)}
    assert sorted(truth) == [2, 3]

    def times(factor: float) -> dict[str, Any]:
        forecaster = of_fields(lambda flow, steps: factor * truth[len(flow.fields_T4XYZ)], "central2")
        return rollout_errors(forecaster, records, 2, 3, 2, "central2")["calm"]

    perfect, doubled = times(1.0), times(2.0)
    still = rollout_errors(of_fields(persistence, "central2"), records, 2, 3, 2, "central2")
    assert perfect["nrmse"] == {"velocity": [0.0] * 3, "pressure": [0.0] * 3}
    assert perfect["divergence"] == pytest.approx(perfect["divergence_true"])
    assert perfect["forecasts"] == 2
    assert doubled["nrmse"]["velocity"] == pytest.approx([1.0] * 3)
    assert doubled["band_errors"][2] == pytest.approx([1.0] * 3)
    assert doubled["band_energy"][0] == pytest.approx([4.0] * 3)
    assert doubled["solid_velocity"] == pytest.approx([2 * value for value in perfect["solid_velocity"]])
    assert all(0.5 < value < 2.5 for value in still["calm"]["vrmse"]["velocity"])
    assert json.dumps(perfect)

    def broken(flow: Any, steps: int) -> Forecast:
        fields = torch.full((3, 4, 16, 16, 16), float("inf"))
        return Forecast(fields, fields[:, :3])

    assert not math.isfinite(rollout_errors(broken, records, 2, 3, 1, "central2")["calm"]["nrmse"]["velocity"][0])
