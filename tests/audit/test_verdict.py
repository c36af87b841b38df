from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shodh_moe.audit.results import Estimate, estimate, relative_difference
from shodh_moe.audit.verdict import MARGIN, as_good, compare, ends_negative_transfer, harm, reads_mask, splits

A, B = "open_channel", "porous_media"


def around(value: float, half: float) -> Estimate:
    return Estimate(value, value - half, value + half, {0: value, 1: value, 2: value})


GOOD, HARM, NONE = around(0.0, 0.01), around(0.3, 0.1), Estimate(0.3, None, None, {0: 0.3})
BETTER = around(-0.2, 0.1)


@pytest.mark.parametrize(
    ("transfer", "answer"),
    [
        (HARM, "harms"),
        (around(0.01, 0.005), "harms"),  # significantly above 0 takes precedence over below the margin
        (GOOD, "does not harm"),
        (around(0.0, 0.5), "not shown"),
        (around(0.01, 0.011), "not shown"),
        (NONE, "not shown"),
    ],
)
def test_harm(transfer: Estimate, answer: str) -> None:
    assert harm(transfer) == answer


@pytest.mark.parametrize(
    ("dense", "moe", "against", "answer"),
    [
        ((GOOD, GOOD), (HARM, HARM), (HARM, HARM), "no harm to end"),
        ((HARM, GOOD), (GOOD, GOOD), (BETTER, GOOD), "shown"),
        ((HARM, NONE), (GOOD, GOOD), (BETTER, NONE), "shown"),
        ((HARM, GOOD), (GOOD, NONE), (BETTER, GOOD), "not shown"),
        ((HARM, GOOD), (GOOD, HARM), (BETTER, GOOD), "not shown"),
        ((HARM, GOOD), (GOOD, GOOD), (around(-0.1, 0.2), GOOD), "not shown"),
        ((HARM, HARM), (GOOD, HARM), (BETTER, GOOD), "refuted"),
        ((HARM, HARM), (NONE, NONE), (NONE, NONE), "not shown"),
        ((NONE, GOOD), (GOOD, GOOD), (BETTER, GOOD), "not shown"),
    ],
)
def test_the_main_verdict(
    dense: tuple[Estimate, ...], moe: tuple[Estimate, ...], against: tuple[Estimate, ...], answer: str
) -> None:
    found = ends_negative_transfer(*(dict(zip((A, B), each, strict=True)) for each in (dense, moe, against)))
    assert found.answer == answer
    assert found.reason


def test_the_mixtures_upper_end_may_equal_the_margin() -> None:
    on_margin = Estimate(0.0, -MARGIN, MARGIN, {})
    assert ends_negative_transfer({A: HARM}, {A: on_margin}, {A: BETTER}).answer == "shown"


def test_missing_runs_give_no_verdict() -> None:
    assert ends_negative_transfer({}, {}, {}).answer == "not shown"
    assert ends_negative_transfer({A: HARM}, {}, {A: BETTER}).answer == "not shown"
    assert compare({}).answer == "no difference shown"
    assert as_good({}).answer == "not shown"


def verdict_of(single: dict, dense: dict, moe: dict) -> str:
    of = relative_difference
    return ends_negative_transfer({A: of(dense, single)}, {A: of(moe, single)}, {A: of(moe, dense)}).answer


error = st.one_of(st.floats(0.5, 2.0), st.none())


@given(st.lists(st.tuples(error, error, error), max_size=6))
def test_never_shown_with_few_seeds_or_a_diverged_run(runs: list[tuple[float | None, ...]]) -> None:
    single, dense, moe = ({seed: run[i] for seed, run in enumerate(runs)} for i in range(3))
    diverged = any(value is None for run in runs for value in run)
    if len(runs) < 3 or diverged:
        # Even if the numbers alone would be clear.
        dense = {seed: None if value is None else 10 * value for seed, value in dense.items()}
        assert verdict_of(single, dense, moe) not in ("shown", "refuted", "no harm to end")


near = st.tuples(st.floats(0.98, 1.02), st.floats(1.1, 1.3), st.floats(0.9, 1.1))


@given(st.lists(near, min_size=3, max_size=5), st.floats(1.0, 1.5), st.booleans())
def test_a_worse_mixture_never_becomes_shown(
    runs: list[tuple[float, float, float]], factor: float, diverges: bool
) -> None:
    single, dense, moe = ({seed: run[i] for seed, run in enumerate(runs)} for i in range(3))
    worse: dict[int, float | None] = {seed: factor * value for seed, value in moe.items()}
    if diverges:
        worse[0] = None
    order = ["refuted", "not shown", "shown"]
    before, after = (verdict_of(single, dense, each) for each in (moe, worse))
    if before in order and after in order and not diverges:
        assert order.index(after) <= order.index(before)
    assert not (before == "not shown" and after == "shown")


ends = st.tuples(st.floats(-1, 1), st.floats(-1, 1)).map(sorted)


@given(ends, ends, st.floats(0, 1), st.floats(0, 1))
def test_raised_ends_never_become_shown(moe: list[float], against: list[float], low: float, high: float) -> None:
    def shown(raised_low: float, raised_high: float) -> bool:
        both = [Estimate(one[0], one[0] + raised_low, one[1] + raised_high, {}) for one in (moe, against)]
        return ends_negative_transfer({A: HARM}, {A: both[0]}, {A: both[1]}).answer == "shown"

    assert shown(0, 0) or not shown(low, high)


def test_comparisons() -> None:
    unsure = around(0.0, 0.5)
    assert compare({A: BETTER, B: unsure}).answer == "better"
    assert compare({A: HARM, B: unsure}).answer == "worse"
    assert compare({A: HARM, B: BETTER}).answer == "mixed"
    assert compare({A: unsure, B: NONE}).answer == "no difference shown"
    assert as_good({A: GOOD, B: BETTER}).answer == "as good"
    assert as_good({A: GOOD, B: HARM}).answer == "worse"
    assert as_good({A: GOOD, B: NONE}).answer == "not shown"


def test_a_diverged_seed_is_given_as_the_reason() -> None:
    lost = dataclasses.replace(NONE, diverged=[4])
    found = ends_negative_transfer({A: HARM}, {A: lost}, {A: lost})
    assert found.answer == "not shown"
    assert "seed 4 diverged" in found.reason


@pytest.mark.parametrize(
    ("seeds", "answer"),
    [
        ([True, True, True], "splits"),
        ([False, False, False], "does not split"),
        ([True, False, True], "on some seeds"),
        ([True, True, True, None], "on some seeds"),
        ([True, True], "not shown"),
        ([True, True, None], "not shown"),
    ],
)
def test_splits(seeds: list[bool | None], answer: str) -> None:
    assert splits(dict(enumerate(seeds))).answer == answer


def test_reads_mask() -> None:
    assert reads_mask(estimate({0: 0.5, 1: 0.52, 2: 0.48})).answer == "reads more than the mask"
    assert reads_mask(estimate({0: 0.001, 1: 0.0, 2: 0.002})).answer == "tells no more than the mask"
    assert reads_mask(estimate({0: 0.5})).answer == "not shown"
    assert reads_mask(estimate({})).answer == "not shown"
