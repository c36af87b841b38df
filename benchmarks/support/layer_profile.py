"""Profile a mixture-of-experts layer with torch's profiler: the share of its parts in its time, and its peak memory.

Both cover what torch itself runs and allocates, in the same way for every implementation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from support.timing import Call, peak_memory

PARTS = ("experts' products", "activation", "gating", "dispatch, combine", "other")
_PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "_grouped_mm")
_GATING = ("gating", "softmax", "argmax", "topk", "sort", "one_hot", "cumsum", "bernoulli", "entr", "logsumexp")
_MOVING = ("dispatch", "combine", "index_select", "scatter", "gather", "einsum", "alltoall", "all_to_all")


def part_of(name: str, shapes: list[Any], width: int, hidden: int, experts: int) -> str:
    """The part of the layer that an operation belongs to, from its name and the shapes of its inputs.

    The router's products have an axis of size E; element-wise operations of width F or 2 F are between the experts'
    products; other operations of width D move tokens.
    """
    plain = name.rpartition("::")[2]
    sizes = [shape for shape in shapes if isinstance(shape, (list, tuple)) and shape]
    if plain in _PRODUCTS:
        router = any(experts in shape for shape in sizes if len(shape) == 2)
        return "gating" if router else "experts' products"
    if "SwiGLU" in name or "silu" in plain:
        return "activation"
    for words, part in ((_MOVING, "dispatch, combine"), (_GATING, "gating")):
        if any(word in name for word in words):
            return part
    last = {shape[-1] for shape in sizes if len(shape) >= 2}
    if last & {hidden, 2 * hidden}:
        return "activation"
    if experts in last:
        return "gating"
    return "dispatch, combine" if width in last else "other"


def shares(
    call: Call, inputs: Any, device: torch.device, width: int, hidden: int, experts: int, repeats: int = 3
) -> dict[str, float]:
    """Share of each part in the time of a call, over ``repeats`` calls; the shares add up to 1."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    call(inputs)
    with profile(activities=activities, record_shapes=True) as recorded:
        for _ in range(repeats):
            call(inputs)
    time = dict.fromkeys(PARTS, 0.0)
    for event in recorded.events() or []:
        if event.device_type != DeviceType.CPU:  # a kernel is counted with the operation that launched it
            continue
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        time[part_of(event.name, event.input_shapes or [], width, hidden, experts)] += spent
    total = sum(time.values()) or 1.0
    return {part: spent / total for part, spent in time.items()}


def peak_bytes(call: Call, inputs: Any, device: torch.device) -> int:
    """Peak memory of a call in bytes, above what was held before it."""
    call(inputs)
    if (on_device := peak_memory(call, inputs, device)) is not None:
        return on_device
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call(inputs)
    held = peak = 0
    steps = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for step in sorted(steps, key=lambda e: e.start_ns()):
        held += step.nbytes()
        peak = max(peak, held)
    return peak
