"""Each method against numbers computed by hand, and properties that hold for any numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shodh_moe.merging.alpha import Composition
from shodh_moe.merging.axes import in_order
from shodh_moe.merging.linear import Sum, linear
from shodh_moe.merging.methods import METHODS, recipe
from shodh_moe.merging.recipe import BLOCK, Recipe, TensorMerge
from shodh_moe.merging.sparsify import KthLargest, kept_at_random
from shodh_moe.merging.spherical import Slerp
from shodh_moe.merging.task_vectors import TaskVectors
from tests.merging.models import lookup

BASE = torch.tensor([1.0, 1.0, 1.0, 1.0])
ONE = torch.tensor([1.0, 3.0, 0.0, 1.5])  # d = 0, 2, -1, 0.5
TWO = torch.tensor([2.0, 0.0, 0.5, 1.25])  # d = 1, -1, -0.5, 0.25


def apply(recipe: Recipe, inputs: list[Tensor], length: int = 10**9) -> Tensor:
    """Return the result of a recipe that gets its tensors in slices of ``length``."""
    starts = range(0, inputs[0].numel(), length)
    for number in range(recipe.passes):
        for start in starts:
            recipe.observe(number, start, [x[start : start + length] for x in inputs])
        recipe.end_pass(number)
    return torch.cat([recipe.result(start, [x[start : start + length] for x in inputs]) for start in starts])


def vectors(method: str, numel: int = 4, weights: tuple[float, ...] = (1.0, 1.0), **shared: float) -> TaskVectors:
    own = [{"weight": weight} for weight in weights]
    given = lookup(shared, own)  # type: ignore[arg-type]
    return TaskVectors(TensorMerge(method, given, "w", (numel,), 1, len(weights), True, torch.float32))


def ccm(alpha: float, base: bool) -> Recipe:
    return Sum(in_order(["low", "high"], "").coefficients([alpha])[0 if base else 1 :])


def test_ccm_by_hand() -> None:
    low, high = torch.tensor([2.0, 0.0]), torch.tensor([4.0, 1.0])
    assert apply(ccm(0.0, False), [low, high]).tolist() == [3.0, 0.5]
    assert apply(ccm(0.5, False), [low, high]).tolist() == [3.5, 0.75]
    assert apply(ccm(2.0, False), [low, high]).tolist() == [5.0, 1.5]


def test_ccm_is_anchor_plus_shared_plus_alpha_times_direction() -> None:
    """The definition in terms of the anchor, which cancels."""
    random = torch.Generator().manual_seed(0)
    anchor, low, high = torch.randn(3, 100, dtype=torch.float64, generator=random)
    shared, direction = (low + high - 2 * anchor) / 2, (high - low) / 2
    for alpha in (-1.5, -0.3, 0.0, 0.7, 1.5):
        expected = anchor + shared + alpha * direction
        torch.testing.assert_close(apply(ccm(alpha, True), [anchor, low, high]), expected, rtol=0, atol=1e-14)


def test_linear_by_hand() -> None:
    assert apply(linear([1.0, 3.0], True, False), [ONE, TWO]).tolist() == [1.75, 0.75, 0.375, 1.3125]
    assert apply(linear([1.0, 3.0], False, False), [ONE, TWO]).tolist() == [7.0, 3.0, 1.5, 5.25]


def test_task_arithmetic_by_hand() -> None:
    # 1 + 0.5 (2 d1 + d2), d1 = 0 2 -1 .5, d2 = 1 -1 -.5 .25
    made = apply(vectors("task_arithmetic", weights=(2.0, 1.0), **{"lambda": 0.5}), [BASE, ONE, TWO])
    assert made.tolist() == [1.5, 2.5, -0.25, 1.625]
    # Over the sum of the weights, 3.
    made = apply(vectors("task_arithmetic", weights=(2.0, 1.0), normalize=True), [BASE, ONE, TWO])
    torch.testing.assert_close(made, torch.tensor([1 + 1 / 3, 2.0, 1 - 2.5 / 3, 1 + 1.25 / 3]))


def test_ties_by_hand() -> None:
    # Of four elements the two largest stay: d1 = 0 2 -1 0, d2 = 1 -1 0 0. Signs of the sums: + + - +.
    # Element 0: d2 alone. 1: d1 alone. 2: d1 alone (d2 is zero there). 3: nothing.
    assert apply(vectors("ties", density=0.5), [BASE, ONE, TWO]).tolist() == [2.0, 3.0, 0.0, 1.0]
    # All stay, weighted 1 and 3: d1 = 0 2 -1 .5, 3 d2 = 3 -3 -1.5 .75; signs + - - +; over the weights that agree.
    made = apply(vectors("ties", weights=(1.0, 3.0)), [BASE, ONE, TWO])
    assert made.tolist() == [1 + 3 / 3, 1 - 3 / 3, 1 - 2.5 / 4, 1 + 1.25 / 4]
    made = apply(vectors("ties", weights=(1.0, 3.0), normalize=False), [BASE, ONE, TWO])
    assert made.tolist() == [4.0, -2.0, -1.5, 2.25]


def test_dare_keeps_a_random_share_and_divides_by_the_density() -> None:
    n, density = 200_000, 0.25
    base, other = torch.zeros(n), torch.ones(n)
    made = apply(vectors("dare", n, (1.0,), density=density, seed=3), [base, other])
    assert set(made.unique().tolist()) == {0.0, 4.0}
    # Six standard deviations of a binomial share.
    assert abs((made > 0).float().mean() - density) < 6 * math.sqrt(density * (1 - density) / n)
    again = apply(vectors("dare", n, (1.0,), density=density, seed=4), [base, other])
    assert 0.3 < float((made != again).float().mean()) < 0.45  # independent: 2 * 1/4 * 3/4


def test_dare_ties_keeps_only_values_with_the_sign_of_the_sum() -> None:
    made = apply(vectors("dare_ties", weights=(1.0, 3.0)), [BASE, ONE, TWO])
    assert made.tolist() == [4.0, -2.0, -1.5, 2.25]


def test_random_masks_of_models_are_independent() -> None:
    a, b = (kept_at_random(0.5, 0, "w", model, 0, 100_000) for model in (0, 1))
    assert abs(float((a & b).float().mean()) - 0.25) < 0.01


def test_slerp_by_hand() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    half = math.sqrt(0.5)
    torch.testing.assert_close(apply(Slerp(0.5), [a, b]), torch.tensor([half, 2 * half]))
    third = apply(Slerp(1 / 3), [a, b])
    torch.testing.assert_close(third, torch.tensor([math.cos(math.pi / 6), 2 * math.sin(math.pi / 6)]))
    # Collinear vectors and a zero vector are interpolated linearly.
    assert apply(Slerp(0.25), [a, 3 * a]).tolist() == [1.5, 0.0]
    assert apply(Slerp(0.25), [a, 0 * a]).tolist() == [0.75, 0.0]


numbers = st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=300)


@settings(max_examples=60, deadline=None)
@given(numbers, st.integers(0, 2**16))
def test_ends_are_reproduced_bit_for_bit(values: list[float], seed: int) -> None:
    a = torch.tensor(values)
    b = torch.randn(len(values), generator=torch.Generator().manual_seed(seed))
    for made, expected in [
        (ccm(-1.0, False), a),
        (ccm(1.0, False), b),
        (linear([0.0, 1.0], True, False), b),
        (linear([2.0, 0.0], True, False), a),
        (Slerp(0.0), a),
        (Slerp(1.0), b),
        (vectors("task_arithmetic", a.numel(), (0.0,)), a),
        (vectors("ties", a.numel(), (1.0,), density=0.5, **{"lambda": 0.0}), a),
        (vectors("dare", a.numel(), (0.0,), density=0.5), a),
    ]:
        assert torch.equal(apply(made, [a, b]).view(torch.int32), expected.view(torch.int32))


@settings(max_examples=60, deadline=None)
@given(numbers, st.floats(0.01, 1.0), st.booleans())
def test_the_kth_largest_equals_the_sorted_one(values: list[float], density: float, double: bool) -> None:
    tensor = torch.tensor(values, dtype=torch.float64 if double else torch.float32)
    k = max(1, int(density * len(values)))
    found = KthLargest(k, tensor.dtype)
    for number in range(found.passes):
        for part in tensor.split(7):
            found.observe(number, part.clone())
        found.end_pass(number)
    assert found.value == float(tensor.abs().sort(descending=True).values[k - 1])


# Parameters of each method with which all of its passes are needed. The 24,673 elements of a row of "w" do not divide
# the blocks, nor do the 11 rows.
SETTINGS: dict[str, dict[str, float]] = {
    "slerp": {"t": 0.3},
    "ccm": {"alpha": 0.3},
    "linear": {"weight": 0.3},
    "task_arithmetic": {"weight": 0.3},
    "karcher": {},
    "model_stock": {"filter_wise": True},
    **{key: {"weight": 0.3, "density": 0.4} for key in ("ties", "dare", "dare_linear", "dare_ties")},
    **{key: {"weight": 0.3, "density": 0.4, "rescale": True} for key in ("breadcrumbs", "breadcrumbs_ties")},
    **{key: {"weight": 0.3, "density": 0.4} for key in ("della", "della_linear")},
}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_slicing_a_tensor_does_not_change_a_bit(method: str, dtype: torch.dtype, parts: int) -> None:
    shape = (11, 24_673 // parts)
    numel = math.prod(shape) * parts
    assert numel > 8 * BLOCK
    inputs = list(torch.randn(3, numel, dtype=dtype, generator=torch.Generator().manual_seed(1)))
    inputs = inputs[:2] if method == "slerp" else inputs
    line = Composition(in_order(["low", "high"], ""), {"": 0.3})

    def make() -> Recipe:
        given = lookup(dict(SETTINGS[method]))
        return recipe(TensorMerge(method, given, "w", shape, parts, len(inputs) - 1, True, dtype, line))

    whole = apply(make(), inputs)
    assert all(not torch.equal(whole, one) for one in inputs)
    for length in (BLOCK, 3 * BLOCK):
        assert torch.equal(apply(make(), inputs, length), whole)
