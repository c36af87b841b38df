"""Compare a layer on several ranks with one rank at the same global batch: speedup, and share of the all-to-all.

On a CPU every rank has cores / ranks threads, even a single rank, so that more ranks use more cores; on GPUs every
rank has its own device. Float32, linear router, forward and backward; the router's gradients are reduced as in
training.
Shapes: N tokens of all ranks together, D width, F hidden width (2 D), E experts.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from shodh_moe.base.memory import keep_freed_memory
from support.common import Report, describe
from support.moe_layers import our_layer

MODES = {"capacity": False, "dropless": True}


def bench_ranks(report: Report, tokens: int, width: int, experts: int, ranks: int) -> None:
    """Print the times of one rank and of several, and record them under ``ranks`` in the JSON."""
    case = {"tokens": tokens, "width": width, "hidden": 2 * width, "experts": experts, "dtype": "float32"}
    if experts % ranks or tokens % ranks:
        return report.missing("moe_ranks", "shodh", case, f"{ranks} ranks do not divide experts and tokens")
    cuda = report.device.type == "cuda"
    if cuda and torch.cuda.device_count() < ranks:
        found = torch.cuda.device_count()
        return report.missing("moe_ranks", "shodh", case, f"{ranks} ranks need {ranks} GPUs; {found} found")
    threads, rounds = max(torch.get_num_threads() // ranks, 1), report.options.patience.fewest
    print(f"\nmoe_layer  {describe(case)}  {ranks} ranks against one, {threads} threads each")
    print(
        f"  {'mode':<12} {'1 rank ms':>10} {f'{ranks} ranks ms':>11} {'speedup':>8} {'of ideal':>9} {'all-to-all':>11}"
    )
    one, several = (_run(case, count, threads, rounds, report.device.type) for count in (1, ranks))
    for mode in MODES:
        speedup = one[mode]["seconds"] / several[mode]["seconds"]
        row = {
            "case": case, "mode": mode, "ranks": ranks, "threads_per_rank": threads,
            "seconds_one_rank": one[mode]["seconds"], "seconds": several[mode]["seconds"],
            "speedup": speedup, "efficiency": speedup / ranks,
            "all_to_all_share": several[mode]["waiting"], "all_to_all_bytes": several[mode]["bytes"],
        }  # fmt: skip
        report.content.setdefault("ranks", []).append(row)
        print(
            f"  {mode:<12} {row['seconds_one_rank'] * 1e3:10.2f} {row['seconds'] * 1e3:11.2f} {speedup:7.2f}x "
            f"{speedup / ranks:9.0%} {row['all_to_all_share']:11.1%}",
            flush=True,
        )
    return report.save()


def _run(case: dict[str, Any], ranks: int, threads: int, rounds: int, device: str) -> dict[str, Any]:
    """Start a group of processes and return the measurements of rank 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        # At start-up, numba reads its number of threads from environment variables, which the processes inherit.
        kept = {key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
        os.environ.update(dict.fromkeys(kept, str(threads)))
        try:
            mp.spawn(_worker, (ranks, threads, rounds, device, port, case, str(result)), nprocs=ranks)
        finally:
            for key, value in kept.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})
        return dict(json.loads(result.read_text()))


def _worker(
    rank: int, ranks: int, threads: int, rounds: int, device_type: str, port: int, case: dict[str, Any], result: str
) -> None:
    from shodh_moe.parallel import ExpertParallel

    torch.set_num_threads(threads)
    keep_freed_memory()
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    tokens, width, hidden = case["tokens"] // ranks, case["width"], case["hidden"]
    found: dict[str, Any] = {}
    for mode, dropless in MODES.items():
        ep = ExpertParallel(ranks, rank, dist.group.WORLD)
        layer = our_layer(width, hidden, case["experts"], "linear", dropless, ep).to(device).train()
        x_ND, grad_ND = (torch.randn(tokens, width, device=device) for _ in range(2))
        x_ND.requires_grad_()

        def step(layer: Any = layer, x_ND: Any = x_ND, grad_ND: Any = grad_ND) -> None:
            y_ND, routing = layer(x_ND)
            torch.autograd.backward((y_ND, routing.balance_loss), (grad_ND, torch.tensor(0.01, device=x_ND.device)))
            dist.all_reduce(layer.router.projection.weight.grad)
            layer.zero_grad()

        seconds, waiting, sent = [], [], 0
        for number in range(rounds + 3):
            ep.exchanges = []
            dist.barrier()
            _synchronize(device)
            began = time.perf_counter()
            step()
            dist.barrier()
            _synchronize(device)
            if number >= 3:
                seconds.append(time.perf_counter() - began)
                waiting.append(sum(exchange.times_ms()[1] for exchange in ep.exchanges) / 1e3 / seconds[-1])
                sent = sum(exchange.sent_bytes for exchange in ep.exchanges)
        found[mode] = {"seconds": statistics.median(seconds), "waiting": statistics.median(waiting), "bytes": sent}
    if rank == 0:
        Path(result).write_text(json.dumps(found))
    dist.destroy_process_group()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
