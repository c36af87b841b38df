"""Compare exchanges between the ranks of an expert-parallel group in one training step: samples, tokens, DeepSpeed's.

    python benchmarks/exchange.py [--json FILE] [--ranks 2 4] [--cases 256/2/4/128/8] [--rounds 5]

Every rank runs forward and backward passes of a whole latent transformer, without the reduction of gradients, which is
the same for all. CPU only, over gloo, one thread per rank. Variants:

    none         every rank holds all experts, and nothing is exchanged
    sample       `parallel.exchange: sample`, an even load of the experts
    sample, 3:1  the same, when three of four samples have experts on the first half of the ranks
    token        `parallel.exchange: token`, even load
    token, 3:1   the same, uneven load
    deepspeed    deepspeed.moe.layer.MoE in every block instead, capacity factor 1.25, with its own routers

Times are CPU seconds of a rank's process, gloo's threads included, since ranks may share a core with each other and
with other work. ``in_exchanges`` is the share of them between the start of an exchange and its return, and while a rank
waits for one; work of gloo's threads beside other work is left out. Wall times are recorded too; they mean something
only if every rank has a core of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from shodh_moe.base.command import OneLineParser, exit_code
from shodh_moe.base.files import require_writable, write_text
from shodh_moe.base.network import free_port
from support.common import machine

VARIANTS = ("none", "sample", "sample, 3:1", "token", "token, 3:1", "deepspeed")
HISTORY = 2
WARM_UP = 1


class Counter:
    """Counts calls, bytes to other ranks and time of every all-to-all in the block of `counting`."""

    def __init__(self) -> None:
        self.calls, self.bytes, self.cpu = 0, 0, 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        began = time.process_time()
        yield
        self.cpu += time.process_time() - began


class _Work:
    """A running exchange, whose wait is timed."""

    def __init__(self, work: Any, counter: Counter):
        self._work, self._counter = work, counter

    def wait(self) -> None:
        with self._counter.timed():
            self._work.wait()


@contextmanager
def counting() -> Iterator[Counter]:
    counter, call = Counter(), dist.all_to_all_single

    def counted(
        output: Tensor, input: Tensor, output_split_sizes: Any = None, input_split_sizes: Any = None, **options: Any
    ) -> Any:
        ranks, rank = dist.get_world_size(options.get("group")), dist.get_rank(options.get("group"))
        send = input_split_sizes
        rows = len(input) if send is None else sum(send)
        staying = rows // ranks if send is None else send[rank]
        counter.calls += 1
        counter.bytes += (rows - staying) * input.shape[1:].numel() * input.itemsize
        with counter.timed():
            work = call(output, input, output_split_sizes, input_split_sizes, **options)
        return _Work(work, counter) if work is not None else None

    dist.all_to_all_single = counted  # type: ignore[assignment]
    try:
        yield counter
    finally:
        dist.all_to_all_single = call


class _Engine:
    """What `training.forward` needs of an engine, without DeepSpeed's reduction of gradients."""

    def __init__(self, model: nn.Module, ep: Any, cp: Any):
        self.model, self.ep, self.cp = model, ep, cp

    def __call__(self, *inputs: Any) -> Any:
        return self.model(*inputs)


class _DeepSpeedBlock(nn.Module):
    """DeepSpeed's layer beside our shared experts, as a `FeedForwardBlock`."""

    def __init__(self, config: Any, dim: int, ranks: int):
        from deepspeed.moe.layer import MoE

        from shodh_moe.model.experts import FeedForward, shared_experts

        super().__init__()
        self.shared = shared_experts(dim, config)
        self.layer = MoE(
            dim, FeedForward(dim, config.expert_hidden), config.num_experts, ep_size=ranks, k=1, capacity_factor=1.25,
            min_capacity=4, use_rts=False,
        )  # fmt: skip
        self.layer.set_deepspeed_parallelism()

    def forward(self, x_ND: Tensor, context: Any, plan: Any) -> tuple[Tensor, None]:
        from shodh_moe.model.experts import sum_outputs

        return sum_outputs(self.shared, x_ND) + self.layer(x_ND)[0], None


def _batch(case: dict[str, int], rank: int, ranks: int, uneven: bool) -> Any:
    """Samples whose domain is the number of their expert. With an even load, every expert gets the same number."""
    from shodh_moe.base.boundaries import UNKNOWN_CODE
    from shodh_moe.tokenizer.latents import Batch

    samples, channels, grid = case["samples"], case["channels"], [case["grid"]] * 3
    generator = torch.Generator().manual_seed(rank)
    history, geometry, target = (
        torch.randn(samples, *more, channels, *grid, generator=generator) for more in ([HISTORY], [], [])
    )
    domain_B = (torch.arange(samples) + rank) % ranks
    if uneven:  # of four samples, three have an expert in the first half
        half = ranks // 2
        domain_B = domain_B % half + half * ((torch.arange(samples) + rank * samples) % 4 == 3)
    unknown_B32 = torch.full((samples, 3, 2), UNKNOWN_CODE)
    return Batch(history, geometry, target[:, None], domain_B, torch.ones_like(domain_B), unknown_B32)


def _config(case: dict[str, int], variant: str, ranks: int) -> Any:
    from shodh_moe.config import Config

    kind, _, _ = variant.partition(",")
    moe = {
        "num_experts": ranks,
        "scope": "layer" if kind == "deepspeed" else "path",
        "attention": "shared",
        "expert_hidden": 2 * case["dim"],
        "shared_experts": 1,
        "router": {"kind": "cosine" if kind == "deepspeed" else "oracle", "start": "random"},
    }
    model = {"dim": case["dim"], "depth": case["depth"], "heads": 4, "history": HISTORY, "norms": "pre", "moe": moe}
    exchange = kind if kind in ("sample", "token") else "auto"
    return Config.model_validate({"model": model, "training": {"loss": "mse"}, "parallel": {"exchange": exchange}})


def _measure(case: dict[str, int], variant: str, rank: int, ranks: int, rounds: int) -> dict[str, Any]:
    from shodh_moe.model import LatentTransformer
    from shodh_moe.parallel import ALONE, ExpertParallel
    from shodh_moe.training.forward import forward

    config = _config(case, variant, ranks)
    shares = ranks if variant.startswith(("sample", "token")) else 1
    ep = ExpertParallel(shares, rank % shares, dist.group.WORLD)
    model = LatentTransformer(config.model, case["channels"], 0, ep).train()
    if variant == "deepspeed":
        for block in model.blocks:
            block.moe = _DeepSpeedBlock(config.model.moe, case["dim"], ranks)
    engine: Any = _Engine(model, ep, ALONE)
    batch = _batch(case, rank, ranks, variant.endswith("3:1"))
    cpu, wall, within, computed = [], [], [], None
    for number in range(WARM_UP + rounds):
        with counting() as counter:
            dist.barrier()
            began, began_cpu = time.perf_counter(), time.process_time()
            losses, _, exchange = forward(engine, batch, config)
            losses.loss.backward()
            spent, spent_cpu = time.perf_counter() - began, time.process_time() - began_cpu
        model.zero_grad()
        if number >= WARM_UP:
            cpu.append(spent_cpu)
            wall.append(spent)
            within.append(counter.cpu / spent_cpu)
        computed = exchange.computed_G if exchange else None
    median = statistics.median
    return {
        "cpu_seconds": median(cpu), "wall_seconds": median(wall), "in_exchanges": median(within),
        "bytes": counter.bytes, "exchanges": counter.calls, "samples_by_rank": computed,
    }  # fmt: skip


def _worker(rank: int, ranks: int, port: int, case: dict[str, int], rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), DS_ACCELERATOR="cpu", DEEPSPEED_LOG_LEVEL="error")
    from shodh_moe.training.process_group import init_distributed

    init_distributed()
    found = {variant: _measure(case, variant, rank, ranks, rounds) for variant in VARIANTS}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure(case: dict[str, int], ranks: int, rounds: int) -> list[dict[str, Any]]:
    """Measure all variants of one case; times and bytes are means over ranks."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (ranks, free_port(), case, rounds, folder), nprocs=ranks)
        by_rank = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
    rows = []
    for variant in VARIANTS:
        found = [one[variant] for one in by_rank]
        means = {key: statistics.mean(one[key] for one in found) for key in found[0] if key != "samples_by_rank"}
        row = {"case": case, "ranks": ranks, "variant": variant, **means}
        rows.append(row | {"samples_by_rank": found[0]["samples_by_rank"]})
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    case = ", ".join(f"{key} {value}" for key, value in rows[0]["case"].items())
    print(f"\n{case}: {rows[0]['ranks']} ranks")
    print(f"  {'variant':<14}{'CPU ms':>9}{'in exchanges':>14}{'kB':>10}{'exchanges':>11}{'wall ms':>9}  samples")
    for row in rows:
        print(
            f"  {row['variant']:<14}{row['cpu_seconds'] * 1e3:9.1f}{row['in_exchanges']:14.2%}"
            f"{row['bytes'] / 1e3:10.1f}{row['exchanges']:11.0f}{row['wall_seconds'] * 1e3:9.1f}"
            f"  {row['samples_by_rank'] or ''}",
            flush=True,
        )


def case_of(text: str) -> dict[str, int]:
    """Parse ``256/2/4/128/8`` (argparse type)."""
    parts = text.split("/")
    if len(parts) != 5 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not width/depth/grid/channels/samples like 256/2/4/128/8")
    return dict(zip(("dim", "depth", "grid", "channels", "samples"), map(int, parts), strict=True))


def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--cases",
        type=case_of,
        nargs="+",
        metavar="WIDTH/DEPTH/GRID/CHANNELS/SAMPLES",
        help="samples per rank, on GRID^3 latents; default: that of configs/quickstart.yaml, and a larger one",
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions, date and results here")
    parser.add_argument("--quick", action="store_true", help="use a tiny size, to test the script; times mean nothing")
    options = parser.parse_args(arguments)
    if min(options.ranks) < 2 or any(ranks % 2 for ranks in options.ranks) or options.rounds < 1:
        parser.error("--ranks must be even numbers, and --rounds at least 1")
    cases = options.cases or [case_of(text) for text in ("256/2/4/128/8", "256/4/8/16/2")]
    if options.quick:
        cases, options.ranks, options.rounds = [case_of("24/1/2/4/4")], options.ranks[:1], 1

    def job() -> None:
        if options.json:
            require_writable(options.json.absolute().parent)
        content = {"benchmark": "exchange", "quick": options.quick, "results": []}
        content["machine"] = machine(torch.device("cpu"))
        for case in cases:
            for ranks in options.ranks:
                rows = measure(case, ranks, options.rounds)
                report(rows)
                content["results"] += rows
                if options.json:
                    write_text(options.json, json.dumps(content, indent=1) + "\n")

    return exit_code(job)


if __name__ == "__main__":
    sys.exit(main())
