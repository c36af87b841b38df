"""A dataset as a sequence of trajectories, each a set of named tensors. It is read when it is indexed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from shodh_moe.base.boundaries import UNKNOWN_BOUNDARIES, Boundaries
from shodh_moe.base.errors import UserError
from shodh_moe.base.remote_file import local_folder
from shodh_moe.data.listing import domain_names, list_trajectories, open_file
from shodh_moe.data.reading import TrajectoryRecord, read_snapshots, read_times, stated_units

if TYPE_CHECKING:
    import xarray

AXES = ("x", "y", "z")


@dataclass(frozen=True)
class Source:
    """What is known about the fields of a trajectory besides their values.

    Attributes:
        domain: name of the domain, "" if unknown.
        spacing: distance between voxels along x, y and z; None if unknown.
        units: units of ``velocity``, ``pressure``, ``length`` and ``time``; a quantity whose unit the file does not
            state is missing.
        boundaries: kind of the low and the high face of each axis: ``wall``, ``open``, ``periodic`` or ``unknown``.
    """

    domain: str = ""
    spacing: tuple[float, float, float] | None = None
    units: Mapping[str, str] | None = None
    boundaries: Boundaries = UNKNOWN_BOUNDARIES


class Fields(dict[str, Tensor]):
    """The fields of T snapshots of one flow, by name.

        velocity       [T, 3, X, Y, Z]  along x, y and z, at the voxel centres
        pressure       [T, 1, X, Y, Z]  at the voxel centres
        solid          [1, X, Y, Z]     1 in solid voxels, 0 in fluid
        time           [T]              float64; missing if the file has no times
        velocity_face  [T, 3, X, Y, Z]  only in forecasts of a model with the operator `staggered`: component i at the
                                        centre of the lower face of its voxel along axis i; its divergence vanishes

    Fields of a dataset are float32, and forecasts float64, in the units of the data.
    """

    def __init__(self, tensors: Mapping[str, Tensor], source: Source | None = None) -> None:
        super().__init__(tensors)
        self.source = source or Source()

    def channels(self) -> Tensor:
        """Return velocity, pressure and solid mask as the input of a tokenizer, float32 [T, 5, X, Y, Z]."""
        solid_T1XYZ = self["solid"].expand(len(self["velocity"]), -1, -1, -1, -1)
        return torch.cat([self["velocity"].float(), self["pressure"].float(), solid_T1XYZ.float()], dim=1)

    def to_xarray(self) -> xarray.Dataset:
        """Return a labelled copy, with units where they are known; needs the package xarray.

        The coordinates x, y and z are those of the voxel centres, from the lower corner of the box. Velocities have an
        additional axis ``component``.

        Raises:
            UserError: xarray is not installed.
        """
        try:
            import xarray
        except ImportError:
            raise UserError("to_xarray needs xarray: pip install 'shodh_moe[analysis]'") from None
        units = dict(self.source.units or {})
        variables = {}
        for name, values in self.items():
            kind = "velocity" if name.startswith("velocity") else name
            attributes = {"units": units[kind]} if kind in units else {}
            if name == "time":
                continue
            array = values.numpy() if kind == "velocity" else values.squeeze(-4).numpy()
            axes = AXES if name == "solid" else ("time", *(("component",) if kind == "velocity" else ()), *AXES)
            variables[name] = (axes, array, attributes)
        coordinates: dict[str, object] = {"component": list(AXES)}
        if "time" in self:
            coordinates["time"] = ("time", self["time"].numpy(), {"units": units["time"]} if "time" in units else {})
        for axis, size, step in zip(AXES, self["solid"].shape[-3:], self.source.spacing or (), strict=False):
            centres = (torch.arange(size, dtype=torch.float64) + 0.5) * step
            coordinates[axis] = (axis, centres.numpy(), {"units": units["length"]} if "length" in units else {})
        return xarray.Dataset(variables, coordinates, {"domain": self.source.domain})


def source_of(fields: Mapping[str, Tensor]) -> Source:
    """What is known about fields besides their values; nothing of a plain dictionary."""
    return fields.source if isinstance(fields, Fields) else Source()


class Dataset(TorchDataset[Fields]):
    """Trajectories in the order of their files. Nothing is read before an index asks for it.

    ``dataset[3]`` reads a whole trajectory, ``dataset[3, :2]`` its first two snapshots and ``dataset[3, 5]`` one of
    them, each as `Fields` with an axis of snapshots.

    Attributes:
        records: the trajectories; each has its file, domain, grid, number of snapshots and boundary conditions.
    """

    def __init__(self, records: Sequence[TrajectoryRecord]) -> None:
        self.records = list(records)

    @property
    def domains(self) -> list[str]:
        """Names of the domains in alphabetical order."""
        return domain_names(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int | tuple[int, int | slice]) -> Fields:
        """Read snapshots of a trajectory.

        Raises:
            IndexError: there is no such trajectory or snapshot.
            UserError: the file is damaged, or a value is not finite or too large.
        """
        number, chosen = index if isinstance(index, tuple) else (index, slice(None))
        record = self.records[number]
        if isinstance(chosen, int):
            snapshots = range(record.n_snapshots)[chosen : chosen + 1 or None]
        else:
            snapshots = range(record.n_snapshots)[chosen]
        if not snapshots:
            raise IndexError(f"trajectory {number} has {record.n_snapshots} snapshots, and none of them are {chosen}")
        first, last = min(snapshots), max(snapshots)
        fields_T4XYZ, solid_1XYZ = read_snapshots(record, first, last + 1)
        kept = [snapshot - first for snapshot in snapshots]
        values = torch.from_numpy(fields_T4XYZ if snapshots.step == 1 else fields_T4XYZ[kept])
        tensors = {"velocity": values[:, :3], "pressure": values[:, 3:], "solid": torch.from_numpy(solid_1XYZ)}
        time_T = read_times(record)
        if time_T is not None:
            tensors["time"] = torch.from_numpy(time_T[list(snapshots)])
        return Fields(tensors, Source(record.domain, record.spacing, stated_units(record), record.boundaries))


def open_dataset(place: Path | str, split: str = "train", *, skip_bad: bool = False) -> Dataset:
    """Open a dataset in the_well's schema: a folder, the URL of a folder, or a single HDF5 file.

    Args:
        split: ``train``, ``valid`` or ``test``; a single file has no splits.
        skip_bad: leave out files that cannot be read, and name them on stderr.

    Raises:
        UserError: there is no data, a file is damaged or has no flow, or the grids of the files differ.
    """
    path = local_folder(place)
    if path.is_file():
        return Dataset(open_file(path, path))
    return Dataset(list_trajectories(path, split, skip_bad=skip_bad))
