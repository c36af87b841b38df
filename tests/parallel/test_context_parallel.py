"""Slabs of samples on four gloo processes: attention, contexts and means are those of whole samples, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shodh_moe.config import MoEConfig
from shodh_moe.model.attention import Attention
from shodh_moe.model.path import Features
from shodh_moe.model.positions import token_angles
from shodh_moe.parallel import ContextParallel, Layout, join_context
from tests.forked import spawn

WORLD, GRID, SAMPLES, DIM = 4, (4, 3, 2), 2, 24
SIZES = (1, 2, 4)


def _tokens(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _slab(cp: ContextParallel) -> tuple[int, int, int]:
    return GRID[0] // cp.size, GRID[1], GRID[2]


def _attention(cp: ContextParallel) -> dict[str, Tensor]:
    torch.manual_seed(0)
    layer = Attention(DIM, 2, cp=cp).double()
    x_BSD = _tokens(24, DIM)[:, cp.slab(24)].requires_grad_()
    y_BSD = layer(x_BSD, token_angles(_slab(cp), DIM // 2, torch.device("cpu"), cp=cp))
    (y_BSD * _tokens(24, DIM)[:, cp.slab(24)].cos()).sum().backward()
    weights = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"y": y_BSD.detach(), "dx": x_BSD.grad, **weights}


def _context(cp: ContextParallel, context: str) -> dict[str, Tensor]:
    """The rows of all tokens. Their first feature has a large mean, so that sums of squares would cancel."""
    z_BSI = _tokens(24, 3)
    z_BSI[:, :, 0] += 1e6
    config = MoEConfig.model_validate({"router": {"context": context, "window": 1}})
    x_MF, row_N = Features(3, config, cp)(z_BSI[:, cp.slab(24)], _slab(cp))
    return {"rows": (x_MF if row_N is None else x_MF[row_N]).view(SAMPLES, -1, x_MF.shape[1])}


def _mean(cp: ContextParallel) -> dict[str, Tensor]:
    """Squares of a sample's mean over all tokens, with the same sum on each rank of the group."""
    x_BS = _tokens(24)[:, cp.slab(24)].requires_grad_()
    mean_B = cp.mean(x_BS.mean(1))
    mean_B.square().sum().backward()
    return {"mean": mean_B.detach(), "dx": x_BS.grad}


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    results = {}
    for size in SIZES:
        cp = join_context(Layout(WORLD, cp=size), rank)
        results[size, "attention"], results[size, "mean"] = _attention(cp), _mean(cp)
        for context in ("sample", "both", "window"):
            results[size, context] = _context(cp, context)
    torch.save(results, Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("slabs")
    spawn(_worker, (str(folder),), WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def _whole(ranks: list[dict], size: int, case: str, key: str) -> Tensor:
    """Put the slabs of the first group together."""
    return torch.cat([rank[size, case][key] for rank in ranks[:size]], dim=1)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
def test_attention_over_slabs_is_that_of_whole_samples(ranks, size):
    whole = ranks[0][1, "attention"]
    for key in ("y", "dx"):
        torch.testing.assert_close(_whole(ranks, size, "attention", key), whole[key], rtol=0, atol=1e-13)
    for name, expected in whole.items():
        if name not in ("y", "dx"):
            found = sum(rank[size, "attention"][name] for rank in ranks[:size])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, msg=name)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("context", ["sample", "both", "window"])
def test_contexts_are_those_of_whole_samples(ranks, size, context):
    expected = ranks[0][1, context]["rows"]
    torch.testing.assert_close(_whole(ranks, size, context, "rows"), expected, rtol=0, atol=1e-12)
    if context == "sample":  # one decision for all slabs of a sample needs equal bits
        assert all(
            torch.equal(rank[size, context]["rows"][:, 0], ranks[0][size, context]["rows"][:, 0]) for rank in ranks
        )


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
def test_a_mean_passes_on_the_gradients_of_all_ranks(ranks, size):
    whole = ranks[0][1, "mean"]
    for rank in ranks:
        torch.testing.assert_close(rank[size, "mean"]["mean"], whole["mean"], rtol=0, atol=1e-15)
    torch.testing.assert_close(_whole(ranks, size, "mean", "dx"), size * whole["dx"], rtol=0, atol=1e-15)


@pytest.mark.parametrize(("ep", "cp"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 2), (2, 4), (8, 1)])
def test_every_rank_is_in_one_group_of_each_kind(ep, cp):
    layout = Layout(8, ep, cp)
    assert layout.edp * ep * cp == 8
    for groups, size in (
        (layout.context_groups(), cp),
        (layout.expert_groups(), ep),
        (layout.replica_groups(), layout.replicas),
    ):
        assert all(len(ranks) == size for ranks in groups)
        assert sorted(rank for ranks in groups for rank in ranks) == list(range(8))
    for ranks in layout.context_groups():
        assert len({layout.batch_rank(rank) for rank in ranks}) == 1
        assert [layout.context_rank(rank) for rank in ranks] == list(range(cp))
    for ranks in layout.expert_groups():
        assert [layout.expert_rank(rank) for rank in ranks] == list(range(ep))
        assert len({layout.context_rank(rank) for rank in ranks}) == 1
        assert len({layout.batch_rank(rank) for rank in ranks}) == ep
    for ranks in layout.replica_groups():
        assert [layout.replica(rank) for rank in ranks] == list(range(layout.replicas))


def test_ranks_of_a_context_group_are_consecutive_then_those_of_an_expert_group():
    layout = Layout(8, ep=2, cp=2)
    assert layout.context_groups() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.expert_groups() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert layout.replica_groups() == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_an_axis_is_not_cut_into_slabs_of_different_sizes():
    cp = ContextParallel(3, 1)
    assert cp.slab(6) == slice(2, 4)
    assert cp.whole((2, 5, 4)) == (6, 5, 4)
    with pytest.raises(ValueError, match="an axis of 16 cannot be cut into 3 slabs"):
        cp.slab(16)
