"""Draw slices through flows as PNG pictures: one picture per trajectory, and an overview of a folder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import atomic_file
from shodh_moe.base.progress import progress
from shodh_moe.base.text import printable
from shodh_moe.data.derivatives import vorticity
from shodh_moe.data.listing import files_of, open_file
from shodh_moe.data.reading import TrajectoryRecord, read_snapshots, stated_units

DPI = 130
_MOST_PER_DOMAIN = 2  # trajectories drawn per domain and split
_SOLID = "0.55"
_AXES = "xyz"
_LONGEST_UNIT = 28
# RdBu_r without its darkest ends.
_SIGNED = LinearSegmentedColormap.from_list("signed", [colormaps["RdBu_r"](x) for x in np.linspace(0.04, 0.96, 64)])


@dataclass(frozen=True)
class _Kind:
    """A quantity to draw; a ``signed`` one gets a diverging colour map."""

    name: str
    unit: str
    signed: bool


@dataclass(frozen=True)
class _Frame:
    """One snapshot: each quantity [X, Y, Z], NaN in solids."""

    snapshot: int
    values: list[NDArray[np.float32]]


def preview(path: Path, folder: Path) -> list[Path]:
    """Write ``<folder>/<split>_<file>.png`` and, for a dataset's folder, ``<folder>/overview.png``; return the paths.

    Each picture shows speed, pressure and vorticity of a trajectory's first, middle and last snapshot in the three
    middle planes. For a folder, up to two trajectories of each domain and split are drawn.

    Raises:
        UserError: there is no file, a file cannot be read, or the folder cannot be written.
    """
    path, folder = Path(path), Path(folder)
    chosen: dict[tuple[str, str], list[TrajectoryRecord]] = {}
    for split, files in files_of(path).items():
        for file in files:
            for record in open_file(file, path):
                found = chosen.setdefault((split, record.domain), [])
                if len(found) < _MOST_PER_DOMAIN or not split:
                    found.append(record)
    every = [(split, record) for (split, _), records in chosen.items() for record in records]
    if not every:
        raise UserError(f"{path} holds no trajectory")
    written = []
    for split, record in progress(every, "drawing", len(every)):
        sample = f"_{record.sample}" if record.sample else ""
        name = "_".join(part for part in (split, record.path.stem + sample) if part)
        written.append(_write(_trajectory(record), folder / f"{name}.png"))
    if path.is_dir():
        firsts = [(split, records[0]) for (split, _), records in chosen.items()]
        written.append(_write(_overview(firsts, str(path)), folder / "overview.png"))
    return written


def _trajectory(record: TrajectoryRecord) -> Figure:
    """Draw three planes (rows) of up to three snapshots (columns), for each quantity."""
    kinds = _kinds(record)
    snapshots = sorted({0, record.n_snapshots // 2, record.n_snapshots - 1})
    frames = [_frame(record, snapshot) for snapshot in snapshots]
    sides = [_sides(record.grid, axis) for axis in (2, 1, 0)]
    heights = [record.grid[up] / record.grid[across] for across, up in sides]
    width = 1.55
    columns = len(kinds) * len(frames)
    figure = Figure(
        figsize=(columns * width + 2.2, sum(max(width * one, 0.5) for one in heights) + 1.7),
        dpi=DPI,
        layout="compressed",
    )
    sample = f", trajectory {record.sample}" if record.sample else ""
    grid = " x ".join(map(str, record.grid))
    title = (
        f"{_words(record.domain)} — {_shown(record.path.name)}{sample}: {grid} cells, {record.n_snapshots} snapshots"
    )
    figure.suptitle(f"{title}\n", fontsize=11, fontweight="bold")
    parts = figure.subfigures(1, len(kinds), squeeze=False)[0]
    for number, (kind, part) in enumerate(zip(kinds, parts, strict=True)):
        panels = part.subplots(3, len(frames), squeeze=False, height_ratios=[max(one, 0.3) for one in heights])
        low, high = _limits([frame.values[number] for frame in frames], kind)
        for column, frame in enumerate(frames):
            for row, axis in enumerate((2, 1, 0)):
                axes = panels[row][column]
                image = _draw(axes, frame.values[number], axis, kind, low, high)
                if row == 0:
                    axes.set_title(_time(record, frame.snapshot), fontsize=8)
                across, up = _sides(record.grid, axis)
                axes.set_xlabel(_AXES[across], fontsize=8, labelpad=1)
                if column == 0:
                    axes.set_ylabel(_AXES[up], fontsize=8, rotation=0, labelpad=8, va="center")
        bar = part.colorbar(image, ax=panels, orientation="horizontal", fraction=0.05, pad=0.03, aspect=28, shrink=0.9)
        _label(bar, kind.name, kind.unit)
    return figure


def _overview(firsts: list[tuple[str, TrajectoryRecord]], name: str) -> Figure:
    """Draw one row per domain and split: its first trajectory's last snapshot in the middle plane normal to y."""
    ratio = max(record.grid[_sides(record.grid, 1)[1]] / record.grid[_sides(record.grid, 1)[0]] for _, record in firsts)
    figure = Figure(figsize=(9.5, len(firsts) * (2.0 * ratio + 0.7) + 0.5), dpi=DPI, layout="constrained")
    figure.suptitle(
        f"{_shown(name)}: last snapshot of a trajectory of each domain and split", fontsize=11, fontweight="bold"
    )
    panels = figure.subplots(len(firsts), 3, squeeze=False)
    for row, (split, record) in zip(panels, firsts, strict=True):
        frame = _frame(record, record.n_snapshots - 1)
        for axes, kind, values in zip(row, _kinds(record), frame.values, strict=True):
            image = _draw(axes, values, 1, kind, *_limits([values], kind))
            bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02)
            _label(bar, "", kind.unit)
            axes.set_title(f"{_words(record.domain)}, {split}: {kind.name}", fontsize=9)
            across, up = _sides(record.grid, 1)
            axes.set_xlabel(_AXES[across], fontsize=8, labelpad=1)
            axes.set_ylabel(_AXES[up], fontsize=8, rotation=0, labelpad=6, va="center")
    return figure


def _label(bar: Colorbar, name: str, unit: str) -> None:
    """Label the colour bar, moving a common power of ten into the unit."""
    high = max(abs(bar.vmin), abs(bar.vmax))
    power = math.floor(math.log10(high)) if high > 0 else 0
    power = 0 if -2 < power < 3 else power
    bar.locator = MaxNLocator(5)
    bar.formatter = FuncFormatter(lambda value, _: f"{value / 10.0**power:.4g}")
    bar.update_ticks()
    bar.ax.tick_params(labelsize=7)
    unit = unit if len(unit) <= _LONGEST_UNIT else f"{unit[:_LONGEST_UNIT]}..."
    unit = _shown(unit)
    factor = f"$10^{{{power}}}$ " if power else ""
    bar.set_label(f"{name} [{factor}{unit}]".strip(), fontsize=8)


def _draw(axes: Axes, values_XYZ: NDArray[np.float32], axis: int, kind: _Kind, low: float, high: float) -> Any:
    """Draw the middle plane normal to ``axis``; solids are grey and hatched."""
    plane = np.take(values_XYZ, values_XYZ.shape[axis] // 2, axis)
    if (sides := _sides(values_XYZ.shape, axis)) != tuple(sorted(sides)):
        plane = plane.T
    colours = _SIGNED if kind.signed else colormaps["viridis"]
    image = axes.imshow(plane.T, origin="lower", cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    solid = np.isnan(plane)
    if solid.any():
        grey = ListedColormap([(0, 0, 0, 0), _SOLID])
        axes.imshow(solid.T, origin="lower", cmap=grey, vmin=0, vmax=1, interpolation="nearest")
        with rc_context({"hatch.linewidth": 0.4}):
            axes.contourf(solid.T.astype(float), levels=[0.5, 1.5], colors="none", hatches=["/////"])
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_linewidth(0.6)
    return image


def _frame(record: TrajectoryRecord, snapshot: int) -> _Frame:
    fields_T4XYZ, solid_1XYZ = read_snapshots(record, snapshot, snapshot + 1)
    solid_XYZ = solid_1XYZ[0] > 0.5
    velocity_3XYZ, pressure_XYZ = fields_T4XYZ[0, :3], fields_T4XYZ[0, 3]
    values = [np.linalg.norm(velocity_3XYZ, axis=0), pressure_XYZ, vorticity(velocity_3XYZ, solid_XYZ, record)]
    return _Frame(snapshot, [np.where(solid_XYZ, np.nan, one).astype(np.float32) for one in values])


def _kinds(record: TrajectoryRecord) -> list[_Kind]:
    """Return speed, pressure and vorticity with the units stated in the file."""
    units, lattice = stated_units(record), record.units.startswith("lattice")
    speed, pressure = units.get("velocity", "file's unit"), units.get("pressure", "file's unit")
    if lattice:
        curl = "1 / time step"
    else:
        curl = f"1/({units['time']})" if "length" in units and "time" in units else "speed / length"
    return [_Kind("speed", speed, False), _Kind("pressure", pressure, True), _Kind("vorticity", curl, False)]


def _limits(values: list[NDArray[np.float32]], kind: _Kind) -> tuple[float, float]:
    """Choose colour limits that ignore a few outliers: symmetric about the median if signed, otherwise from 0."""
    every = np.concatenate([one[np.isfinite(one)].ravel() for one in values])
    if not every.size:
        return 0.0, 1.0
    if kind.signed:
        low, middle, high = np.percentile(every, [0.5, 50, 99.5])
        half = max(middle - low, high - middle) or 1.0
        return float(middle - half), float(middle + half)
    high = float(np.percentile(every, 99.8))
    return 0.0, high if high > 0 else 1.0


def _time(record: TrajectoryRecord, snapshot: int) -> str:
    if record.interval is None:
        return f"snapshot {snapshot}"
    return f"t = {snapshot * record.interval:.4g}"


def _sides(grid: tuple[int, ...], axis: int) -> tuple[int, int]:
    """Return the horizontal and vertical axis of the plane normal to ``axis``; a clearly longer axis is horizontal."""
    first, second = (one for one in range(3) if one != axis)
    return (first, second) if grid[second] <= 1.25 * grid[first] else (second, first)


def _shown(text: str) -> str:
    """Prepare text of a file for matplotlib, which takes what lies between two dollar signs for a formula."""
    return printable(text).replace("$", r"\$")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _write(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", facecolor="white", bbox_inches="tight", pad_inches=0.1)
    return path
