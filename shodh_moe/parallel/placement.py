"""Which rank of an expert-parallel group holds which experts, chosen by their load."""

from __future__ import annotations

from collections.abc import Sequence

GAIN = 0.05  # by how much, relative to an even share, a new placement must lower the load of the busiest rank


def place_experts(load_E: Sequence[float], ranks: int, placement: Sequence[int] | None = None) -> list[int] | None:
    """Choose a placement that keeps the load of the busiest rank low. Every rank holds the same number of experts.

    Experts go, in order of decreasing load, to the rank with the least load that still has a place (the longest
    processing time first, as in scheduling).

    Args:
        load_E: what each expert has had to do, in any unit.
        ranks: number of ranks; divides the number of experts.
        placement: the present one; None: in the order of their numbers.

    Returns:
        The experts in the order of the ranks that hold them, in ascending order within a rank; None if that is not
        better than the present placement by `GAIN`.
    """
    each, even = len(load_E) // ranks, sum(load_E) / ranks
    held: list[list[int]] = [[] for _ in range(ranks)]
    sums = [0.0] * ranks
    for expert in sorted(range(len(load_E)), key=lambda expert: -load_E[expert]):
        rank = min((rank for rank in range(ranks) if len(held[rank]) < each), key=lambda rank: sums[rank])
        held[rank].append(expert)
        sums[rank] += load_E[expert]
    order = list(range(len(load_E))) if placement is None else placement
    present = max(sum(load_E[expert] for expert in order[rank * each :][:each]) for rank in range(ranks))
    if present - max(sums) <= GAIN * even:
        return None
    return [expert for experts in held for expert in sorted(experts)]
