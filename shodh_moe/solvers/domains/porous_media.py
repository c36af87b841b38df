"""Porous-media flow: driven by a mean pressure gradient through a periodic solid, started from rest.

The x component of the gradient pulses and its y and z components rotate, so that the flow keeps finding new ways
through the pores. Two short runs calibrate the gradient's size. They start from a guess by Kozeny and Carman's formula,
or for fractures by that of flow between plates.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from shodh_moe.base.section import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat
from shodh_moe.solvers.calibration import ramp
from shodh_moe.solvers.domains.domain import Domain, Grid, PulsedDomain, choose, drawn_speed
from shodh_moe.solvers.domains.geometry_file import GeometryFile
from shodh_moe.solvers.flow import Calibration, Drive, FloatArray, FlowSetup, Pulse, Turn
from shodh_moe.solvers.geometry import blob_field, fractures, percolating, sphere_field, threshold

# Low enough that the Mach number stays near 0.2 although the pulse can double the speed.
MAX_THROAT_SPEED = 0.08
_MAX_DRAWS = 100

Geometry = Literal["spheres", "blobs", "fractures"]
Drawn = dict[str, float | int | str]


class PorousMedia(PulsedDomain):
    """Flow driven by a mean pressure gradient through a periodic solid, started from rest."""

    added_keys: ClassVar[frozenset[str]] = Domain.added_keys | {
        "geometry",
        "aperture",
        "fractures",
        "fracture_roughness",
        "geometry_file",
    }

    viscosity: PositiveFloat = 0.02
    speed: PositiveFloat = 0.027
    spinup_steps: NonNegative = 400
    steps_per_snapshot: Positive = 50
    pulse: Fraction = 1.0
    geometry: list[Geometry] = Field(
        ["spheres", "blobs"], min_length=1, description="kinds of solid from which each trajectory draws one"
    )
    porosity: list[Fraction] = Field(
        [0.65, 0.9], description="range from which to draw the porosity of spheres and blobs"
    )
    grain: PositiveFloat = Field(5.5, description="radius of spheres and length scale of blobs, in cells")
    aperture: PositiveFloat = Field(5.0, description="open width of fractures in cells; determines their porosity")
    fractures: list[Positive] = Field([2, 4], description="range from which to draw the number of fractures")
    fracture_roughness: NonNegativeFloat = Field(0.8, description="rms displacement of a fracture's walls in cells")
    geometry_file: GeometryFile | None = Field(
        None, description="file from which to take all solids, in place of `geometry`"
    )

    @model_validator(mode="after")
    def _ranges(self) -> PorousMedia:
        if len(self.porosity) != 2 or not 0.3 <= self.porosity[0] <= self.porosity[1] <= 0.98:
            raise ValueError(f"porosity must be [low, high] with 0.3 <= low <= high <= 0.98, not {self.porosity}")
        if len(self.fractures) != 2 or self.fractures[0] > self.fractures[1]:
            raise ValueError(f"fractures must be [low, high] with low <= high, not {self.fractures}")
        return self

    def setup(self, grid: Grid, rng: np.random.Generator) -> FlowSetup:
        """See `Domain.setup`."""
        speed = drawn_speed(self, rng)
        solid_XYZ, drawn = porous_solid(grid, self, rng)
        pulse = Pulse.draw(rng, self.pulse, self.pulse_period)
        turn = Turn.draw(rng, self.pulse, self.pulse_period)
        if drawn["geometry"] == "fractures":
            # Flow between plates: permeability = porosity aperture^2 / 12.
            permeability, pore, length = float(drawn["porosity"]) * self.aperture**2 / 12, self.aperture, self.aperture
        else:
            permeability, pore, length = kozeny_carman(solid_XYZ, self.grain), self.grain, 2 * self.grain

        def force(size: float) -> Drive:
            def drive(time_T: FloatArray) -> FloatArray:
                direction_T3 = np.column_stack([1 + pulse.value(time_T), turn.value(time_T)])
                return np.asarray(size * ramp(time_T)[:, None] * direction_T3)

            return drive

        return FlowSetup(
            solid_XYZ=solid_XYZ,
            lid=False,
            length=length,
            calibration=Calibration(
                speed=speed,
                max_speed=MAX_THROAT_SPEED,
                guess=self.viscosity * speed * float(1 - solid_XYZ.mean()) / permeability,
                # Momentum diffuses across a pore well within this time.
                steps=int(np.clip(0.6 * pore**2 / self.viscosity, 100, 1000)),
                force=force,
            ),
            parameters={"target_speed": speed, **drawn},
        )

    def identity(self) -> dict[str, Any]:
        """See `Domain.identity`. Includes the hash of a geometry file.

        Raises:
            UserError: the geometry file cannot be read.
        """
        identity = super().identity()
        if self.geometry_file:
            identity["geometry_file"] = {**identity["geometry_file"], "sha256": self.geometry_file.sha256()}
        return identity


def porous_solid(grid: Grid, config: PorousMedia, rng: np.random.Generator) -> tuple[NDArray[np.bool_], Drawn]:
    """Draw a solid through which flow along x is possible.

    Returns:
        The mask [X, Y, Z], bool, and the drawn parameters.

    Raises:
        ValueError: no mask in 100 draws percolates (porosity too low for the grain size).
        UserError: the geometry file cannot be used.
    """
    if config.geometry_file:
        return _solid_of_file(grid, config.geometry_file, rng)
    kind: Geometry = choose(config.geometry, rng)
    if kind == "fractures":
        return _fractured(grid, config, rng)
    porosity = rng.uniform(config.porosity[0], config.porosity[1])
    for sub_seed in range(_MAX_DRAWS):
        draw = np.random.default_rng(rng.integers(2**63))
        if kind == "spheres":
            field_XYZ = sphere_field(grid, config.grain, porosity, draw)
        else:
            field_XYZ = blob_field(grid, config.grain, draw)
        solid_XYZ = percolating(threshold(field_XYZ, porosity))
        # Filling dead pores must not change the porosity too much.
        if solid_XYZ is not None and solid_XYZ.any() and 1 - solid_XYZ.mean() > 0.9 * porosity:
            return solid_XYZ, _drawn(kind, solid_XYZ, sub_seed + 1)
    raise ValueError(
        f"no percolating porous solid in {_MAX_DRAWS} draws at porosity {porosity:.2f}: raise porosity or lower grain"
    )


def _fractured(grid: Grid, config: PorousMedia, rng: np.random.Generator) -> tuple[NDArray[np.bool_], Drawn]:
    count = int(rng.integers(config.fractures[0], config.fractures[1] + 1))
    for number in range(_MAX_DRAWS):
        solid_XYZ = percolating(fractures(grid, config.aperture, count, config.fracture_roughness, rng))
        if solid_XYZ is not None and solid_XYZ.any():
            return solid_XYZ, {**_drawn("fractures", solid_XYZ, number + 1), "fractures": count}
    raise ValueError(
        f"no {count} fractures in {_MAX_DRAWS} draws let flow through and leave some rock: lower "
        f"fracture_roughness or change aperture (now {config.aperture:g} cells)"
    )


def _solid_of_file(grid: Grid, file: GeometryFile, rng: np.random.Generator) -> tuple[NDArray[np.bool_], Drawn]:
    for number in range(_MAX_DRAWS):
        solid_XYZ, corner_3 = file.read(grid, rng)
        found_XYZ = percolating(solid_XYZ)
        if found_XYZ is not None and found_XYZ.any():
            corner: Drawn = {f"corner_{axis}": int(cell) for axis, cell in zip("xyz", corner_3, strict=True)}
            return found_XYZ, {**_drawn("file", found_XYZ, number + 1), **corner}
    raise ValueError(
        f"no part of {file.path} in {_MAX_DRAWS} draws has solid and a fluid path through it along x: "
        "check geometry_file.solid_value and geometry_file.order"
    )


def _drawn(kind: str, solid_XYZ: NDArray[np.bool_], draws: int) -> Drawn:
    return {"geometry": kind, "porosity": float(1 - solid_XYZ.mean()), "geometry_draws": draws}


def kozeny_carman(solid_XYZ: NDArray[np.bool_], grain: float) -> float:
    """Permeability in cells^2 of a pack of spheres of diameter d = 2 ``grain`` (Kozeny and Carman).

    permeability = porosity^3 d^2 / (180 (1 - porosity)^2)
    """
    porosity = 1 - float(solid_XYZ.mean())
    return porosity**3 * (2 * grain) ** 2 / (180 * (1 - porosity) ** 2)
