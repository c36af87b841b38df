"""Compare a whole mixture-of-experts layer with DeepSpeed's and with a dense network of the same active size.

    python benchmarks/moe_layer.py [--device cpu|cuda] [--json FILE] [--cases 4096/128/4 8192/256/16] [--ranks 2]

After the times it prints each layer's peak memory and the share of its parts in the time of forward and backward:
moving tokens faster cannot reduce the time of the experts' products. ``--ranks 2`` also splits the layer over two
processes (`moe_ranks`).
All layers have the same SwiGLU experts, linear router, Top-1 routing and capacity factor, and no shared expert.
``products alone`` are the experts' products without a layer around them, for an even load: what routing cannot improve.
DeepSpeed 0.19's MOELayer always uses its sparse path (_sparse_encode, _sparse_decode) unless Tutel is requested.
Shapes: N tokens, D width, F hidden width (2 D), E experts.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor, nn

from support.common import DTYPES, OURS, Report, describe, run
from support.layer_profile import PARTS, peak_bytes, shares
from support.moe_layers import CAPACITY_FACTOR, deepspeed_layer, expert_products, feed_forward, our_layer
from support.moe_ranks import bench_ranks
from support.timing import BOTH, Missing, Times, release, rotating, with_backward


def layer_flops(tokens: int, width: int, hidden: int, experts: int) -> int:
    """FLOP per token: 3 products of D x F in its expert and D x E in the router, 2 FLOP each; backward twice that.

    Padding of empty slots does not count.
    """
    return 3 * 2 * tokens * (3 * width * hidden + width * experts)


def layer_bytes(tokens: int, width: int, hidden: int, experts: int, itemsize: int) -> int:
    """Minimal bytes: x, the output and their gradients once; weights, read twice, and their gradients, written once."""
    return itemsize * (4 * tokens * width + 3 * experts * 3 * width * hidden)


def check_same(report: Report, width: int, hidden: int, experts: int) -> None:
    """Check that DeepSpeed's layer and ours give the same output with the same weights and room for every token."""
    ours = our_layer(width, hidden, experts, "linear")
    theirs = deepspeed_layer(width, hidden, experts, float(experts), False, report.device)
    if isinstance(ours, Missing) or isinstance(theirs, Missing):
        return
    ours.config = ours.config.model_copy(update={"capacity_factor": float(experts)})
    with torch.no_grad():
        theirs.deepspeed_moe.gate.wg.weight.copy_(ours.router.projection.weight)
        for local, expert in enumerate(theirs.deepspeed_moe.experts.deepspeed_experts):
            expert.gate_up.weight.copy_(ours.experts.gate_up_LDF[local].T)
            expert.down.weight.copy_(ours.experts.down_LFD[local].T)
        ours, theirs = ours.to(report.device), theirs.to(report.device)
        x_ND = torch.randn(64, width, device=report.device)
        y_ND, routing = ours(x_ND)
        their_y_ND, l_aux, _ = theirs(x_ND)
    close = torch.allclose(y_ND, their_y_ND, rtol=1e-3, atol=1e-4) and torch.allclose(l_aux, routing.balance_loss)
    worst = float((y_ND - their_y_ND).abs().max())
    report.check("moe_layer", {"width": width, "experts": experts}, "deepspeed gives the same", close, f"{worst:.2e}")


def bench_layer(report: Report, tokens: int, width: int, experts: int, dtype: torch.dtype) -> None:
    device, hidden = report.device, 2 * width
    check_same(report, width, hidden, experts)
    case = {"tokens": tokens, "width": width, "hidden": hidden, "experts": experts, "dtype": str(dtype)[6:]}
    modules: dict[str, Any] = {
        OURS: our_layer(width, hidden, experts, "linear"),
        "shodh, cosine router": our_layer(width, hidden, experts, "cosine"),
        "shodh, dropless": our_layer(width, hidden, experts, "linear", dropless=True),
        "deepspeed": deepspeed_layer(width, hidden, experts, CAPACITY_FACTOR, False, device),
        "deepspeed, random token selection": deepspeed_layer(width, hidden, experts, CAPACITY_FACTOR, True, device),
        "dense, active size": feed_forward(width, hidden),
    }
    calls: dict[str, Any] = {}
    parameters: dict[str, list[Tensor]] = {}
    for name, module in modules.items():
        if isinstance(module, Missing):
            calls[name] = module
            continue
        module = module.to(device, dtype).train()
        parameters[name] = list(module.parameters())
        calls[name] = _call(name, module, parameters[name])
    rows = -(-tokens // experts)
    for batched, name in ((False, "products alone"), (True, "products alone, batched")):
        calls[name] = expert_products(width, hidden, experts, rows, batched, device, dtype)

    def make(seed: int) -> dict[str, Any]:
        x_ND, grad_ND = (torch.randn(tokens, width, device=device).to(dtype) for _ in range(2))
        return {"x": x_ND.requires_grad_(), "grads": (grad_ND, torch.tensor(0.01, device=device))}

    def rate(name: str, times: Times) -> dict[str, float]:
        return {"tokens_per_s": tokens / times.median}

    sets = rotating(make, 2 * tokens * width * dtype.itemsize, device)
    bytes_ = layer_bytes(tokens, width, hidden, experts, dtype.itemsize)
    flops = layer_flops(tokens, width, hidden, experts)
    report.measure("moe_layer", case | {"pass": BOTH}, calls, sets, bytes_, flops, rate)
    explain(report, case, calls, sets[0])
    release(device)


def explain(report: Report, case: dict[str, Any], calls: dict[str, Any], inputs: dict[str, Any]) -> None:
    """Print peak memory and time shares of every layer that runs here; record them under ``profiles`` in the JSON."""
    shape = {key: case[key] for key in ("width", "hidden", "experts")}
    print(f"\nmoe_layer  {describe(case)}  peak memory and share of the time of {BOTH}")
    print(f"  {'implementation':<36} {'peak MB':>9} " + " ".join(f"{part:>18}" for part in PARTS))
    for name, call in calls.items():
        if isinstance(call, Missing):
            continue
        peak, parts = peak_bytes(call, inputs, report.device), shares(call, inputs, report.device, **shape)
        print(f"  {name:<36} {peak / 1e6:9.1f} " + " ".join(f"{parts[part]:18.1%}" for part in PARTS), flush=True)
        row = {"implementation": name, "case": case, "peak_memory_bytes": peak, "shares": parts}
        report.content.setdefault("profiles", []).append(row)
    report.save()


def _call(name: str, module: nn.Module, parameters: list[Tensor]) -> Any:
    """A call that runs forward, and backward to x and all parameters, with the balance loss of layers that have one."""

    def forward(i: dict[str, Any]) -> tuple[Tensor, ...]:
        if name.startswith(OURS):
            y_ND, routing = module(i["x"])
            return y_ND, routing.balance_loss
        if name.startswith("deepspeed"):
            return module(i["x"])[:2]
        return (module(i["x"]),)

    both = with_backward(forward)
    weights = {f"parameter {number}": one for number, one in enumerate(parameters)}
    return lambda i: both(i | weights)


def case_of(text: str) -> tuple[int, int, int]:
    """Parse ``4096/128/4`` (argparse type)."""
    parts = text.split("/")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not tokens/width/experts like 4096/128/4")
    return int(parts[0]), int(parts[1]), int(parts[2])


def work(report: Report) -> None:
    options, cuda = report.options, report.device.type == "cuda"
    cases = [(4096, 128, 4), (4096, 256, 8), (8192, 256, 16)] + ([(65_536, 1024, 16)] if cuda else [])
    for tokens, width, experts in options.cases or ([(64, 16, 4)] if options.quick else cases):
        for dtype in options.dtypes or (["float32", "bfloat16"] if cuda else ["float32"]):
            if not report.out_of_time(
                "moe_layer", {"tokens": tokens, "width": width, "experts": experts, "dtype": dtype}
            ):
                bench_layer(report, tokens, width, experts, DTYPES[dtype])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if options.ranks > 1:
        for tokens, width, experts in options.cases or ([(64, 16, 4)] if options.quick else cases):
            bench_ranks(report, tokens, width, experts, options.ranks)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cases", type=case_of, nargs="+", metavar="TOKENS/WIDTH/EXPERTS", help="default: three cases, four on cuda"
    )
    parser.add_argument("--ranks", type=int, default=1, help="also run on this many ranks with the same global batch")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16"), help="default: float32 on cpu; both on cuda"
    )


def main(arguments: list[str] | None = None) -> int:
    return run("moe_layer", (__doc__ or "").splitlines()[0], work, arguments, add_arguments)


if __name__ == "__main__":
    sys.exit(main())
