"""Import the trajectories that a mapping names into a dataset folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import remove_leftovers, require_writable
from shodh_moe.base.progress import progress as default_progress
from shodh_moe.base.text import printable
from shodh_moe.data.importing.coordinates import coordinate_arrays, points_of
from shodh_moe.data.importing.ends import require_ends_once
from shodh_moe.data.importing.file_set import ArrayFiles, open_array_files
from shodh_moe.data.importing.grids import Grid, new_grid
from shodh_moe.data.importing.items import Item, is_done, plan_items, require_no_others
from shodh_moe.data.importing.mapping import AXES, Mapping, Scale
from shodh_moe.data.importing.projection import project
from shodh_moe.data.importing.samples import mapping_of, sample_names, view_of
from shodh_moe.data.importing.snapshots import (
    Plan,
    plan,
    read_mask,
    read_pressure,
    read_velocity,
)
from shodh_moe.data.importing.time_step import gap_warning, start_and_step
from shodh_moe.data.importing.units import require_same_unit, scale_of
from shodh_moe.data.importing.writing import Header, new_trajectory_file
from shodh_moe.data.listing import SPLITS, list_trajectories, open_file
from shodh_moe.data.reading import LARGEST, open_trajectories
from shodh_moe.data.stats import stats_of_files, write_stats

Progress = Callable[..., Iterator[Any]]


def import_data(
    mapping: Mapping, folder: Path | None = None, *, skip_bad: bool = False, progress: Progress = default_progress
) -> Path:
    """Write ``<folder>/data/<split>/<domain>_<index>.hdf5`` and ``<folder>/stats.yaml``; return ``folder``.

    Trajectories that the same mapping created from the same files are kept, so a killed import can resume. Trajectories
    of other domains in the folder are kept and included in the statistics. Only one snapshot at a time is in memory.

    Args:
        folder: replaces the mapping's ``output``.
        skip_bad: skip trajectories that cannot be imported, and list them at the end.
        progress: called as in `generation.generate`.

    Raises:
        UserError: an input file is missing, damaged or does not fit the mapping, or the folder cannot be written.
    """
    folder = Path(folder or mapping.output or "")
    if folder == Path(""):
        raise UserError("the dataset has no folder: set output in the mapping, or give --output")
    require_writable(folder)
    items = plan_items(mapping, folder)
    for split in SPLITS:
        remove_leftovers(folder / "data" / split)
    require_no_others(folder, mapping.domain, {item.path for item in items})
    left_out = []
    grid = _grid_of_others(folder, mapping.domain)
    for item in progress(items, "importing", len(items)):
        try:
            if not is_done(item):
                _import(item, mapping, grid)
            grid = grid or open_trajectories(item.path)[0].grid
        except UserError as error:
            message = _with_file(str(error), item, mapping)
            if not skip_bad:
                raise UserError(message) from error
            left_out.append(f"{item.path.name}: {message}")
    for line in left_out:
        print(printable(f"left out: {line}"))
    for split in SPLITS[1:]:
        if not any((folder / "data" / split).glob("*.hdf5")):
            print(f"warning: no trajectories for {split}: training needs some; add files.{split} to the mapping")
    records = list_trajectories(folder, "train")
    stats = stats_of_files(records, 1, progress)
    write_stats(folder, stats)
    if not stats["rms"]["pressure"]:
        print("warning: the pressure is zero everywhere: training needs another domain that has one in the same folder")
    return folder


def _with_file(message: str, item: Item, mapping: Mapping) -> str:
    """The message of an error, after the trajectory's first file if it names none, as messages about its grid do."""
    files = [*item.files, item.path, *([mapping.mask.file] if mapping.mask and mapping.mask.file else [])]
    return message if any(str(path) in message for path in files) else f"{item.files[0]}: {message}"


def _grid_of_others(folder: Path, domain: str) -> tuple[int, ...] | None:
    """Return the grid of the folder's trajectories of other domains; None if it has none."""
    for split in SPLITS:
        for path in sorted((folder / "data" / split).glob("*.h*5")):
            if path.name[0] != "." and not path.name.startswith(f"{domain}_"):
                return open_file(path, folder)[0].grid
    return None


def _import(item: Item, mapping: Mapping, wanted_grid: tuple[int, ...] | None) -> None:
    """Import one trajectory; raise `UserError` if its grid is not ``wanted_grid``."""
    view = None
    if mapping.many:
        # Of files that could not be read while planning, the reason is needed now.
        sample = item.sample if item.sample is not None else sample_names(mapping, item.entries)[0]
        mapping, view = mapping_of(mapping, sample), view_of(mapping, sample, item.samples)
    with open_array_files(item.entries, view) as files:
        found = plan(files, mapping)
        start, stop = item.snapshots or (0, len(found))
        if stop > len(found) or stop - start < 2:
            raise UserError(
                f"{item.files[0]}: asked for the snapshots {start}..{stop} of {len(found)}: a trajectory needs two "
                "or more; check `snapshots`, or name all files of a trajectory in one list"
            )
        if line := gap_warning(found):
            print(f"{item.path.name}: {line}")
        scale = _scale(files, mapping, found)
        start_time, time_step = start_and_step(files, mapping, found.times, scale.time, start, stop)
        require_ends_once(files, mapping, found)
        points = points_of(files, mapping, found)
        grid = new_grid(points, mapping)
        if wanted_grid and grid.cells != tuple(wanted_grid):
            raise UserError(f"{item.files[0]} gives the grid {list(grid.cells)}, the dataset has {list(wanted_grid)}")
        mask_XYZ = read_mask(files, mapping, found)
        solid_XYZ = grid.apply(mask_XYZ) > 0.5
        header = Header(
            mapping.name,
            mapping.domain,
            time_step,
            stop - start,
            grid.spacing * scale.length,
            [mapping.boundaries.ends(axis) for axis in AXES],
            solid_XYZ,
            mapping.scalars,
        )
        with new_trajectory_file(item.path, header) as (file, provenance):
            totals = _Totals()
            for index, snapshot in enumerate(range(start, stop)):
                velocity_3XYZ, pressure_XYZ = _snapshot(
                    files, mapping, scale, found, snapshot, grid, mask_XYZ > 0.5, solid_XYZ, totals
                )
                file["t1_fields/velocity"][0, index] = np.moveaxis(velocity_3XYZ, 0, -1)
                file["t0_fields/pressure"][0, index] = pressure_XYZ
            provenance.update(_provenance(item, mapping, scale, grid, points, totals, start_time))
    for line in totals.lines(mapping):
        print(f"{item.path.name}: {line}")


@dataclass
class _Totals:
    """Energy and speeds that projection and mask removed from a trajectory, over all its snapshots.

    Attributes:
        energy: sum of the squared speeds before projection.
        removed: part of ``energy`` that the projection removed.
        most_removed: largest share of a snapshot's energy that the projection removed.
        fastest_in_solids: largest speed of the input in solid voxels.
        cells: number of cells over all snapshots.
    """

    energy: float = 0.0
    removed: float = 0.0
    most_removed: float = 0.0
    fastest_in_solids: float = 0.0
    cells: int = 0

    @property
    def removed_share(self) -> float:
        """Share of the energy that the projection removed."""
        return self.removed / self.energy if self.energy else 0.0

    @property
    def solid_speed(self) -> float:
        """Largest speed of the input in solid voxels, relative to the rms of all cells."""
        return self.fastest_in_solids / (self.energy / self.cells) ** 0.5 if self.energy else 0.0

    def lines(self, mapping: Mapping) -> Iterator[str]:
        """Report the removed energy and speeds, if any."""
        if mapping.project:
            yield (
                f"projection removed {self.removed_share:.3g} of the velocity's energy "
                f"(at most {self.most_removed:.3g} of a snapshot's)"
            )
        if self.fastest_in_solids:
            yield f"set to zero: velocity in solid voxels, up to {self.solid_speed:.3g} of its rms"


def _snapshot(
    files: ArrayFiles,
    mapping: Mapping,
    scale: Scale,
    found: Plan,
    snapshot: int,
    grid: Grid,
    stored_solid_XYZ: NDArray[np.bool_],
    solid_XYZ: NDArray[np.bool_],
    totals: _Totals,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Read and convert one snapshot: velocity [3, X, Y, Z] and pressure [X, Y, Z], ready to store.

    Args:
        stored_solid_XYZ, solid_XYZ: the solid voxels of the input, cropped, and those on the new grid.
    """
    for places in [*found.velocity, *([found.pressure] if found.pressure else [])]:
        first, here = places[0], places[snapshot]
        require_same_unit(files.array(first.path, first.name), files.array(here.path, here.name))
    read_3XYZ, read_XYZ = read_velocity(files, mapping, found, snapshot), read_pressure(files, mapping, found, snapshot)
    for read in (*read_3XYZ, read_XYZ):
        # Solid voxels often contain NaN, which interpolation would spread.
        read[stored_solid_XYZ & ~np.isfinite(read)] = 0
    velocity_3XYZ = grid.apply(read_3XYZ) * scale.velocity
    pressure_XYZ = grid.apply(read_XYZ) * scale.pressure
    if solid_XYZ.any():
        inside = np.linalg.norm(np.nan_to_num(velocity_3XYZ[:, solid_XYZ], posinf=0, neginf=0), axis=0)
        totals.fastest_in_solids = max(totals.fastest_in_solids, float(inside.max()))
        velocity_3XYZ[:, solid_XYZ] = 0
        pressure_XYZ[solid_XYZ] = 0
    place = found.velocity[0][snapshot]
    with np.errstate(over="ignore"):
        stored = velocity_3XYZ.astype(np.float32), pressure_XYZ.astype(np.float32)
    for name, values in zip(("velocity", "pressure"), stored, strict=True):
        if not np.isfinite(values).all():
            remedy = f": if they mark solids, write `mask: {{dataset: {place.name}, solid: missing}}`"
            raise UserError(
                f"{place.path}: {name} of snapshot {snapshot} ({place.name}) has values that are not finite"
                + ("" if mapping.mask else remedy)
            )
        largest = np.abs(values).max()
        if largest >= LARGEST:
            raise UserError(
                f"{place.path}: {name} of snapshot {snapshot} ({place.name}) has values up to {largest:.3g}: if these "
                "mark missing values, state it in the attribute _FillValue; if they mark solids, name the mask"
            )
    totals.energy += float(np.sum(velocity_3XYZ**2))
    totals.cells += pressure_XYZ.size
    if mapping.project:
        ends = [mapping.boundaries.ends(axis) for axis in AXES]
        kinds = ["wall" if low in ("wall", "free slip") else low for low, _ in ends]
        projected_3XYZ, share = project(velocity_3XYZ, kinds)
        totals.removed += share * float(np.sum(velocity_3XYZ**2))
        totals.most_removed = max(totals.most_removed, share)
        stored = projected_3XYZ.astype(np.float32), stored[1]
    return stored


def _scale(files: ArrayFiles, mapping: Mapping, found: Plan) -> Scale:
    """Return the factors for all values, from the units that the files state and from the mapping."""
    first = {
        "velocity": [one[0] for one in found.velocity],
        "pressure": found.pressure[:1] if found.pressure else [],
    }
    stated = {quantity: [files.array(one.path, one.name) for one in places] for quantity, places in first.items()}
    stated["length"] = coordinate_arrays(files, mapping)
    stated["time"] = [found.times.array] if found.times and found.times.array else []
    return scale_of(stated, mapping)


def _provenance(
    item: Item,
    mapping: Mapping,
    scale: Scale,
    grid: Grid,
    points: list[NDArray[np.float64]],
    totals: _Totals,
    start_time: float,
) -> dict[str, Any]:
    units = mapping.units.of()
    found: dict[str, Any] = {
        "label": "imported",
        "units": ", ".join(f"{name} in {unit}" for name, unit in units.items()),
        **{f"unit_{name}": unit for name, unit in units.items()},
        "source": mapping.source or "not stated",
        "files": str(item.files[0]) + (f" to {item.files[-1]}" if len(item.files) > 1 else ""),
        "request": item.request,
        "origin": [one * scale.length for one in grid.origin],
        "first_snapshot": item.snapshots[0] if item.snapshots else 0,
        "start_time": start_time,
        "scale": scale.model_dump(),
        "pressure": "zero: the source has none" if mapping.pressure == "zero" else "of the source",
    }
    if item.sample is not None:
        found["sample"] = item.sample
    if mapping.resample:
        spacings = [np.abs(np.diff(one)) for one in points]
        found["resampled"] = {
            "method": mapping.resample.method,
            "spacing": grid.spacing * scale.length,
            "from_spacing": [[float(one.min()), float(one.max())] for one in spacings],
        }
    if mapping.project:
        found["projection"] = "Leray, spectral, mirrored at ends that are not periodic"
        found["projection_removed_energy"] = totals.removed_share
        found["projection_removed_energy_most"] = totals.most_removed
    if mapping.mask:
        found["speed_in_solids_set_to_zero"] = totals.solid_speed
    return found
