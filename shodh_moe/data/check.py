"""Find all errors and warnings of a dataset in one pass over its files: ``shodh data check``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shodh_moe.base.errors import UserError
from shodh_moe.base.progress import progress
from shodh_moe.base.text import printable
from shodh_moe.base.yaml_text import parse_yaml
from shodh_moe.config.window import Window
from shodh_moe.data.derivatives import relative_divergence
from shodh_moe.data.listing import SPLITS, domain_names, files_of, open_file, require_inside
from shodh_moe.data.opening import opened
from shodh_moe.data.reading import TrajectoryRecord, read_provenance, read_snapshots
from shodh_moe.data.repeats import SeenSnapshots, has_repeated_end
from shodh_moe.data.schema import schema_findings
from shodh_moe.data.stats import STATS_FILE, TrajectorySums, combined
from shodh_moe.data.trainable import require_trainable

# relative_divergence of a well resolved flow is below this; independent random components give 0.58.
DIVERGENCE = 0.2
SOLID_SPEED = 1e-3  # largest accepted speed in solids, relative to the flow's rms
STALE = 1e-4  # largest accepted deviation of a stored statistic, relative to the field's rms


@dataclass(frozen=True)
class Finding:
    """One problem of a dataset.

    Attributes:
        severity: ``error`` if training fails or learns from wrong data, otherwise ``warning``.
        file: path relative to the dataset's folder.
        dataset: the HDF5 dataset or attribute; may be empty.
        text: what was found and what was expected.
    """

    severity: str
    file: str
    dataset: str
    text: str

    def line(self) -> str:
        """Format the finding as one line."""
        return printable(f"{self.severity}: {self.file}: {self.dataset + ': ' if self.dataset else ''}{self.text}")


@dataclass
class CheckReport:
    """All findings, and measurements of each trajectory, whether or not they indicate a problem."""

    findings: list[Finding] = field(default_factory=list)
    trajectories: list[dict[str, Any]] = field(default_factory=list)

    @property
    def errors(self) -> int:
        return sum(finding.severity == "error" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values, with the numbers of errors and warnings."""
        return {"errors": self.errors, "warnings": len(self.findings) - self.errors, **asdict(self)}

    def text(self) -> str:
        """One line per finding, then the divergence of each trajectory and a summary."""
        lines = [finding.line() for finding in self.findings]
        lines += [
            f"{printable(one['file'])}{'' if one['sample'] == 0 else ' trajectory ' + str(one['sample'])}: "
            f"rms of the divergence is {one['divergence']:.2g} of the velocity gradient's"
            for one in self.trajectories
        ]
        warnings = len(self.findings) - self.errors
        return "\n".join([*lines, f"{len(self.trajectories)} trajectories, {self.errors} errors, {warnings} warnings"])


def check_files(path: Path, skip_bad: bool = False) -> CheckReport:
    """Read every file of a dataset's folder, or one file, and report all problems.

    Args:
        skip_bad: report unreadable files as warnings.

    Raises:
        UserError: there is no file.
    """
    path = Path(path)
    splits = files_of(path)
    root = path if path.is_dir() else path.parent
    report, seen = CheckReport(), SeenSnapshots()
    sums: list[TrajectorySums] = []
    records: dict[str, list[TrajectoryRecord]] = {split: [] for split in splits}
    bad = 0
    every = [(split, file) for split, files in splits.items() for file in files]
    for split, file in progress(every, "checking", len(every)):
        name = str(file.relative_to(root))
        try:
            found = open_file(file, path)
            report.findings += _header(name, file, found)
            for record in found:
                report.findings += _values(name, split, record, report, seen, sums if split == "train" else [])
            records[split] += found
        except UserError as error:
            bad += 1
            text = str(error).removeprefix(f"{file}").lstrip(": ")
            report.findings.append(Finding("warning" if skip_bad else "error", name, "", text))
            report.findings += _schema_of_bad(name, file, path)
    report.findings += [Finding("error" if one.leak else "warning", one.file, "", one.text) for one in seen.repeats()]
    report.findings += _grids(root, [record for found in records.values() for record in found])
    if path.is_dir():
        report.findings += _splits(path, records)
        report.findings += _stats(path, sums, complete=not bad or skip_bad)
    return report


def _header(name: str, path: Path, records: list[TrajectoryRecord]) -> Iterator[Finding]:
    """Find problems of the header that do not prevent reading the file."""
    with opened(path) as file:
        yield from (Finding("warning", name, where, text) for where, text in schema_findings(file))
    provenance = read_provenance(path)
    if not provenance:
        yield Finding("warning", name, "provenance", "missing or incomplete: the origin of the data is unknown")
    elif not provenance.get("units"):
        yield Finding("warning", name, "provenance/units", "missing: expected the units of the values")
    record = records[0]
    if record.spacing is None:
        yield Finding("warning", name, "dimensions", "no coordinates: assuming cubic cells of size 1")
    elif np.ptp(record.spacing) > 1e-3 * min(record.spacing):
        shown = " x ".join(f"{step:.4g}" for step in record.spacing)
        yield Finding("error", name, "dimensions", f"cells of {shown}: expected cubes; resample with shodh data import")
    if record.interval is None:
        yield Finding("warning", name, "dimensions/time", "no times: expected a constant time step")
    if any(size % 8 for size in record.grid):
        yield Finding("error", name, "", f"grid {list(record.grid)}: the tokenizer needs multiples of 8; crop it")


def _schema_of_bad(name: str, path: Path, dataset: Path) -> list[Finding]:
    """Find schema problems of a file that cannot be used, if it can at least be opened."""
    try:
        require_inside(path, dataset)
        with opened(path) as file:
            return [Finding("warning", name, where, text) for where, text in schema_findings(file)]
    except UserError:
        return []


def _values(
    name: str,
    split: str,
    record: TrajectoryRecord,
    report: CheckReport,
    seen: SeenSnapshots,
    sums: list[TrajectorySums],
) -> Iterator[Finding]:
    """Find problems of the field values, read one snapshot at a time; add measurements to ``report`` and ``sums``."""
    bad, energy, fastest, divergences, solid_1XYZ = [], 0.0, 0.0, [], None
    ends: dict[str, list[bool | None]] = {"xyz"[axis]: [] for axis in range(3) if record.periodic[axis]}
    own = TrajectorySums()
    sums.append(own)
    observed = {0, record.n_snapshots // 2, record.n_snapshots - 1}
    for snapshot in range(record.n_snapshots):
        try:
            fields_T4XYZ, solid_1XYZ = read_snapshots(record, snapshot, snapshot + 1)
        except UserError as error:
            bad.append(str(error).removeprefix(f"{record.path}: "))
            own.add({})
            continue
        u_3XYZ, solid_XYZ = fields_T4XYZ[0, :3], solid_1XYZ[0] > 0.5
        seen.add(name, split, record.sample, snapshot, fields_T4XYZ)
        energy += float(np.mean(np.sum(u_3XYZ.astype(np.float64) ** 2, 0)))
        if solid_XYZ.any():
            fastest = max(fastest, float(np.linalg.norm(u_3XYZ[:, solid_XYZ], axis=0).max()))
        if snapshot in observed:
            divergences.append(relative_divergence(u_3XYZ, solid_XYZ, record))
            for axis, found in ends.items():
                found.append(has_repeated_end(u_3XYZ, "xyz".index(axis), ~solid_XYZ))
        fields = {"velocity": fields_T4XYZ[0, :3], "pressure": fields_T4XYZ[0, 3:]}
        own.add(fields if snapshot else {**fields, "solid": solid_1XYZ})
    for text in bad[:3]:
        yield Finding("error", name, "", text)
    if len(bad) > 3:
        yield Finding("error", name, "", f"{len(bad) - 3} more snapshots have the same problem")
    speed = (energy / max(record.n_snapshots - len(bad), 1)) ** 0.5
    divergence = max(divergences, default=float("nan"))
    report.trajectories.append(
        {
            "file": name,
            "sample": record.sample,
            "divergence": divergence,
            "rms_speed": speed,
            "largest_speed_in_solids": fastest,
        }
    )
    if not speed and not bad:
        yield Finding("error", name, "t1_fields/velocity", "zero everywhere: expected a flow")
    if speed and fastest > SOLID_SPEED * speed:
        yield Finding(
            "warning", name, "t1_fields/velocity", f"up to {fastest / speed:.2g} of its rms in solid voxels: expected 0"
        )
    if solid_1XYZ is not None and not np.isin(solid_1XYZ, (0, 1)).all():
        yield Finding("warning", name, "t0_fields/solid", "values other than 0 and 1")
    if solid_1XYZ is not None and solid_1XYZ.min() > 0.5:
        yield Finding("error", name, "t0_fields/solid", "solid everywhere: expected 1 in solids and 0 in the fluid")
    for axis, found in ends.items():
        if True in found and False not in found:
            yield Finding(
                "error",
                name,
                "t1_fields/velocity",
                f"the last plane along {axis} repeats the first, but a periodic axis holds each point once: drop the "
                f"last plane, e.g. by an import with `repeated_end: [{axis}]`",
            )
    if divergence > DIVERGENCE:
        yield Finding(
            "warning",
            name,
            "t1_fields/velocity",
            f"rms of the divergence is {divergence:.2g} of the velocity gradient's (central differences), above "
            f"{DIVERGENCE}: not divergence-free, badly resolved, or axes and components mixed up",
        )


def _grids(root: Path, records: list[TrajectoryRecord]) -> Iterator[Finding]:
    """Find files whose grid differs from the first file's, or whose time step from that of the domain's first file."""
    if not records:
        return
    first = records[0]
    steps: dict[str, float] = {}
    for record in records:
        name = str(record.path.relative_to(root))
        if record.sample:
            continue
        if record.grid != first.grid:
            text = f"grid {list(record.grid)}, expected {list(first.grid)} as in {first.path.relative_to(root)}"
            yield Finding("error", name, "", text)
        step = steps.setdefault(record.domain, record.interval or 0.0)
        if abs((record.interval or 0.0) - step) > 1e-3 * step:
            text = f"time step {record.interval or 0:g}, expected {step:g} as in other files of {record.domain}"
            yield Finding("warning", name, "dimensions/time", text)


def _splits(folder: Path, records: dict[str, list[TrajectoryRecord]]) -> Iterator[Finding]:
    """Find problems that `require_trainable` would raise, in each split."""
    for split, found in records.items():
        if not found:
            yield Finding("error", f"data/{split}", "", "no usable trajectory: training needs every split")
        for record in found:
            if record.n_snapshots < 2:
                text = f"{record.n_snapshots} snapshot: expected two or more"
                yield Finding("error", str(record.path.relative_to(folder)), "dimensions/time", text)
    if all(records.values()):
        domains = domain_names(records["train"])
        try:
            windows = {split: Window(history=1) for split in SPLITS}
            require_trainable(folder, records["train"][0].grid, windows, batch_size=len(domains), budget_bytes=0)
        except UserError as error:
            # Other problems of files and statistics are found elsewhere.
            if "has the domains" in str(error):
                yield Finding("error", "data", "", str(error))


def _stats(folder: Path, sums: list[TrajectorySums], complete: bool) -> Iterator[Finding]:
    """Compare stats.yaml with the statistics of the current training split."""
    try:
        stored = parse_yaml((folder / STATS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        yield Finding("error", STATS_FILE, "", "missing: expected the statistics of the training split")
        return
    except (OSError, ValueError) as error:
        yield Finding("error", STATS_FILE, "", f"cannot be read ({' '.join(str(error).split())[:200]})")
        return
    if not complete or not sums:
        return  # the statistics may include files that could not be read
    numbers = combined(sums)
    for key, fields in numbers.items():
        for name, value in fields.items():
            got = (
                stored.get(key, {}).get(name)
                if isinstance(stored, dict) and isinstance(stored.get(key), dict)
                else None
            )
            if name == "solid" and got is None and not numbers["rms"]["solid"]:
                continue  # files of others often have no solids
            wanted = np.atleast_1d(np.asarray(value, dtype=np.float64))
            try:
                found = np.atleast_1d(np.asarray(got, dtype=np.float64))
            except (TypeError, ValueError):
                found = np.full(1, np.nan)
            scale = float(np.max(np.atleast_1d(numbers["rms" + "_delta" * key.endswith("_delta")][name])))
            if found.shape != wanted.shape or not (np.abs(found - wanted) <= STALE * scale).all():
                shown = [f"{one:.6g}" for one in wanted]
                text = f"is {got!r}, but the training split has {', '.join(shown)}: these statistics are of other data"
                yield Finding("error", STATS_FILE, f"{key}.{name}", text)
