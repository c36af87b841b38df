from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shodh_moe.metrics import routing

counts_tables = st.integers(1, 5).flatmap(
    lambda experts: st.lists(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts), min_size=1, max_size=4)
)


def test_purity_and_shares() -> None:
    assert routing.load_shares([1, 3]) == [0.25, 0.75]
    assert routing.purity([1, 3, 0, 0]) == 0.75
    assert routing.majority_expert([1, 3, 0, 0]) == 1
    assert routing.load_shares(torch.tensor([0, 0])) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"a": [99, 1], "b": [1, 99]}, True),  # exactly at the threshold
        ({"a": [989, 11], "b": [0, 1000]}, False),  # one domain not pure enough
        ({"a": [100, 0], "b": [100, 0]}, False),  # the same expert for both
        ({"a": [100, 0]}, False),  # no other domain
        ({"a": [9, 0, 0], "b": [0, 9, 0], "c": [0, 0, 9]}, True),
        ({"a": [9, 0, 0], "b": [0, 9, 0], "c": [0, 9, 0]}, False),
    ],
)
def test_bifurcated(counts: dict[str, list[float]], expected: bool) -> None:
    assert routing.bifurcated(counts) is expected


def test_mutual_information_golden() -> None:
    assert routing.mutual_information([[10, 0], [0, 10]]) == pytest.approx(math.log(2))
    assert routing.mutual_information([[5, 15], [10, 30]]) == pytest.approx(0.0, abs=1e-12)
    by_hand = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert routing.mutual_information([[3, 1], [1, 3]]) == pytest.approx(by_hand)
    assert routing.mutual_information([[0, 0], [0, 0]]) == 0
    with pytest.raises(ValueError, match="axes"):
        routing.mutual_information([1, 2])  # type: ignore[list-item]


@settings(max_examples=50, deadline=None)
@given(table=counts_tables, factor=st.integers(1, 9))
def test_mutual_information_properties(table: list[list[int]], factor: int) -> None:
    counts = torch.tensor(table)
    found = routing.mutual_information(counts)
    assert 0 <= found <= math.log(min(counts.shape)) + 1e-9
    assert found == pytest.approx(routing.mutual_information(counts.T), abs=1e-9)
    assert found == pytest.approx(routing.mutual_information(counts * factor), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(table=counts_tables)
def test_shares_sum_to_one_and_purity_is_between_even_and_all(table: list[list[int]]) -> None:
    for row in table:
        if sum(row):
            assert sum(routing.load_shares(row)) == pytest.approx(1)
            assert 1 / len(row) - 1e-12 <= routing.purity(row) <= 1


def test_information_from_the_mask_is_not_knowledge_of_the_domain() -> None:
    by_mask = torch.tensor([[[30, 0], [0, 0]], [[0, 0], [0, 10]]])  # solid category, domain and expert coincide
    assert routing.mutual_information(by_mask.sum(0)) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert routing.conditional_mutual_information(by_mask) == 0
    by_domain = torch.tensor([[[3, 0], [0, 3]], [[5, 0], [0, 5]]])  # every category has both domains equally
    assert routing.conditional_mutual_information(by_domain) == pytest.approx(math.log(2))
    assert routing.mutual_information(by_domain.sum(0)) == pytest.approx(math.log(2))


def test_conditional_mutual_information_weighs_categories_by_their_tokens() -> None:
    knows, knows_not, empty = [[1, 0], [0, 1]], [[3, 3], [1, 1]], [[0, 0], [0, 0]]
    found = routing.conditional_mutual_information([knows, knows_not, empty])
    assert found == pytest.approx(0.2 * math.log(2))
    assert routing.conditional_mutual_information([empty]) == 0
    with pytest.raises(ValueError, match="axes"):
        routing.conditional_mutual_information([[1, 2]])  # type: ignore[list-item]


@settings(max_examples=50, deadline=None)
@given(numbers=st.lists(st.integers(0, 100), min_size=24, max_size=24))
def test_chain_rule(numbers: list[int]) -> None:
    """I(E; D, C) = I(E; C) + I(E; D | C)."""
    counts_CDE = torch.tensor(numbers).view(4, 3, 2)
    together = routing.mutual_information(counts_CDE.flatten(0, 1))
    beyond = routing.conditional_mutual_information(counts_CDE)
    assert together == pytest.approx(routing.mutual_information(counts_CDE.sum(1)) + beyond, abs=1e-9)


def test_joint_counts_and_solid_categories() -> None:
    solid = torch.tensor([0.0, 0.1, 0.5, 0.99, 1.0, 1.0])
    category = routing.solid_fraction_category(solid, categories=6)
    assert category.tolist() == [0, 1, 3, 4, 5, 5]
    joint = routing.joint_counts(category, torch.tensor([0, 0, 0, 1, 1, 1]), 6, 2)
    assert joint.tolist() == [[1, 0], [1, 0], [0, 0], [1, 0], [0, 1], [0, 2]]


def test_by_default_there_are_four_solid_categories() -> None:
    solid = torch.tensor([[0.0, 0.25], [0.5, 1.0]])
    category = routing.solid_fraction_category(solid)
    assert category.tolist() == [[0, 1], [2, 3]]
    assert routing.joint_counts(category, torch.zeros(2, 2), 4, 1).tolist() == [[1], [1], [1], [1]]
    with pytest.raises(ValueError, match="at least 3"):
        routing.solid_fraction_category(solid, categories=2)


def test_joint_counts_refuse_numbers_out_of_range() -> None:
    with pytest.raises(ValueError, match="expert numbers run from -1"):
        routing.joint_counts(torch.tensor([0, 0]), torch.tensor([0, -1]), 1, 2)
    with pytest.raises(ValueError, match="category numbers"):
        routing.joint_counts(torch.tensor([0, 5]), torch.tensor([0, 1]), 4, 2)


def test_router_entropy() -> None:
    assert routing.router_entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]])) == pytest.approx(math.log(2) / 2)


def test_the_summary_has_the_format_of_metrics_json() -> None:
    counts = [{"a": [100, 0], "b": [0, 100]}, {"a": torch.tensor([50, 50]), "b": torch.tensor([0, 100])}]
    found = routing.summarise_routing(counts, dropped_fraction=[{"a": 0.1, "b": 0.0}] * 2, entropy=[{"a": 0.2}] * 2)
    first, second = found["layers"]
    assert found["bifurcated"] is False
    assert first["bifurcated"] is True
    assert second["bifurcated"] is False
    assert second["load"]["a"] == [0.5, 0.5]
    assert second["purity"] == {"a": 0.5, "b": 1.0}
    assert first["majority_expert"] == {"a": 0, "b": 1}
    assert first["dropped_fraction"]["a"] == 0.1
    assert first["mutual_information"]["domain"] == pytest.approx(math.log(2))
    assert routing.summarise_routing([])["bifurcated"] is False
