"""The exchange on two gloo processes: unequal batches raise an error on both; records have bytes and times."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shodh_moe.base.errors import UserError
from shodh_moe.config import MoEConfig
from shodh_moe.model.moe import MoE
from shodh_moe.parallel import ExpertParallel, all_to_all, start_all_to_all
from tests.forked import spawn
from tests.tiny import LAYER

pytestmark = pytest.mark.distributed

LATE = 0.2  # seconds


def _mismatch(rank: int) -> str:
    layer = MoE(4, MoEConfig(**LAYER, capacity_factor=1.5), ExpertParallel(2, rank, dist.group.WORLD), seed=0, layer=0)
    layer(torch.randn(8, 4))  # the same batch on both
    layer.ep = ExpertParallel(2, rank, dist.group.WORLD)
    try:
        layer(torch.randn((8, 6)[rank], 4))
    except UserError as error:
        return str(error)
    return ""


def _equal(rank: int, ep: ExpertParallel) -> None:
    x = torch.zeros(2, 3, 5, requires_grad=True)
    all_to_all(start_all_to_all(x, ep, layer=7).wait(), ep, layer=7).sum().backward()


def _uneven(rank: int, ep: ExpertParallel) -> None:
    """Rank 0 keeps 1 row and sends 4; rank 1 keeps 2 and sends 3."""
    send, receive = ([1, 4], [1, 3]) if rank == 0 else ([3, 2], [4, 2])
    x = torch.zeros(5, 6, dtype=torch.bfloat16, requires_grad=True)
    start_all_to_all(x, ep, send, receive).wait().sum().backward()


def _late(rank: int, ep: ExpertParallel) -> None:
    """Rank 0 starts the exchange, works, and then waits for rank 1."""
    if rank == 1:
        time.sleep(3 * LATE)
    exchange = start_all_to_all(torch.zeros(2, 3), ep)
    if rank == 0:
        time.sleep(LATE)
    exchange.wait()


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    ep, results = ExpertParallel(2, rank, dist.group.WORLD), {}
    for case in (_equal, _uneven, _late):
        dist.barrier()
        ep.exchanges = []
        case(rank, ep)
        results[case.__name__] = [(e.layer, e.direction, e.sent_bytes, *e.times_ms()) for e in ep.exchanges]
    dist.barrier()
    ep.exchanges = []
    ep.exchange_counts(torch.tensor([3, 1, 2, 0]))
    results["_counts"] = [(e.direction, e.sent_bytes) for e in ep.exchanges]
    ep.exchanges = None
    _equal(rank, ep)
    results["_mismatch"] = _mismatch(rank)
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("exchange_ranks")
    spawn(_worker, (str(folder),), 2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_unequal_batches_are_an_error_on_both_ranks_not_a_hang(ranks):
    first, second = (rank["_mismatch"] for rank in ranks)
    assert first == second
    assert "rank 0: 8 tokens, 6 slots per expert; rank 1: 6 tokens, 5 slots per expert" in first
    assert "\n" not in first


def test_bytes_of_equal_blocks(ranks):
    for rank in ranks:
        kinds = [tuple(exchange[:3]) for exchange in rank["_equal"]]
        block_bytes = 3 * 5 * 4  # the block for the other rank
        # Dispatch, combine, and their backward passes in reverse order.
        assert kinds == [
            (7, "dispatch", block_bytes),
            (7, "combine", block_bytes),
            (7, "combine", block_bytes),
            (7, "dispatch", block_bytes),
        ]


def test_bytes_of_uneven_blocks(ranks):
    row = 6 * 2
    assert [exchange[2] for exchange in ranks[0]["_uneven"]] == [4 * row, 3 * row]  # gradients go the other way
    assert [exchange[2] for exchange in ranks[1]["_uneven"]] == [3 * row, 4 * row]
    assert all(rank["_counts"] == [["dispatch", 2 * 8]] for rank in ranks)


def test_waiting_is_measured_separately_from_time_in_flight(ranks):
    ((*_, flight, waited),) = ranks[0]["_late"]
    assert waited > 500 * LATE  # rank 1 started 2 LATE after rank 0 began to wait
    assert flight - waited > 990 * LATE  # the time that rank 0 slept before it waited
