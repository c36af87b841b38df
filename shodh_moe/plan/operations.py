"""Count what one rank computes in a micro-batch and in an optimizer step: FLOPs, bytes and operations.

The counts follow the code of `shodh_moe.model` and `shodh_moe.training`, in its eager form. Tests compare the FLOPs of
the products with those that `torch.utils.flop_counter` counts, and bytes and operations with those that torch
dispatches. Left out are the controls `film` and `boundaries` and several strides, which cost little.

torch.distributed._tools has a RuntimeEstimator that counts by running the model on fake tensors. It is not used: it
refuses to work without a CUDA device, knows no collectives, no time per operation and no CPU, and the hundreds of
layouts that a plan compares would take minutes. MemTracker and the SAC estimators run the model as well; memory is
computed by `shodh_moe.runs.plan`, which a rehearsal checks with a tracker of its own.

Letters: N tokens of a micro-batch, R rows at the experts, D width, F hidden width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from shodh_moe.config import Config
from shodh_moe.model.transformer import attention_paths
from shodh_moe.runs.plan import batch_tokens, sample_tokens, slots, widths, with_one_block

Part = Literal["products", "attention", "experts", "norms and sums", "dispatch", "ends and losses", "optimizer"]
# Operations outside the blocks that a plan does not list one by one: inputs, router, decision, loss and records. As
# torch dispatches them (forward, backward), by `model.moe.scope` or in a dense network; they touch few bytes.
OTHERS = {"path": (51, 71), "layer": (24, 17), "dense": (21, 10)}
ROUTER = (10, 45)  # of a router in a block (forward, backward)


class Cost(NamedTuple):
    """What operations of one kind need.

    Attributes:
        flops: of products.
        bytes: read and written.
        calls: number of operations.
    """

    flops: float = 0.0
    bytes: float = 0.0
    calls: float = 0.0

    def times(self, factor: float) -> Cost:
        return Cost(self.flops * factor, self.bytes * factor, self.calls * factor)


@dataclass(frozen=True)
class Operation:
    """Operations of one kind in a pass.

    Attributes:
        part: where their time is reported.
        kind: ``product`` and ``attention`` are limited by FLOPs or bytes, ``memory`` and ``kernel`` (our own) by bytes.
        forward, backward: their cost. FLOPs of attention's backward pass do not include what it recomputes.
    """

    part: Part
    kind: Literal["product", "attention", "memory", "kernel"]
    forward: Cost
    backward: Cost


@dataclass(frozen=True)
class Work:
    """What a rank computes in one micro-batch and step.

    Attributes:
        block: operations of one block.
        shared: those of its shared experts, which are also in ``block``.
        ends: operations outside the blocks, for one prediction.
        accumulation: bytes of adding a micro-batch's gradients to those before.
        update: bytes of the optimizer step.
        tensors: number of a rank's tensors of parameters.
        read: bytes of latents that a rank reads for a micro-batch.
    """

    block: list[Operation]
    shared: list[Operation]
    ends: list[Operation]
    accumulation: Cost
    update: float
    tensors: int
    read: float


def work_of(config: Config, ep: int, world: int, fused: bool) -> Work:
    """Count the work of a rank, if all ranks have the same load.

    Args:
        ep: size of an expert-parallel group.
        fused: whether norms and products of all experts are single operations, as on a GPU.
    """
    counter = _Counter(config, ep, fused)
    parameters = _Parameters.of(config, ep)
    wide = widths(config)[0]
    accumulation = Cost(0, 3 * wide * parameters.elements, parameters.tensors)
    latents = config.model.history + 1 + config.training.unroll
    read = batch_tokens(config) * counter.channels * 4 * latents
    update = _update(config, parameters, ep, world)
    return Work(
        counter.block(), counter.shared_experts(), counter.ends(), accumulation, update, parameters.tensors, read
    )


@dataclass(frozen=True)
class _Counter:
    config: Config
    ep: int
    fused: bool

    @property
    def channels(self) -> int:
        """Numbers per token of one latent."""
        return int(self.config.tokenizer.latent_channels * self.config.model.patch**3)

    @property
    def grouped(self) -> bool:
        """Whether all experts' products are one operation."""
        narrow = widths(self.config)[1]
        return self.fused and (narrow == 2 or not self.config.model.moe.dropless)

    def block(self) -> list[Operation]:
        m, moe = self.config.model, self.config.model.moe
        narrow = widths(self.config)[1]
        n, d, f = batch_tokens(self.config), m.dim, moe.expert_hidden
        paths, rank = attention_paths(moe)
        shared = moe.shared_linear or not (paths and rank is None)
        found = [self.norm(n * d) for _ in range(6 if m.norms == "sandwich" else 4)]
        found += [self.rotations(n * d), *self.residuals(n * d)]
        found += self.linear("products", d, 3 * d, paths, rank, shared)
        found += self.linear("products", d, d, paths, rank, shared)
        scores = n * sample_tokens(self.config) * d
        moved = 2 * (1 + self.config.parallel.context_size) * narrow * n * d  # keys and values are those of all slabs
        attention = Operation(
            "attention",
            "attention",
            Cost(4 * scores, moved, 1),
            Cost(8 * scores, 2 * moved, 1),
        )
        found.append(attention)
        found.append(self.copies(2 * n * d, 1, 1))  # norm's outputs narrow, branches' outputs wide
        found += self.shared_experts()
        if moe.num_experts:
            rows = slots(self.config)
            found += self.swiglu(rows, d, f, moe.num_experts // self.ep)
            found += self.dispatched(rows, n, d, d, bool(moe.shared_experts))
            if moe.scope == "layer":
                found += self.router(n, d)
        return found

    def shared_experts(self) -> list[Operation]:
        m = self.config.model
        one = self.swiglu(batch_tokens(self.config), m.dim, m.moe.expert_hidden, 1)
        return one * m.moe.shared_experts

    def ends(self) -> list[Operation]:
        m, moe = self.config.model, self.config.model.moe
        wide, _ = widths(self.config)
        n, inputs, d = batch_tokens(self.config), (m.history + 1) * self.channels, m.dim
        paths = moe.num_experts if moe.scope == "path" else 0
        shared = moe.shared_linear or not paths
        embedding = self.linear("ends and losses", inputs, d, paths, None, shared)
        found = [replace(one, backward=one.backward.times(0.5)) for one in embedding]  # inputs need no gradient
        found += self.linear("ends and losses", d, self.channels, paths, None, shared)
        found.append(replace(self.norm(n * d), part="ends and losses"))
        passes = 4 * inputs + 12 * self.channels  # the embedding's inputs and their statistics; the loss
        forward, backward = OTHERS[moe.scope if moe.num_experts else "dense"]
        costs = Cost(0, wide * n * passes, forward), Cost(0, wide * n * 8 * self.channels, backward)
        found.append(Operation("ends and losses", "memory", *costs))
        return found

    def norm(self, numbers: int) -> Operation:
        """An RMS norm: read and write; backward reads input and gradient. Composed of six operations if not fused."""
        wide = widths(self.config)[0]
        forward, backward = (Cost(0, 2, 1), Cost(0, 3, 2)) if self.fused else (Cost(0, 7.1, 6), Cost(0, 23, 14))
        scale = wide * numbers
        return Operation("norms and sums", "memory", _bytes(forward, scale), _bytes(backward, scale))

    def rotations(self, numbers: int) -> Operation:
        """Rotary positions of queries and keys, and the stacking of their gradients with the values'."""
        wide, narrow = widths(self.config)
        forward = Cost(0, wide * 18 * numbers, 18)
        casts = 2 * (wide + narrow) * numbers if wide != narrow else 0.0
        return Operation(
            "norms and sums",
            "memory",
            Cost(0, forward.bytes + 2 * casts, forward.calls + 4 * bool(casts)),
            Cost(0, wide * 24 * numbers + narrow * 12 * numbers + 2 * casts, 20 + 4 * bool(casts)),
        )

    def residuals(self, numbers: int) -> list[Operation]:
        cost = Cost(0, 3 * widths(self.config)[0] * numbers, 1)
        return [Operation("norms and sums", "memory", cost, cost)] * 2

    def copies(self, numbers: int, forward: int, backward: int) -> Operation:
        """Autocast's casts between wide and narrow numbers, in both directions."""
        wide, narrow = widths(self.config)
        one = (wide + narrow) * numbers if wide != narrow else 0.0
        calls = 2.0 * (wide != narrow)
        return Operation("norms and sums", "memory", Cost(0, forward * one, calls), Cost(0, backward * one, calls))

    def product(self, part: Part, rows: float, inputs: int, outputs: int, matrices: int = 1) -> list[Operation]:
        """Rows times one matrix, or each expert's rows times its own; also the casts of the weights."""
        narrow = widths(self.config)[1]
        calls = 1 if self.grouped else matrices
        weights = matrices * inputs * outputs
        forward = Cost(2 * rows * inputs * outputs, narrow * (rows * (inputs + outputs) + weights), calls)
        made = [Operation(part, "product", forward, forward.times(2))]
        if widths(self.config)[0] != narrow:
            made.append(replace(self.copies(weights, 1, 1), part=part))
        return made

    def linear(
        self, part: Part, inputs: int, outputs: int, paths: int, rank: int | None, shared: bool
    ) -> list[Operation]:
        """A `RoutedLinear`, with the paths' own part."""
        n = batch_tokens(self.config)
        found = self.product(part, n, inputs, outputs) if shared else []
        if not paths:
            return found
        narrow, rows = widths(self.config)[1], slots(self.config)
        sizes = [(inputs, outputs)] if rank is None else [(inputs, rank), (rank, outputs)]
        for one, other in sizes:
            found += self.product(part, rows, one, other, paths)
            if not self.grouped:  # the parts' results are joined, and the gradients of their weights stacked
                forward = Cost(0, narrow * 2 * rows * other, 1)
                backward = Cost(0, narrow * 2 * paths * one * other, 1)
                found.append(Operation("norms and sums", "memory", forward, backward))
        found += self.dispatched(rows, n, inputs, outputs, shared)
        if shared:  # two gradients of the inputs are added
            added = Cost(0, narrow * 3 * n * inputs, 1)
            found.append(Operation("norms and sums", "memory", Cost(), added))
        return found

    def dispatched(self, rows: int, tokens: int, inputs: int, outputs: int, shared: bool) -> list[Operation]:
        """Dispatch of the inputs and combine of the outputs."""
        narrow = widths(self.config)[1]
        there = narrow * (tokens + rows) * inputs
        back = narrow * (rows + tokens * (2 if shared else 1)) * outputs
        backward = there + narrow * (tokens + 2 * rows) * outputs
        return [Operation("dispatch", "kernel", Cost(0, there + back, 2), Cost(0, backward, 2))]

    def swiglu(self, rows: int, d: int, f: int, matrices: int) -> list[Operation]:
        """Gate, up and down with their activation: silu (2 F), product (3 F); backward 14 F, with the silu again."""
        narrow = widths(self.config)[1]
        calls = 1 if self.grouped else matrices
        found = self.product("experts", rows, d, 2 * f, matrices) + self.product("experts", rows, f, d, matrices)
        forward, backward = Cost(0, narrow * 5 * rows * f, 2 * calls), Cost(0, narrow * 14 * rows * f, 5 * calls)
        return [*found, Operation("experts", "memory", forward, backward)]

    def router(self, rows: int, features: int) -> list[Operation]:
        """A router in a block: float32 products and small operations on scores."""
        moe = self.config.model.moe
        flops = 2 * rows * moe.router.dim * (features + moe.num_experts)
        size = 4 * rows * (features + 2 * moe.router.dim + 8 * moe.num_experts)
        forward = Cost(flops, size, 2)
        small = Operation("dispatch", "memory", Cost(0, size, ROUTER[0]), Cost(0, 2 * size, ROUTER[1]))
        return [Operation("dispatch", "product", forward, forward.times(2)), small]


def _bytes(cost: Cost, scale: float) -> Cost:
    return Cost(cost.flops, cost.bytes * scale, cost.calls)


@dataclass(frozen=True)
class _Parameters:
    """Numbers of a rank's tensors of parameters and their elements; ``sharded`` are the routed experts' elements."""

    tensors: int
    elements: int
    sharded: int

    @classmethod
    def of(cls, config: Config, ep: int) -> _Parameters:
        model, more = with_one_block(config, ep), config.model.depth - 1
        inside, everything = list(model.blocks.parameters()), list(model.parameters())
        elements = sum(p.numel() for p in everything) + more * sum(p.numel() for p in inside)
        experts = config.model.depth * sum(p.numel() for layer in model.moe_layers for p in layer.experts.parameters())
        return cls(len(everything) + more * len(inside), elements, experts)


def _update(config: Config, own: _Parameters, ep: int, world: int) -> float:
    """Bytes of an optimizer step: DeepSpeed's copies of gradients, norms, clipping, AdamW and new weights."""
    wide, stage = widths(config)[0], config.parallel.zero_stage
    part = own.elements
    if stage:
        part = -(-(own.elements - own.sharded) // world) - (-own.sharded // (world // ep))
    # Without ZeRO: gradients are copied to a flat bucket, divided, and copied back. With it: copied to a bucket and
    # divided, a rank's part copied out, and its updated part copied to the weights.
    copied = 6 * own.elements if not stage else 4 * own.elements + 4 * part
    return wide * (copied + (1 + 2 + 7) * part)  # norms, clipping, and AdamW: weight, gradient and two moments
