"""Compare the times of several implementations of one operation fairly.

After a warm-up they take turns, in a new order every round, so that noise affects all of them equally. Every call gets
the next of several input sets, which together exceed the last-level cache.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FORWARD, BOTH = "forward", "forward+backward"
# The GPU spins for this many cycles, about a millisecond, before each timed call. Launches queue up meanwhile, as they
# do in training, so gaps between them are not counted; this favours implementations that launch more kernels.
SPIN_CYCLES = 2_000_000
MOST_SETS = 128
MOST_SET_BYTES = 2**31


class Missing(NamedTuple):
    """Placeholder for an implementation that cannot run here."""

    reason: str


class Times(NamedTuple):
    """Seconds of one call: median, 20th and 80th percentile over ``rounds`` calls."""

    median: float
    p20: float
    p80: float
    rounds: int
    peak_memory: int | None  # bytes above what was allocated before the call; None on a CPU


class Patience(NamedTuple):
    """How long to measure one group of implementations: for ``seconds``, but ``fewest`` to ``most`` rounds."""

    seconds: float
    fewest: int
    most: int


Call = Callable[[Any], Any]


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [2**25]  # fallback if the system does not report it
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * unit)
    return max(sizes)


def rotating(make: Callable[[int], Any], set_bytes: int, device: torch.device) -> list[Any]:
    """Input sets from ``make(seed)``: enough to exceed twice the cache, within limits, and at least one."""
    needed = -(-2 * cache_bytes(device) // max(set_bytes, 1))
    fitting = max(MOST_SET_BYTES // max(set_bytes, 1), 1)
    return [make(seed) for seed in range(max(min(needed, MOST_SETS, fitting), 1))]


def release(device: torch.device) -> None:
    """Free the memory of the last case, compiled code included."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def seconds_of(call: Call, inputs: Any, device: torch.device) -> float:
    """Seconds of one call, by the host's clock on a CPU and by device events on a GPU."""
    if device.type != "cuda":
        began = time.perf_counter()
        call(inputs)
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SPIN_CYCLES)
    begin.record()
    call(inputs)
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000.0


def peak_memory(call: Call, inputs: Any, device: torch.device) -> int | None:
    """Peak device memory of a call in bytes, above what was held before it; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call(inputs)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def time_alternately(
    calls: dict[str, Call | Missing],
    sets: Sequence[Any],
    device: torch.device,
    patience: Patience,
    must_run: Callable[[str], bool] = lambda name: False,
) -> dict[str, Times | Missing]:
    """Times of each call, or the reason why it failed. Errors of a call whose name ``must_run`` accepts are raised."""
    found: dict[str, Times | Missing] = {name: call for name, call in calls.items() if isinstance(call, Missing)}
    ready: dict[str, Call] = {}
    peak: dict[str, int | None] = {}
    estimate = 0.0
    for name, call in calls.items():
        if isinstance(call, Missing):
            continue
        try:
            call(sets[0])  # compilation
            peak[name] = peak_memory(call, sets[-1], device)
            estimate += seconds_of(call, sets[len(sets) // 2], device)
            ready[name] = call
        except Exception as error:
            if must_run(name):
                raise
            found[name] = Missing(first_line(error))
    rounds = int(min(max(patience.seconds / max(estimate, 1e-9), patience.fewest), patience.most))
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    names, turn = list(ready), 0
    for number in range(rounds if names else 0):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(seconds_of(ready[name], sets[turn % len(sets)], device))
            turn += 1
    for name, values in seconds.items():
        found[name] = summary(values, peak[name])
    return {name: found[name] for name in calls}


def summary(seconds: list[float], peak_memory: int | None = None) -> Times:
    if len(seconds) == 1:
        return Times(seconds[0], seconds[0], seconds[0], 1, peak_memory)
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return Times(statistics.median(seconds), fifths[0], fifths[3], len(seconds), peak_memory)


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bandwidth of copying ``size`` bytes between tensors, in bytes per second, read plus written."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    for _ in range(2):
        target.copy_(source)
    times = [seconds_of(target.copy_, source, device) for _ in range(15)]
    return 2 * source.numel() * 4 / statistics.median(times)


def gemm_peak(device: torch.device, size: int, dtype: torch.dtype) -> float:
    """FLOP per second of a square matrix product."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(2):
        a @ b
    times = [seconds_of(lambda m: m @ b, a, device) for _ in range(7)]
    return 2 * size**3 / statistics.median(times)


def without_gradient(forward: Call) -> Call:
    def call(inputs: dict[str, Any]) -> Any:
        with torch.no_grad():
            return forward(inputs)

    return call


def with_backward(forward: Call) -> Call:
    """A call that runs ``forward``, which returns differentiable tensors, and backpropagates ``inputs["grads"]``.

    It returns the gradients of the inputs. If there are fewer outputs than incoming gradients, the rest are ignored.
    """

    def call(inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        leaves = [value for value in inputs.values() if isinstance(value, Tensor) and value.requires_grad]
        outputs = forward(inputs)
        return torch.autograd.grad(outputs, leaves, inputs["grads"][: len(outputs)])

    return call


def passes(calls: dict[str, Call | Missing]) -> list[tuple[str, dict[str, Call | Missing]]]:
    """(pass, calls) for the forward pass only, and for forward and backward together."""
    return [
        (name, {key: call if isinstance(call, Missing) else wrap(call) for key, call in calls.items()})
        for name, wrap in ((FORWARD, without_gradient), (BOTH, with_backward))
    ]
