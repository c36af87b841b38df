"""Dispatch and combine, and gating + dispatch + combine together, against DeepSpeed, plain torch and torch.compile.

    python benchmarks/dispatch.py [--device cpu|cuda] [--json FILE] [--experts 8,64] [--tokens 65536] [--width 1024]

Shapes: N tokens, D width, E experts, K capacity slots per expert, R rows.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shodh_moe.kernels import combine, dispatch, expert_capacity
from support.common import DTYPES, OURS, Report, run, sizes
from support.dispatch_cases import (
    Case,
    movement_bytes,
    movement_flops,
    route,
    slots_of,
    together_deepspeed,
    together_inputs,
    together_ours,
    together_torch,
)
from support.gating_cases import CAPACITY_FACTOR, gating_bytes, gating_flops
from support.peers import (
    DeepSpeed,
    compiled,
    deepspeed,
    deepspeed_call,
    torch_combine,
    torch_combine_dropless,
    torch_dispatch,
    torch_dispatch_dropless,
)
from support.timing import BOTH, Missing, passes, release, rotating, with_backward


def check_peers(report: Report, case: Case) -> None:
    """Check on a smaller problem of the same kind that all implementations give the same rows and the same result."""
    small = case._replace(tokens=min(case.tokens, 512), width=min(case.width, 64), dtype=torch.float32)
    if case.capacity is not None:
        small = small._replace(capacity=expert_capacity(small.tokens, small.experts, CAPACITY_FACTOR, 1))
    g = route(small, 0, report.device)
    x_ND = torch.randn(small.tokens, small.width, device=report.device)
    rows = dispatch(x_ND, g.expert_N, g.slot_N, g.kept_E, small.capacity)
    y_ND = combine(rows, g.expert_N, g.slot_N, g.gate_N, g.kept_E)
    if small.capacity is None:
        theirs = torch_dispatch_dropless(x_ND, g.expert_N), torch_combine_dropless(rows, g.expert_N, g.gate_N)
    else:
        theirs = (
            torch_dispatch(x_ND, g.expert_N, g.slot_N, small.experts, small.capacity),
            torch_combine(rows, g.expert_N, g.slot_N, g.gate_N),
        )
    same = torch.equal(theirs[0], rows) and torch.allclose(theirs[1], y_ND, rtol=1e-5, atol=1e-6)
    report.check("dispatch, combine", small.record(), "plain torch gives the same", same)

    def deepspeed_same(ds: DeepSpeed, _: Any) -> bool:
        slots = slots_of(ds, small, g)
        rows_same = torch.equal(ds.encode(x_ND, slots, small.experts, small.capacity or 0), rows)
        decoded_ND = ds.decode(rows, slots, g.gate_N[None], small.tokens)
        return rows_same and torch.allclose(decoded_ND, y_ND, rtol=1e-5, atol=1e-6)

    call = deepspeed_call(deepspeed_same)
    if case.capacity is not None and callable(call):
        report.check("dispatch, combine", small.record(), "deepspeed gives the same", bool(call(None)))


def bench_dispatch(report: Report, case: Case) -> None:
    """Time `dispatch`: copy tokens into rows."""
    device, leave_out = report.device, report.options.no_compile or report.options.quick
    capacity = case.capacity

    def make(seed: int) -> dict[str, Any]:
        x_ND = torch.randn(case.tokens, case.width, device=device).to(case.dtype).requires_grad_()
        grad = torch.randn(case.rows_shape(), device=device).to(case.dtype)
        return {"x": x_ND, "g": route(case, seed, device), "grads": (grad,)}

    def ours(i: dict[str, Any]) -> tuple[Tensor, ...]:
        g = i["g"]
        return (dispatch(i["x"], g.expert_N, g.slot_N, g.kept_E, capacity),)

    def plain(i: dict[str, Any], form: Any) -> tuple[Tensor, ...]:
        return (form(i["x"], i["g"].expert_N, *(() if capacity is None else (i["g"].slot_N, case.experts, capacity))),)

    def theirs(ds: DeepSpeed, i: dict[str, Any]) -> tuple[Tensor, ...]:
        return (ds.encode(i["x"], slots_of(ds, case, i["g"]), case.experts, capacity or 0),)

    textbook = torch_dispatch_dropless if capacity is None else torch_dispatch
    _measure(report, case, "dispatch", make, ours, plain, theirs, textbook, compiled(textbook, leave_out), False)


def bench_combine(report: Report, case: Case, shared: bool) -> None:
    """Time `combine`: scale rows and copy them back to tokens, with or without the shared experts' output."""
    device, leave_out = report.device, report.options.no_compile or report.options.quick
    capacity = case.capacity

    def make(seed: int) -> dict[str, Any]:
        g = route(case, seed, device)
        found = {
            "rows": torch.randn(case.rows_shape(), device=device).to(case.dtype).requires_grad_(),
            "gate": g.gate_N.detach().clone().requires_grad_(),
            "g": g,
            "grads": (torch.randn(case.tokens, case.width, device=device).to(case.dtype),),
        }
        if shared:
            found["shared"] = torch.randn(case.tokens, case.width, device=device).to(case.dtype).requires_grad_()
        return found

    def ours(i: dict[str, Any]) -> tuple[Tensor, ...]:
        g = i["g"]
        return (combine(i["rows"], g.expert_N, g.slot_N, i["gate"], g.kept_E, i.get("shared")),)

    def plain(i: dict[str, Any], form: Any) -> tuple[Tensor, ...]:
        if capacity is None:
            return (form(i["rows"], i["g"].expert_N, i["gate"]),)
        return (form(i["rows"], i["g"].expert_N, i["g"].slot_N, i["gate"], i.get("shared")),)

    def theirs(ds: DeepSpeed, i: dict[str, Any]) -> tuple[Tensor, ...]:
        # MOELayer reuses the slots of its dispatch, so their cost is counted there.
        y_ND = ds.decode(i["rows"], i["slots"], i["gate"][None], case.tokens)
        return (y_ND + i["shared"] if shared else y_ND,)

    textbook = torch_combine_dropless if capacity is None else torch_combine
    _measure(report, case, "combine", make, ours, plain, theirs, textbook, compiled(textbook, leave_out), shared)


def _measure(
    report: Report, case: Case, op: str, make: Any, ours: Any, plain: Any, theirs: Any, textbook: Any,
    fast_textbook: Any, shared: bool,
) -> None:  # fmt: skip
    calls = {OURS: ours}
    call = deepspeed_call(theirs)
    if case.capacity is not None:  # DeepSpeed's native layer has no dropless form
        calls["deepspeed"] = call
    calls["torch"] = partial(plain, form=textbook)
    calls["torch.compile"] = partial(plain, form=fast_textbook) if callable(fast_textbook) else fast_textbook
    sets = rotating(make, 2 * case.tokens * case.width * case.dtype.itemsize, report.device)
    if op == "combine":
        for one in sets:
            made = deepspeed_call(lambda ds, i: slots_of(ds, case, i["g"]))
            one["slots"] = made(one) if callable(made) and case.capacity is not None else None
    kept = int(sum(int(one["g"].kept_E.sum()) for one in sets) / len(sets))
    bytes_, flops = movement_bytes(case, kept, shared)[op], movement_flops(case, kept, shared)[op]
    record = case.record() | {"kept": kept} | ({"shared": shared} if op == "combine" else {})
    for name, timed in passes(calls):
        report.measure(op, record | {"pass": name}, timed, sets, bytes_[name], flops[name])
    del sets
    release(report.device)


def check_together(report: Report, case: Case) -> None:
    """Check that all give the same y, loss and gradients if no token is dropped, and that DeepSpeed keeps as many."""
    small = case._replace(tokens=min(case.tokens, 512), width=min(case.width, 64), dtype=torch.float32)
    small = small._replace(capacity=small.tokens)
    i = together_inputs(small, 0, report.device)

    def results(call: Any) -> tuple[Tensor, ...]:
        return *call(i), *with_backward(call)(i)

    def equal(theirs: tuple[Tensor, ...]) -> bool:
        return all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(ours, theirs, strict=True))

    ours = results(partial(together_ours, case=small))
    theirs = results(lambda i: together_torch(i["x"], i["logits"], small.tokens))
    report.check("gating+dispatch+combine", small.record(), "plain torch gives the same", equal(theirs))
    ds = deepspeed()
    if isinstance(ds, Missing):
        return
    theirs = results(lambda i: together_deepspeed(ds, i, small, float(small.experts)))
    report.check("gating+dispatch+combine", small.record(), "deepspeed gives the same", equal(theirs))
    tight = small._replace(capacity=expert_capacity(small.tokens, small.experts, CAPACITY_FACTOR, 1))
    kept = [
        int(y_ND.ne(0).any(dim=1).sum())
        for y_ND, _ in (together_ours(i, tight), together_deepspeed(ds, i, tight, CAPACITY_FACTOR))
    ]
    report.check("gating+dispatch+combine", tight.record(), "deepspeed keeps as many", kept[0] == kept[1], str(kept))


def bench_together(report: Report, case: Case) -> None:
    """Time gating, dispatch and combine without experts: the cost of routing in a layer, forward and backward."""
    check_together(report, case)
    textbook = compiled(together_torch, report.options.no_compile or report.options.quick)
    capacity = case.capacity or 0
    calls: dict[str, Any] = {
        OURS: partial(together_ours, case=case),
        "deepspeed": deepspeed_call(lambda ds, i: together_deepspeed(ds, i, case, CAPACITY_FACTOR)),
        "torch": lambda i: together_torch(i["x"], i["logits"], capacity),
        "torch.compile": (lambda i: textbook(i["x"], i["logits"], capacity)) if callable(textbook) else textbook,
    }
    sets = rotating(
        lambda seed: together_inputs(case, seed, report.device),
        2 * case.tokens * case.width * case.dtype.itemsize,
        report.device,
    )
    kept = int(route(case, 0, report.device).kept_E.sum())
    parts_bytes, parts_flops = movement_bytes(case, kept, False), movement_flops(case, kept, False)
    bytes_ = sum(part[BOTH] for part in parts_bytes.values()) + gating_bytes(case.tokens, case.experts, 4)["both"]
    flops = sum(part[BOTH] for part in parts_flops.values()) + gating_flops(case.tokens, case.experts)["both"]
    timed = {name: with_backward(call) if callable(call) else call for name, call in calls.items()}
    report.measure("gating+dispatch+combine", case.record() | {"kept": kept, "pass": BOTH}, timed, sets, bytes_, flops)
    del sets
    release(report.device)


def work(report: Report) -> None:
    options, cuda = report.options, report.device.type == "cuda"
    tokens = options.tokens or (256 if options.quick else 65_536)
    width = options.width or (32 if options.quick else 1024)
    experts = options.experts or ([4] if options.quick else [8, 16, 64])
    dtypes = [DTYPES[options.dtype]] if options.dtype else [torch.bfloat16, torch.float32] if cuda else [torch.float32]
    cases = [
        Case(tokens, width, count, dtype, expert_capacity(tokens, count, CAPACITY_FACTOR, 1))
        for dtype in dtypes
        for count in experts
    ]
    for case in cases:
        check_peers(report, case)
        if not report.out_of_time("gating+dispatch+combine", case.record()):
            bench_together(report, case)
    ends = [case for case in cases if case.experts in (experts[0], experts[-1])]
    for case in ends + [case._replace(capacity=None) for case in ends]:
        check_peers(report, case)
        if not report.out_of_time("dispatch", case.record()):
            bench_dispatch(report, case)
        for shared in (False, True) if case.capacity is not None else (False,):
            if not report.out_of_time("combine", case.record()):
                bench_combine(report, case, shared)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, help="default: 65536")
    parser.add_argument("--width", type=int, help="default: 1024")
    parser.add_argument("--experts", type=sizes, help="default: 8,16,64")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: float32 on cpu; bfloat16 and float32 on cuda")


def main(arguments: list[str] | None = None) -> int:
    return run("dispatch", (__doc__ or "").splitlines()[0], work, arguments, add_arguments)


if __name__ == "__main__":
    sys.exit(main())
