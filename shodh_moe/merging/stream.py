"""Stream slices of all inputs: read ahead, combine, and write behind, in a fixed amount of memory.

Each input has a thread that reads and hashes, each output has threads that write and hash; the caller computes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.merging.config import Target
from shodh_moe.merging.drift import Drift
from shodh_moe.merging.inputs import Stored
from shodh_moe.merging.layout import REAL, output_dtype
from shodh_moe.merging.methods import recipe
from shodh_moe.merging.output import Output
from shodh_moe.merging.reading import InputReader
from shodh_moe.merging.recipe import BLOCK, Recipe, TensorMerge
from shodh_moe.merging.settings import Lookup

AHEAD, BEHIND = 3, 2  # slices in memory per input, and per output
LARGEST_SLICE = 1 << 20  # real numbers; longer slices do not fit into caches and are not faster


@dataclass
class MergeJob:
    """One output of a stream."""

    target: Target
    output: Output
    lookup: Lookup


def recipe_for(target: Target, lookup: Lookup, name: str, stored: Stored) -> Recipe:
    """Return a target's recipe for a tensor of real or complex numbers.

    Raises:
        UserError: a parameter has no value, or an invalid one, for this tensor.
    """
    real = REAL.get(stored.dtype, stored.dtype)
    return recipe(
        TensorMerge(
            method=target.method,
            lookup=lookup,
            name=name,
            shape=stored.shape,
            parts=stored.dtype.itemsize // real.itemsize,
            models=len(target.models),
            base=target.base is not None,
            dtype=computed_dtype(real),
            composition=target.composition,
        )
    )


def computed_dtype(real: torch.dtype) -> torch.dtype:
    """Dtype in which a tensor of real numbers of dtype ``real`` is merged."""
    return torch.float64 if real == torch.float64 else torch.float32


class Work:
    """One tensor in the stream, and the recipe of each output for it.

    Attributes:
        real: dtype of its real numbers; for a complex tensor that of its real and imaginary parts.
        numel: number of its real numbers.
        exact: whether it holds integers or booleans, which are copied and not merged.
        computed: dtype in which it is merged.
        passes: number of passes before the one that computes the results.
        drifts: distances between the base and the models, by the inputs' paths.
        written: dtype of the real numbers in each output.
        unequal: for each output, the inputs whose values differ from the copied ones.
        not_finite: the slices, by their first number, in which an input has NaN or infinity.
        kept: for each output, the number of such values that are copied.
    """

    def __init__(self, name: str, stored: Stored, jobs: list[MergeJob]):
        self.name, self.stored, self.jobs = name, stored, jobs
        self.real = REAL.get(stored.dtype, stored.dtype)
        self.numel = stored.nbytes // self.real.itemsize
        self.exact = not self.real.is_floating_point
        self.computed = computed_dtype(self.real)
        self.recipes = [] if self.exact else [recipe_for(job.target, job.lookup, name, stored) for job in jobs]
        self.passes = max((one.passes for one in self.recipes), default=0)
        self.drifts: dict[tuple[str, ...], Drift] = {}
        self.written = [self._written(job) for job in jobs]
        self.unequal: list[set[str]] = [set() for _ in jobs]
        self.not_finite: set[int] = set()
        self.kept = [0 for _ in jobs]

    def _written(self, job: MergeJob) -> torch.dtype:
        dtype = output_dtype(self.stored.dtype, job.target.config.out_dtype or job.target.config.dtype)
        return REAL.get(dtype, dtype)


class Step(NamedTuple):
    """One slice of one pass over a tensor."""

    work: Work
    number: int  # index of the pass; the last pass computes the result
    start: int  # first real number
    length: int


def slice_length(bytes_free: int, readers: list[InputReader], combined: list[int]) -> int:
    """Return the length of the longest slice, in real numbers, for which all buffers fit.

    Args:
        bytes_free: memory for buffers.
        readers: the inputs.
        combined: number of inputs of each output.

    Raises:
        UserError: the memory limit is too small for the shortest slice.
    """
    types = {stored.dtype for reader in readers for stored in reader.model.tensors.values()}
    stored = max(REAL.get(dtype, dtype).itemsize for dtype in types)
    computed = 8 if stored == 8 else 4
    inputs = len(readers) * (AHEAD * stored + computed)
    # Task vectors need a vector, a mask and a masked copy per model, and a few sums.
    bytes_each = inputs + len(combined) * BEHIND * 8 + (3 * max(combined) + 6) * computed + 24
    length = min(bytes_free // bytes_each, LARGEST_SLICE) // BLOCK * BLOCK
    if length < BLOCK:
        missing = math.ceil((BLOCK * bytes_each - bytes_free) / 2**20)
        raise UserError(f"the memory limit is {missing} MiB too small for {len(readers)} inputs: raise --memory-limit")
    return length


class Stream:
    """Makes the outputs of all jobs in one pass over the inputs."""

    def __init__(self, readers: dict[str, InputReader], jobs: list[MergeJob], length: int):
        self._readers, self._jobs, self._length = readers, jobs, length
        self._threads = {path: ThreadPoolExecutor(1) for path in readers}
        size = length * 8
        self._in = {path: [np.empty(size, np.uint8) for _ in range(AHEAD)] for path in readers}
        self._out = {id(job): [np.empty(size, np.uint8) for _ in range(BEHIND)] for job in jobs}
        self._writes: dict[int, deque[Future[None]]] = {id(job): deque() for job in jobs}

    def run(self, order: list[str], tensors: dict[str, Stored]) -> None:
        """Merge the tensors named in ``order``, in this order; ``tensors`` describes them."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # leave the other cores to hashing
        queue: deque[tuple[Step, dict[str, Future[Tensor]]]] = deque()
        try:
            for number, step in enumerate(self._steps(order, tensors)):
                paths = {path for job in step.work.jobs for path in job.target.paths}
                slot = number % AHEAD
                queue.append((step, {p: self._threads[p].submit(self._read, p, step, slot) for p in sorted(paths)}))
                if len(queue) == AHEAD:
                    self._process(*queue.popleft())
            while queue:
                self._process(*queue.popleft())
            for writes in self._writes.values():
                for one in writes:
                    one.result()
        finally:
            torch.set_num_threads(threads)
            for pool in self._threads.values():
                pool.shutdown(cancel_futures=True)

    def _steps(self, order: list[str], tensors: dict[str, Stored]) -> Iterator[Step]:
        for name in order:
            jobs = [job for job in self._jobs if not job.output.has(name)]
            if not jobs:
                continue
            work = Work(name, tensors[name], jobs)
            for number in range(work.passes + 1):
                for start in range(0, work.numel, self._length):
                    yield Step(work, number, start, min(self._length, work.numel - start))

    def _read(self, path: str, step: Step, slot: int) -> Tensor:
        """Read a slice in its stored dtype, 1-D."""
        work = step.work
        buffer = self._in[path][slot][: step.length * work.real.itemsize]
        parts = work.stored.dtype.itemsize // work.real.itemsize
        self._readers[path].read(work.name, step.start // parts, buffer.data)
        return torch.from_numpy(buffer).view(work.real)

    def _process(self, step: Step, reads: dict[str, Future[Tensor]]) -> None:
        work = step.work
        stored = {path: one.result() for path, one in reads.items()}
        if work.exact:
            self._copy(step, stored)
            return
        values = {path: one.to(work.computed) for path, one in stored.items()}
        masks = self._not_finite(step, values, stored)
        last = step.start + step.length == work.numel
        for job, made in zip(work.jobs, work.recipes, strict=True):
            if step.number < made.passes:
                made.observe(step.number, step.start, [values[path] for path in job.target.paths])
                if last:
                    made.end_pass(step.number)
        if step.number == work.passes:
            self._make(step, values, last, masks, stored)

    def _make(
        self, step: Step, values: dict[str, Tensor], last: bool, masks: dict[str, Tensor], stored: dict[str, Tensor]
    ) -> None:
        work = step.work
        for job in work.jobs:
            key = tuple(job.target.paths)
            if job.target.base and job.target.method != "slerp" and key not in work.drifts:
                work.drifts[key] = Drift()
        for key, drift in work.drifts.items():
            drift.add([values[path] for path in key])
        for number, (job, made, dtype) in enumerate(zip(work.jobs, work.recipes, work.written, strict=True)):
            result = made.result(step.start, [values[path] for path in job.target.paths])
            _require_fits(result, dtype, work.name, job.target)
            if (mask := masks.get(job.target.paths[0])) is not None:
                result = torch.where(mask, stored[job.target.paths[0]].to(dtype), result.to(dtype))
                work.kept[number] += int(mask.sum())
            if last and work.kept[number]:
                job.output.add_fact(work.name, {"not_finite": work.kept[number]})
            if last and (found := work.drifts.get(tuple(job.target.paths))):
                job.output.add_fact(work.name, {"drift": found.sums()})
            self._write(job, step, result, dtype)

    def _copy(self, step: Step, stored: dict[str, Tensor]) -> None:
        """Copy integers and booleans from the first input, as they cannot be averaged."""
        work = step.work
        for job, unequal in zip(work.jobs, work.unequal, strict=True):
            first, *others = job.target.paths
            unequal.update(path for path in others if not torch.equal(stored[path], stored[first]))
            if unequal and step.start + step.length == work.numel:
                job.output.add_fact(work.name, {"taken_from": first, "differs_in": sorted(unequal)})
            self._write(job, step, stored[first], work.real)

    def _write(self, job: MergeJob, step: Step, values: Tensor, dtype: torch.dtype) -> None:
        writes, buffers = self._writes[id(job)], self._out[id(job)]
        if len(writes) == BEHIND:
            writes.popleft().result()
        buffers.append(buffers.pop(0))  # the oldest one, whose write has ended
        buffer = buffers[-1][: step.length * dtype.itemsize]
        torch.from_numpy(buffer).view(dtype).copy_(values)
        writes.append(job.output.write(step.work.name, step.start * dtype.itemsize, buffer.data))

    def _not_finite(self, step: Step, values: dict[str, Tensor], stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replace NaN and infinity in a slice by 0 in ``values``, and return where they were, by input.

        Such values, as in a causal mask, are not merged but copied, so they must be the same in all models.

        Raises:
            UserError: they are not.
        """
        masks = {}
        if step.number == 0 or step.start in step.work.not_finite:
            for path, one in values.items():
                # A finite sum proves that all values are finite. If it overflows, check each value.
                if not math.isfinite(one.sum()) and not bool((finite := one.isfinite()).all()):
                    masks[path] = ~finite
        if not masks:
            return {}
        step.work.not_finite.add(step.start)
        for job in step.work.jobs:
            first, *others = paths = job.target.paths
            for path in others:
                if not _same_bits(stored[first], stored[path], masks.get(first), masks.get(path)):
                    self._refuse_not_finite(step, next(one for one in (path, *paths) if one in masks), masks)
        for path, mask in masks.items():
            values[path] = values[path].masked_fill(mask, 0)
        return masks

    def _refuse_not_finite(self, step: Step, path: str, masks: dict[str, Tensor]) -> None:
        work, model = step.work, self._readers[path].model
        parts = work.stored.dtype.itemsize // work.real.itemsize
        place = (step.start + int(masks[path].nonzero()[0])) // parts
        index = [int(i) for i in np.unravel_index(place, work.stored.shape)] if work.stored.shape else []
        raise UserError(
            f"{model.file_of(work.name)}: tensor {work.name} has NaN or infinity, first at {index}, unlike the other "
            "models: merge only finite weights"
        )


def _same_bits(a: Tensor, b: Tensor, mask_a: Tensor | None, mask_b: Tensor | None) -> bool:
    """Whether the same elements of two 1-D tensors are masked, and these have the same bits."""
    if mask_a is None or mask_b is None:
        return mask_a is mask_b
    return torch.equal(mask_a, mask_b) and torch.equal(a[mask_a].view(torch.uint8), b[mask_b].view(torch.uint8))


def _require_fits(values: Tensor, dtype: torch.dtype, name: str, target: Target) -> None:
    largest = torch.finfo(dtype).max
    low, high = values.aminmax()
    if not (-largest <= low and high <= largest):  # also true for NaN
        raise UserError(
            f"{target.output}: the merged tensor {name} is too large for {str(dtype).removeprefix('torch.')}: "
            "choose another dtype, or smaller coefficients"
        )
