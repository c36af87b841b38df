"""The audit resumes, reports diverged runs, and uses no results of other weights or settings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from shodh_moe.audit import run as stages
from shodh_moe.audit.arms import all_runs, arm_config, choose_rates, find_run, tuning, tuning_runs
from shodh_moe.audit.measure import measure, measure_key, measured, result_path
from shodh_moe.audit.outcome import DIVERGED_ABOVE, diverged, ended, last_checkpoint, run_folder, validation_score
from shodh_moe.audit.relearning import curves, pair, relearns
from shodh_moe.base.errors import UserError
from shodh_moe.config import Config
from shodh_moe.launching.jobs import ProcessJob, run_jobs
from tests.audit.tiny import audit


def _finish(config: Config, ratios: dict[str, float | None], sha: str = "a") -> None:
    """Write the files of a finished run: its validation records, and the state of a last checkpoint."""
    folder = run_folder(config)
    last_checkpoint(config).mkdir(parents=True)
    errors = {domain: None if ratio is None else 0.5 * ratio for domain, ratio in ratios.items()}
    record = {"latent_mse": errors, "latent_mse_persistence": dict.fromkeys(ratios, 0.5)}
    lines = [{"kind": "valid", "step": step, **record} for step in (2, config.training.steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (last_checkpoint(config) / "state.json").write_text(json.dumps({"sha256": sha}))


def _blow_up(config: Config, step: int = 3) -> None:
    """Write the file of a run whose loss was not finite."""
    folder = run_folder(config) / "nonfinite"
    folder.mkdir(parents=True)
    (folder / f"{step}.json").write_text("{}")


@pytest.fixture
def config(tmp_path) -> Config:
    return arm_config(audit(tmp_path), "main", "dense_active", 0, 1e-3)


def test_the_score_weighs_domains_equally(config):
    assert not ended(config)
    _finish(config, {"open_channel": 0.2, "porous_media": 0.6})
    assert ended(config)
    assert validation_score(config) == pytest.approx(0.4)


def test_a_run_with_a_nonfinite_loss_counts_as_diverged(config):
    _blow_up(config)
    assert ended(config)
    assert diverged(config) == "a loss or gradient was not finite at step 3"
    assert validation_score(config) == math.inf


@pytest.mark.parametrize(
    ("ratio", "words"),
    [(None, "was not finite"), (DIVERGED_ABOVE * 1.01, "10.1 times that of persistence"), (DIVERGED_ABOVE, None)],
)
def test_a_run_far_worse_than_persistence_counts_as_diverged(config, ratio, words):
    _finish(config, {"open_channel": 0.1, "porous_media": ratio})
    reason = diverged(config)
    assert reason is None if words is None else words in reason and "porous_media" in reason and "step 4" in reason


def test_the_best_rate_is_chosen_and_an_edge_of_the_range_is_reported(tmp_path):
    one = audit(tmp_path, learning_rates=[1e-3, 2e-3, 4e-3], tuning_seeds=[1000, 1001])
    for name, runs in tuning_runs(one).items():
        for rate, (run, other) in runs.items():
            best = 2e-3 if name == "moe" else 4e-3
            _finish(run.config, dict.fromkeys(run.domains, 0.1 + abs(rate - best)))
            if name == "layer" and rate > 1e-3:  # one diverged seed rules out a rate
                _blow_up(other.config)
                continue
            spoilt = 0.1 if name == "film" and rate == 4e-3 else 0
            _finish(other.config, dict.fromkeys(other.domains, 0.1 + abs(rate - best) + spoilt))
    found = tuning(one)
    assert (found["moe"]["chosen"], found["moe"]["at_edge"]) == (2e-3, False)
    assert (found["dense_active"]["chosen"], found["dense_active"]["at_edge"]) == (4e-3, True)
    assert (found["film"]["chosen"], found["film"]["at_edge"]) == (2e-3, False)
    assert found["layer"]["chosen"] == 1e-3
    assert found["layer"]["valid_latent_mse"] == [pytest.approx(0.103), math.inf, math.inf]
    assert choose_rates(one)["single:porous_media"] == 4e-3


def test_a_diverged_run_is_recorded_and_not_repeated_while_others_continue(tmp_path, monkeypatch):
    one = audit(tmp_path)
    bad, good = (arm_config(one, "main", arm, 0, 1e-3) for arm in ("moe", "dense_active"))
    made = tmp_path / "made"
    code = {
        bad.name: f"import pathlib; p = pathlib.Path(r'{run_folder(bad)}') / 'nonfinite'; p.mkdir(parents=True); "
        "(p / '2.json').write_text('{}'); raise SystemExit(2)",
        good.name: f"open(r'{made}', 'w')",
    }
    job = stages._training_job
    monkeypatch.setattr(
        stages, "_training_job", lambda *a: ProcessJob(**{**vars(job(*a)), "arguments": ["-c", code[a[1].name]]})
    )
    stages.train(one, [bad, good], 1)
    assert made.exists()
    made.unlink()
    run = next(r for r in all_runs(one, dict.fromkeys(tuning_runs(one), 1e-3)) if r.name == bad.name)
    result = json.loads(measure(one, run).read_text())
    assert result["diverged"] == "a loss or gradient was not finite at step 2"
    assert (result["arm"], result["seed"], result["domains"]) == ("moe", 0, ["open_channel", "porous_media"])
    assert "errors" not in result
    assert measured(one, run)
    assert not relearns(one, run)
    stages.train(one, [bad], 1)  # starts nothing, since the run's folder exists


def test_another_failure_of_a_run_stops_the_audit(tmp_path):
    job = ProcessJob("bad", ["-c", "raise SystemExit(2)"], tmp_path / "log", tmp_path / "cost", excused=lambda: False)
    with pytest.raises(UserError, match="bad ended with code 2"):
        run_jobs([job], 1, "audit")


def test_a_result_of_other_weights_or_settings_is_stale(tmp_path, monkeypatch):
    read = lambda path: SimpleNamespace(state=json.loads((path / "state.json").read_text()))  # noqa: E731
    monkeypatch.setattr("shodh_moe.audit.measure.CheckpointReader", read)
    one = audit(tmp_path)
    run = next(iter(all_runs(one, dict.fromkeys(tuning_runs(one), 1e-3))))
    _finish(run.config, {"open_channel": 0.2, "porous_media": 0.6})
    path = result_path(one, run)
    path.parent.mkdir(parents=True)
    assert not measured(one, run)
    path.write_text(json.dumps({"key": measure_key(one, run)}))
    assert measured(one, run)
    assert not measured(audit(tmp_path, gradient_samples=3), run)
    (last_checkpoint(run.config) / "state.json").write_text(json.dumps({"sha256": "b"}))
    assert not measured(one, run)


def test_relearning_starts_from_the_trained_network_and_from_scratch(tmp_path):
    one = audit(tmp_path)
    run = next(r for r in all_runs(one, dict.fromkeys(tuning_runs(one), 1e-3)) if r.arm == "layer")
    _finish(run.config, {"open_channel": 0.2, "porous_media": 0.6})
    trained, scratch = pair(one, run)
    assert (trained.start, scratch.start) == (str(run_folder(run.config)), None)
    assert trained.name != scratch.name
    assert trained.data.weights == {"decaying_turbulence": 1.0, "open_channel": 0.0, "porous_media": 0.0}
    _finish(trained, {"decaying_turbulence": 0.25})
    _finish(scratch, {"decaying_turbulence": 0.75})
    assert curves(one, run) == {
        "domain": "decaying_turbulence",
        "steps": [2, 4],
        "from_checkpoint": [0.125, 0.125],
        "from_scratch": [0.375, 0.375],
    }
    assert not [
        r for r in all_runs(one, dict.fromkeys(tuning_runs(one), 1e-3)) if r.arm == "single" and relearns(one, r)
    ]


def test_the_report_names_missing_results(tmp_path):
    one = audit(tmp_path)
    for runs in tuning_runs(one).values():
        for (run,) in runs.values():
            _finish(run.config, dict.fromkeys(run.domains, 0.1))
    with pytest.raises(UserError, match="has no run other"):
        find_run(one, "other")
    with pytest.raises(UserError, match="is missing: run `shodh audit`"):
        stages.report(one)
    assert not Path(one.folder / "report").exists()
