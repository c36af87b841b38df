"""Top-1 gating against DeepSpeed, plain torch and torch.compile.

    python benchmarks/gating.py [--device cpu|cuda] [--json FILE] [--experts 8,64] [--tokens 65536]

Shapes: N tokens, D width, R routing width, E experts, K capacity slots per expert.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shodh_moe.kernels import Gating, cosine_topk_gating, expert_capacity, topk_gating
from shodh_moe.kernels.gating import DROP_ORDERS
from support.common import DTYPES, OURS, Report, run, sizes
from support.gating_cases import CAPACITY_FACTOR, checks_finite, gating_bytes, gating_flops, logits_of
from support.peers import DeepSpeed, compiled, deepspeed_call, torch_cosine_logits, torch_gating
from support.timing import FORWARD, passes, release, rotating

ROUTING_WIDTH = 16


def differentiable(g: Gating) -> tuple[Tensor, ...]:
    return g.gate_N, g.balance_loss, g.z_loss


def gradients(tokens: int, device: torch.device) -> tuple[Tensor, ...]:
    """Incoming gradients for the outputs of `differentiable`."""
    return torch.randn(tokens, device=device), torch.tensor(0.01, device=device), torch.tensor(1e-3, device=device)


def check_peers(report: Report, case: dict[str, Any], logits_NE: Tensor, capacity: int, drop_order: str) -> None:
    """Check that ours, plain torch and DeepSpeed choose the same experts, keep as many tokens, and agree on the losses.

    A few tokens may differ, because the peers' choice is arbitrary where rounding makes probabilities equal.
    """
    few = 4
    ours = topk_gating(logits_NE, capacity, drop_order)
    torchs = torch_gating(logits_NE, capacity, drop_order)
    same = torch.equal(ours.expert_N, torchs.expert_N) and torch.equal(ours.kept_E, torchs.kept_E)
    same &= int(((ours.slot_N >= 0) != (torchs.slot_N >= 0)).sum()) <= (few if drop_order == "probability" else 0)
    close = all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(differentiable(ours), torchs[:3], strict=True))
    report.check("gating", case, "plain torch gives the same routes, gates and losses", same and close)

    def theirs(ds: DeepSpeed, _: Any) -> bool:
        l_aux, their_capacity, _, indices, _, gates, counts = ds.gating(logits_NE, CAPACITY_FACTOR)
        kept = int((indices >= 0).sum())
        return (
            abs(int(their_capacity) - capacity) <= 1  # theirs is rounded in float32
            and int((counts - ours.routed_E).abs().sum()) <= few
            and abs(kept - int(ours.kept_E.sum())) <= few + logits_NE.shape[1] * (int(their_capacity) != capacity)
            and torch.allclose(l_aux, ours.balance_loss, rtol=1e-3)
            and int(gates.ne(0).sum()) == kept
        )

    call = deepspeed_call(theirs)
    if callable(call):
        report.check("gating", case, "deepspeed keeps as many tokens and has the same balance loss", bool(call(None)))


def bench_gating(report: Report, tokens: int, experts: int, drop_order: str, dtype: torch.dtype) -> None:
    device, options = report.device, report.options
    capacity = expert_capacity(tokens, experts, CAPACITY_FACTOR, 1)
    case = {"tokens": tokens, "experts": experts, "dtype": str(dtype)[6:], "drop_order": drop_order}
    check_peers(report, case, logits_of(tokens, experts, 0, device, torch.float32), capacity, drop_order)

    def make(seed: int) -> dict[str, Any]:
        logits_NE = logits_of(tokens, experts, seed, device, dtype).requires_grad_()
        return {"logits": logits_NE, "grads": gradients(tokens, device)}

    def ours(i: dict[str, Any], check_finite: bool) -> tuple[Tensor, ...]:
        return differentiable(topk_gating(i["logits"], capacity, drop_order, check_finite=check_finite))

    def theirs(ds: DeepSpeed, i: dict[str, Any]) -> tuple[Tensor, ...]:
        l_aux, *_, gates, _ = ds.gating(i["logits"], CAPACITY_FACTOR)
        return gates[0], l_aux

    textbook = compiled(torch_gating, options.no_compile or options.quick)
    calls: dict[str, Any] = {
        OURS: partial(ours, check_finite=checks_finite(device)),
        f"shodh, {'no ' if checks_finite(device) else ''}finite check": partial(
            ours, check_finite=not checks_finite(device)
        ),
        "deepspeed": deepspeed_call(theirs),
        "torch": lambda i: torch_gating(i["logits"], capacity, drop_order)[:3],
        "torch.compile": (lambda i: textbook(i["logits"], capacity, drop_order)[:3])
        if callable(textbook)
        else textbook,
    }
    sets = rotating(make, tokens * experts * dtype.itemsize, device)
    count = gating_bytes(tokens, experts, dtype.itemsize), gating_flops(tokens, experts)
    for name, timed in passes(calls):
        key = "forward" if name == FORWARD else "both"
        report.measure("gating", case | {"pass": name}, timed, sets, count[0][key], count[1][key])
    release(device)


def bench_cosine(report: Report, tokens: int, width: int, experts: int, dtype: torch.dtype) -> None:
    """Time cosine scores in the routing pass against projection, normalisation and topk_gating in sequence."""
    device, options = report.device, report.options
    capacity = expert_capacity(tokens, experts, CAPACITY_FACTOR, 1)
    case = {"tokens": tokens, "width": width, "experts": experts, "dtype": str(dtype)[6:]}

    def make(seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

        return {
            "x": random(tokens, width, dtype=dtype),
            "projection": random(ROUTING_WIDTH, width),
            "prototypes": random(experts, ROUTING_WIDTH),
            "temperature": torch.full((1,), 0.1, device=device, requires_grad=True),
            "grads": gradients(tokens, device),
        }

    keys, check = ("x", "projection", "prototypes", "temperature"), checks_finite(device)
    fused = partial(cosine_topk_gating, capacity=capacity, check_finite=check)

    def ours(i: dict[str, Any]) -> tuple[Tensor, ...]:
        return differentiable(fused(*(i[k] for k in keys)))

    def unfused(i: dict[str, Any]) -> tuple[Tensor, ...]:
        return differentiable(topk_gating(torch_cosine_logits(*(i[k] for k in keys)), capacity, check_finite=check))

    def plain(*arguments: Tensor) -> tuple[Tensor, ...]:
        return torch_gating(torch_cosine_logits(*arguments), capacity, "position")[:3]

    textbook = compiled(plain, options.no_compile or options.quick)
    calls: dict[str, Any] = {
        OURS: ours,
        "unfused, our gating": unfused,
        "torch": lambda i: plain(*(i[k] for k in keys)),
        "torch.compile": (lambda i: textbook(*(i[k] for k in keys))) if callable(textbook) else textbook,
    }
    sets = rotating(make, tokens * width * dtype.itemsize, device)
    # As for gating, but logits need not be in memory: the forward pass reads x instead; the backward pass reads x and
    # writes its gradient. FLOP: 2 N D R for the projection and 2 N R E for the scores; twice as many backward.
    x_bytes, scores = tokens * width * dtype.itemsize, 2 * tokens * ROUTING_WIDTH * (width + experts)
    bytes_ = {"forward": x_bytes + 24 * tokens, "both": 3 * x_bytes + 36 * tokens}
    flops = gating_flops(tokens, experts)
    flops = {"forward": flops["forward"] + scores, "both": flops["both"] + 3 * scores}
    for name, timed in passes(calls):
        key = "forward" if name == FORWARD else "both"
        report.measure("cosine_gating", case | {"pass": name}, timed, sets, bytes_[key], flops[key])
    release(device)


def work(report: Report) -> None:
    options = report.options
    tokens = options.tokens or (256 if options.quick else 65_536)
    width = 32 if options.quick else 1024
    experts = options.experts or ([4] if options.quick else [8, 16, 64, 256])
    dtype = DTYPES[options.dtype]
    for count in experts:
        for drop_order in DROP_ORDERS:
            if not report.out_of_time("gating", {"tokens": tokens, "experts": count, "drop_order": drop_order}):
                bench_gating(report, tokens, count, drop_order, dtype)
    for count in experts:
        if not report.out_of_time("cosine_gating", {"tokens": tokens, "experts": count}):
            bench_cosine(report, tokens, width, count, torch.bfloat16 if report.device.type == "cuda" else dtype)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, help="default: 65536")
    parser.add_argument("--experts", type=sizes, help="default: 8,16,64,256")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the logits")


def main(arguments: list[str] | None = None) -> int:
    return run("gating", (__doc__ or "").splitlines()[0], work, arguments, add_arguments)


if __name__ == "__main__":
    sys.exit(main())
