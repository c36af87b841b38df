"""Find fast block sizes for the Triton kernels on this GPU and save them in kernels/tuned.json.

    python benchmarks/tune.py [--seconds 240] [--only gating dispatch] [--file kernels/tuned.json]
    python benchmarks/tune.py --rehearse     # in Triton's interpreter, tiny sizes; writes to --file only

Kernels get their sizes from `backend.settings` by name and size class. This script replaces that function, tries half
and twice the value of each setting, and keeps values that are faster and give the same results.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import shodh_moe.kernels as kernels
from shodh_moe.base.command import OneLineParser, exit_code
from shodh_moe.base.files import write_text
from shodh_moe.kernels import backend
from support.timing import Missing, Patience, first_line, release, time_alternately

GAIN = 0.97  # a new setting must take at most this share of the old one's time; smaller gains may be noise
LIMITS = {"num_warps": (1, 16), "num_stages": (1, 5)}
BLOCK_LIMIT = 2048

Settings = dict[str, int]
Key = tuple[str, str]  # kernel, size class
Workload = tuple[str, str, Callable[[], tuple[Tensor, ...]]]


class Tuner:
    """Replacement for `backend.settings` that records the requests."""

    def __init__(self) -> None:
        self.defaults: dict[Key, Settings] = {}
        self.chosen: dict[Key, Settings] = {}
        self.asked: set[Key] = set()

    def settings(self, kernel: str, size_class: str, default: Settings, device: torch.device) -> Settings:
        key = (kernel, size_class)
        self.asked.add(key)
        self.defaults.setdefault(key, dict(default))
        return default | self.chosen.get(key, {})

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Within the block, replace the function in every module that launches kernels."""
        names = [found.name for found in pkgutil.iter_modules(kernels.__path__) if found.name.endswith("_triton")]
        modules = [importlib.import_module(f"shodh_moe.kernels.{name}") for name in names]
        modules = [module for module in modules if hasattr(module, "settings")]
        try:
            for module in modules:
                module.settings = self.settings  # type: ignore[attr-defined]
            yield
        finally:
            for module in modules:
                module.settings = backend.settings  # type: ignore[attr-defined]

    def with_settings(self, key: Key, settings: Settings, work: Callable[[], Any]) -> Callable[[Any], Any]:
        def call(_: Any) -> Any:
            before = self.chosen.get(key)
            self.chosen[key] = settings
            try:
                return work()
            finally:
                self.chosen.pop(key) if before is None else self.chosen.update({key: before})

        return call


def neighbours(name: str, value: int) -> list[int]:
    """Values to try instead of ``value``."""
    low, high = LIMITS.get(name, (1, BLOCK_LIMIT))
    tried = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
    return [number for number in tried if low <= number <= high]


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    """Whether integers are equal and floating-point numbers differ at most by the order of their sums."""
    for x, y in zip(a, b, strict=True):
        if not x.dtype.is_floating_point:
            if not torch.equal(x, y):
                return False
            continue
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-4}.get(x.dtype, 1e-2)
        # The error is relative to the whole tensor, because single numbers near zero may have any relative error.
        if not (x.double() - y.double()).norm() <= tolerance * y.double().norm():
            return False
    return True


def tune_key(
    tuner: Tuner, key: Key, work: Callable[[], Any], device: torch.device, patience: Patience, late: Any
) -> str:
    """Improve one kernel's settings in one size class by changing one setting at a time."""
    best = dict(tuner.defaults[key])
    expected = work()
    refused = 0
    improved = True
    while improved and not late():
        improved = False
        for name in tuner.defaults[key]:
            for value in neighbours(name, best[name]):
                if late():
                    break
                candidate = best | {name: value}
                calls: dict[str, Any] = {
                    "best": tuner.with_settings(key, best, work),
                    "candidate": tuner.with_settings(key, candidate, work),
                }
                try:
                    if not same(calls["candidate"](None), expected):
                        refused += 1
                        continue
                except Exception as error:  # too many registers, too much shared memory, sizes the kernel cannot take
                    print(f"    {name}={value}: {first_line(error)}")
                    refused += 1
                    continue
                times = time_alternately(calls, [None], device, patience, lambda name: name == "best")
                ours, theirs = times["best"], times["candidate"]
                if isinstance(ours, Missing) or isinstance(theirs, Missing):
                    continue
                if theirs.median < GAIN * ours.median:
                    best, improved = candidate, True
                    print(f"    {name}={value}: {ours.median * 1e6:.1f} -> {theirs.median * 1e6:.1f} us", flush=True)
                    break
    if best != tuner.defaults[key]:
        tuner.chosen[key] = best
    return f"{best} (default {tuner.defaults[key]}, {refused} refused)"


def workloads(device: torch.device, quick: bool) -> Iterator[Workload]:
    """Yield (operation, name, work) for the operations to tune, forward and backward. Results must not change."""
    yield from gating_workloads(device, quick)
    yield from dispatch_workloads(device, quick)
    yield from curl_workloads(device, quick)


def _gradients(outputs: tuple[Tensor, ...], leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Outputs, and gradients for fixed incoming gradients."""
    floating = tuple(out for out in outputs if out.requires_grad)
    grads = tuple(
        torch.linspace(-1, 1, out.numel(), device=out.device).to(out.dtype).view(out.shape) for out in floating
    )
    return tuple(out.detach() for out in outputs) + torch.autograd.grad(floating, leaves, grads)


def gating_workloads(device: torch.device, quick: bool) -> Iterator[Workload]:
    tokens, width = (64, 32) if quick else (65_536, 1024)
    for experts in (4,) if quick else (2, 4, 8, 16, 32, 64, 128, 256):
        for order in ("probability",) if quick else ("position", "probability"):
            logits_NE = torch.randn(tokens, experts, device=device).requires_grad_()
            capacity = kernels.expert_capacity(tokens, experts, 1.25, 1)

            def gate(logits_NE: Tensor = logits_NE, capacity: int = capacity, order: str = order) -> tuple[Tensor, ...]:
                g = kernels.topk_gating(logits_NE, capacity, order, None, False)
                return _gradients((g.slot_N, g.gate_N, g.balance_loss, g.z_loss), (logits_NE,))

            yield "gating", f"gating E={experts} {order}", gate
    for experts in (4,) if quick else (8, 64):
        x_ND = torch.randn(tokens, width, device=device)
        x_ND = x_ND if quick else x_ND.bfloat16()
        projection_RD, prototypes_ER = torch.randn(16, width, device=device), torch.randn(experts, 16, device=device)
        temperature = torch.full((1,), 0.1, device=device)
        capacity = kernels.expert_capacity(tokens, experts, 1.25, 1)

        def cosine(x: Tensor = x_ND, w: Tensor = projection_RD, p: Tensor = prototypes_ER, t: Tensor = temperature,
                   k: int = capacity) -> tuple[Tensor, ...]:  # fmt: skip
            # Compare only results that near ties cannot change: the last bits of scores depend on the order of sums.
            return (kernels.cosine_topk_gating(x, w, p, t, k, "position", None, False).gate_N,)

        yield "cosine_gating", f"cosine gating E={experts}", cosine


def dispatch_workloads(device: torch.device, quick: bool) -> Iterator[Workload]:
    tokens, experts = (64, 4) if quick else (65_536, 16)
    capacity = kernels.expert_capacity(tokens, experts, 1.25, 1)
    g = kernels.topk_gating(torch.randn(tokens, experts, device=device), capacity, "position", None, False)
    dtypes = (torch.float32,) if quick else (torch.bfloat16, torch.float32)
    for dtype in dtypes:
        for width in (32,) if quick else (1024, 512, 256, 128):
            x_ND = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
            gate_N = g.gate_N.detach().requires_grad_()

            def move(x_ND: Tensor = x_ND, gate_N: Tensor = gate_N) -> tuple[Tensor, ...]:
                rows_EKD = kernels.dispatch(x_ND, g.expert_N, g.slot_N, g.kept_E, capacity)
                y_ND = kernels.combine(rows_EKD, g.expert_N, g.slot_N, gate_N, g.kept_E)
                return _gradients((y_ND,), (x_ND, gate_N))

            yield "dispatch", f"dispatch and combine D={width} {str(dtype)[6:]}", move


def curl_workloads(device: torch.device, quick: bool) -> Iterator[Workload]:
    grids = (16,) if quick else (128, 64)
    dtypes = (torch.float32,) if quick else (torch.float32, torch.bfloat16, torch.float64)
    for operator in ("spectral", "central2"):
        for dtype in dtypes:
            for grid in grids:
                a_B3XYZ = torch.randn(1, 3, grid, grid, grid, device=device).to(dtype)

                def turn(a: Tensor = a_B3XYZ, operator: str = operator) -> tuple[Tensor, ...]:
                    return (kernels.curl(a, None, operator, 1.0),)

                yield "curl", f"curl {grid}^3 {operator} {str(dtype)[6:]}", turn


def tune(tuner: Tuner, options: argparse.Namespace, device: torch.device) -> None:
    began = time.monotonic()

    def late() -> bool:
        return time.monotonic() - began > options.seconds

    patience = Patience(0.0, 1, 1) if options.rehearse else Patience(0.05, 15, 100)
    finished: set[Key] = set()
    for operation, name, work in workloads(device, options.rehearse):
        if late() or (options.only and operation not in options.only):
            continue
        tuner.asked.clear()
        work()
        for key in sorted(tuner.asked - finished):
            if late():
                break
            print(f"{key[0]} {key[1]} ({name})", flush=True)
            print("  " + tune_key(tuner, key, work, device, patience, late), flush=True)
            finished.add(key)
        release(device)
    if late():
        print(f"stopped after {options.seconds:g} s; {len(finished)} kernels and size classes tried")


def keep(file: Path, device: torch.device, chosen: dict[Key, Settings]) -> None:
    """Merge the new settings into the table; entries of other devices and kernels are kept."""
    table = json.loads(file.read_text()) if file.exists() else {}
    entries = table.setdefault(backend._device_name(device), {})
    for (kernel, size_class), settings in sorted(chosen.items()):
        entries.setdefault(kernel, {})[size_class] = settings
    write_text(file, json.dumps(table, indent=1, sort_keys=True) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=240.0, help="stop trying after this long")
    parser.add_argument("--only", nargs="+", choices=("gating", "cosine_gating", "dispatch", "curl"))
    parser.add_argument("--file", type=Path, help="default: kernels/tuned.json")
    parser.add_argument("--rehearse", action="store_true", help="run tiny sizes on the CPU, in Triton's interpreter")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("this torch finds no CUDA device; --rehearse runs in Triton's interpreter")
    # Set before Triton is imported, which then decides whether kernels are compiled or interpreted.
    os.environ["SHODH_KERNELS"] = "triton"
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    device = torch.device("cpu" if options.rehearse else "cuda")
    file = options.file or (None if options.rehearse else backend.TUNED)

    def work() -> None:
        torch.manual_seed(0)
        tuner = Tuner()
        with tuner.installed():
            try:
                tune(tuner, options, device)
            finally:
                # Settings found before an interruption or error are still valid.
                if file and tuner.chosen:
                    keep(file, device, tuner.chosen)
        print(f"{len(tuner.chosen)} entries differ from the defaults" + (f", written to {file}" if file else ""))

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
