"""Statistics of the training split, in the_well's stats.yaml."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from shodh_moe.data.reading import Trajectory
from shodh_moe.errors import UserError
from shodh_moe.files import atomic_file

STATS_FILE = "stats.yaml"


class Moments:
    """Running mean and mean square per channel, in float64: the same for the same order of updates."""

    def __init__(self) -> None:
        self.count = 0
        self.sum_C: NDArray[np.float64] = np.zeros(1)
        self.square_C: NDArray[np.float64] = np.zeros(1)

    def add(self, values_TCXYZ: NDArray[np.floating]) -> None:
        """Take in values [T, C, X, Y, Z]."""
        for values_CXYZ in values_TCXYZ:
            flat_CN = values_CXYZ.reshape(len(values_CXYZ), -1).astype(np.float64)
            self.sum_C = self.sum_C + flat_CN.sum(1)
            self.square_C = self.square_C + (flat_CN**2).sum(1)
            self.count += flat_CN.shape[1]

    def numbers(self) -> dict[str, list[float] | float]:
        """mean, std and rms; a list per component for vectors, a number for scalars. Zero if nothing was added."""
        mean_C = self.sum_C / max(self.count, 1)
        square_C = self.square_C / max(self.count, 1)
        std_C = np.sqrt(np.maximum(square_C - mean_C**2, 0))
        return {"mean": _plain(mean_C), "std": _plain(std_C), "rms": _plain(np.sqrt(square_C))}


def compute_stats(trajectories: Iterable[Trajectory]) -> dict[str, dict[str, Any]]:
    """mean, std, rms of velocity, pressure and solid, and of the change between snapshots (``_delta``).

    Over all cells, solid ones included, of the given trajectories: the training split, nothing else.
    """
    fields = {name: Moments() for name in ("velocity", "pressure", "solid")}
    deltas = {name: Moments() for name in ("velocity", "pressure")}
    for trajectory in trajectories:
        fields["solid"].add(trajectory.solid_1XYZ[None])
        for name, values in (("velocity", trajectory.velocity_T3XYZ), ("pressure", trajectory.pressure_T1XYZ)):
            fields[name].add(values)
            deltas[name].add(np.diff(values, axis=0))
    stats: dict[str, dict[str, Any]] = {}
    for suffix, group in (("", fields), ("_delta", deltas)):
        for name, moments in group.items():
            for key, value in moments.numbers().items():
                stats.setdefault(key + suffix, {})[name] = value
    return stats


def write_stats(folder: Path, stats: dict[str, dict[str, Any]]) -> None:
    """Write ``<folder>/stats.yaml``, complete or not at all."""
    with atomic_file(folder / STATS_FILE) as temporary:
        temporary.write_text(yaml.safe_dump(stats, sort_keys=False), encoding="utf-8")


@dataclass(frozen=True)
class FieldStats:
    """What normalisation needs: root mean squares over the training split, in the data's units."""

    velocity_rms: float
    pressure_rms: float
    velocity_delta_rms: float
    pressure_delta_rms: float

    @classmethod
    def load(cls, folder: Path | str) -> FieldStats:
        """From ``<folder>/stats.yaml``. The velocity's rms is over its three components.

        Raises:
            UserError: the file is missing, is not YAML, or lacks a number.
        """
        path = Path(folder) / STATS_FILE
        try:
            stats = yaml.safe_load(path.read_text(encoding="utf-8"))
            numbers = [
                float(np.sqrt(np.mean(np.square(np.asarray(stats[key][name], dtype=np.float64)))))
                for key in ("rms", "rms_delta")
                for name in ("velocity", "pressure")
            ]
        except FileNotFoundError as error:
            raise UserError(f"{path} does not exist: generate the data again, or compute its statistics") from error
        except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} lacks the rms of velocity and pressure ({error!r}): generate it again") from error
        if not all(np.isfinite(numbers)) or min(numbers[:2]) <= 0:
            raise UserError(f"{path}: the rms of velocity and pressure must be positive, not {numbers[:2]}")
        return cls(*numbers)


def _plain(values_C: NDArray[np.float64]) -> list[float] | float:
    return float(values_C[0]) if len(values_C) == 1 else [float(value) for value in values_C]
