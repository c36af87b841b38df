"""What a run will need, worked out from its config before anything is started: parameters, memory of a GPU, disk.

Everything here is computed. Tests hold the activations against the tensors that autograd really keeps on a CPU, and
weights, gradients and optimizer state against what a real DeepSpeed engine allocates there. No number has been held
against a GPU. Left out: the CUDA context and NCCL's buffers (together often 1 to 3 GiB), workspaces of libraries, and
what the allocator cannot use.

All sizes are in bytes. Letters in comments: N tokens of a micro-batch on a rank, S of a sample, D model width, H heads,
F expert hidden width, E experts, T slots that a rank fills in one layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from shodh_moe.config import COMPRESSION, Config
from shodh_moe.kernels import expert_capacity
from shodh_moe.model import LatentTransformer
from shodh_moe.parallel import ExpertParallel
from shodh_moe.training.deepspeed_config import deepspeed_config, expert_parallel_size

BUCKET = 500_000_000  # elements that DeepSpeed reduces at once, where the config does not say


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Attributes:
        shared: on every rank: attention, routers, shared experts, norms, embedding, head.
        expert: of all routed experts of all layers.
        rank_expert: of those, the ones that one rank holds.
        active: those that a token passes through.
    """

    shared: int
    expert: int
    rank_expert: int
    active: int

    @property
    def total(self) -> int:
        return self.shared + self.expert

    @property
    def rank(self) -> int:
        return self.shared + self.rank_expert


def latent_grid(config: Config) -> list[int]:
    """Latents along x, y and z."""
    return [size // COMPRESSION for size in config.data.grid]


def sample_tokens(config: Config) -> int:
    """Tokens of one sample."""
    return math.prod(latent_grid(config)) // config.model.patch**3


def batch_tokens(config: Config) -> int:
    """Tokens of a micro-batch on a rank."""
    return config.training.batch_size * sample_tokens(config)


def step_samples(config: Config, world: int) -> int:
    """Samples of one optimizer step on all ranks."""
    return world * config.training.batch_size * config.training.accumulation


def training_samples(config: Config) -> int:
    """Different samples to train on: of every latent copy of every trajectory of the training split."""
    data = config.data
    trajectories = sum(domain.trajectories.train for _, domain in data.domains.items())
    return trajectories * config.tokenizer.latent_copies * (data.snapshots - config.model.history)


def count_parameters(config: Config, world: int) -> Parameters:
    """By building one block of the model of one rank, without its memory.

    Raises:
        UserError: ranks or experts cannot be shared out, or the patch does not divide the latents.
    """
    ep, depth = expert_parallel_size(config, world), config.model.depth
    channels, grid = config.tokenizer.latent_channels, latent_grid(config)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = LatentTransformer(config.model.model_copy(update={"depth": 1}), channels, grid, 0, ExpertParallel(ep))
    rank_expert = depth * sum(_numel(layer.experts) for layer in model.moe_layers)
    shared = _numel(model) + (depth - 1) * _numel(model.blocks) - rank_expert
    expert = rank_expert * ep
    return Parameters(shared, expert, rank_expert, shared + expert // max(config.model.moe.num_experts, 1))


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def state_bytes(config: Config, world: int, count: Parameters | None = None) -> dict[str, int]:
    """Weights, gradients, optimizer and reduction buffers of one rank, by part (DESIGN 7: bfloat16 is autocast).

    ``reduction`` is what DeepSpeed needs to bring the gradients to where they are used: without ZeRO a flat copy of
    a bucket, after the backward pass; with it the buckets, and this rank's part laid end to end.

    Args:
        count: what is trained; None: the transformer.
    """
    count, ep = count or count_parameters(config, world), expert_parallel_size(config, world)
    wide, _ = _widths(config)
    stage = config.parallel.zero_stage
    if not stage:
        flat = min(max(count.shared, count.rank_expert), BUCKET)
        sizes = {"weights": 1, "gradients": 1, "optimizer": 2}
        return {**{key: n * wide * count.rank for key, n in sizes.items()}, "reduction": wide * flat}
    part = -(-count.shared // world) - (-count.rank_expert // (world // ep))  # what this rank updates
    zero = deepspeed_config(config, world)["zero_optimization"]
    buckets = int(zero.get("reduce_bucket_size", BUCKET)) * (2 if zero.get("overlap_comm") else 1)
    return {
        "weights": wide * count.rank,
        "gradients": wide * (count.rank if stage == 1 else part),
        "optimizer": wide * 3 * part,  # two moments, and the part's own copy of the weights
        "reduction": wide * (buckets + part),
    }


def activation_bytes(config: Config, ep: int = 1) -> dict[str, int]:
    """What one micro-batch needs on a GPU, by part.

    ``activations``: what autograd keeps until the backward pass, copies of weights in the products' precision and the
    batch included; flash attention (nothing of size S^2), fused RMS norms. ``backward``: a bound of what the backward
    pass holds beside it; with activation checkpointing one whole block. ``exchange``: rows on their way between ranks.
    Dropless counts an even load.
    """
    m, t, channels = config.model, config.training, config.tokenizer.latent_channels * config.model.patch**3
    wide, narrow = _widths(config)
    tokens, row = batch_tokens(config), slots(config) * m.dim * narrow
    # The head's norm and product, the embedding's input, the batch, the prediction, the error.
    ends = tokens * (m.dim * (wide + narrow) + channels * (narrow * (m.history + 1) + wide * (m.history + 4)))
    backward, block = tokens * m.dim * wide + 2 * row, _block_bytes(config, ep)
    exchange = 2 * row if ep > 1 else 0
    if t.activation_checkpointing:
        # Each block's input and routing.
        kept = m.depth * tokens * (m.dim * wide + 24)
        return {"activations": kept + ends, "backward": backward + block, "exchange": exchange}
    return {"activations": m.depth * block + ends, "backward": backward, "exchange": exchange}


def slots(config: Config) -> int:
    """Rows that a rank sends to experts in one layer, and that its own experts get from as many ranks as share them."""
    moe, tokens = config.model.moe, batch_tokens(config)
    if not moe.num_experts:
        return 0
    if moe.dropless:
        return tokens
    return moe.num_experts * expert_capacity(tokens, moe.num_experts, moe.capacity_factor, moe.min_capacity)


def _widths(config: Config) -> tuple[int, int]:
    """Bytes of a number in weights and between blocks, and of one in products."""
    wide = 8 if config.training.precision == "float64" else 4
    return wide, 2 if config.training.precision == "bfloat16" else wide


def _block_bytes(config: Config, ep: int) -> int:
    """What autograd keeps of one block on a GPU."""
    m, moe = config.model, config.model.moe
    wide, narrow = _widths(config)
    cast = wide != narrow
    d, f, experts = m.dim, moe.expert_hidden, moe.num_experts
    norms = 2 * wide * d + 2 * wide * (1 + m.heads)  # both inputs; a scale a token and norm, or a head and norm
    # The norm's output; q, k, v as one; q and k turned; the result, and again token by token; a number a head.
    attention = narrow * 8 * d + wide * m.heads
    attention += cast * 2 * wide * d  # q and k before their norms
    router = wide * d  # the norm's output
    router += (4 * (experts + moe.router.dim) + 40) * bool(experts)  # scores; expert, slot, probability, ...
    shared = narrow * moe.shared_experts * 4 * f  # gate and up, silu(gate), their product
    shared += cast * narrow * d * bool(moe.shared_experts)  # the norm's output, narrow
    of_slot = narrow * (2 * d + 4 * f)  # as much, what comes in, what goes out
    turns = 4 * wide * sample_tokens(config) * (d // m.heads // 2)  # cosines and sines for q and k
    weights = cast * narrow * (4 * d * d + 3 * d * f * (moe.shared_experts + experts // ep))
    return batch_tokens(config) * (norms + attention + router + shared) + slots(config) * of_slot + turns + weights


def memory(config: Config, world: int) -> dict[str, int]:
    """Memory of one GPU by part, and their ``sum``: at no moment of a step is it more."""
    parts = {**state_bytes(config, world), **activation_bytes(config, expert_parallel_size(config, world))}
    total = sum(parts.values())
    if not config.parallel.zero_stage:
        # The flat copy comes when the activations are gone.
        total -= min(parts["reduction"], parts["activations"] + parts["backward"] + parts["exchange"])
    return {**parts, "sum": total}


def snapshots(config: Config) -> int:
    """Snapshots of a generated dataset, all splits."""
    return config.data.snapshots * sum(domain.trajectories.total for _, domain in config.data.domains.items())


def dataset_bytes(config: Config) -> int:
    """Generated files: velocity and pressure of each snapshot, the solid mask of each trajectory, float32."""
    data = config.data
    trajectories = sum(domain.trajectories.total for _, domain in data.domains.items())
    return trajectories * (4 * data.snapshots + 1) * 4 * math.prod(data.grid)


def latent_bytes(config: Config) -> int:
    """Cached latents of all splits and copies, float32: each snapshot and each trajectory's geometry."""
    data = config.data
    copies = config.tokenizer.latent_copies
    trajectories = sum(d.trajectories.total + (copies - 1) * d.trajectories.train for _, d in data.domains.items())
    return trajectories * (data.snapshots + 1) * config.tokenizer.latent_channels * 4 * math.prod(latent_grid(config))


def checkpoint_bytes(config: Config, world: int) -> int:
    """One checkpoint on disk: every weight and its two moments."""
    return 3 * _widths(config)[0] * count_parameters(config, world).total


def checkpoints_kept(config: Config) -> int:
    """The most checkpoints that lie on the disk at once: the newest, those for good, and one being written."""
    t = config.training
    return t.keep_last + 1 + (t.steps // t.keep_every if t.keep_every else 0)


def plan(config: Config, world: int) -> str:
    """The table that ``shodh plan`` prints.

    Raises:
        UserError: the layout does not fit ``world`` ranks.
    """
    count, t, ep = count_parameters(config, world), config.training, expert_parallel_size(config, world)
    sizes, samples, tokens = memory(config, world), step_samples(config, world), sample_tokens(config)
    layout = f"{world}: EP {ep}, EDP {world // ep}, ZeRO {config.parallel.zero_stage}, {t.precision}"
    lines = {
        "ranks": layout + (", activation checkpointing" if t.activation_checkpointing else ""),
        "parameters": f"{_count(count.total)}, {_count(count.active)} active, {_count(count.rank)} on a rank",
        "tokens": f"{tokens:,} a sample, {batch_tokens(config):,} a micro-batch, {samples * tokens:,} a step",
        "steps": f"{t.steps:,} of {samples:,} samples",
        "memory of a GPU": f"{sizes.pop('sum') / 2**30:.1f} GiB, computed, without CUDA's and NCCL's own; of which",
        **{f"  {part}": f"{size / 2**30:.2f} GiB" for part, size in sizes.items()},
        "checkpoint": f"{checkpoint_bytes(config, world) / 1e9:,.1f} GB, at most {checkpoints_kept(config)} at once",
    }
    if not config.data.path:
        different = training_samples(config)
        lines["steps"] += f": {t.steps * samples / different:.1f} times each of {different:,}"
        lines["dataset"] = f"{dataset_bytes(config) / 1e9:,.1f} GB, {snapshots(config):,} snapshots"
        lines["latents"] = f"{latent_bytes(config) / 1e9:,.1f} GB"
    return "\n".join(f"{name:<18}{text}" for name, text in lines.items())


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"
