"""The MoE layer on four real gloo processes: EP 1, 2 and 4 give the same outputs and gradients, to rounding; and
under bfloat16 autocast half the bytes travel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from shodh_moe.config import MoEConfig
from shodh_moe.model.moe import MoE
from shodh_moe.parallel import ExpertParallel
from tests.forked import spawn

pytestmark = pytest.mark.distributed

WORLD, TOKENS, DIM, EXPERTS = 4, 23, 6, 8
EMPTY = 5  # no token chooses this expert
LONELY = 3  # all tokens of rank 3 choose this expert, so the other ranks of its EP group get none from it


def _layer(ep: ExpertParallel, dropless: bool, top_k: int = 1) -> MoE:
    config = MoEConfig(
        scope="layer", num_experts=EXPERTS, expert_hidden=5, shared_experts=1, dropless=dropless, capacity_factor=1.0,
        min_capacity=1, top_k=top_k,
        router={"kind": "linear"},
    )  # fmt: skip
    torch.manual_seed(0)
    layer = MoE(DIM, config, ep, seed=0, layer=0).double()
    torch.nn.init.normal_(layer.router.projection.weight, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        layer.router.projection.weight[EMPTY] = 0
        layer.router.projection.weight[EMPTY, 0] = -50.0  # the first feature of every token is positive
        layer.router.projection.weight[LONELY, 1] = 50.0
    return layer


def _tokens(rank: int) -> torch.Tensor:
    x = torch.randn(TOKENS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(10 + rank))
    x[:, 0] = x[:, 0].abs() + 0.1
    x[:, 1] = 1.0 if rank == 3 else 0.0
    return x.requires_grad_()


def _under_autocast(ep: ExpertParallel, dropless: bool, rank: int, on: bool) -> dict:
    layer, x = _layer(ep, dropless).float(), _tokens(rank).detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=on):
        y, routing = layer(x)
    ((y * torch.arange(DIM)).sum() + routing.balance_loss + routing.z_loss).backward()
    named = {name: parameter.grad for name, parameter in layer.named_parameters()}
    rows = sum(e.sent_bytes for e in ep.exchanges) - _bytes_of_counts(layer)
    return {"y": y.detach(), "dx": x.grad, "expert": routing.expert_N, "sent_bytes": rows, **named}


def _bytes_of_counts(layer: MoE) -> int:
    """Every rank sends the three others the number of tokens it has for their experts, as int64."""
    return EXPERTS * 8 * 3 // 4


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    results = {}
    for size in (1, 2, 4):
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, WORLD, size)]
        for dropless in (False, True):
            for recomputed in (False, True, "top 3"):
                top_k = 3 if recomputed == "top 3" else 1
                layer = _layer(ExpertParallel(size, rank % size, groups[rank // size]), dropless, top_k)
                x = _tokens(rank)
                y, routing = checkpoint(layer, x, use_reentrant=False) if recomputed is True else layer(x)
                ((y * torch.arange(DIM)).sum() + routing.balance_loss + routing.z_loss).backward()
                held = layer.ep.local_experts(EXPERTS)
                results[size, dropless, recomputed] = {
                    "y": y.detach(), "dx": x.grad, "kept": routing.kept_N, "expert": routing.expert_N,
                    "router": layer.router.projection.weight.grad, "shared": layer.shared[0].down.weight.grad,
                    "held": torch.tensor(list(held)),
                    "gate_up": layer.experts.gate_up_LDF.grad, "down": layer.experts.down_LFD.grad,
                }  # fmt: skip
    for dropless in (False, True):
        for precision in ("float32", "bfloat16"):
            ep = ExpertParallel(4, rank, groups[0], exchanges=[])
            results[precision, dropless] = _under_autocast(ep, dropless, rank, precision == "bfloat16")
    torch.save(results, Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("moe_ranks")
    spawn(_worker, (str(folder),), WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def _expert_gradient(ranks: list[dict], key: tuple, name: str) -> torch.Tensor:
    """Sum over the ranks that hold each expert, [E, ...]."""
    total = torch.zeros(EXPERTS, *ranks[0][key][name].shape[1:], dtype=torch.float64)
    for rank in ranks:
        total.index_add_(0, rank[key]["held"], rank[key][name])
    return total


@pytest.mark.parametrize("dropless", [False, True])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", [False, "top 3"])
def test_expert_parallel_sizes_agree(ranks, size, dropless, kind):
    one, other = (1, dropless, kind), (size, dropless, kind)
    for rank in ranks:
        assert torch.equal(rank[one]["kept"], rank[other]["kept"])  # the same tokens are dropped
        for name in ("y", "dx", "router", "shared"):
            torch.testing.assert_close(rank[other][name], rank[one][name], rtol=1e-12, atol=1e-12)
    for name in ("gate_up", "down"):
        expected = _expert_gradient(ranks, one, name)
        torch.testing.assert_close(_expert_gradient(ranks, other, name), expected, rtol=1e-12, atol=1e-12)
        assert not expected[EMPTY].any()
        assert expected[LONELY].any()


def test_the_setting_is_what_it_claims(ranks):
    for number, rank in enumerate(ranks):
        chosen = rank[1, True, False]["expert"]
        assert EMPTY not in chosen
        assert (chosen == LONELY).all() == (number == 3)
        assert rank[1, True, False]["kept"].all()
    assert not all(rank[1, False, False]["kept"].all() for rank in ranks)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dropless", [False, True])
def test_recomputation_routes_tokens_identically(ranks, size, dropless):
    for rank in ranks:
        plain, recomputed = rank[size, dropless, False], rank[size, dropless, True]
        for name in plain:
            assert torch.equal(plain[name], recomputed[name]), name


@pytest.mark.parametrize("dropless", [False, True])
def test_bfloat16_autocast_is_close_and_sends_half_the_bytes(ranks, dropless):
    for rank in ranks:
        exact, narrow = rank["float32", dropless], rank["bfloat16", dropless]
        assert torch.equal(exact["expert"], narrow["expert"])  # the router computes in float32 either way
        assert 0 < 2 * narrow["sent_bytes"] == exact["sent_bytes"]
        for name in exact.keys() - {"sent_bytes", "expert"}:
            assert narrow[name].dtype == torch.float32, name
            error = (narrow[name] - exact[name]).norm() / exact[name].norm().clamp(min=1e-3)
            assert error < 0.02, (name, error)
