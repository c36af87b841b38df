from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.ccm.bench import aims
from shodh_moe.ccm.bench.aims import READOUTS, ROWS
from shodh_moe.ccm.bench.summary import resampled_means, resampling_weights, summarise
from shodh_moe.ccm.bench.tables import markdown
from tests.ccm.bench.synthetic import result


def tiny(seed: int, errors: dict[str, dict[float, list[float]]]) -> dict[str, Any]:
    """Make a result of three regimes (s = -1.5, 0.5, 1.5) with the given errors by row and s."""
    splits = {0.5: "interpolation", -1.5: "ood_low", 1.5: "ood_high"}
    regimes = [
        {
            "split": split,
            "coordinate": s,
            "value": 1.0 + s,
            "rows": {row: {"errors": by_s[s], "alpha": s + seed / 10} for row, by_s in errors.items() if s in by_s},
        }
        for s, split in splits.items()
    ]
    return {
        "family": "reaction_diffusion",
        "seed": seed,
        "parameter": "diffusivity",
        "frames": 4,
        "regimes": regimes,
        "cpu_seconds": {"anchor": 60.0},
    }


def golden() -> list[dict[str, Any]]:
    first = {
        "anchor": {0.5: [0.1, 0.3], -1.5: [1.0, 1.0], 1.5: [0.4, 0.6]},
        "low": {0.5: [0.2, 0.2], -1.5: [0.3, 0.5], 1.5: [1.0, 1.0]},
        "high": {0.5: [0.4, 0.4], -1.5: [1.0, 1.0], 1.5: [0.3, 0.3]},
        "best_endpoint": {0.5: [0.4, 0.4], -1.5: [0.3, 0.5], 1.5: [0.3, 0.3]},
        "ccm_coordinate": {0.5: [0.2, 0.4], -1.5: [0.2, 0.2], 1.5: [0.1, 0.1]},
        "oracle": {0.5: [0.1, 0.1], -1.5: [0.2, 0.2], 1.5: [0.1, 0.1]},
    }
    second = copy.deepcopy(first)
    second["anchor"][0.5] = [0.5, 0.7]
    second["ccm_coordinate"][1.5] = [0.1, 0.3]
    return [tiny(1, second), tiny(0, first)]


def test_golden_numbers() -> None:
    summary = summarise(golden())
    family = summary["families"]["reaction_diffusion"]
    assert family["seeds"] == [0, 1]
    anchor, ccm = family["rows"]["anchor"], family["rows"]["ccm_coordinate"]
    assert anchor["interpolation"]["value"] == pytest.approx((0.1 + 0.3 + 0.5 + 0.7) / 4)
    assert anchor["ood_low"]["value"] == pytest.approx(1.0)
    assert anchor["ood_high"]["value"] == pytest.approx(0.5)
    assert anchor["ood"]["value"] == pytest.approx(0.75)
    assert ccm["ood"]["value"] == pytest.approx((0.2 + 0.15) / 2)
    assert ccm["reduction"]["anchor"]["value"] == pytest.approx(1 - 0.175 / 0.75)
    assert ccm["reduction"]["best_endpoint"]["value"] == pytest.approx(1 - 0.175 / 0.35)
    assert anchor["reduction"]["anchor"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert [regime["errors"]["ccm_coordinate"] for regime in family["regimes"]] == pytest.approx([0.3, 0.2, 0.15])
    assert family["regimes"][1]["alpha"] == {"ccm_coordinate": pytest.approx(-1.45), "oracle": pytest.approx(-1.45)}
    assert summary["cpu_seconds"] == 120.0


def test_golden_numbers_meet_or_miss_the_aims() -> None:
    records = {record["aim"]: record for record in summarise(golden())["aims"]}
    assert {record["readout"] for record in records.values()} == {"ccm_coordinate"}
    reduction = records[aims.REDUCTION]
    assert reduction["held"]
    assert reduction["target"] == 0.6
    # At s = 0.5 the low expert (0.2) is the better one; CCM (0.3) is worse than it but not worse than the chosen one.
    better = records[aims.BETTER_ENDPOINT]
    assert (better["value"], better["where"], better["held"]) == (pytest.approx(1.5), "s = +0.5", False)
    chosen = records[aims.CHOSEN_ENDPOINT]
    assert (chosen["value"], chosen["where"], chosen["held"]) == (pytest.approx(0.75), "s = +0.5", True)
    # The oracle counts only in OOD regimes: 0.2 / 0.2 and 0.15 / 0.1.
    worst = records[aims.ORACLE_WORST]
    assert (worst["value"], worst["where"], worst["held"]) == (pytest.approx(1.5), "s = +1.5", False)
    assert records[aims.ORACLE_MEAN]["value"] == pytest.approx(1.25)


@pytest.mark.parametrize(("error", "held"), [(0.29, True), (0.31, False)])
def test_the_reduction_aim_is_met_at_its_target(error: float, held: bool) -> None:
    errors = {"anchor": {-1.5: [0.75] * 2}, "ccm_scale": {-1.5: [error] * 2}}
    results = [tiny(0, errors)]
    results[0]["regimes"] = results[0]["regimes"][1:2]
    (record,) = summarise(results)["aims"]
    assert record["held"] is held


def test_intervals_contain_the_mean_and_are_reproducible() -> None:
    results = [result("navier_stokes", seed) for seed in range(3)]
    summary = summarise(results, seed=7)
    for row in summary["families"]["navier_stokes"]["rows"].values():
        estimates = [row[group] for group in ("interpolation", "ood", "ood_low", "ood_high")]
        for one in [*estimates, *row["reduction"].values()]:
            assert one["low"] <= one["value"] <= one["high"]
        assert row["ood"]["high"] - row["ood"]["low"] > 0.01 * row["ood"]["value"]
    assert summary == summarise(results[::-1], seed=7)


def test_the_interval_of_equal_errors_has_no_width() -> None:
    errors = {row: {s: [value] * 3 for s in (-1.5, 0.5, 1.5)} for row, value in (("anchor", 0.4), ("average", 0.3))}
    row = summarise([tiny(seed, errors) for seed in range(3)])["families"]["reaction_diffusion"]["rows"]["average"]
    assert [row["ood"][key] for key in ("value", "low", "high")] == pytest.approx([0.3] * 3, rel=1e-12)
    assert [row["reduction"]["anchor"][key] for key in ("value", "low", "high")] == pytest.approx([0.25] * 3, rel=1e-12)


def test_pairing_removes_the_common_difficulty() -> None:
    hard = [0.1, 0.2, 0.4, 0.8]
    errors = {row: {s: [f * one for one in hard] for s in (-1.5, 0.5, 1.5)} for row, f in (("anchor", 1), ("low", 0.5))}
    row = summarise([tiny(0, errors)])["families"]["reaction_diffusion"]["rows"]["low"]
    assert row["ood"]["high"] > 1.3 * row["ood"]["low"]
    assert [row["reduction"]["anchor"][key] for key in ("low", "high")] == pytest.approx([0.5, 0.5])


def test_resamples_draw_seeds_and_trajectories() -> None:
    rng = np.random.default_rng(0)
    seeds, trajectories = resampling_weights(3, rng), resampling_weights(4, rng)
    assert seeds.sum(1) == pytest.approx(1)
    errors = rng.random((3, 4))
    means = resampled_means(errors, seeds, trajectories)
    assert means[0] == pytest.approx(errors.mean())
    drawn = np.repeat(np.arange(3), np.rint(3 * seeds[5]).astype(int))
    columns = np.repeat(np.arange(4), np.rint(4 * trajectories[5]).astype(int))
    assert means[5] == pytest.approx(errors[drawn][:, columns].mean())


@pytest.mark.parametrize("broken", [None, float("nan"), float("inf")])
def test_diverged_rollouts(broken: float | None) -> None:
    results = golden()
    rows = results[0]["regimes"][1]["rows"]
    rows["ccm_coordinate"]["errors"] = [0.2, broken]
    summary = summarise(results)
    json.dumps(summary, allow_nan=False)
    family = summary["families"]["reaction_diffusion"]
    row = family["rows"]["ccm_coordinate"]
    assert row["ood"]["value"] is row["ood_low"]["value"] is row["ood"]["high"] is None
    assert row["ood_high"]["value"] == pytest.approx(0.15)
    assert (row["blew_up"], row["rollouts"]) == (1, 12)
    assert row["reduction"]["anchor"]["value"] is None
    held = {record["aim"]: record["held"] for record in summary["aims"]}
    assert not any(held.values())
    text = markdown(summary)
    assert "blew up at s = -1.5" in text
    assert "Rollouts that blew up: CCM, coordinate 1 of 12." in text


def test_nothing_is_claimed_against_a_diverged_anchor() -> None:
    results = golden()
    results[0]["regimes"][1]["rows"]["anchor"]["errors"][0] = None
    summary = summarise(results)
    assert summary["families"]["reaction_diffusion"]["rows"]["ccm_coordinate"]["reduction"]["anchor"]["value"] is None
    (record,) = (record for record in summary["aims"] if record["aim"] == aims.REDUCTION)
    assert not record["held"]


def test_missing_rows_are_skipped() -> None:
    results = golden()
    for one in results:
        del one["regimes"][0]["rows"]["oracle"]  # no seed has it in the interpolation regime
    del results[0]["regimes"][1]["rows"]["high"]  # one seed lacks it at s = -1.5
    summary = summarise(results)
    family = summary["families"]["reaction_diffusion"]
    assert "ties" not in family["rows"]
    assert "interpolation" not in family["rows"]["oracle"]
    assert "ood" in family["rows"]["oracle"]
    assert set(family["rows"]["high"]) & {"ood", "ood_low", "ood_high"} == {"ood_high"}
    assert family["incomplete"] == ["high"]
    text = markdown(summary)
    assert "TIES" not in text
    assert "Left out of regimes that some seed lacks: high expert." in text


def test_the_markdown_has_every_table() -> None:
    families = ("reaction_diffusion", "navier_stokes", "shallow_water")
    results = [result(family, seed) for family in families for seed in range(3)]
    summary = summarise(results)
    assert len(summary["aims"]) == 3 * len(READOUTS) * 5
    text = markdown(summary)
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## Aims", "## Reaction-diffusion", "## Navier-Stokes", "## Shallow water", "## Cost"]
    for title in ROWS.values():
        assert sum(line.startswith(f"| {title} |") for line in text.splitlines()) == 6
    assert "| met: " in text
    assert "| **missed**: " in text
    assert "gamma = 0.9 / 0.9 / 0.95; task arithmetic lambda = 0.5;" in text
    assert "up to |alpha| = 1.5." in text
    assert "Total: 1.50 CPU hours." in text
    tables = [[line.count("|") for line in block.splitlines()] for block in text.split("\n\n") if block[0] == "|"]
    assert len(tables) == 1 + 2 * 3 + 1
    assert all(len(set(columns)) == 1 for columns in tables)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda results: results.clear(), "no results"),
        (lambda results: results[0].update(seed=0), "seed 0 are given twice"),
        (lambda results: results[0].update(frames=5), "different regimes or frames"),
        (lambda results: results[0]["regimes"].pop(), "different regimes or frames"),
        (lambda results: results[0]["regimes"][2]["rows"]["low"]["errors"].pop(), "ood_high at s = \\+1.5"),
        (lambda results: results[0]["regimes"][2]["rows"].update(slerp={"errors": [1, 1]}), "unknown row slerp"),
    ],
)
def test_results_that_do_not_match_are_refused(change: Any, complaint: str) -> None:
    results = golden()
    change(results)
    with pytest.raises(UserError, match=complaint):
        summarise(results)


def test_networks_on_one_family_are_compared_and_have_its_aims() -> None:
    results = [{**result(key, seed), "name": "navier_stokes"} for key in ("small", "large") for seed in range(2)]
    summary = summarise(results)
    targets = {record["family"]: record["target"] for record in summary["aims"] if record["aim"] == aims.REDUCTION}
    assert targets == dict.fromkeys(("small", "large"), aims.REDUCTIONS["navier_stokes"])
    summary["backbones"] = {"navier_stokes": {"FNO 24/6": "small", "DPOT tiny": "large"}}
    text = markdown(summary)
    section = text[text.index("## Backbones") : text.index("## Small")]
    assert "| row | FNO 24/6 | DPOT tiny |" in section
    value = 100 * summary["families"]["large"]["rows"]["ccm_scale"]["reduction"]["anchor"]["value"]
    line = next(line for line in section.splitlines() if line.startswith("| CCM, scale |"))
    assert f"{value:.1f} %" in line.split("|")[3]
    assert "| nRMSE of the anchor |" in section
    assert "42.8 % (CCM, scale)" in text  # the paper's number for this family
