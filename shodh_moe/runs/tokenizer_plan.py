"""Compute from its config what the training of a tokenizer needs: parameters and memory per rank.

Activations are counted on the real module: one micro-batch runs forward and backward on fake tensors, which have shapes
but no memory, and `LiveBytes` counts those that are alive. The workspace of operations is estimated: for convolutions
and Fourier transforms a copy of the inputs and outputs (libraries lay out a convolution's channels in blocks), for
`walls.project` the fields of its solver. Not included, as in `plan`: the CUDA context, NCCL's buffers, and memory that
the allocator wastes on fragmentation. benchmarks/studies/tokenizer_memory.py compares the numbers with real steps on a
CPU; nothing has been compared with a GPU.

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

# Number of scalar fields that `walls.project` holds in addition to its inputs and result, including the FFT's.
SOLVER_FIELDS = 20
LIBRARIES = 700 * 2**20  # bytes of Python, torch, DeepSpeed and other libraries in a rank on a CPU
# A rank on a CPU keeps freed memory. Ratio of its resident memory to the peak of live bytes (measured: 1 to 2.2).
KEPT = 2.25
BLOCK = 16  # channels per block in a convolution's layout
READ_AHEAD = 2  # micro-batches that `read_batches` holds in host memory


def count_parameters(config: Config) -> int:
    """Return the number of parameters of encoder and decoder."""
    return sum(parameter.numel() for parameter in _build(config).parameters())


def activation_bytes(config: Config, samples: int, checkpointing: bool) -> dict[str, int]:
    """Return the bytes that a step on one rank's ``samples`` needs in addition to `state_bytes`, by part.

    ``batch``: the fields as read, which are kept while the transformed ones are in use. ``activations``: the
    transformed batch, and the tensors that autograd keeps for the backward pass. ``passes``: the largest number of
    bytes that either pass holds in addition. ``workspace``: temporary memory inside operations, on top of that.

    Args:
        checkpointing: whether each stage of the tokenizer is recomputed in the backward pass.
    """
    t, grid = config.tokenizer, config.data.grid
    # Fill this function's cache now: a call inside FakeTensorMode would leave a fake tensor in it.
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
    """Return one GPU's memory in bytes by part, and their ``sum``, a bound because the parts do not peak together.

    Raises:
        UserError: the batch cannot be divided among ``world`` ranks, or the DeepSpeed section does not fit.
    """
    run, count = tokenizer_run(config, world), count_parameters(config)
    states = state_bytes(run, world, Parameters(shared=count, expert=0, rank_expert=0, active=count))
    parts = {**states, **activation_bytes(config, run.training.batch_size, checkpointing)}
    return {**parts, "sum": sum(parts.values())}


def tokenizer_plan(config: Config, world: int) -> str:
    """Return the table that ``shodh tokenizer plan`` prints.

    Raises:
        UserError: the batch cannot be divided among ``world`` ranks, or the DeepSpeed section does not fit.
    """
    t, samples = config.tokenizer, tokenizer_run(config, world).training.batch_size
    latents = " x ".join(str(size // COMPRESSION) for size in config.data.grid)
    ratio = 4 * COMPRESSION**3 / t.latent_channels
    sizes = [memory(config, world, checkpointing) for checkpointing in (False, True)]
    totals = [part.pop("sum") for part in sizes]
    host = [LIBRARIES + int(KEPT * total) + READ_AHEAD * sizes[0]["batch"] for total in totals]
    rows = {
        "ranks": f"{world}, {samples} samples each; ZeRO {config.parallel.zero_stage}, {t.precision}",
        "parameters": f"{count_parameters(config) / 1e6:.2f} million",
        "latents": f"{latents}, {t.latent_channels} channels: {ratio:g} times fewer numbers than velocity and pressure",
        "checkpointing": f"{'off':>10}{'on':>10}  activation checkpointing; the config has it "
        f"{'on' if t.activation_checkpointing else 'off'}",
        "memory per GPU": _columns(totals) + "  GiB (computed, without CUDA's and NCCL's own), of which",
        **{f"  {part}": _columns([both[part] for both in sizes]) for part in sizes[0]},
        "host memory": _columns(host) + "  GiB at most, per rank when training on a CPU",
    }
    return "\n".join(f"{name:<18}{text}" for name, text in rows.items())


def _columns(sizes: list[int]) -> str:
    return "".join(f"{size / 2**30:10.2f}" for size in sizes)


def _build(config: Config) -> Tokenizer:
    """Build the tokenizer on the meta device, which allocates no memory."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return Tokenizer(config.tokenizer, config.data.grid)


def _workspace(operation: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Estimate the temporary bytes of one operation, for `LiveBytes`."""
    if operation.startswith("aten.convolution"):
        # The backward pass computes its two gradients one after the other.
        both = inputs[:2] if "backward" in operation else [inputs[0], outputs[0]]
        return sum(-(-x.shape[1] // BLOCK) * BLOCK * x[:, 0].numel() * x.element_size() for x in both)
    if "fft" in operation:
        return sum(x.numel() * x.element_size() for x in (*inputs, *outputs))
    if "project_masked" in operation:
        return SOLVER_FIELDS * outputs[0][:, 0].numel() * outputs[0].element_size()
    return 0
