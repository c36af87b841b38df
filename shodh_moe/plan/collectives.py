"""Times of collectives by the alpha-beta model: a step costs a latency (alpha) and its bytes over a rate (1 / beta).

Ring, and all-to-all: R. Thakur, R. Rabenseifner, W. Gropp, Optimization of Collective Communication Operations in
MPICH, 2005. Double binary tree: P. Sanders, J. Speck, J. L. Traeff, Two-tree algorithms for full bandwidth broadcast,
reduction and scan, 2009. Where groups span nodes, the latencies of a ring's and a tree's steps are added up as in
NCCL's own model (src/graph/tuning.cc): a ring crosses the network once for each node, the other steps stay in a node.

p ranks, on m nodes with k ranks each; n bytes.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass

from shodh_moe.base.errors import UserError
from shodh_moe.parallel.layout import Layout
from shodh_moe.plan.hardware import NETWORKS
from shodh_moe.plan.machine import MEASURE, Kind, Machine


@dataclass(frozen=True)
class Place:
    """Where the ranks of a group are.

    Attributes:
        ranks: p.
        nodes: m.
        together: k, the smallest number of the group's ranks in any of its nodes.
    """

    ranks: int
    nodes: int
    together: int


@functools.lru_cache(maxsize=4096)
def place_of(group: str, layout: Layout, per_node: int) -> Place:
    """Place a group of `Traffic`: the one of its kind that spans most nodes, with fewest ranks in a node.

    Ranks fill one node after the other.
    """
    found = []
    for ranks in layout.groups(group):
        nodes = Counter(rank // per_node for rank in ranks)
        found.append(Place(len(ranks), len(nodes), min(nodes.values())))
    return max(found, key=lambda place: (place.nodes, -place.together))


def collective_seconds(kind: Kind, sent: float, place: Place, machine: Machine, world: int) -> float:
    """Time of one collective.

    Args:
        sent: n: the tensor that is reduced, that all ranks together gather, or that a rank distributes or reduces and
            scatters.
        world: number of busy ranks, which all run such a collective at the same time.

    Raises:
        UserError: the group spans nodes, and the machine has no network.
    """
    if place.ranks == 1:
        return 0.0
    rates = machine.rates(world)
    if kind not in rates.links:
        raise UserError(
            f"{machine.name} was measured with one rank, not {world}: measure again, as with "
            f"`{MEASURE} --ranks 1 {world}`"
        )
    inside, p, m, k = rates.links[kind], place.ranks, place.nodes, place.together
    if m == 1:
        steps, hops, rate = p - 1, (p - 1) * inside.hop, inside.rate
        if kind == "all_reduce":
            return rates.start + 2 * hops + 2 * steps / p * sent / rate
        return rates.start + hops + steps / p * sent / rate
    network = machine.network
    if network is None:
        raise UserError(
            f"{world} ranks need more than one node of {machine.per_node}: name the network between them with "
            f"--network, one of {', '.join(sorted(NETWORKS))}"
        )
    if kind == "all_to_all":
        hops = (k - 1) * inside.hop + (p - k) * network.hop
        # Both links are used at the same time.
        return rates.start + hops + max((k - 1) / p * sent / inside.rate, (p - k) / p * sent / network.rate)
    # The ranks of a node share its adapters: each carries a part of the ring.
    rate = k * network.rate if k == 1 else min(inside.rate, k * network.rate)
    if kind in ("all_gather", "reduce_scatter"):
        hops = (p - m) * inside.hop + (m - 1) * network.hop
        return rates.start + hops + (p - 1) / p * sent / rate
    across = min(m, p - 1)
    ring = 2 * ((p - 1 - across) * inside.hop + across * network.hop) + 2 * (p - 1) / p * sent / rate
    tree = 2 * ((k - 1) * inside.hop + math.ceil(math.log2(m)) * network.hop) + 2 * sent / rate
    return rates.start + min(ring, tree)


def exposed_seconds(bucket: float, buckets: int, backward: float) -> float:
    """Time by which reducing gradients prolongs a backward pass that it overlaps.

    The buckets become ready at equal distances, the last one at the end of the pass; they are sent one after the other.

    Args:
        bucket: time to reduce one bucket.
        buckets: their number, at least 1.
        backward: time of the backward pass.
    """
    return max(bucket, backward / buckets + buckets * bucket - backward)
