"""Compute from its config what the ranks of a pretraining send each other in one step, without starting anything.

DeepSpeed reduces gradients in buckets. Without ZeRO these follow the order of the parameters, with ZeRO 1 that of the
optimizer's groups. With ZeRO 2, or with ``overlap_comm``, they follow the order in which the backward pass finishes
them; it is taken to be the reverse of the parameters' order, so the number of buckets can be off by a few, as it can
with parameters that are larger than a bucket. With ZeRO 1 and without ZeRO gradients are reduced once a step, with ZeRO
2 in every micro-batch. Settings of DeepSpeed's ``zero_optimization`` other than ``reduce_bucket_size`` and
``overlap_comm`` are taken to have their defaults. With slabs, keys and values are taken to have gradients in all
layers, as they have unless a fine-tuning trains only some weights.

A rehearsal (`shodh_moe.rehearsal`) counts the same collectives while it runs the training's own code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from shodh_moe.base.parameters import marks
from shodh_moe.config import Config
from shodh_moe.parallel.layout import CONTEXT, EXPERTS, REPLICAS, WORLD
from shodh_moe.runs.plan import BUCKET, batch_tokens, latent_grid, sample_tokens, slots, widths, with_one_block
from shodh_moe.training.deepspeed_config import deepspeed_config, exchanges_samples, layout_of

LARGEST_GROUP = 178_956_971  # elements of a group of experts' parameters in DeepSpeed's optimizer


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one group and step.

    Attributes:
        group: ``world``, ``expert parallel``, ``expert data parallel`` or ``context parallel``.
        kind: ``all_reduce``, ``all_gather``, ``reduce_scatter`` or ``all_to_all``.
        ranks: number of ranks in the group.
        count: number of collectives that a rank takes part in.
        sent: sum of their sizes in bytes: of the tensor that is reduced (and scattered), that all ranks together
            gather, or that a rank distributes in an all-to-all, its own part included.
        why: what they are for.
    """

    group: str
    kind: str
    ranks: int
    count: int
    sent: int
    why: str


def step_traffic(config: Config, world: int) -> list[Traffic]:
    """Return what one rank of ``world`` sends in a step without a record, with an even load of the experts.

    Raises:
        UserError: the layout or the DeepSpeed section does not fit ``world`` ranks.
    """
    layout = layout_of(config, world)
    ep, cp = layout.ep, layout.cp
    ranks = {WORLD: world, EXPERTS: ep, REPLICAS: layout.replicas, CONTEXT: cp}
    found = [*_exchanges(config, ep), *_slabs(config, ep, cp), *_gradients(config, world, ep)]
    found += [*_balance(config, ep, cp), *_clipping(config), *_weights(config, world, ep)]
    return [Traffic(group, kind, ranks[group], count, sent, why) for group, kind, count, sent, why in found if count]


def traffic_table(config: Config, world: int) -> str:
    """Return the lines that ``shodh plan`` prints about the collectives of a step; groups of one rank are left out."""
    rows = [row for row in step_traffic(config, world) if row.ranks > 1]
    total = sum(row.sent for row in rows)
    lines = {"collectives": f"{sum(row.count for row in rows)} per rank and step, {total / 1e6:,.1f} MB (computed)"}
    for row in rows:
        what = f"{row.count} among {row.ranks} ranks ({row.group}), {row.sent / 1e6:,.1f} MB: {row.why}"
        name = f"  {row.kind}"
        lines[name] = f"{lines[name]}\n{'':<18}{what}" if name in lines else what
    return "\n".join(f"{name:<18}{text}" for name, text in lines.items())


_Row = tuple[str, str, int, int, str]  # group, kind, count, sent and why of a `Traffic`


def _exchanges(config: Config, ep: int) -> list[_Row]:
    """Exchanges of samples or tokens in the forward and backward passes of a step."""
    if ep == 1:
        return []
    m, t, slabs = config.model, config.training, config.parallel.context_size
    wide, narrow = widths(config)
    if exchanges_samples(config, ep):
        numbers = config.tokenizer.latent_channels * math.prod(latent_grid(config)) // slabs
        latents = (m.history + 1 + t.unroll) * numbers * wide
        kept = 0 if m.moe.dropless else sample_tokens(config) // slabs  # whether each token is kept
        # With domain, stride, expert and the kinds of six faces; norms and weight.
        sample = latents + 9 * 8 + (t.unroll + 1) * wide + kept
        sent = t.batch_size * (sample + t.unroll * wide) + 8 * ep * ep  # errors go back; counts are exchanged first
        return [(EXPERTS, "all_to_all", 3 * t.accumulation, sent * t.accumulation, "samples")]
    # Dispatch and combine of each prediction: forward, again, and backward.
    passes = t.unroll * (6 if t.activation_checkpointing else 4)
    row = slots(config) * m.dim * narrow
    rows = (EXPERTS, "all_to_all", passes * m.depth * t.accumulation, passes * m.depth * t.accumulation * row, "tokens")
    if not m.moe.dropless:
        return [rows]
    if m.moe.scope == "path":
        plans = 1 if m.moe.router.context == "sample" else t.unroll  # a sample keeps its path in all predictions
    else:
        plans = t.unroll * m.depth * (2 if t.activation_checkpointing else 1)
    counts = plans * t.accumulation
    return [rows, (EXPERTS, "all_to_all", counts, counts * 8 * m.moe.num_experts, "numbers of tokens")]


def _slabs(config: Config, ep: int, cp: int) -> list[_Row]:
    """What ranks with slabs of the same samples gather in a step, and the gradients that they scatter."""
    if cp == 1:
        return []
    m, t, moe = config.model, config.training, config.model.moe
    (wide, narrow), again = widths(config), 2 if t.activation_checkpointing else 1
    layers, pair = t.unroll * m.depth, cp * 2 * batch_tokens(config) * m.dim * narrow
    gathered, scattered = [pair] * layers * again, [pair] * layers

    number = cp * t.batch_size * wide  # one of each sample
    parts = [number * t.unroll] * (2 if t.loss in ("sample", "relative") else 1)  # of errors, and of their norms
    parts_back = [number * t.unroll]  # gradients
    parts += [number] if t.history_noise else []
    # The latents of later predictions have a gradient if it passes through the earlier ones.
    later = t.unroll - 1 if t.unroll_gradient == "through" else 0
    # How often the router looks at samples once, before all predictions, and how often in each of them.
    paths, sample = bool(moe.num_experts) and moe.scope == "path", moe.router.context == "sample"
    once = paths * sample * (2 if exchanges_samples(config, ep) else 1)
    of_each = paths * (not sample) + m.film
    if moe.router.context in ("sample", "both"):
        features = 2 * number * (m.history + 1) * config.tokenizer.latent_channels * m.patch**3
        parts += [features] * (once + of_each * t.unroll)
        parts_back += [features] * (of_each * later)
    if m.scale_history:
        parts += [number] * (once + 2 * t.unroll)
        parts_back += [number] * (2 * later)
    rows = [
        ("all_gather", gathered, "keys and values"),
        ("reduce_scatter", scattered, "gradients of keys and values"),
        ("all_gather", parts, "means over slabs"),
        ("reduce_scatter", parts_back, "gradients of means over slabs"),
    ]
    return [(CONTEXT, kind, t.accumulation * len(sizes), t.accumulation * sum(sizes), why) for kind, sizes, why in rows]


def _gradients(config: Config, world: int, ep: int) -> list[_Row]:
    """Reduction of the gradients in a step."""
    wide, stage = widths(config)[0], config.parallel.zero_stage
    parameters = [(_owners(p), p.numel()) for p in _parameters(config, ep)]
    if not stage:
        buckets = [bucket for group in (WORLD, REPLICAS) for bucket in _filled(parameters, group)]
        passes = 1
    else:
        zero = deepspeed_config(config, world)["zero_optimization"]
        if stage == 1 and not zero.get("overlap_comm"):
            ordered = [(_owners(p), p.numel()) for group in _optimizer_groups(config, ep) for p in group]
        else:
            ordered = parameters[::-1]
        buckets = _limited(ordered, int(zero.get("reduce_bucket_size", BUCKET)))
        passes = config.training.accumulation if stage == 2 else 1
    return [
        (group, "all_reduce", passes * len(sizes), passes * wide * sum(sizes), "gradients")
        for group in (WORLD, REPLICAS)
        if (sizes := [size for found, size in buckets if found == group])
    ]


def _filled(parameters: list[tuple[str, int]], group: str) -> list[tuple[str, int]]:
    """Buckets of one group without ZeRO: one is sent as soon as it has more than `BUCKET` elements."""
    buckets, size = [], 0
    for owner, count in parameters:
        size += count if owner == group else 0
        if size > BUCKET:
            buckets.append((group, size))
            size = 0
    return [*buckets, (group, size)] if size else buckets


def _limited(parameters: list[tuple[str, int]], limit: int) -> list[tuple[str, int]]:
    """Buckets of ZeRO: a common one for all groups, sent before it would have more than ``limit`` elements."""
    buckets: list[tuple[str, int]] = []
    held: dict[str, int] = {}
    for group, count in parameters:
        if sum(held.values()) + count > limit:
            buckets += held.items()
            held = {}
        held[group] = held.get(group, 0) + count
    return [*buckets, *held.items()]


def _balance(config: Config, ep: int, cp: int) -> list[_Row]:
    """Sums of the experts' loads over all ranks (``router.balance``), or over the slabs of the same samples."""
    moe, t = config.model.moe, config.training
    own = moe.router.balance == "loss"  # the balance is that of the micro-batch
    if not moe.num_experts or (own and cp == 1):
        return []
    loads = config.model.depth * moe.num_experts
    decisions = 1 if exchanges_samples(config, ep) else t.unroll
    count, sent = t.accumulation, t.accumulation * 8 * (decisions * loads + 2)
    if moe.router.balance == "bias":
        count, sent = count + 1, sent + 8 * loads
    return [(CONTEXT if own else WORLD, "all_reduce", count, sent, "loads of the experts")]


def _clipping(config: Config) -> list[_Row]:
    experts = config.model.depth * config.model.moe.num_experts
    return [(WORLD, "all_reduce", 1, 8 * (experts + 3), "gradient norms")]


def _weights(config: Config, world: int, ep: int) -> list[_Row]:
    """With ZeRO each rank updates a part of the weights and then gets the others."""
    if not config.parallel.zero_stage:
        return []
    wide = widths(config)[0]
    groups = _optimizer_groups(config, ep)
    rows = []
    for group, replicas in ((WORLD, world), (REPLICAS, world // ep)):
        each = 2 * replicas  # DeepSpeed fills a group up to a multiple of this
        counts = [sum(parameter.numel() for parameter in one) for one in groups if _owners(one[0]) == group]
        sizes = [-(-count // each) * each for count in counts]
        if sizes and replicas > 1:
            rows.append((group, "all_gather", len(sizes), wide * sum(sizes), "updated weights"))
    return rows


def _optimizer_groups(config: Config, ep: int) -> list[list[nn.Parameter]]:
    """The optimizer's groups of parameters in their order; those that all ranks hold come first."""
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for parameter in _parameters(config, ep):
        own = marks(parameter)
        groups.setdefault((own.sharded, not own.decay, own.lr_scale), []).append(parameter)
    dense = [groups[key] for key in sorted(groups) if not key[0]]
    return dense + [part for key in sorted(groups) if key[0] for part in _split(groups[key])]


def _split(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Split a group of experts' parameters as DeepSpeed does."""
    parts: list[list[nn.Parameter]] = [[]]
    size = 0
    for parameter in parameters:
        if size and size + parameter.numel() > LARGEST_GROUP:
            parts.append([])
            size = 0
        parts[-1].append(parameter)
        size += parameter.numel()
    return parts


def _owners(parameter: nn.Parameter) -> str:
    """The group whose ranks hold a parameter and average its gradient."""
    return REPLICAS if marks(parameter).sharded else WORLD


def _parameters(config: Config, ep: int) -> Iterable[nn.Parameter]:
    """All parameters of a rank's transformer in order; those of the first block stand for all blocks'."""
    model = with_one_block(config, ep)
    block = [parameter for parameter in model.blocks.parameters() if parameter.requires_grad]
    inside = {id(parameter) for parameter in block}
    seen = False
    for parameter in model.parameters():
        if id(parameter) not in inside:
            yield parameter
        elif not seen:
            seen = True
            yield from block * config.model.depth
