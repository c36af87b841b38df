"""How the ranks of a run divide the experts, the tokens of a sample, and the samples among themselves (DESIGN 7)."""

from __future__ import annotations

from dataclasses import dataclass

WORLD, EXPERTS, REPLICAS, CONTEXT = "world", "expert parallel", "expert data parallel", "context parallel"


@dataclass(frozen=True)
class Layout:
    """World = EDP x EP x CP ranks: those of a CP group are consecutive, then those of an EP group.

    Attributes:
        world: number of ranks.
        ep: number of ranks that share the experts (EP); divides ``world / cp``.
        cp: number of ranks that share the tokens of each sample (CP); divides ``world``.
    """

    world: int = 1
    ep: int = 1
    cp: int = 1

    @property
    def edp(self) -> int:
        """Number of EP groups that have the same slabs."""
        return self.world // (self.ep * self.cp)

    @property
    def replicas(self) -> int:
        """Number of ranks that hold the same experts: EDP x CP."""
        return self.world // self.ep

    @property
    def batches(self) -> int:
        """Number of different micro-batches at a time: the ranks of a CP group have the same samples."""
        return self.world // self.cp

    def context_rank(self, rank: int) -> int:
        """Number of a rank in its CP group, which is that of its slab."""
        return rank % self.cp

    def batch_rank(self, rank: int) -> int:
        """Number of a rank's CP group, which is that of its micro-batch."""
        return rank // self.cp

    def expert_rank(self, rank: int) -> int:
        """Number of a rank in its EP group, which is that of its share of the experts."""
        return rank // self.cp % self.ep

    def replica(self, rank: int) -> int:
        """Number of a rank among those that hold the same experts."""
        return rank // (self.cp * self.ep) * self.cp + rank % self.cp

    def context_groups(self) -> list[list[int]]:
        """Ranks that have slabs of the same samples."""
        return [list(range(first, first + self.cp)) for first in range(0, self.world, self.cp)]

    def expert_groups(self) -> list[list[int]]:
        """Ranks that share the experts: they have the same slab of different samples."""
        size = self.ep * self.cp
        firsts = [first + slab for first in range(0, self.world, size) for slab in range(self.cp)]
        return [list(range(first, first + size, self.cp)) for first in firsts]

    def replica_groups(self) -> list[list[int]]:
        """Ranks that hold the same experts."""
        return [[rank for rank in range(self.world) if self.expert_rank(rank) == e] for e in range(self.ep)]

    def groups(self, kind: str) -> list[list[int]]:
        """Ranks of each group of a kind: `WORLD`, `EXPERTS`, `REPLICAS` or `CONTEXT`."""
        if kind == WORLD:
            return [list(range(self.world))]
        return {EXPERTS: self.expert_groups, REPLICAS: self.replica_groups, CONTEXT: self.context_groups}[kind]()
