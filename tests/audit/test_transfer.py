from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shodh_moe.audit.results import MIN_SEEDS, estimate, relative_difference

positive = st.floats(1e-6, 1e3)


def test_negative_transfer_by_hand() -> None:
    # Differences 0.1, 0.2, 0.3: mean 0.2, s = 0.1, t(0.975, 2) = 4.3027.
    found = relative_difference({0: 1.1, 1: 2.4, 2: 3.9}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.2 - 0.24841, 0.2 + 0.24841), abs=1e-4)
    assert found.by_seed == pytest.approx({0: 0.1, 1: 0.2, 2: 0.3})


@pytest.mark.parametrize("seeds", [1, 2])
def test_no_interval_with_too_few_seeds(seeds: int) -> None:
    found = estimate(dict.fromkeys(range(seeds), 1.0))
    assert (found.value, found.low, found.high) == (1.0, None, None)


def test_a_diverged_seed_is_reported_and_removes_the_interval() -> None:
    found = relative_difference({0: 2.0, 1: 2.0, 2: 2.0, 3: None}, dict.fromkeys(range(4), 1.0))
    assert (found.value, found.low, found.high, found.diverged) == (1.0, None, None, [3])
    assert relative_difference({0: 1.0}, {0: None}).diverged == [0]
    assert estimate({0: math.inf, 1: 1.0}).diverged == [0]


def test_seeds_of_only_one_arm_do_not_count() -> None:
    found = relative_difference({0: 2.0, 1: 3.0, 7: None}, {0: 1.0, 1: 1.0, 8: 5.0})
    assert found.by_seed == {0: 1.0, 1: 2.0}
    assert found.diverged == []


def test_no_results_give_no_transfer() -> None:
    assert estimate({}).value is None


@given(st.dictionaries(st.integers(0, 20), st.tuples(positive, positive), min_size=MIN_SEEDS), st.floats(0.1, 10))
def test_a_common_factor_of_a_seed_cancels(pairs: dict[int, tuple[float, float]], factor: float) -> None:
    plain = relative_difference({s: a for s, (a, _) in pairs.items()}, {s: b for s, (_, b) in pairs.items()})
    # Pairing must remove the difficulty of a seed that both arms share.
    scale = {seed: factor ** (seed % 3) for seed in pairs}
    scaled = relative_difference(
        {s: a * scale[s] for s, (a, _) in pairs.items()}, {s: b * scale[s] for s, (_, b) in pairs.items()}
    )
    assert plain.low is not None
    assert plain.value is not None
    assert plain.high is not None
    assert plain.low <= plain.value <= plain.high
    tolerance = 1e-6 * (1 + max(abs(value) for value in plain.by_seed.values()))
    assert [scaled.low, scaled.high] == pytest.approx([plain.low, plain.high], rel=1e-6, abs=tolerance)
