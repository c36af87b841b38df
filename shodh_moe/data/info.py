"""Summarise a dataset's folder or a file, as JSON values and as a table: ``shodh data info``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shodh_moe.base.errors import UserError
from shodh_moe.base.remote_file import size_of
from shodh_moe.base.text import printable, printable_tree
from shodh_moe.data.listing import files_of, open_file
from shodh_moe.data.opening import opened
from shodh_moe.data.reading import TrajectoryRecord, read_provenance, read_snapshots

_MOST_READ = 16  # snapshots per domain and split whose values are read


def describe(path: Path) -> dict[str, Any]:
    """Collect the contents of `table` as JSON values, with one entry for each domain of each split.

    Value ranges are computed from at most 16 evenly spaced snapshots per entry.

    Raises:
        UserError: there is no file, or no file can be read.
    """
    path = Path(path)
    groups: dict[tuple[str, str], list[TrajectoryRecord]] = {}
    unreadable = []
    for split, files in files_of(path).items():
        for file in files:
            try:
                for record in open_file(file, path):
                    groups.setdefault((split, record.domain), []).append(record)
            except UserError as error:
                unreadable.append(str(error))
    if not groups:
        raise UserError(unreadable[0])
    entries = [_entry(split, domain, records) for (split, domain), records in groups.items()]
    return {
        "path": str(path),
        "trajectories": sum(entry["trajectories"] for entry in entries),
        "snapshots": sum(entry["snapshots"] for entry in entries),
        "bytes": sum(entry["bytes"] for entry in entries),
        "statistics": (path / "stats.yaml").exists() if path.is_dir() else None,
        "unreadable": unreadable,
        "entries": entries,
    }


def _entry(split: str, domain: str, records: list[TrajectoryRecord]) -> dict[str, Any]:
    files = list(dict.fromkeys(record.path for record in records))
    first = records[0]
    provenance = [printable_tree(read_provenance(file)) for file in files]
    return {
        "split": split,
        "domain": domain,
        "trajectories": len(records),
        "files": len(files),
        "snapshots": sum(record.n_snapshots for record in records),
        "grids": sorted({record.grid for record in records}),
        "periodic": first.periodic,
        "spacing": first.spacing,
        "time_step": first.interval,
        "bytes": sum(size_of(file) for file in files),
        "fields": _fields(files[0]),
        "ranges": _ranges(records),
        "scalars": _scalars(files),
        "label": sorted({str(one.get("label", "not stated")) for one in provenance}),
        "units": first.units,
        "source": sorted({str(one.get("source") or one.get("solver") or "not stated") for one in provenance})[:3],
        "versions": sorted({str(one["package_version"]) for one in provenance if "package_version" in one}),
    }


def _fields(path: Path) -> list[dict[str, Any]]:
    """List name, dtype, shape, chunks, compression and checksum of every field in a file."""
    with opened(path) as file:
        return [
            {
                "name": f"{group}/{name}",
                "dtype": str(item.dtype),
                "shape": list(item.shape),
                "chunks": list(item.chunks) if item.chunks else None,
                "compression": item.compression,
                "checksum": bool(item.fletcher32),
            }
            for group in ("t0_fields", "t1_fields", "t2_fields")
            if group in file
            for name, item in file[group].items()
        ]


def _scalars(files: list[Path]) -> dict[str, list[float]]:
    """Return the [smallest, largest] value of each constant of the flows, such as reynolds and mach."""
    found: dict[str, list[float]] = {}
    for path in files:
        with opened(path) as file:
            for name, item in file["scalars"].items() if "scalars" in file else ():
                if item.dtype.kind in "iuf" and item.size:
                    found.setdefault(name, []).extend(np.ravel(item[()]).tolist())
    return {name: [min(values), max(values)] for name, values in found.items()}


def _ranges(records: list[TrajectoryRecord]) -> dict[str, dict[str, float]]:
    """Measure min, rms and max of speed and pressure in the fluid, and the solid fraction of the volume."""
    every = [(record, snapshot) for record in records for snapshot in range(record.n_snapshots)]
    chosen = [every[n] for n in np.unique(np.linspace(0, len(every) - 1, _MOST_READ).round().astype(int))]
    speeds, pressures, solids = [], [], []
    for record, snapshot in chosen:
        fields_T4XYZ, solid_1XYZ = read_snapshots(record, snapshot, snapshot + 1)
        fluid = solid_1XYZ[0] <= 0.5
        solids.append(1 - fluid.mean())
        if fluid.any():
            speeds.append(_range(np.linalg.norm(fields_T4XYZ[0, :3, fluid].T, axis=0)))
            pressures.append(_range(fields_T4XYZ[0, 3, fluid]))
    return {
        "speed": _joined(speeds),
        "pressure": _joined(pressures),
        "solid": {"min": float(min(solids)), "mean": float(np.mean(solids)), "max": float(max(solids))},
    }


def _range(values: np.ndarray) -> tuple[float, float, float]:
    """Return minimum, mean square and maximum."""
    return float(values.min()), float(np.mean(values.astype(np.float64) ** 2)), float(values.max())


def _joined(ranges: list[tuple[float, float, float]]) -> dict[str, float]:
    """Combine the results of `_range` into minimum, rms and maximum."""
    low, square, high = np.array(ranges or [(0.0, 0.0, 0.0)]).T
    return {"min": float(low.min()), "rms": float(np.sqrt(square.mean())), "max": float(high.max())}


def table(found: dict[str, Any]) -> str:
    """Format the result of `describe` as text."""
    lines = [
        f"{found['path']}: {found['trajectories']:,} trajectories, {found['snapshots']:,} snapshots, "
        f"{_size(found['bytes'])}" + ("" if found["statistics"] is not False else "; no stats.yaml")
    ]
    rows: list[tuple[str, ...]] = [
        ("split", "domain", "trajectories", "snapshots", "grid", "spacing", "time step", "size")
    ]
    for one in found["entries"]:
        grids = ", ".join(" x ".join(map(str, grid)) for grid in one["grids"])
        steps = sorted(set(one["spacing"] or ()))
        spacing = " x ".join(f"{step:.4g}" for step in (steps if _same(steps) else one["spacing"] or ())[:3])
        step = f"{one['time_step']:.4g}" if one["time_step"] else "?"
        counts = f"{one['trajectories']:,}", f"{one['snapshots']:,}"
        rows.append((one["split"] or "-", one["domain"], *counts, grids, spacing or "?", step, _size(one["bytes"])))
    lines += ["", *_aligned(rows), ""]
    rows = [("split", "domain", "speed: min", "rms", "max", "pressure: min", "rms", "max", "solid")]
    for one in found["entries"]:
        ranges = [f"{one['ranges'][name][key]:.4g}" for name in ("speed", "pressure") for key in ("min", "rms", "max")]
        rows.append((one["split"] or "-", one["domain"], *ranges, f"{one['ranges']['solid']['mean']:.1%}"))
    lines += [*_aligned(rows), ""]
    for domain in dict.fromkeys(one["domain"] for one in found["entries"]):
        lines += _about(domain, [one for one in found["entries"] if one["domain"] == domain])
    lines += [printable(f"cannot be read: {text}") for text in found["unreadable"]]
    return "\n".join(lines).rstrip()


def _about(domain: str, entries: list[dict[str, Any]]) -> list[str]:
    """Format provenance and storage of a domain's data as lines."""
    first = entries[0]
    sides = ", ".join(axis for axis, periodic in zip("xyz", first["periodic"], strict=True) if periodic)
    names = dict.fromkeys(name for one in entries for name in one["scalars"])
    scalars = [(name, [value for one in entries for value in one["scalars"].get(name, ())]) for name in names]
    shown = [f"{name} {min(values):.4g}" + _to(values) for name, values in scalars if values]
    lines = [
        f"{domain}",
        f"  provenance  {', '.join(first['label'])}: {'; '.join(first['source'])}",
        f"  units       {first['units'] or 'not stated'}",
        f"  periodic    {sides or 'no axis'}",
        f"  scalars     {', '.join(shown) or 'none'}",
    ]
    for field in first["fields"]:
        layout = f"chunks {' x '.join(map(str, field['chunks']))}" if field["chunks"] else "in one block"
        extras = [field["compression"] or "not compressed", *(["checksum"] if field["checksum"] else [])]
        shape = " x ".join(map(str, field["shape"]))
        lines.append(f"  {field['name']}  {field['dtype']}, {shape}, {layout}, {', '.join(extras)}")
    return [*lines, ""]


def _to(values: list[float]) -> str:
    return f" to {max(values):.4g}" if max(values) > min(values) else ""


def _same(steps: list[float]) -> bool:
    return bool(steps) and max(steps) - min(steps) <= 1e-3 * max(steps)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Align the first two columns left and the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = list(zip(row, widths, strict=True))
        words, numbers = (
            [cell.ljust(width) for cell, width in cells[:2]],
            [cell.rjust(width) for cell, width in cells[2:]],
        )
        lines.append("  ".join([*words, *numbers]).rstrip())
    return lines


def _size(count: int) -> str:
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{count / step:.1f} {unit}"
    return f"{count} bytes"
