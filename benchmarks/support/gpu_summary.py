"""Summarise the output of benchmarks/gpu.py's steps: counts, comparisons, the final table.

Run as a script, it prints the environment as JSON: python benchmarks/support/gpu_summary.py cpu|cuda
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MILLISECOND = 1e-3


def environment(device: str) -> dict[str, Any]:
    """Describe the machine, the versions and, on a GPU, its driver and memory."""
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, for `support`
    from support.common import machine

    found = machine(torch.device(device))
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {"memory_bytes": properties.total_memory, "multiprocessors": properties.multi_processor_count}
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            found["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip() or None
        except (OSError, subprocess.TimeoutExpired):
            found["driver"] = None
    return found


def count_tests(log: Path) -> dict[str, Any]:
    """Test counts by outcome from pytest's last line, and the names of failed tests."""
    text = log.read_text(errors="replace")
    last = text.strip().splitlines()[-1] if text.strip() else ""
    counts = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped|deselected)", last)
    }
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
    return counts | {"which_failed": failed[:50]}


def merge_benchmarks(out: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Results of every benchmark that has written a JSON file."""
    files = {name: out / f"{name}.json" for name in names}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def compare_losses(out: Path) -> dict[str, Any]:
    """Compare the losses of Triton's kernels with those of the reference over the first steps of two trainings."""
    found: dict[str, Any] = {}
    series: dict[str, list[float]] = {}
    for kernels in ("triton", "reference"):
        file = out / f"losses_{kernels}.json"
        if file.exists():
            series[kernels] = json.loads(file.read_text())["losses"]
    if len(series) == 2:
        found["small network"] = _difference(**series)
    series = {}
    for kernels in ("triton", "reference"):
        file = out / "quickstart" / "runs" / f"first_{kernels}" / "metrics.jsonl"
        if file.exists():
            records = [json.loads(line) for line in file.read_text().splitlines()]
            series[kernels] = [record["loss"] for record in records if record["kind"] == "train"]
    if len(series) == 2:
        found["quickstart"] = _difference(**series)
    return found


def _difference(triton: list[float], reference: list[float]) -> dict[str, Any]:
    relative = [abs(a - b) / max(abs(b), 1e-30) for a, b in zip(triton, reference, strict=False)]
    return {"triton": triton, "reference": reference, "largest_relative_difference": max(relative, default=None)}


def goals(benchmarks: dict[str, Any]) -> Iterator[tuple[str, float, str]]:
    """Yield (label, measured value, goal) for every performance goal."""
    for row in benchmarks.get("dispatch", {}).get("ratios", []):
        case, theirs = row["case"], row["time_over_ours"].get("deepspeed")
        if row["op"] == "gating+dispatch+combine" and theirs:
            label = f"gating+dispatch+combine E={case['experts']} {case['dtype']}, deepspeed's time over ours"
            yield label, theirs, ">= 5"
    for row in benchmarks.get("dispatch", {}).get("results", []):
        if row["op"] in ("dispatch", "combine") and row["implementation"] == "shodh":
            case = row["case"]
            kind = "dropless" if case["capacity"] == "dropless" else "capacity"
            shared = ", shared" if case.get("shared") else ""
            label = f"{row['op']} E={case['experts']} {case['dtype']} {kind}{shared} {case['pass']}, share of copy"
            yield label, row["share_of_copy"], ">= 0.75"
    curl = benchmarks.get("spectral_curl", {})
    for row in curl.get("ratios", []):
        case = row["case"]
        if _has_curl_goal(case) and "torch.fft" in row["time_over_ours"]:
            yield (
                f"curl {case['grid']}^3 {case['pass']}, torch.fft's time over ours",
                row["time_over_ours"]["torch.fft"],
                ">= 5",
            )
    for row in curl.get("results", []):
        case, extra = row["case"], row["extra"]
        if row["implementation"] == "shodh" and _has_curl_goal(case):
            yield (
                f"curl {case['grid']}^3 {case['pass']}, share of one read and one write",
                row["share_of_copy"],
                ">= 0.5",
            )
            if extra:
                yield f"curl {case['grid']}^3, relative error against FP64", extra["relative_error"], "<= 1e-6"
                yield f"curl {case['grid']}^3, FP64 h*rms(div)/rms(u)", extra["div_fp64"], "<= 1e-13"
    for row in benchmarks.get("lattice_boltzmann", {}).get("results", []):
        case, implementation = row["case"], row["implementation"]
        if implementation.startswith("shodh") and case["fluid"] == 1:
            threads = implementation.removeprefix("shodh")  # number of threads, on a CPU
            yield (
                f"lattice Boltzmann {case['grid']}^3 {case['variant']}{threads}, share of copy",
                row["share_of_copy"],
                ">= 0.6",
            )


def _has_curl_goal(case: dict[str, Any]) -> bool:
    return case["operator"] == "spectral" and case["dtype"] == "float32" and case["grid"] in (16, 128)


def meets(value: float, goal: str) -> bool:
    relation, number = goal.split()
    return value >= float(number) if relation == ">=" else value <= float(number)


def print_summary(content: dict[str, Any]) -> None:
    """Print the steps, then the measurements with their goals."""
    print(f"\n{content['device']}: {content['seconds']:.0f} s")
    for step in content["steps"]:
        counts = step["result"] if step["name"] == "tests" else {}
        words = ", ".join(f"{number} {word}" for word, number in counts.items() if word != "which_failed")
        print(f"  {step['name']:<24} {step['status']:<10} {step['seconds']:6.1f} s  {words} {step['reason']}".rstrip())
    if content["rehearsal"]:
        print("\nA rehearsal in tiny sizes on a CPU: the numbers below only show that they are collected.")
    print(f"\n{'measured':<84} {'value':>10}  goal")
    for label, value, goal in goals(content["benchmarks"]):
        verdict = "" if content["rehearsal"] else "reached" if meets(value, goal) else "NOT reached"
        print(f"{label:<84} {value:>10.3g}  {goal} {verdict}".rstrip())
    for label, found in content["losses"].items():
        worst = found["largest_relative_difference"]
        print(f"{'losses of ' + label + ', triton against reference, largest relative difference':<84} {worst:>10.3g}")


if __name__ == "__main__":
    print(json.dumps(environment(sys.argv[1])))
