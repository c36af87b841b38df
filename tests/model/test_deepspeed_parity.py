"""Our mixture-of-experts layer against DeepSpeed's own, with the same weights, tokens and gate.

The layers run in separate processes, since DeepSpeed's groups outlive a test. Both have a linear router, Top-1, SwiGLU
experts, capacity per rank and l_aux. Our layer has no shared expert here.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shodh_moe.config import MoEConfig, RouterConfig
from shodh_moe.kernels import expert_capacity
from shodh_moe.model.experts import FeedForward
from shodh_moe.model.moe import MoE
from shodh_moe.parallel import ExpertParallel
from tests.forked import spawn

pytestmark = pytest.mark.distributed

TOKENS, DIM, HIDDEN, EXPERTS = 48, 8, 6, 4
# Name: tokens and capacity factor. No token is dropped; 6 slots per expert; a capacity that depends on rounding.
CASES = {"room": (TOKENS, float(EXPERTS)), "tight": (TOKENS, 0.5), "rounded": (50, 1.2)}


def _tokens(count: int, rank: int) -> torch.Tensor:
    x = torch.randn(count, DIM, generator=torch.Generator().manual_seed(10 + rank))
    x[:, 0] = 1.0
    return x.requires_grad_()


def _ours(ep: ExpertParallel, factor: float) -> MoE:
    config = MoEConfig(
        scope="layer", num_experts=EXPERTS, expert_hidden=HIDDEN, dropless=False, capacity_factor=factor,
        min_capacity=1,
        router=RouterConfig(kind="linear"),
    )  # fmt: skip
    torch.manual_seed(3)  # the router's weights, the same on every rank
    layer = MoE(DIM, config, ep, seed=0, layer=0)
    with torch.no_grad():
        layer.router.projection.weight[0, 0] = 1.0  # many tokens choose expert 0
    return layer


def _theirs(ours: MoE, factor: float) -> Any:
    """DeepSpeed's layer with our weights, without random token selection, which would ignore token order."""
    from deepspeed.moe.layer import MoE as DeepSpeedMoE

    layer = DeepSpeedMoE(
        DIM, FeedForward(DIM, HIDDEN), EXPERTS, ep_size=ours.ep.size, k=1, capacity_factor=factor, min_capacity=1,
        drop_tokens=True, use_rts=False,
    )  # fmt: skip
    layer.set_deepspeed_parallelism()
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(ours.router.projection.weight)
        for local, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            expert.gate_up.weight.copy_(ours.experts.gate_up_LDF[local].T)
            expert.down.weight.copy_(ours.experts.down_LFD[local].T)
    return layer


def _compare(ep: ExpertParallel, factor: float, tokens: int, rank: int) -> dict[str, Any]:
    """Output, loss, gradients and kept tokens of both layers."""
    ours, x, their_x = _ours(ep, factor), _tokens(tokens, rank), _tokens(tokens, rank)
    theirs = _theirs(ours, factor)
    y, routing = ours(x)
    their_y, their_l_aux, _ = theirs(their_x)
    weight = torch.arange(1.0, DIM + 1) * torch.arange(1, tokens + 1)[:, None] / tokens
    ((y * weight).sum() + routing.balance_loss).backward()
    ((their_y * weight).sum() + their_l_aux).backward()
    experts = theirs.deepspeed_moe.experts.deepspeed_experts
    ones = torch.ones(EXPERTS, dtype=torch.int64)

    def kept(expert_N: torch.Tensor) -> torch.Tensor:
        return torch.zeros(EXPERTS, dtype=torch.int64).scatter_add_(0, expert_N, ones[:1].expand(len(expert_N)))

    return {
        "y": (y, their_y),
        "l_aux": (routing.balance_loss, their_l_aux),
        "dx": (x.grad, their_x.grad),
        "router": (ours.router.projection.weight.grad, theirs.deepspeed_moe.gate.wg.weight.grad),
        "gate_up": (ours.experts.gate_up_LDF.grad, torch.stack([e.gate_up.weight.grad.T for e in experts])),
        "down": (ours.experts.down_LFD.grad, torch.stack([e.down.weight.grad.T for e in experts])),
        # DeepSpeed's layer outputs zeros for a dropped token; both routers agree on the token's expert.
        "kept": (kept(routing.expert_N[routing.kept_N]), kept(routing.expert_N[their_y.detach().any(dim=1)])),
    }


def _worker(rank: int, world: int, size: int, port: int, folder: str) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), DEEPSPEED_LOG_LEVEL="error")
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # otherwise it compiles for a minute or two
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
    ep = ExpertParallel(size, rank % size, groups[rank // size])
    for case, (tokens, factor) in CASES.items():
        both = _compare(ep, factor, tokens, rank)
        torch.save({name: [t.detach() for t in pair] for name, pair in both.items()}, Path(folder, f"{case}{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "EP 2"])
def ranks(request, tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """The results of both layers, [case][rank][name]: (ours, theirs)."""
    world, folder = request.param, tmp_path_factory.mktemp("parity")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_worker, (world, world, port, str(folder)), world)
    return {
        case: [torch.load(folder / f"{case}{rank}.pt", weights_only=True) for rank in range(world)] for case in CASES
    }


def test_same_output_loss_and_gradients(ranks):
    for rank in ranks["room"]:
        assert rank["kept"][0].sum() == TOKENS
        for name, (ours, theirs) in rank.items():
            torch.testing.assert_close(
                ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_same_counts_where_capacity_binds(ranks):
    for rank in ranks["tight"]:
        ours, theirs = rank["kept"]
        assert torch.equal(ours, theirs)
        assert ours.max() == 6  # TOKENS / EXPERTS * 0.5, exact in float32 too
        assert ours.sum() < TOKENS
        torch.testing.assert_close(*rank["l_aux"])  # counted before dropping


def test_capacity_in_float32_is_one_slot_more_than_exact_arithmetic(ranks):
    """50 / 4 * 1.2 = 15; DeepSpeed computes it in float32, gets a little more, and rounds up."""
    assert expert_capacity(50, EXPERTS, 1.2, 1) == 15
    for rank in ranks["rounded"]:
        ours, theirs = rank["kept"]
        assert (ours.max(), theirs.max()) == (15, 16)
