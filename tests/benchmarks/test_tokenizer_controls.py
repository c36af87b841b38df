"""The tables of the tokenizer controls, on made-up results."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shodh_moe.config.load import load_config
from shodh_moe.kernels.differentiation import OPERATORS

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def summary(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("studies.tokenizer_controls_summary")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("studies.tokenizer_controls")


def domain(error: float | None, **divergences: float) -> dict[str, Any]:
    """One domain of an evaluation by `shodh tokenizer evaluate`."""
    norms = {op: divergences.get(op, 0.25) for op in OPERATORS}
    return {
        "velocity_vrmse": error,
        "pressure_vrmse": 0.5,
        "velocity_nrmse": error,
        "velocity_mse": 0.0,
        "pressure_mse": 0.0,
        "band_errors": {"velocity": [0.001, 0.02, 0.3], "pressure": [0.0, 0.0, 0.0]},
        "divergence": {
            op: {dtype: {"rms_relative": v, "rms": v, "max": v} for dtype in ("float32", "float64")}
            for op, v in norms.items()
        },
        "solid_velocity": {"rms_relative": 0.0, "max_relative": 0.0, "max": 0.0},
        "ms_per_sample": {"encode": 10.0, "decode": 20.0},
        "n_snapshots": 48,
    }


def evaluation(error: float | None, projected: float | None = None, **divergences: float) -> dict[str, Any]:
    found: dict[str, Any] = {"domains": {"open_channel": domain(error, **divergences)}}
    if projected is not None:
        one = {**domain(projected, staggered=1e-16), "ms_per_sample": {"project": 5.0}}
        found["projected"] = {"exact/staggered": {"open_channel": one}}
    return found


RESULTS = {
    "direct": {0: evaluation(0.10, projected=0.12), 1: evaluation(0.20, projected=0.22), 2: evaluation(0.30)},
    "soft-1": {0: evaluation(0.09), 1: evaluation(0.19), 2: evaluation(0.29)},
    "spectral": {0: evaluation(0.11, spectral=3e-15), 2: evaluation(0.33, spectral=1e-15)},
}
# Here the soft penalty is worse, although it is better on the test split.
VALID = {
    "direct": {seed: {"open_channel": 1.0} for seed in range(3)},
    "soft-1": {seed: {"open_channel": 2.0} for seed in range(3)},
}


def cells(lines: list[str], title: str) -> list[str]:
    (line,) = (line for line in lines if line.startswith(f"| {title} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_means_ranges_and_intervals(summary):
    found = summary.estimate([1.0, 2.0, 3.0])
    assert (found["n"], found["mean"], found["low"], found["high"]) == (3, 2.0, 1.0, 3.0)
    assert found["half_width_95"] == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)  # Student's t, 2 degrees of freedom
    assert summary.estimate([1.0])["half_width_95"] is None


def test_ratios_compare_the_same_seed(summary):
    rows = summary.rows_of(RESULTS)
    assert summary.ratios(rows, "spectral", "direct", "open_channel") == pytest.approx({0: 1.1, 2: 1.1})
    row = summary.projected_row("direct", "exact/staggered")
    assert summary.ratios(rows, row, "direct", "open_channel") == pytest.approx({0: 1.2, 1: 1.1})
    assert summary.ratios(rows, "spectral", "central4", "open_channel") == {}


def test_the_reference_is_chosen_on_validation(summary):
    rows = summary.rows_of(RESULTS)
    found = summary.summarise(rows, VALID)
    assert found["selection"]["open_channel"] == {"soft_penalty": "soft-1", "unconstrained": "direct"}
    assert found["domains"]["open_channel"]["spectral"]["over_unconstrained"]["mean"] == pytest.approx(1.1)
    better = {**VALID, "soft-1": {seed: {"open_channel": 0.5} for seed in range(3)}}
    chosen = summary.summarise(rows, better)
    assert chosen["selection"]["open_channel"]["unconstrained"] == "soft-1"
    ratio = chosen["domains"]["open_channel"]["spectral"]["over_unconstrained"]["mean"]
    assert ratio == pytest.approx((0.11 / 0.09 + 0.33 / 0.29) / 2)
    assert summary.summarise(rows, {})["selection"]["open_channel"] == {"soft_penalty": None, "unconstrained": "direct"}


def test_tables(summary):
    found = summary.summarise(summary.rows_of(RESULTS), VALID)
    errors = summary.error_table(found, "open_channel")
    assert cells(errors, "direct")[1:4] == ["3", "0.2000 (0.1000 to 0.3000)", "1.000 (1.000 to 1.000)"]
    assert cells(errors, "direct + Leray, staggered, walls exact")[3] == "1.150 (1.100 to 1.200)"
    assert len({line.count("|") for line in errors}) == 1
    exact = summary.exactness_table(found, "open_channel")
    assert cells(exact, "Helmholtz, spectral")[1:7] == ["**3.0e-15**", *["2.5e-01"] * 3, "3.0e-15", "0"]
    assert cells(exact, "direct + Leray, staggered, walls exact")[4] == "**1.0e-16**"
    assert cells(exact, "direct + Leray, staggered, walls exact")[-2:] == ["10", "25"]


def test_missing_runs_are_named(summary):
    planned = [(variant, seed) for seed in range(3) for variant in ("direct", "spectral", "staggered")]
    missing = summary.missing_runs(RESULTS, planned)
    assert missing == [("staggered", 0), ("spectral", 1), ("staggered", 1), ("staggered", 2)]
    only = {"spectral": {0: RESULTS["spectral"][0]}}  # nothing to compare with
    text = summary.markdown(summary.summarise(summary.rows_of(only), {}), missing)
    assert "Missing: staggered seed 0, spectral seed 1," in text
    errors, _ = (line for line in text.splitlines() if line.startswith("| Helmholtz, spectral |"))
    assert cells([errors], "Helmholtz, spectral")[3] == "missing"


def test_errors_that_are_not_finite_are_shown(summary):
    results = {"direct": {0: evaluation(0.1)}, "spectral": {0: evaluation(None)}}
    lines = summary.error_table(summary.summarise(summary.rows_of(results), {}), "open_channel")
    assert cells(lines, "Helmholtz, spectral")[2:4] == ["nan", "nan"]


def test_every_variant_is_a_valid_config(script, summary):
    options = script.parser().parse_args(["--output", "nowhere"])
    runs = script.planned(options)
    of_seed = [(run.variant, run.seed) for run in runs]
    assert of_seed[: len(summary.VARIANTS)] == [(variant, 0) for variant in summary.VARIANTS]
    assert len(runs) == 3 * len(summary.VARIANTS) - 2 * len(summary.ONE_SEED)
    assert len({run.tokenizer for run in runs}) == len(runs)
    titles = [summary.title_of(variant) for variant in summary.VARIANTS]
    assert len(set(titles)) == len(titles)
    for run in runs[: len(summary.VARIANTS)]:
        assert load_config(run.config, run.settings).tokenizer.operator == summary.operator_of(run.variant)


def test_finished_runs_are_kept(script, tmp_path, monkeypatch):
    run = script.Run("direct", 0, tmp_path, [], tmp_path / "tokenizer", tmp_path / "direct-0.json")
    steps = []

    def shodh(run: Any, step: str, *arguments: str) -> bool:
        steps.append(step)
        if step == "train":
            run.tokenizer.mkdir()
            (run.tokenizer / "tokenizer.json").write_text(json.dumps({"sha256": "a"}))
        elif steps.count("evaluate") > 1:
            run.evaluation.write_text(json.dumps({"sha256": "a", "split": "test"}))
        return run.evaluation.exists() or step == "train"

    monkeypatch.setattr(script, "shodh", shodh)
    assert not script.carry_out(run), "its first evaluation fails"
    assert script.carry_out(run)
    assert script.carry_out(run)
    assert steps == ["train", "evaluate", "evaluate"]
    assert run.seconds() >= 0


def test_an_evaluation_of_another_tokenizer_is_not_used(script, tmp_path):
    run = script.Run("direct", 0, tmp_path, [], tmp_path / "tokenizer", tmp_path / "direct-0.json")
    run.evaluation.write_text(json.dumps({"sha256": "a", "split": "test"}))
    assert run.read_evaluation() is None, "there is no tokenizer"
    run.tokenizer.mkdir()
    (run.tokenizer / "tokenizer.json").write_text(json.dumps({"sha256": "b"}))
    assert run.read_evaluation() is None
    (run.tokenizer / "tokenizer.json").write_text(json.dumps({"sha256": "a"}))
    assert run.read_evaluation() == {"sha256": "a", "split": "test"}
