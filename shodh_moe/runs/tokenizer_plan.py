"""What the tokenizer's training will need, worked out before anything is started: parameters, memory of a rank.

Activations are counted on the real module: one micro-batch goes forward and backward on fake tensors, which have shapes
and no memory, and `LiveBytes` counts those that are alive. What operations need for themselves is estimated: of a
convolution a copy of what goes in and comes out (libraries lay channels out in blocks), of a Fourier transform the
same, of `walls.project` the fields of its solver. Left out, as in `plan`: the CUDA context, NCCL's buffers, what the
allocator cannot use. benchmarks/studies/tokenizer_memory.py compares the numbers with
real steps on a CPU; nothing has been compared with a GPU.

All sizes are in bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from shodh_moe.config import COMPRESSION, Config
from shodh_moe.runs.live_bytes import LiveBytes
from shodh_moe.runs.plan import Parameters, state_bytes
from shodh_moe.tokenizer.laplacian import inverse_laplacian
from shodh_moe.tokenizer.reconstruction import Reconstruction
from shodh_moe.tokenizer.tokenizer import Tokenizer
from shodh_moe.training.tokenizer_config import tokenizer_run

# Fields of one component that `walls.project` holds beside its inputs and its result, FFT's own included.
SOLVER_FIELDS = 20
# Python, torch, DeepSpeed and the other libraries of a rank on a CPU.
LIBRARIES = 700 * 2**20
# A rank on a CPU keeps memory that is freed: what it grows to over the bytes alive at once (measured: 1 to 2.2).
KEPT = 2.25
BLOCK = 16  # channels
READ_AHEAD = 2  # micro-batches that wait in host memory (`read_batches`)


def count_parameters(config: Config) -> int:
    """Numbers of parameters of encoder and decoder."""
    return sum(parameter.numel() for parameter in _build(config).parameters())


def activation_bytes(config: Config, samples: int, checkpointing: bool) -> dict[str, int]:
    """What the step of one rank's ``samples`` needs beside `state_bytes`, by part.

    ``batch``: as it was read; it is kept beside what its symmetries make of it. ``activations``: that, and what
    autograd keeps from the forward to the backward pass. ``passes``: the most that either pass holds beside them.
    ``workspace``: what operations add to that for themselves.
    """
    t, grid = config.tokenizer, config.data.grid
    # It is kept for the next call: not from inside, where it would be fake.
    inverse_laplacian((grid[0], grid[1], grid[2]), t.operator, torch.float32, torch.device("cpu"))
    tokenizer = _build(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        tokenizer.to_empty(device="cpu")
        tokenizer.encoder.checkpointing = tokenizer.decoder.checkpointing = checkpointing
        with LiveBytes([*tokenizer.parameters(), *tokenizer.buffers()], _workspace) as live:
            fields_B5XYZ = torch.empty(samples, 5, *grid)
            with torch.autocast("cpu", torch.bfloat16, enabled=t.precision == "bfloat16"):
                loss = Reconstruction(tokenizer)(fields_B5XYZ).mean()
            kept = live.now
            loss.backward()
    batch = fields_B5XYZ.untyped_storage().nbytes()
    return {"batch": batch, "activations": kept, "passes": live.peak - kept, "workspace": live.bound - live.peak}


def memory(config: Config, world: int, checkpointing: bool) -> dict[str, int]:
    """Memory of one GPU by part, and their ``sum``, which the parts do not all reach at the same moment.

    Raises:
        UserError: ``world`` ranks cannot share the batch, or the DeepSpeed section does not fit.
    """
    run, count = tokenizer_run(config, world), count_parameters(config)
    states = state_bytes(run, world, Parameters(shared=count, expert=0, rank_expert=0, active=count))
    parts = {**states, **activation_bytes(config, run.training.batch_size, checkpointing)}
    return {**parts, "sum": sum(parts.values())}


def tokenizer_plan(config: Config, world: int) -> str:
    """The table that ``shodh tokenizer plan`` prints.

    Raises:
        UserError: ``world`` ranks cannot share the batch, or the DeepSpeed section does not fit.
    """
    t, samples = config.tokenizer, tokenizer_run(config, world).training.batch_size
    latents = " x ".join(str(size // COMPRESSION) for size in config.data.grid)
    fewer = 4 * COMPRESSION**3 / t.latent_channels
    sizes = [memory(config, world, checkpointing) for checkpointing in (False, True)]
    totals = [part.pop("sum") for part in sizes]
    host = [LIBRARIES + int(KEPT * total) + READ_AHEAD * sizes[0]["batch"] for total in totals]
    rows = {
        "ranks": f"{world}, samples on each: {samples}; ZeRO {config.parallel.zero_stage}, {t.precision}",
        "parameters": f"{count_parameters(config) / 1e6:.2f} million",
        "latents": f"{latents}, {t.latent_channels} channels: {fewer:g} times fewer numbers than velocity and pressure",
        "checkpointing": f"{'off':>10}{'on':>10}  of activations; now {'on' if t.activation_checkpointing else 'off'}",
        "memory of a GPU": _columns(totals) + "  GiB, computed, without CUDA's and NCCL's own; of which",
        **{f"  {part}": _columns([both[part] for both in sizes]) for part in sizes[0]},
        "host memory": _columns(host) + "  GiB at most, of a rank that trains on a CPU",
    }
    return "\n".join(f"{name:<18}{text}" for name, text in rows.items())


def _columns(sizes: list[int]) -> str:
    return "".join(f"{size / 2**30:10.2f}" for size in sizes)


def _build(config: Config) -> Tokenizer:
    """Without its memory."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return Tokenizer(config.tokenizer, config.data.grid)


def _workspace(operation: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    if operation.startswith("aten.convolution"):
        # The backward pass makes one of its two gradients after the other.
        both = inputs[:2] if "backward" in operation else [inputs[0], outputs[0]]
        return sum(-(-x.shape[1] // BLOCK) * BLOCK * x[:, 0].numel() * x.element_size() for x in both)
    if "fft" in operation:
        return sum(x.numel() * x.element_size() for x in (*inputs, *outputs))
    if "project_masked" in operation:
        return SOLVER_FIELDS * outputs[0][:, 0].numel() * outputs[0].element_size()
    return 0
