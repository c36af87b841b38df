"""Times of collectives: values computed by hand from the formulas, and properties."""

from __future__ import annotations

import math

import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.parallel.layout import CONTEXT, EXPERTS, REPLICAS, WORLD, Layout
from shodh_moe.plan.collectives import Place, collective_seconds, exposed_seconds, place_of
from shodh_moe.plan.machine import KINDS, Link, Machine, from_data_sheets
from shodh_moe.plan.microbenchmarks import fitted_link


def machine(hop: float = 1.0, rate: float = 10.0, outside: tuple[float, float] | None = (3.0, 2.0)) -> Machine:
    """Nodes of four ranks with round numbers."""
    made = from_data_sheets("h100")
    link = Link(hop=hop, rate=rate)
    rates = made.ranks[1].model_copy(update={"start": 0.5, "links": dict.fromkeys(KINDS, link)})
    network = Link(hop=outside[0], rate=outside[1]) if outside else None
    return made.model_copy(update={"per_node": 4, "ranks": {1: rates}, "network": network})


BY_HAND = {
    # 2 (p - 1) steps of latency 1, 2 (p - 1) / p of 80 bytes at 10 bytes/s
    "all_reduce in a node": ("all_reduce", 80, Place(4, 1, 4), 0.5 + 6 + 12),
    "all_gather in a node": ("all_gather", 80, Place(4, 1, 4), 0.5 + 3 + 6),
    "all_to_all in a node": ("all_to_all", 80, Place(4, 1, 4), 0.5 + 3 + 6),
    "one rank": ("all_reduce", 80, Place(1, 1, 1), 0.0),
    # two nodes of two: rate min(10, 2 * 2) = 4; tree 2 (1 + 1 * 3) + 160 / 4, ring 2 (1 + 2 * 3) + 1.5 * 80 / 4
    "all_reduce, ring": ("all_reduce", 80, Place(4, 2, 2), 0.5 + 14 + 30),
    "all_reduce, tree": ("all_reduce", 8, Place(4, 2, 2), 0.5 + 8 + 4),
    # two nodes of two: one hop between nodes, two inside
    "reduce_scatter in a node": ("reduce_scatter", 80, Place(4, 1, 4), 0.5 + 3 + 6),
    "all_gather, two nodes": ("all_gather", 80, Place(4, 2, 2), 0.5 + 2 + 3 + 15),
    # a quarter goes to the neighbour at 10, two quarters over the network at 2
    "all_to_all, two nodes": ("all_to_all", 80, Place(4, 2, 2), 0.5 + 1 + 6 + 20),
    # four nodes of one: only the network
    "all_gather, alone in each node": ("all_gather", 80, Place(4, 4, 1), 0.5 + 9 + 30),
}


@pytest.mark.parametrize(("kind", "sent", "place", "expected"), BY_HAND.values(), ids=BY_HAND)
def test_a_collective_takes_the_time_of_the_formula(kind, sent, place, expected):
    assert collective_seconds(kind, sent, place, machine(), 16) == pytest.approx(expected)


PLACES = {
    "the world fills nodes": (WORLD, 16, 4, 1, Place(16, 2, 8)),
    "the last node is not full": (WORLD, 12, 4, 1, Place(12, 2, 4)),
    "experts within a node": (EXPERTS, 16, 8, 1, Place(8, 1, 8)),
    "experts over two nodes": (EXPERTS, 32, 16, 1, Place(16, 2, 8)),
    "replicas, one in each node": (REPLICAS, 32, 8, 1, Place(4, 4, 1)),
    "replicas, two in each node": (REPLICAS, 32, 4, 1, Place(8, 4, 2)),
    "slabs of a sample": (CONTEXT, 16, 4, 2, Place(2, 1, 2)),
    "experts beside slabs": (EXPERTS, 32, 8, 2, Place(8, 2, 4)),
    "replicas beside slabs": (REPLICAS, 32, 8, 2, Place(4, 2, 2)),
    "experts that straddle nodes": (EXPERTS, 12, 6, 1, Place(6, 2, 2)),
}


@pytest.mark.parametrize(("group", "world", "ep", "cp", "expected"), PLACES.values(), ids=PLACES)
def test_a_group_is_placed(group, world, ep, cp, expected):
    assert place_of(group, Layout(world, ep, cp), 8) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [Place(4, 1, 4), Place(8, 2, 4), Place(4, 4, 1)])
def test_more_bandwidth_and_less_latency_are_never_slower(kind, place):
    slow = collective_seconds(kind, 100, place, machine(), 8)
    for better in (machine(rate=20), machine(hop=0.5), machine(outside=(3, 4)), machine(outside=(1, 2))):
        assert collective_seconds(kind, 100, place, better, 8) <= slow


def test_a_group_over_nodes_needs_a_network():
    with pytest.raises(UserError, match=r"8 ranks need more than one node of 4: .*--network, one of efa-3200"):
        collective_seconds("all_reduce", 1, Place(8, 2, 4), machine(outside=None), 8)


def test_collectives_that_were_not_measured_are_named():
    made = machine()
    alone = made.model_copy(update={"ranks": {1: made.ranks[1].model_copy(update={"links": {}})}})
    with pytest.raises(UserError, match="--ranks 1 2"):
        collective_seconds("all_reduce", 1, Place(2, 1, 2), alone, 2)


def test_buckets_that_overlap_the_backward_pass():
    assert exposed_seconds(1.0, 4, 100.0) == 1.0  # the last one, after the pass
    assert exposed_seconds(10.0, 4, 8.0) == 34.0  # the first is ready after 2 of 8 seconds; 2 + 40 - 8
    assert exposed_seconds(5.0, 1, 8.0) == 5.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_is_found_again_from_its_times(kind):
    link = Link(hop=2e-5, rate=3e9)
    place, twice = Place(4, 1, 4), machine().model_copy(update={"per_node": 4})
    rates = twice.ranks[1].model_copy(update={"start": 0.0, "links": dict.fromkeys(KINDS, link)})
    twice = twice.model_copy(update={"ranks": {1: rates}})
    times = [(sent, collective_seconds(kind, sent, place, twice, 4)) for sent in (1e3, 1e5, 1e7)]
    found = fitted_link(kind, 4, times)
    assert found.hop == pytest.approx(link.hop, rel=1e-6)
    assert found.rate == pytest.approx(link.rate, rel=1e-6)


def test_a_link_without_latency_or_with_latency_alone_has_valid_values():
    for times in ([(1e3, 1e-6), (1e6, 1e-2)], [(1e3, 1e-3), (1e6, 1e-3)], [(1e3, 2e-3), (1e6, 1e-3)]):
        found = fitted_link("all_gather", 2, times)
        assert found.hop >= 0
        assert 0 < found.rate < math.inf
