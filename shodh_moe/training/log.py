"""Write ``metrics.jsonl`` and TensorBoard events on rank 0 (docs/telemetry.md)."""

from __future__ import annotations

import json
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import image as image_summary

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import finite_json, write_text
from shodh_moe.training.event_file import EventFile, append
from shodh_moe.training.records import METRICS, Record, read_run

COLUMNS = 256  # maximum width of a load map
RECORDS_PER_MAP = 20  # maps are drawn after this many routing records, and at the end
MOST_EXPERTS = 16  # up to this many get a scalar each; for more, only the smallest and the largest value are shown
MAP_HEIGHT = 128  # minimum height of a map in pixels
# Map colours at no load, at an even share 1 / E, and at a much larger load.
STARVED, EVEN, BUSY = (33, 102, 172), (247, 247, 247), (178, 24, 43)


class LoadMaps:
    """Load of the experts over time: one experts-by-time map per layer and domain.

    As soon as a map has `COLUMNS` columns, neighbours are averaged, so that each column covers twice as many records.

    Attributes:
        columns: loads [layers, domains, experts], oldest first.
        domains: names of the domains.
    """

    def __init__(self) -> None:
        self.columns: list[np.ndarray] = []
        self.domains: list[str] = []
        self._records_per_column = 1
        self._waiting: list[np.ndarray] = []

    def add(self, layers: list[dict[str, Any]]) -> None:
        """Add one routing record: a dict with ``load`` by domain for each layer."""
        self.domains = list(layers[0]["load"])
        self._waiting.append(np.array([list(layer["load"].values()) for layer in layers]))
        if len(self._waiting) < self._records_per_column:
            return
        self.columns.append(np.mean(self._waiting, axis=0))
        self._waiting = []
        if len(self.columns) == COLUMNS:
            pairs = np.stack(self.columns)
            self.columns = list((pairs[::2] + pairs[1::2]) / 2)
            self._records_per_column *= 2

    def images(self) -> dict[str, np.ndarray]:
        """Return RGB images, uint8 [height, width, 3], by ``layer_<number>/<domain>``.

        Expert 0 is at the top and time runs to the right. White is an even share, blue is less, red is more.
        """
        if not self.columns:
            return {}
        load_LDET = np.stack(self.columns, axis=-1)
        experts = load_LDET.shape[2]
        # 0 at no load, 1/2 at the even share, approaching 1 above it, for any number of experts.
        level = load_LDET * experts / (1 + load_LDET * experts)
        rgb = np.stack([np.interp(level, (0, 0.5, 1), ends) for ends in zip(STARVED, EVEN, BUSY, strict=True)], axis=-1)
        rgb = rgb.round().astype(np.uint8).repeat(max(MAP_HEIGHT // experts, 4), axis=2).repeat(2, axis=3)
        return {
            f"layer_{layer}/{domain}": rgb[layer, d]
            for layer in range(len(rgb))
            for d, domain in enumerate(self.domains)
        }


class Log:
    """Appends records to ``metrics.jsonl`` and scalars to TensorBoard. A context manager that closes itself.

    Args:
        step: the step that the run resumes from; later records are removed.

    Raises:
        UserError: here and at every write, if the disk is full or not writable. No file is left with half a record.
    """

    def __init__(self, folder: Path, step: int):
        self.path, self.closed = folder / METRICS, False
        kept = [record for record in read_run(folder) if record["step"] <= step] if step else []
        # Written as a whole: on a full disk the records of a resumed run must not be lost.
        write_text(self.path, "".join(map(_line, kept)))
        self._events = EventFile(folder / "tensorboard", purge_step=step + 1 if step else 0)
        self._maps, self._records, self._step = LoadMaps(), 0, step
        for record in kept:
            if record.get("routing"):
                self._maps.add(record["routing"])

    def write(self, record: dict[str, Any]) -> None:
        """Write one record with ``step`` and ``kind``.

        Its numbers become scalars ``<kind>/<key>``, its routing ``routing_.../layer_<number>...``. Numbers that are not
        finite become null, because JSON cannot represent them.
        """
        if self.closed:
            raise ValueError(f"the log {self.path} is closed")
        record = finite_json(record)
        append(self.path, _line(record).encode())
        kind, routing = record["kind"], record.get("routing") or []
        scalars: dict[str, float] = {}
        for key, value in record.items():
            if key not in ("kind", "step", "routing"):
                _flatten(f"{kind}/{key}", value, scalars)
        for layer in routing:
            _flatten_layer(layer, scalars)
        # One event for all scalars: one add_scalar call each would cost ten times as much.
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._events.add(Summary(value=values), record["step"])
        if routing:
            self._maps.add(routing)
            self._step, self._records = record["step"], self._records + 1
            if self._records % RECORDS_PER_MAP == 0:
                self._draw()

    def _draw(self) -> None:
        for name, image in self._maps.images().items():
            self._events.add(image_summary(f"routing_load_map/{name}", image, dataformats="HWC"), self._step)

    def close(self) -> None:
        """Draw the load maps a last time. `write` raises ValueError from then on."""
        if not self.closed:
            self.closed = True
            if self._records % RECORDS_PER_MAP:
                self._draw()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        # After an error, such as a full disk, a second one of the same kind must not hide it.
        with suppress(UserError) if error else nullcontext():
            self.close()


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _flatten(tag: str, value: Any, scalars: dict[str, float]) -> None:
    """Collect the numbers inside ``value``. A list has one entry per expert."""
    if isinstance(value, float):
        scalars[tag] = value
    elif isinstance(value, dict):
        for key, below in value.items():
            _flatten(f"{tag}/{key}", below, scalars)
    elif isinstance(value, list) and len(value) <= MOST_EXPERTS:
        for expert, below in enumerate(value):
            _flatten(f"{tag}/expert_{expert}", below, scalars)
    elif isinstance(value, list):
        known = [number for number in value if number is not None]
        _flatten(tag, {"smallest": min(known, default=None), "largest": max(known, default=None)}, scalars)


def _flatten_layer(record: dict[str, Any], scalars: dict[str, float]) -> None:
    for key, value in record.items():
        name = {"dropped_fraction": "dropped"}.get(key, key)
        _flatten(f"routing_{name}/layer_{record['layer']}", value, scalars)
