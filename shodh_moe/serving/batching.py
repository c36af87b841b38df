"""Forecasts of several requests at a time, in a thread of their own.

Requests that wait and ask for the same number of steps are computed together: all have the model's grid. The thread
takes the request that waits longest, and those that fit to it.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.data.dataset import Fields
from shodh_moe.inference.model import Model
from shodh_moe.serving.limits import Limits, Refused


@dataclass
class Job:
    """One request that waits for its forecast.

    Attributes:
        fields: the flow, and ``given_H4XYZ`` and ``solid_1XYZ`` what `Model.checked` made of it.
        deadline: when it is given up, on the clock of `time.monotonic`.
        done: its forecast, or the exception that ended it.
    """

    fields: Fields
    given_H4XYZ: Tensor
    solid_1XYZ: Tensor
    steps: int
    deadline: float
    done: Future[Fields] = field(default_factory=Future)

    @property
    def given_up(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.done.cancelled() or time.monotonic() > self.deadline


class Batcher:
    """Computes forecasts one batch after another.

    Args:
        on_batch: called with the number of requests and of steps of each batch.
    """

    def __init__(self, model: Model, limits: Limits, on_batch: Callable[[int, int], None] = lambda size, steps: None):
        self.model, self.limits, self._on_batch = model, limits, on_batch
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._ends = False
        self._thread = threading.Thread(target=self._work, name="forecasts", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether forecasts are computed."""
        return self._thread.is_alive()

    def submit(self, fields: Fields, steps: int) -> Future[Fields]:
        """Let a flow be continued.

        Raises:
            UserError: the flow does not fit the model.
        """
        given_H4XYZ, solid_1XYZ = self.model.checked(fields, steps, self.model.strides[0])
        job = Job(fields, given_H4XYZ, solid_1XYZ, steps, time.monotonic() + self.limits.seconds)
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()
        return job.done

    def close(self) -> None:
        """End after the batch that is being computed."""
        with self._changed:
            self._ends = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while jobs := self._next():
            try:
                self._on_batch(len(jobs), jobs[0].steps)
                self._compute(jobs)
            except Exception as error:  # the service goes on with the next batch
                traceback.print_exc()
                for job in jobs:
                    _fail(job, error)

    def _next(self) -> list[Job]:
        """Wait for jobs and return those to compute together; [] at the end."""
        with self._changed:
            while not self._ends:
                for job in [one for one in self._waiting if one.given_up]:
                    self._waiting.remove(job)
                    _fail(job, _too_late(self.limits))
                if self._waiting:
                    steps = self._waiting[0].steps
                    jobs = [one for one in self._waiting if one.steps == steps][: self.limits.batch]
                    for job in jobs:
                        self._waiting.remove(job)
                    return jobs
                self._changed.wait()
        return []

    @torch.no_grad()
    def _compute(self, jobs: list[Job]) -> None:
        given_BH4XYZ = torch.stack([job.given_H4XYZ for job in jobs])
        solid_B1XYZ = torch.stack([job.solid_1XYZ for job in jobs])
        predicted: list[tuple[Tensor, Tensor]] = []
        for found in islice(self.model.continue_flows(given_BH4XYZ, solid_B1XYZ, self.model.strides[0]), jobs[0].steps):
            predicted.append(found)
            if all(job.given_up for job in jobs):
                break
        for number, job in enumerate(jobs):
            if len(predicted) < job.steps or job.given_up:
                _fail(job, _too_late(self.limits))
                continue
            own = [(exact_B4XYZ[number], conserved_B3XYZ[number]) for exact_B4XYZ, conserved_B3XYZ in predicted]
            try:
                forecast = self.model.collected(own, job.fields, job.solid_1XYZ, self.model.strides[0])
            except UserError as error:
                _fail(job, error)
            else:
                if job.done.set_running_or_notify_cancel():
                    job.done.set_result(forecast)


def _too_late(limits: Limits) -> Refused:
    return Refused(504, f"the forecast took longer than {limits.seconds:g} s: ask for fewer steps, or try again later")


def _fail(job: Job, error: Exception) -> None:
    if not job.done.done() and job.done.set_running_or_notify_cancel():
        job.done.set_exception(error)
