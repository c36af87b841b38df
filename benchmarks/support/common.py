"""Command line, result table and JSON file of the microbenchmarks.

A result's ``bytes`` and ``flops`` are the minimum that the operation needs, whatever the implementation. Its GB/s are
thus an effective bandwidth, which is lower for an implementation that moves more bytes than necessary.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from shodh_moe.base.command import OneLineParser, exit_code
from shodh_moe.base.environment import describe_environment
from shodh_moe.base.errors import UserError
from shodh_moe.base.files import require_writable, write_text
from shodh_moe.base.memory import keep_freed_memory
from support.timing import (
    Call,
    Missing,
    Patience,
    Times,
    cache_bytes,
    copy_bandwidth,
    gemm_peak,
    release,
    time_alternately,
)

OURS = "shodh"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass
class Result:
    """One implementation of one operation in one case."""

    op: str
    implementation: str
    case: dict[str, Any]
    seconds: float  # median
    seconds_p20: float
    seconds_p80: float
    rounds: int
    bytes: int
    flops: int
    gb_s: float  # 1e9 bytes per second
    share_of_copy: float  # gb_s over the copy bandwidth measured in this run
    gflop_s: float
    peak_memory_bytes: int | None
    extra: dict[str, Any] = field(default_factory=dict)  # errors, tokens per second


class Report:
    """Collect results. Prints them and rewrites the JSON file after every case, so that a killed run keeps them."""

    def __init__(self, benchmark: str, options: argparse.Namespace):
        self.options, self.device = options, options.device
        self.began = time.monotonic()
        self.content: dict[str, Any] = {
            "benchmark": benchmark,
            "device": self.device.type,
            "quick": options.quick,
            "machine": machine(self.device),
            "ceilings": ceilings(self.device, options.quick),
            "results": [],
            "not_available": [],
            "checks": [],
            "ratios": [],
        }
        ceiling, hardware = self.content["ceilings"], self.content["machine"]
        gemm = ", ".join(f"{name} {value:.0f}" for name, value in ceiling["gemm_gflop_s"].items())
        print(
            f"{benchmark} on {hardware['device_name']}, torch {hardware['packages']['torch']}, "
            f"{hardware['threads']} threads, load average {hardware['load_average']:.1f}"
        )
        print(f"copy bandwidth {ceiling['copy_gb_s']:.1f} GB/s (read + written), matrix product GFLOP/s: {gemm}")

    def out_of_time(self, op: str, case: dict[str, Any]) -> bool:
        """Whether ``--seconds`` have passed; if so, record the case as not measured."""
        over = self.options.seconds is not None and time.monotonic() - self.began > self.options.seconds
        if over:
            self.missing(op, "all", case, f"not measured: over --seconds {self.options.seconds:g}")
        return over

    def missing(self, op: str, implementation: str, case: dict[str, Any], reason: str) -> None:
        row = {"op": op, "implementation": implementation, "case": case, "reason": reason}
        self.content["not_available"].append(row)
        print(f"  {implementation:<24} not available: {reason}")
        self.save()

    def check(self, op: str, case: dict[str, Any], what: str, holds: bool, detail: str = "") -> None:
        """Record whether a peer computes the same. Raises RuntimeError if not: the times would not be comparable."""
        row = {"op": op, "case": case, "what": what, "holds": holds, "detail": detail}
        self.content["checks"].append(row)
        if not holds:
            raise RuntimeError(f"{op} {describe(case)}: {what} does not hold: {detail}")

    def measure(
        self,
        op: str,
        case: dict[str, Any],
        calls: dict[str, Call | Missing],
        sets: Sequence[Any],
        bytes_: int,
        flops: int,
        extra: Callable[[str, Times], dict[str, Any]] = lambda name, times: {},
    ) -> dict[str, Times | Missing]:
        """Time every implementation of this case and record the results."""
        found = time_alternately(calls, sets, self.device, self.options.patience, lambda n: n.startswith(OURS))
        print(f"\n{op}  {describe(case)}  {bytes_ / 1e6:.1f} MB  {flops / 1e6:.1f} MFLOP")
        print(
            f"  {'implementation':<24} {'median ms':>10} {'p20':>9} {'p80':>9} {'GB/s':>8} {'of copy':>8} "
            f"{'GFLOP/s':>9}"
        )
        for name, times in found.items():
            if isinstance(times, Missing):
                self.missing(op, name, case, times.reason)
                continue
            row = self._result(op, name, case, times, bytes_, flops, extra(name, times))
            self.content["results"].append(asdict(row))
            print(
                f"  {name:<24} {row.seconds * 1e3:10.3f} {row.seconds_p20 * 1e3:9.3f} {row.seconds_p80 * 1e3:9.3f} "
                f"{row.gb_s:8.2f} {row.share_of_copy:8.1%} {row.gflop_s:9.2f}"
                + "".join(f"  {key} {_short(value)}" for key, value in row.extra.items()),
                flush=True,
            )
        self._ratios(op, case, found)
        self.save()
        return found

    def _result(
        self, op: str, name: str, case: dict[str, Any], times: Times, bytes_: int, flops: int, extra: dict[str, Any]
    ) -> Result:
        gb_s = bytes_ / times.median / 1e9
        return Result(
            op=op,
            implementation=name,
            case=case,
            seconds=times.median,
            seconds_p20=times.p20,
            seconds_p80=times.p80,
            rounds=times.rounds,
            bytes=bytes_,
            flops=flops,
            gb_s=gb_s,
            share_of_copy=gb_s / self.content["ceilings"]["copy_gb_s"],
            gflop_s=flops / times.median / 1e9,
            peak_memory_bytes=times.peak_memory,
            extra=extra,
        )

    def _ratios(self, op: str, case: dict[str, Any], found: dict[str, Times | Missing]) -> None:
        ours = found.get(OURS)
        if not isinstance(ours, Times):
            return
        ratios = {
            name: times.median / ours.median
            for name, times in found.items()
            if isinstance(times, Times) and not name.startswith(OURS)
        }
        self.content["ratios"].append({"op": op, "case": case, "time_over_ours": ratios})
        if ratios:
            print("  time over ours: " + ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items()))

    def save(self) -> None:
        if self.options.json:
            write_text(self.options.json, json.dumps(self.content, indent=1) + "\n")


def describe(case: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in case.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine and software of a measurement."""
    found = describe_environment()
    cuda = device.type == "cuda"
    return found | {
        "device_name": torch.cuda.get_device_name(device) if cuda else f"{found['processor']}, {found['cores']} cores",
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if cuda else None,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # over the last minute; shows other work on the machine
        "last_level_cache_bytes": cache_bytes(device),
        "kernels": os.environ.get("SHODH_KERNELS", "auto"),
    }


def ceilings(device: torch.device, quick: bool) -> dict[str, Any]:
    """Measure the device's limits: copies in GB/s, matrix products in GFLOP/s by dtype (float32 without tf32)."""
    cuda = device.type == "cuda"
    size = 2**22 if quick else 2**31 if cuda else 2**28
    side = 128 if quick else 8192 if cuda else 2048
    dtypes = (torch.float32, torch.bfloat16) if cuda else (torch.float32,)
    found = {
        "copy_gb_s": copy_bandwidth(device, size) / 1e9,
        "gemm_gflop_s": {str(d).removeprefix("torch."): gemm_peak(device, side, d) / 1e9 for d in dtypes},
    }
    release(device)
    return found


def parse(
    description: str, arguments: list[str] | None, add: Callable[[argparse.ArgumentParser], None] = lambda parser: None
) -> argparse.Namespace:
    """Parse the arguments common to all scripts and those that ``add`` adds. Exits with 2 and one line on an error."""
    parser = OneLineParser(description=description)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if torch can use it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions, date and results here")
    parser.add_argument("--quick", action="store_true", help="use tiny sizes, to test the script; times mean nothing")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--threads", type=int, help="torch's threads on the CPU; default: torch's choice")
    parser.add_argument("--seconds", type=float, help="start no new case after this many seconds")
    add(parser)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch finds no CUDA device")
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads must be at least 1, not {options.threads}")
        torch.set_num_threads(options.threads)
    cuda = options.device == "cuda" or (options.device is None and torch.cuda.is_available())
    options.device = torch.device("cuda" if cuda else "cpu")
    # Measure longer on a CPU: in the first rounds, the process or a virtual machine's host still allocates memory.
    options.patience = (
        Patience(0.0, 2, 2) if options.quick else Patience(1.0, 10, 200) if cuda else Patience(3.0, 15, 50)
    )
    os.environ.setdefault("DS_ACCELERATOR", options.device.type)
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    return options


def run(
    benchmark: str, description: str, work: Callable[[Report], None], arguments: list[str] | None,
    add: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> int:  # fmt: skip
    """Run a benchmark script. Returns its exit code: 0 for success, 2 for wrong input, 1 for any other error."""
    options = parse(description, arguments, add)

    def job() -> None:
        if options.json:
            require_writable(options.json.absolute().parent)
            if options.json.is_dir():
                raise UserError(f"--json {options.json} is a folder")
        keep_freed_memory()
        report = Report(benchmark, options)
        work(report)
        report.save()

    return exit_code(job)


def sizes(text: str) -> list[int]:
    """Parse ``8,64`` into a list (argparse type)."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive integers like 8,64")
    return values
