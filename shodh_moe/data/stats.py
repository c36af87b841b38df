"""Statistics of the training split, in the_well's stats.yaml."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import atomic_file
from shodh_moe.base.yaml_text import parse_yaml
from shodh_moe.data.opening import opened
from shodh_moe.data.reading import Trajectory, TrajectoryRecord, read_snapshots
from shodh_moe.data.storage import CONCENTRATION

STATS_FILE = "stats.yaml"
_BLOCK_BYTES = 2**26  # bytes of a trajectory read at a time

Fields = dict[str, NDArray[np.floating]]  # [C, X, Y, Z] of one snapshot
Sums = tuple[NDArray[np.float64], NDArray[np.float64], int]


class Moments:
    """Running sums and sums of squares per channel in float64; the same order of updates gives the same bits."""

    def __init__(self) -> None:
        self.count = 0
        self.sum_C: NDArray[np.float64] = np.zeros(1)
        self.square_C: NDArray[np.float64] = np.zeros(1)

    def add(self, values_TCXYZ: NDArray[np.floating]) -> None:
        """Add values [T, C, X, Y, Z]."""
        for values_CXYZ in values_TCXYZ:
            self.add_sums(*_sums(values_CXYZ))

    def add_sums(self, sum_C: NDArray[np.float64], square_C: NDArray[np.float64], count: int) -> None:
        """Add ``count`` cells, given the sums of their values and of their squares [C]."""
        self.sum_C = self.sum_C + sum_C
        self.square_C = self.square_C + square_C
        self.count += count

    def numbers(self) -> dict[str, list[float] | float]:
        """Return mean, std and rms: lists of components for vectors, numbers for scalars; zero if nothing was added."""
        mean_C = self.sum_C / max(self.count, 1)
        square_C = self.square_C / max(self.count, 1)
        std_C = np.sqrt(np.maximum(square_C - mean_C**2, 0))
        return {"mean": _plain(mean_C), "std": _plain(std_C), "rms": _plain(np.sqrt(square_C))}


def _sums(values_CXYZ: NDArray[np.floating]) -> Sums:
    """Return sum and sum of squares of each channel [C], and the number of cells."""
    flat_CN = values_CXYZ.reshape(len(values_CXYZ), -1).astype(np.float64)
    return flat_CN.sum(1), (flat_CN**2).sum(1), flat_CN.shape[1]


def compute_stats(trajectories: Iterable[Trajectory]) -> dict[str, dict[str, Any]]:
    """Compute mean, std and rms of velocity, pressure and solid, and of changes between snapshots (``_delta``).

    They cover all cells, including solid ones, of the given trajectories, which should be the training split. The
    concentration is included if every file has one.
    """
    return combined(_trajectory_sums(_in_memory(trajectory)) for trajectory in trajectories)


def stats_of_files(
    records: Sequence[TrajectoryRecord],
    threads: int,
    progress: Callable[..., Iterable[Any]] = lambda sums, desc, total: sums,
) -> dict[str, dict[str, Any]]:
    """Compute the same statistics as `compute_stats`, to the last bit, from files read by several threads.

    Each thread holds 64 MB of a trajectory, or two snapshots. ``progress`` is called as in `generate`.

    Raises:
        UserError: a file is damaged, or a value is not finite.
    """
    with ThreadPoolExecutor(threads) as pool:
        # map keeps the order of the files, so sums are always added in the same order.
        sums = pool.map(lambda record: _trajectory_sums(_from_file(record)), records)
        return combined(progress(sums, "statistics", len(records)))


def _in_memory(trajectory: Trajectory) -> Iterator[Fields]:
    concentration_T1XYZ = read_concentration(trajectory.record)
    for t, velocity_3XYZ in enumerate(trajectory.velocity_T3XYZ):
        fields = {"velocity": velocity_3XYZ, "pressure": trajectory.pressure_T1XYZ[t]}
        if concentration_T1XYZ is not None:
            fields[CONCENTRATION] = concentration_T1XYZ[t]
        yield fields if t else {**fields, "solid": trajectory.solid_1XYZ}


def _from_file(record: TrajectoryRecord) -> Iterator[Fields]:
    at_a_time = max(1, _BLOCK_BYTES * record.n_snapshots // record.nbytes)
    for first in range(0, record.n_snapshots, at_a_time):
        stop = min(first + at_a_time, record.n_snapshots)
        fields_T4XYZ, solid_1XYZ = read_snapshots(record, first, stop)
        concentration_T1XYZ = read_concentration(record, first, stop)
        for t, fields_4XYZ in enumerate(fields_T4XYZ):
            fields = {"velocity": fields_4XYZ[:3], "pressure": fields_4XYZ[3:]}
            if concentration_T1XYZ is not None:
                fields[CONCENTRATION] = concentration_T1XYZ[t]
            yield fields if first + t else {**fields, "solid": solid_1XYZ}


class TrajectorySums:
    """Sums over each snapshot of one trajectory, and over its change from the previous one (``_delta``)."""

    def __init__(self) -> None:
        self.found: dict[str, list[Sums]] = {}
        self._last: Fields = {}

    def add(self, fields: Fields) -> None:
        """Add the next snapshot. The first one includes ``solid``; an empty one stands for an unreadable snapshot."""
        for name, values_CXYZ in fields.items():
            self.found.setdefault(name, []).append(_sums(values_CXYZ))
            if name in self._last and name != "solid":
                self.found.setdefault(f"{name}_delta", []).append(_sums(values_CXYZ - self._last[name]))
        self._last = fields


def _trajectory_sums(snapshots: Iterable[Fields]) -> TrajectorySums:
    sums = TrajectorySums()
    for fields in snapshots:
        sums.add(fields)
    return sums


def combined(trajectories: Iterable[TrajectorySums]) -> dict[str, dict[str, Any]]:
    """Compute the content of stats.yaml from the sums of all training trajectories in order."""
    names = ("velocity", "pressure", "solid", CONCENTRATION)
    fields = {name: Moments() for name in names}
    deltas = {name: Moments() for name in names if name != "solid"}
    with_concentration = []
    for found in (one.found for one in trajectories):
        with_concentration.append(CONCENTRATION in found)
        for suffix, group in (("", fields), ("_delta", deltas)):
            for name, moments in group.items():
                for sums in found.get(name + suffix, ()):
                    moments.add_sums(*sums)
    if not with_concentration or not all(with_concentration):
        del fields[CONCENTRATION], deltas[CONCENTRATION]
    stats: dict[str, dict[str, Any]] = {}
    for suffix, group in (("", fields), ("_delta", deltas)):
        for name, moments in group.items():
            for key, value in moments.numbers().items():
                stats.setdefault(key + suffix, {})[name] = value
    return stats


def read_concentration(record: TrajectoryRecord, start: int = 0, stop: int | None = None) -> NDArray[np.float32] | None:
    """Read the passive scalar of snapshots ``start`` to ``stop`` - 1, float32 [T, 1, X, Y, Z]; None if there is none.

    Raises:
        UserError: the file is damaged.
    """
    with opened(record.path) as file:
        name = f"t0_fields/{CONCENTRATION}"
        if name not in file:
            return None
        return np.asarray(file[name][record.sample, start:stop], dtype=np.float32)[:, None]


def write_stats(folder: Path, stats: dict[str, dict[str, Any]]) -> None:
    """Write ``<folder>/stats.yaml`` atomically."""
    with atomic_file(folder / STATS_FILE) as temporary:
        temporary.write_text(yaml.safe_dump(stats, sort_keys=False), encoding="utf-8")


@dataclass(frozen=True)
class FieldStats:
    """Root mean squares over the training split in the data's units, for normalisation."""

    velocity_rms: float
    pressure_rms: float
    velocity_delta_rms: float
    pressure_delta_rms: float

    @classmethod
    def load(cls, folder: Path | str) -> FieldStats:
        """Read ``<folder>/stats.yaml``. The velocity's rms is over its three components.

        Raises:
            UserError: the file is missing, is not YAML, or lacks a number.
        """
        path = Path(folder) / STATS_FILE
        try:
            stats = parse_yaml(path.read_text(encoding="utf-8"))
            numbers = [_rms(stats[key][name]) for key in ("rms", "rms_delta") for name in ("velocity", "pressure")]
        except FileNotFoundError as error:
            raise UserError(f"{path} does not exist: generate the data again, or compute its statistics") from error
        except (OSError, LookupError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{path} lacks the rms of velocity and pressure ({error!r}): generate it again") from error
        if not all(np.isfinite(numbers)) or min(numbers[:2]) <= 0:
            raise UserError(f"{path}: the rms of velocity and pressure must be positive, not {numbers[:2]}")
        return cls(*numbers)


def _rms(value: object) -> float:
    """Return the rms over a vector's components; the magnitude of a single number."""
    values = value if isinstance(value, list) else [value]
    # Checked here because YAML can express a list that contains itself, which numpy would expand forever.
    if not values or not all(isinstance(one, (int, float, str)) for one in values):
        raise TypeError("not a number or a list of numbers")
    with np.errstate(over="ignore"):
        return float(np.sqrt(np.mean(np.square(np.asarray(value, dtype=np.float64)))))


def _plain(values_C: NDArray[np.float64]) -> list[float] | float:
    """Convert to a number if there is one channel, otherwise to a list."""
    return float(values_C[0]) if len(values_C) == 1 else [float(value) for value in values_C]
