"""Families of regimes: one equation, one physical parameter, and its values for training, validation and testing.

A regime is identified by its coordinate s, which is -1 at the low endpoint, +1 at the high one, and linear in the
parameter, its square root or its logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.merging.axes import alpha_at
from shodh_moe.solvers.planar import navier_stokes, reaction_diffusion, shallow_water
from shodh_moe.solvers.planar.navier_stokes import NavierStokes
from shodh_moe.solvers.planar.reaction_diffusion import ReactionDiffusion
from shodh_moe.solvers.planar.shallow_water import ShallowWater

SPLITS = ("support", "endpoint_low", "endpoint_high", "validation", "interpolation", "ood_low", "ood_high")
Settings = ReactionDiffusion | NavierStokes | ShallowWater


def _coordinates() -> dict[str, tuple[float, ...]]:
    return {
        "support": (-1.0, -0.5, 0.0, 0.5, 1.0),
        "endpoint_low": (-1.0,),
        "endpoint_high": (1.0,),
        "validation": (-1.2, -0.6, 0.6, 1.2),
        "interpolation": (-0.75, -0.25, 0.25, 0.75),
        "ood_low": (-1.5, -1.35),
        "ood_high": (1.35, 1.5),
    }


def _trajectories() -> dict[str, int]:
    return {
        "support": 128,
        "endpoint_low": 256,
        "endpoint_high": 256,
        "validation": 12,
        "interpolation": 12,
        "ood_low": 16,
        "ood_high": 16,
    }


@dataclass(frozen=True)
class Family:
    """One equation with a varying parameter. All quantities are dimensionless; see shodh_moe.solvers.planar.

    Attributes:
        name: name of the family and its folder.
        parameter: ``diffusivity`` (D_u, reaction-diffusion), ``viscosity`` (Navier-Stokes), ``dam_height`` or
            ``gravity`` (shallow water).
        low, high: the parameter at s = -1 and +1.
        scale: s is linear in the parameter (``linear``), its square root (``sqrt``) or its logarithm (``log``).
        settings: settings of the solver; their type selects the equation.
        grid: cells per side.
        snapshots: stored states per trajectory, including the initial one.
        interval: time between snapshots.
        coordinates: the s of the regimes of each split.
        trajectories: trajectories per regime of each split.
        seed: seed of all random initial states.
        fixed_dam_height: height of the dams if the parameter is ``gravity``.
    """

    name: str
    parameter: Literal["diffusivity", "viscosity", "dam_height", "gravity"]
    low: float
    high: float
    scale: Literal["log", "sqrt", "linear"]
    settings: Settings
    interval: float
    grid: int = 48
    snapshots: int = 21
    coordinates: dict[str, tuple[float, ...]] = field(default_factory=_coordinates)
    trajectories: dict[str, int] = field(default_factory=_trajectories)
    seed: int = 0
    fixed_dam_height: float = 2.0

    def value(self, coordinate: float) -> float:
        """The parameter at coordinate s."""
        if self.scale == "log":
            return math.sqrt(self.low * self.high) * (self.high / self.low) ** (coordinate / 2)
        if self.scale == "sqrt":
            low, high = math.sqrt(self.low), math.sqrt(self.high)
            root = (low + high) / 2 + coordinate * (high - low) / 2
            return math.copysign(root**2, root)
        return (self.low + self.high) / 2 + coordinate * (self.high - self.low) / 2

    def coordinate(self, value: float) -> float:
        """The coordinate s of a value of the parameter; s is not limited to [-1, 1]."""
        return alpha_at(value, self.low, self.high, self.power)

    @property
    def power(self) -> float:
        """The power of the parameter in which s is linear; 0 means its logarithm."""
        return {"linear": 1.0, "sqrt": 0.5, "log": 0.0}[self.scale]

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the C channels."""
        return SOLVERS[type(self.settings)].CHANNELS


SOLVERS: dict[type, Any] = {
    ReactionDiffusion: reaction_diffusion,
    NavierStokes: navier_stokes,
    ShallowWater: shallow_water,
}
_PARAMETERS: dict[type, tuple[str, ...]] = {
    ReactionDiffusion: ("diffusivity",),
    NavierStokes: ("viscosity",),
    ShallowWater: ("dam_height", "gravity"),
}

FAMILIES = {
    "reaction_diffusion": Family(
        "reaction_diffusion", "diffusivity", 2e-3, 6e-3, "log", ReactionDiffusion(), interval=0.25
    ),
    "navier_stokes": Family("navier_stokes", "viscosity", 3e-3, 1.1e-2, "linear", NavierStokes(), interval=0.5),
    "shallow_water": Family("shallow_water", "gravity", 0.4, 2.5, "sqrt", ShallowWater(), interval=0.1),
    # This parameter is visible in the state: a network sees the height of the dam and needs no experts for it.
    "dam_height": Family("dam_height", "dam_height", 1.5, 2.5, "linear", ShallowWater(), interval=0.1),
}


def initial_states(
    family: Family, seeds: Sequence[np.random.SeedSequence], value: float, device: str | torch.device = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random initial fields [B, C, H, W] and the solver's parameter [B], both float64, for a value of the family's."""
    settings, parameter = family.settings, torch.full((len(seeds),), value, dtype=torch.float64)
    if isinstance(settings, ReactionDiffusion):
        fields = reaction_diffusion.random_initial(seeds, family.grid, settings)
    elif isinstance(settings, NavierStokes):
        fields = navier_stokes.random_initial(seeds, family.grid, settings)
    elif family.parameter == "gravity":
        fields = shallow_water.random_initial(
            seeds, torch.full_like(parameter, family.fixed_dam_height), family.grid, settings
        )
    else:
        fields = shallow_water.random_initial(seeds, parameter, family.grid, settings)
        parameter = torch.full_like(parameter, settings.gravity)
    return fields.to(device), parameter.to(device)


def simulate(
    family: Family, seeds: Sequence[np.random.SeedSequence], value: float, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """Solve one trajectory per seed at a value of the parameter: [B, T, C, H, W] float64.

    Raises:
        UserError: a setting or the input is refused by the solver.
        DivergedError: a solution diverged.
    """
    fields, parameter = initial_states(family, seeds, value, device)
    module = SOLVERS[type(family.settings)]
    solution: torch.Tensor = module.simulate(fields, parameter, family.snapshots, family.interval, family.settings)
    return solution


def require_sound(family: Family) -> None:
    """Refuse a family that cannot be generated. Raises `UserError`."""
    name, equation = f"family {family.name}", type(family.settings)
    known = _PARAMETERS[equation]
    if family.parameter not in known:
        choices = " or ".join(known)
        raise UserError(f"{name}: {equation.__name__} has no parameter {family.parameter!r}: give {choices}")
    if not 0 < family.low < family.high:
        raise UserError(f"{name}: low is {family.low:g} and high is {family.high:g}: give 0 < low < high")
    if min(family.grid, family.snapshots) < 2 or not family.interval > 0:
        raise UserError(f"{name}: give at least 2 for grid and snapshots, and a positive interval")
    for split, coordinates in family.coordinates.items():
        if split not in SPLITS:
            raise UserError(f"{name}: unknown split {split!r}: choose from {', '.join(SPLITS)}")
        if family.trajectories.get(split, 0) < 1:
            raise UserError(f"{name}: trajectories needs a positive number for split {split}")
        if len({f"{coordinate:+.3f}" for coordinate in coordinates}) < len(coordinates):
            raise UserError(f"{name}: two coordinates of {split} are equal to three decimals: give different ones")
        for coordinate in coordinates:
            if not family.value(coordinate) > 0:
                raise UserError(
                    f"{name}: {family.parameter} is {family.value(coordinate):g} at s = {coordinate:g} ({split}): "
                    "use the log scale or a smaller range"
                )
