"""Compute from its config what a pretraining run needs: parameters, GPU memory and disk space.

Nothing is started or measured. Tests compare the activations with the tensors that autograd keeps on a CPU, and the
weights, gradients and optimizer state with what a DeepSpeed engine allocates there; nothing has been compared with a
GPU. Not included: the CUDA context and NCCL's buffers (together often 1 to 3 GiB), the workspaces of libraries, and
memory that the allocator wastes on fragmentation.

All sizes are in bytes.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import nn

from shodh_moe.base.parameters import marks
from shodh_moe.config import COMPRESSION, Config, ModelConfig, MoEConfig
from shodh_moe.config.sizes import require_slabs
from shodh_moe.config.window import Window
from shodh_moe.model import LatentTransformer
from shodh_moe.model.low_rank import add_low_rank
from shodh_moe.model.plan import moe_capacity
from shodh_moe.model.transformer import attention_paths
from shodh_moe.parallel import ExpertParallel
from shodh_moe.training.deepspeed_config import BUCKET, deepspeed_config, exchanges_samples, layout_of


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of a model.

    Attributes:
        shared: parameters that every rank holds: attention, routers, shared experts, norms, embedding, head, and with
            scope path each path's own parts of them.
        expert: parameters of all routed experts of all layers.
        rank_expert: the part of ``expert`` that one rank holds.
        active: parameters that a token passes through.
    """

    shared: int
    expert: int
    rank_expert: int
    active: int

    @property
    def total(self) -> int:
        """Number of parameters of the whole model."""
        return self.shared + self.expert

    @property
    def rank(self) -> int:
        """Number of parameters that one rank holds."""
        return self.shared + self.rank_expert


def latent_grid(config: Config) -> list[int]:
    """Return the number of latents along x, y and z."""
    return [size // COMPRESSION for size in config.data.grid]


def sample_tokens(config: Config) -> int:
    """Return the number of tokens in one sample."""
    return math.prod(latent_grid(config)) // config.model.patch**3


def batch_tokens(config: Config) -> int:
    """Return the number of tokens in one rank's micro-batch."""
    return config.training.batch_size * sample_tokens(config) // config.parallel.context_size


def step_samples(config: Config, world: int) -> int:
    """Return the number of samples in one optimizer step, over all ranks."""
    return world // config.parallel.context_size * config.training.batch_size * config.training.accumulation


def training_samples(config: Config) -> int:
    """Return the number of distinct samples of the training split, in all latent copies of its trajectories."""
    data = config.data
    trajectories = sum(domain.trajectories.train for _, domain in data.domains.items())
    shortest = Window(config.model.history, config.training.unroll, config.model.strides[0])
    return trajectories * config.tokenizer.latent_copies * (data.snapshots - shortest.snapshots + 1)


def count_parameters(config: Config, world: int) -> Parameters:
    """Count parameters by building a model with one block, as one rank holds it, without allocating memory.

    Raises:
        UserError: the experts or the slabs of samples cannot be distributed over the ranks.
    """
    ep, depth = layout_of(config, world).ep, config.model.depth
    require_slabs(latent_grid(config), config.model, config.parallel.context_size)
    model = with_one_block(config, ep)
    rank_expert = depth * sum(_numel(layer.experts) for layer in model.moe_layers)
    shared = _numel(model) + (depth - 1) * _numel(model.blocks) - rank_expert
    routed = _held_by_all(model) + (depth - 1) * _held_by_all(model.blocks)
    expert, experts = rank_expert * ep, max(config.model.moe.num_experts, 1)
    active = shared - routed + (routed + expert) * config.model.moe.top_k // experts
    return Parameters(shared, expert, rank_expert, active)


def with_one_block(config: Config, ep: int) -> LatentTransformer:
    """The trained network as one rank holds it, without memory, and with its first block alone. Not to be changed."""
    lora = config.finetune.rank if config.finetune and config.finetune.train == "lora" else None
    model = config.model.model_copy(update={"depth": 1})
    return _one_block(model.model_dump_json(), config.tokenizer.latent_channels, ep, lora)


@functools.lru_cache(maxsize=64)
def _one_block(model: str, channels: int, ep: int, lora: int | None) -> LatentTransformer:
    """Build a network on the meta device from its section as JSON; a plan asks for the same ones many times."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        made = LatentTransformer(ModelConfig.model_validate_json(model), channels, 0, ExpertParallel(ep))
        if lora is not None:
            add_low_rank(made, lora)
    return made


def _held_by_all(module: nn.Module) -> int:
    """Number of parameters that belong to one expert each, although every rank holds them."""
    return sum(p.numel() for p in module.parameters() if marks(p).per_expert and not marks(p).sharded)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def state_bytes(config: Config, world: int, count: Parameters | None = None) -> dict[str, int]:
    """Return the bytes of one rank's ``weights``, ``gradients``, ``optimizer`` state and ``reduction`` buffers.

    The weights are float32 or float64, as bfloat16 is autocast only (DESIGN 7). ``reduction`` holds DeepSpeed's
    buffers for the exchange of gradients: without ZeRO a flat copy of one bucket, after the backward pass; with ZeRO
    the buckets, and a flat copy of the part of the gradients that this rank updates.

    Args:
        count: parameters of the network that is trained; None for the config's transformer.

    Raises:
        UserError: the parallel layout or the DeepSpeed section does not fit ``world`` ranks.
    """
    count, ep = count or count_parameters(config, world), layout_of(config, world).ep
    wide, _ = widths(config)
    stage = config.parallel.zero_stage
    if not stage:
        flat = min(max(count.shared, count.rank_expert), BUCKET)
        sizes = {"weights": 1, "gradients": 1, "optimizer": 2}
        return {**{key: n * wide * count.rank for key, n in sizes.items()}, "reduction": wide * flat}
    part = -(-count.shared // world) - (-count.rank_expert // (world // ep))  # elements that this rank updates
    zero = deepspeed_config(config, world, count.rank)["zero_optimization"]
    buckets = int(zero["reduce_bucket_size"]) * (2 if zero.get("overlap_comm") else 1)
    return {
        "weights": wide * count.rank,
        "gradients": wide * (count.rank if stage == 1 else part),
        "optimizer": wide * 3 * part,  # two moments, and ZeRO's own copy of the weights
        "reduction": wide * (buckets + part),
    }


def activation_bytes(config: Config, ep: int = 1) -> dict[str, int]:
    """Return the bytes that one micro-batch needs on a GPU, by part.

    ``activations``: tensors that autograd keeps until the backward pass, including the batch and autocast's copies of
    the weights. This assumes fused RMS norms, and flash attention, which stores nothing quadratic in the number of
    tokens. ``backward``: an upper bound of what the backward pass holds in addition; with activation checkpointing this
    includes one whole block. ``exchange``: buffers of the exchanges between ranks. Dropless mode is counted with an
    even load of the experts. With an exchange of samples these are the bytes of the fullest rank that its capacity
    allows. With ``training.unroll`` autograd keeps the activations of all predictions.
    """
    if exchanges_samples(config, ep):
        return _bytes_of_fullest_rank(config, ep)
    m, t, channels = config.model, config.training, config.tokenizer.latent_channels * config.model.patch**3
    wide, narrow = widths(config)
    tokens, row = batch_tokens(config), slots(config) * m.dim * narrow
    # Outside the blocks: the last norm, the head, the embedding's input, the batch, the prediction, the error.
    outside = tokens * (m.dim * (wide + narrow) + channels * (narrow * (m.history + 1) + wide * (m.history + 4)))
    outside += _path_bytes(config) + _summed_bytes(config, ep)
    backward, block = tokens * m.dim * wide + 2 * row, _block_bytes(config, ep)
    exchange = max(2 * row if ep > 1 else 0, _gather_bytes(config))
    if t.activation_checkpointing:
        kept = m.depth * tokens * (m.dim * wide + 24)  # each block's input and routing
        return {"activations": t.unroll * (kept + outside), "backward": backward + block, "exchange": exchange}
    return {"activations": t.unroll * (m.depth * block + outside), "backward": backward, "exchange": exchange}


def _gather_bytes(config: Config) -> int:
    """Return the bytes that gathering keys and values needs beyond what autograd keeps at another time.

    They are those of a slab, and those of all slabs in two orders. At that time the feed-forward part of the last block
    has not begun, or is freed by the backward pass.
    """
    slabs, (_, narrow) = config.parallel.context_size, widths(config)
    if slabs == 1:
        return 0
    gathered = batch_tokens(config) * 2 * config.model.dim * narrow * (1 + 2 * slabs)
    return max(gathered - _feed_forward_bytes(config), 0)


def _bytes_of_fullest_rank(config: Config, ep: int) -> dict[str, int]:
    """Return `activation_bytes` for an exchange of samples; those beyond the capacity exchange their tokens as well."""
    size = config.training.batch_size
    most = math.ceil(config.parallel.exchange_capacity * size)
    moe = config.model.moe.model_copy(update={"dropless": True})  # a decision names dropped tokens: no slots
    full = config.model_copy(
        update={
            "training": config.training.model_copy(update={"batch_size": most}),
            "parallel": config.parallel.model_copy(update={"exchange": "token"}),
            "model": config.model.model_copy(update={"moe": moe}),
        }
    )
    parts = activation_bytes(full, ep)
    snapshots = config.model.history + config.training.unroll + 1  # with the geometry
    sample = snapshots * config.tokenizer.latent_channels * math.prod(latent_grid(config))
    sample //= config.parallel.context_size
    own = widths(config)[0] * size * sample  # a rank keeps its own batch beside the one that it computes
    packed = widths(config)[0] * (size + most) * sample  # sent and received, and freed before the first layer
    return {**parts, "activations": parts["activations"] + own, "exchange": max(parts["exchange"], packed)}


def _summed_bytes(config: Config, ep: int) -> int:
    """Return the bytes that autograd keeps because weights have low-rank additions.

    These are the sums of weights and additions, except for the embedding, whose inputs need no gradient. Autocast keeps
    narrow copies of the sums, as of weights without additions, and of the additions.
    """
    if not config.finetune or config.finetune.train != "lora":
        return 0
    model, (wide, narrow) = with_one_block(config, ep), widths(config)

    def numbers(module: nn.Module, *ends: str) -> int:
        return sum(p.numel() for name, p in module.named_parameters() if name.endswith(ends))

    more = config.model.depth - 1
    if wide != narrow:
        return narrow * (numbers(model, ".down", ".up") + more * numbers(model.blocks, ".down", ".up"))
    summed = numbers(model, ".original") - numbers(model.embed, ".original")
    return wide * (summed + more * numbers(model.blocks, ".original"))


def _path_bytes(config: Config) -> int:
    """Return the bytes that autograd keeps on a GPU for the path router and the paths' own embeddings and heads."""
    m, moe = config.model, config.model.moe
    if moe.scope != "path" or not moe.num_experts:
        return 0
    wide, _ = widths(config)
    channels = config.tokenizer.latent_channels * m.patch**3
    inputs = (m.history + 1) * channels
    own = _routed_bytes(config, inputs, m.dim, None, inputs_learn=False)
    own += _routed_bytes(config, m.dim, channels, None)
    features = {"token": inputs + 1, "both": 3 * inputs + 1}.get(moe.router.context, 0)
    return own + batch_tokens(config) * (_decision_bytes(moe) + wide * features)


def _decision_bytes(moe: MoEConfig) -> int:
    """Return the bytes per token of a router's decision: scores, and expert, slot, probability, ... of each choice."""
    return 4 * moe.num_experts + 20 + 20 * moe.top_k


def _routed_bytes(config: Config, inputs: int, outputs: int, rank: int | None, inputs_learn: bool = True) -> int:
    """Return the bytes that autograd keeps for the routed part of a linear map, in capacity mode.

    Its narrow weights are kept only if the inputs need a gradient.
    """
    wide, narrow = widths(config)
    per_slot = narrow * (inputs + outputs + (rank or 0))
    weights = inputs * outputs if rank is None else rank * (inputs + outputs)
    kept = wide != narrow and inputs_learn
    return slots(config) * per_slot + kept * narrow * config.model.moe.num_experts * weights


def slots(config: Config) -> int:
    """Return the number of rows that a rank sends to experts in one layer, which equals the number that it receives."""
    moe, tokens = config.model.moe, batch_tokens(config)
    if not moe.num_experts:
        return 0
    return tokens * moe.top_k if moe.dropless else moe.num_experts * moe_capacity(moe, tokens)


def widths(config: Config) -> tuple[int, int]:
    """Return the bytes per number of weights and the residual stream, and those of matrix products under autocast."""
    wide = 8 if config.training.precision == "float64" else 4
    return wide, 2 if config.training.precision == "bfloat16" else wide


def _block_bytes(config: Config, ep: int) -> int:
    """Return the bytes that autograd keeps for one block on a GPU."""
    m, moe = config.model, config.model.moe
    wide, narrow = widths(config)
    cast = wide != narrow
    d, f, experts = m.dim, moe.expert_hidden, moe.num_experts
    # Bytes per token:
    # Inputs of the two block norms, and the scales of the block norms and, per head, of the q and k norms.
    norms = 2 * wide * d + 2 * wide * (1 + m.heads)
    if m.norms == "sandwich":  # the same for the norms after the branches
        norms += 2 * wide * (d + 1)
    # The norm's output (d), q, k and v (3 d), rotated q and k (2 d), the result by head and by token (2 d); logsumexps.
    attention = narrow * 8 * d + wide * m.heads
    attention += cast * 2 * wide * d  # wide copies of q and k, the inputs of their norms
    if (slabs := config.parallel.context_size) > 1:
        # Keys and values of all slabs replace the rotated k and, where there are wide copies, the narrow q, k and v.
        attention += narrow * d * (2 * slabs - (4 if cast else 1))
    own_router = bool(experts) and moe.scope == "layer"
    router = wide * d if own_router or not cast or not experts else 0  # the norm's output
    if own_router:
        router += 4 * moe.router.dim + _decision_bytes(moe)
    # Bytes that do not depend on the batch:
    rotary = 4 * wide * sample_tokens(config) // slabs * (d // m.heads // 2)  # cosines and sines for q and k
    weights = cast * narrow * (4 * d * d + 3 * d * f * (moe.shared_experts + experts // ep))  # narrow copies
    paths, rank = attention_paths(moe)
    own = (_routed_bytes(config, d, 3 * d, rank) + _routed_bytes(config, d, d, rank)) if paths else 0
    rows = batch_tokens(config) * (norms + attention + router) + _feed_forward_bytes(config)
    return rows + rotary + weights + own


def _feed_forward_bytes(config: Config) -> int:
    """Return the bytes that autograd keeps for the experts of one block, without weights."""
    moe, d, (wide, narrow) = config.model.moe, config.model.dim, widths(config)
    f = moe.expert_hidden
    shared = narrow * moe.shared_experts * 4 * f  # gate, up, silu(gate), and silu(gate) * up
    shared += (wide != narrow) * narrow * d * bool(moe.shared_experts)  # narrow copy of the norm's output
    per_slot = narrow * (2 * d + 4 * f)  # a routed expert's input and output, and the same four as above
    return batch_tokens(config) * shared + slots(config) * per_slot


def memory(config: Config, world: int) -> dict[str, int]:
    """Return one GPU's memory in bytes by part, and as ``sum`` an upper bound of its peak during a step.

    Raises:
        UserError: the parallel layout or the DeepSpeed section does not fit ``world`` ranks.
    """
    parts = {**state_bytes(config, world), **activation_bytes(config, layout_of(config, world).ep)}
    total = sum(parts.values())
    if not config.parallel.zero_stage:
        # The flat copy is made after the backward pass has freed the activations.
        total -= min(parts["reduction"], parts["activations"] + parts["backward"] + parts["exchange"])
    return {**parts, "sum": total}


def snapshots(config: Config) -> int:
    """Return the number of snapshots of a generated dataset, over all splits."""
    return config.data.snapshots * sum(domain.trajectories.total for _, domain in config.data.domains.items())


def dataset_bytes(config: Config) -> int:
    """Return a generated dataset's size: float32 velocity and pressure per snapshot, one solid mask per trajectory."""
    data = config.data
    trajectories = sum(domain.trajectories.total for _, domain in data.domains.items())
    return trajectories * (4 * data.snapshots + 1) * 4 * math.prod(data.grid)


def latent_bytes(config: Config) -> int:
    """Return the size of the latent cache, all splits and copies: float32 latents per snapshot, and of the geometry."""
    data = config.data
    copies = config.tokenizer.latent_copies
    trajectories = sum(d.trajectories.total + (copies - 1) * d.trajectories.train for _, d in data.domains.items())
    return trajectories * (data.snapshots + 1) * config.tokenizer.latent_channels * 4 * math.prod(latent_grid(config))


def checkpoint_bytes(config: Config, world: int) -> int:
    """Return the size of one checkpoint on disk: every weight and its two moments."""
    return 3 * widths(config)[0] * count_parameters(config, world).total


def checkpoints_kept(config: Config) -> int:
    """Return the maximum number of checkpoints on disk: the newest, the permanent ones, and one being written."""
    t = config.training
    return t.keep_last + 1 + (t.steps // t.keep_every if t.keep_every else 0)


def plan(config: Config, world: int) -> str:
    """Return the table that ``shodh plan`` prints.

    Raises:
        UserError: the layout does not fit ``world`` ranks.
    """
    count, t, ranks = count_parameters(config, world), config.training, layout_of(config, world)
    sizes, samples, tokens = memory(config, world), step_samples(config, world), sample_tokens(config)
    layout = f"{world}: EP {ranks.ep}, EDP {ranks.edp}{f', CP {ranks.cp}' if ranks.cp > 1 else ''}"
    layout += f", ZeRO {config.parallel.zero_stage}, {t.precision}"
    lines = {
        "ranks": layout + (", activation checkpointing" if t.activation_checkpointing else ""),
        "parameters": f"{_count(count.total)}, {_count(count.active)} active, {_count(count.rank)} per rank",
        "tokens": f"{tokens:,} per sample, {batch_tokens(config):,} per micro-batch, {samples * tokens:,} per step",
        "steps": f"{t.steps:,} with {samples:,} samples each",
        "memory per GPU": f"{sizes.pop('sum') / 2**30:.1f} GiB (computed, without CUDA's and NCCL's own), of which",
        **{f"  {part}": f"{size / 2**30:.2f} GiB" for part, size in sizes.items()},
        "checkpoint": f"{checkpoint_bytes(config, world) / 1e9:,.1f} GB, at most {checkpoints_kept(config)} on disk",
    }
    if not config.data.path:
        distinct = training_samples(config)
        lines["steps"] += f": {t.steps * samples / distinct:.1f} passes over {distinct:,} samples"
        lines["dataset"] = f"{dataset_bytes(config) / 1e9:,.1f} GB, {snapshots(config):,} snapshots"
        lines["latents"] = f"{latent_bytes(config) / 1e9:,.1f} GB"
    return "\n".join(f"{name:<18}{text}" for name, text in lines.items())


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"
