"""The keys of a mapping file, which describes how a user's arrays become trajectories (docs/import.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from shodh_moe.base.section import Name, NonNegative, PathText, Positive, PositiveFloat, Section
from shodh_moe.config.load import load_config_of

AXES = ("x", "y", "z")
SAMPLE = "{n}"  # stands for the name of a trajectory in the names of datasets
Edge = Literal["periodic", "wall", "free slip", "open"]
Range = Annotated[list[NonNegative], Field(min_length=2, max_length=2)]
# A string is a file or pattern, and each matching file is a trajectory; a list is one trajectory in several files.
Entries = list[PathText | list[PathText]]


class Files(Section):
    """The files of each split; paths are relative to the working folder."""

    train: Annotated[Entries, Field(min_length=1)]
    valid: Entries = Field([])
    test: Entries = Field([])


class Snapshots(Section):
    """Range [first, last + 1] of snapshots for all trajectories of a split; default: all."""

    train: Range | None = None
    valid: Range | None = None
    test: Range | None = None


class Samples(Section):
    """Range [first, last + 1] of a file's trajectories for each split, if files hold many; default: all."""

    train: Range | None = None
    valid: Range | None = None
    test: Range | None = None


class PerAxis(Section):
    """Names of the 1D datasets with the coordinates of the grid points."""

    x: str
    y: str
    z: str


class Crop(Section):
    """Range [first, last + 1] of grid points along each axis, counted in the input."""

    x: Range | None = None
    y: Range | None = None
    z: Range | None = None


class Boundaries(Section):
    """Boundaries of the box after cropping; two values are the low and the high end of an axis."""

    x: Edge | list[Edge]
    y: Edge | list[Edge]
    z: Edge | list[Edge]

    @field_validator("x", "y", "z")
    @classmethod
    def _ends(cls, edge: Edge | list[Edge]) -> Edge | list[Edge]:
        if isinstance(edge, list) and (len(edge) != 2 or "periodic" in edge):
            raise ValueError("give `periodic`, or wall, free slip or open once or for both ends: [wall, open]")
        return edge

    def ends(self, axis: str) -> list[str]:
        """Boundaries at the low and at the high end of an axis."""
        edge = getattr(self, axis)
        return list(edge) if isinstance(edge, list) else [edge, edge]

    @property
    def periodic(self) -> tuple[bool, bool, bool]:
        return self.x == "periodic", self.y == "periodic", self.z == "periodic"


class Mask(Section):
    """Solid voxels: values above 0.5, or with ``inverted`` values up to 0.5; or missing values."""

    dataset: str
    file: PathText | None = Field(None, description="file with the dataset; default: the trajectory's own file")
    inverted: bool = False
    solid: Literal["values", "missing", "both"] = Field(
        "values", description="solid by value, where a value is missing (NaN, or NetCDF's fill value), or by both"
    )


class Resample(Section):
    """Interpolate to cubic cells of one size."""

    method: Literal["linear", "cubic"]
    spacing: PositiveFloat = Field(description="cell size of the new grid, in the input's unit of length")
    cells: Annotated[list[Positive], Field(min_length=3, max_length=3)] | None = None


class Units(Section):
    """Names of units after scaling. Default: velocity in length/time, pressure (over density) in its square."""

    length: str
    time: str
    velocity: str = ""
    pressure: str = ""

    def of(self) -> dict[str, str]:
        """The unit of each quantity."""
        velocity = self.velocity or f"{self.length}/{self.time}"
        pressure = self.pressure or f"({velocity})^2"
        return {"length": self.length, "time": self.time, "velocity": velocity, "pressure": pressure}


class Scale(Section):
    """Factors by which the input's values are multiplied."""

    length: PositiveFloat = 1.0
    time: PositiveFloat = 1.0
    velocity: PositiveFloat = 1.0
    pressure: PositiveFloat = 1.0


class Mapping(Section):
    """All keys of a mapping file."""

    name: Name
    domain: Name
    output: PathText | None = Field(None, description="the dataset's folder; --output overrides it")
    source: str = Field("", description="origin of the data and how to cite it, for the provenance")
    files: Files
    snapshots: Snapshots = Snapshots()
    samples: Samples = Samples()
    axes: list[Literal["n", "t", "x", "y", "z", "c"]] = Field(
        description="order of the stored axes; n: trajectory, c: component"
    )
    velocity: str | list[str]
    components: list[Literal["x", "y", "z", "p", "skip"]] = Field(
        ["x", "y", "z"], description="order of the components in the array; p: pressure, skip: another field"
    )
    staggered: bool = Field(False, description="each component is on the faces of the cells, N + 1 along its own axis")
    pressure: str | None = None
    mask: Mask | None = None
    spacing: PositiveFloat | Annotated[list[PositiveFloat], Field(min_length=3, max_length=3)] | None = None
    coordinates: PerAxis | None = None
    time_step: PositiveFloat | None = Field(None, description="time between snapshots, before scaling")
    time: str | None = Field(None, description="name of the dataset with the times of the snapshots")
    boundaries: Boundaries
    repeated_end: list[Literal["x", "y", "z"]] = Field(
        [], description="periodic axes whose last point repeats the first; it is dropped"
    )
    crop: Crop | Literal["auto"] | None = None
    resample: Resample | None = None
    project: bool = Field(False, description="remove the divergent part of the velocity")
    units: Units
    scale: Scale = Scale()
    scalars: dict[str, float] = Field({}, description="constants of the flow, such as viscosity or reynolds")

    @model_validator(mode="after")
    def _fits_together(self) -> Mapping:
        needed = {"x", "y", "z", "c"} if isinstance(self.velocity, str) else {"x", "y", "z"}
        if len(set(self.axes)) != len(self.axes) or not needed <= set(self.axes) <= needed | {"n", "t"}:
            kind = "one array of velocity" if "c" in needed else "three arrays of velocity"
            raise ValueError(
                f"axes must name {', '.join(sorted(needed))} once each, and t and n if there are any, for {kind}"
            )
        if isinstance(self.velocity, list) and len(self.velocity) != 3:
            raise ValueError("velocity must be one dataset with all components, or a list of three")
        named = sorted(one for one in self.components if one != "skip")
        if named not in (["x", "y", "z"], ["p", "x", "y", "z"]):
            raise ValueError("components must name x, y and z once each, and p if the array holds the pressure, too")
        if self.components != ["x", "y", "z"] and isinstance(self.velocity, list):
            raise ValueError("components is for one array of velocity: leave it out for three arrays")
        if "p" in self.components and self.pressure is not None:
            raise ValueError("components names the pressure p: leave out `pressure`, or write skip instead of p")
        if "p" not in self.components and self.pressure is None:
            raise ValueError(
                "training needs a pressure: name its dataset, write `pressure: zero`, or put p into `components`"
            )
        if self.staggered and isinstance(self.velocity, str):
            raise ValueError("staggered components have different shapes: name three arrays in `velocity`")
        self._require_samples()
        for one, other in (("spacing", "coordinates"), ("time_step", "time")):
            if (getattr(self, one) is None) == (getattr(self, other) is None):
                raise ValueError(f"give either {one} or {other}")
        if self.project and self.mask:
            raise ValueError("project does not support solids: leave out mask, or write `project: false`")
        for closed in self.repeated_end:
            if getattr(self.boundaries, closed) != "periodic":
                raise ValueError(f"axis {closed} is not periodic: use crop.{closed} in place of repeated_end")
        if isinstance(self.crop, Crop):
            for axis, periodic in zip(AXES, self.boundaries.periodic, strict=True):
                if getattr(self.crop, axis) and periodic:
                    raise ValueError(f"axis {axis} is cropped and so not periodic: set boundaries.{axis} to open")
        for name, cut in (
            *_ranges("crop", self.crop),
            *_ranges("snapshots", self.snapshots),
            *_ranges("samples", self.samples),
        ):
            if cut[0] >= cut[1]:
                raise ValueError(f"{name} {cut} is empty: give the first and the last plus one")
        return self

    def _require_samples(self) -> None:
        fields = [self.velocity] if isinstance(self.velocity, str) else list(self.velocity)
        fields += [self.pressure] if self.pressure not in (None, "zero") else []
        named = [name for name in fields if SAMPLE in name]
        if named and (len(named) < len(fields) or "n" in self.axes or any(name.count(SAMPLE) > 1 for name in named)):
            raise ValueError(
                f"{SAMPLE} in {named[0]} stands for a trajectory: write it once in each of velocity and pressure, "
                "and leave n out of axes"
            )
        if not self.many and self.samples != Samples():
            raise ValueError(f"samples is for files with many trajectories: add n to axes, or {SAMPLE} to the names")

    @property
    def many(self) -> bool:
        """Whether a file holds many trajectories: along the axis n, or in datasets whose names hold `SAMPLE`."""
        return "n" in self.axes or SAMPLE in (self.velocity if isinstance(self.velocity, str) else self.velocity[0])

    @property
    def request(self) -> dict[str, object]:
        """All keys that a trajectory's values depend on, except for its files, as JSON-like values."""
        values = self.model_dump(mode="json", exclude={"files", "output", "source", "snapshots", "samples"})
        # Data imported before these keys existed stay valid.
        if not self.staggered:
            del values["staggered"]
        if self.mask and self.mask.solid == "values":
            del values["mask"]["solid"]
        return values


def _ranges(name: str, section: Section | str | None) -> list[tuple[str, list[int]]]:
    if not isinstance(section, Section):
        return []
    return [(f"{name}.{key}", cut) for key, cut in section if cut is not None]


def load_mapping(path: Path | str) -> Mapping:
    """Read a mapping file.

    Raises:
        UserError: the file is missing or not YAML, has an unknown key (names the nearest valid one) or a wrong value.
    """
    return load_config_of(Mapping, path)
