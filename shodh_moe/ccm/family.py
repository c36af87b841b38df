"""Families of regimes: one equation, one physical parameter, and its values for training, validation and testing.

A regime is identified by its coordinate s, which is -1 at the low endpoint, +1 at the high one, and linear in the
parameter, its square root or its logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.ccm.regime_folder import RegimeFolder
from shodh_moe.merging.axes import alpha_at
from shodh_moe.solvers.planar import navier_stokes, reaction_diffusion, shallow_water
from shodh_moe.solvers.planar.navier_stokes import NavierStokes
from shodh_moe.solvers.planar.reaction_diffusion import ReactionDiffusion
from shodh_moe.solvers.planar.shallow_water import ShallowWater

SPLITS = ("support", "endpoint_low", "endpoint_high", "validation", "interpolation", "ood_low", "ood_high")
Settings = ReactionDiffusion | NavierStokes | ShallowWater
Scale = Literal["log", "sqrt", "linear"]


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
    """One equation with a varying parameter. Built-in families are dimensionless; see shodh_moe.solvers.planar.

    Attributes:
        name: name of the family and its folder.
        parameter: for a built-in family one of `PARAMETERS`, otherwise the name of the parameter in the files.
        low, high: the parameter at s = -1 and +1.
        scale: s is linear in the parameter (``linear``), its square root (``sqrt``) or its logarithm (``log``).
        settings: settings of the solver, whose type selects the equation; or the user's files.
        grid: cells per side; 0 for the user's files, which have their own.
        snapshots: stored states per trajectory, including the initial one.
        interval: time between snapshots.
        coordinates: the s of the regimes of each split.
        trajectories: trajectories per regime of each split.
        seed: seed of all random initial states.
        fixed_dam_height: height of the dams if another parameter varies.
        fixed: ``diffusivity`` or ``viscosity`` if another parameter varies.
    """

    name: str
    parameter: str
    low: float
    high: float
    scale: Scale
    settings: Settings | RegimeFolder
    interval: float
    grid: int = 48
    snapshots: int = 21
    coordinates: dict[str, tuple[float, ...]] = field(default_factory=_coordinates)
    trajectories: dict[str, int] = field(default_factory=_trajectories)
    seed: int = 0
    fixed_dam_height: float = 2.0
    fixed: dict[str, float] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """Everything that the family's data depend on, ready for JSON."""
        found = asdict(replace(self, settings=ReactionDiffusion()))
        own = self.settings
        found["settings"] = own.identity() if isinstance(own, RegimeFolder) else asdict(own)
        if not self.fixed:  # families of earlier versions, which had no such field, keep their identity
            del found["fixed"]
        return found

    def count(self, split: str, value: float) -> int:
        """The number of trajectories of a regime."""
        if isinstance(self.settings, RegimeFolder):
            available = self.settings.count(value)
            return min(self.trajectories.get(split, available), available)
        return self.trajectories[split]

    @property
    def cells(self) -> tuple[int, int]:
        """Cells along y and x."""
        return self.settings.shape if isinstance(self.settings, RegimeFolder) else (self.grid, self.grid)

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
        if isinstance(self.settings, RegimeFolder):
            return self.settings.channels
        return SOLVERS[type(self.settings)].CHANNELS  # type: ignore[no-any-return]


SOLVERS: dict[type, Any] = {
    ReactionDiffusion: reaction_diffusion,
    NavierStokes: navier_stokes,
    ShallowWater: shallow_water,
}
# The parameters of each equation that may vary, and the scale in which the one-step map is closest to linear.
PARAMETERS: dict[type, dict[str, Scale]] = {
    ReactionDiffusion: {"diffusivity": "log", "inhibitor_diffusivity": "log"},
    NavierStokes: {"viscosity": "linear", "forcing": "linear"},
    ShallowWater: {"gravity": "sqrt", "dam_height": "linear"},
}
# The parameter of each equation that is no setting of its solver.
OTHER_PARAMETER = {ReactionDiffusion: "diffusivity", NavierStokes: "viscosity", ShallowWater: "dam_height"}

FAMILIES = {
    "reaction_diffusion": Family(
        "reaction_diffusion", "diffusivity", 2e-3, 6e-3, "log", ReactionDiffusion(), interval=0.25
    ),
    "navier_stokes": Family("navier_stokes", "viscosity", 3e-3, 1.1e-2, "linear", NavierStokes(), interval=0.5),
    "shallow_water": Family("shallow_water", "gravity", 0.4, 2.5, "sqrt", ShallowWater(), interval=0.1),
    # This parameter is visible in the state: a network sees the height of the dam and needs no experts for it.
    "dam_height": Family("dam_height", "dam_height", 1.5, 2.5, "linear", ShallowWater(), interval=0.1),
}


def settings_at(family: Family, value: float) -> Settings:
    """The solver's settings at a value of the family's parameter, which may be one of them."""
    settings = family.settings
    assert not isinstance(settings, RegimeFolder)
    if isinstance(settings, ReactionDiffusion) and family.parameter == "inhibitor_diffusivity":
        return replace(settings, inhibitor_diffusivity=value)
    if isinstance(settings, NavierStokes) and family.parameter == "forcing":
        return replace(settings, forcing=value)
    return settings


def initial_states(
    family: Family, seeds: Sequence[np.random.SeedSequence], value: float, device: str | torch.device = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random initial fields [B, C, H, W] and the solver's parameter [B], both float64, for a value of the family's."""
    settings = settings_at(family, value)

    def all_of(one: float) -> torch.Tensor:
        return torch.full((len(seeds),), one, dtype=torch.float64)

    if isinstance(settings, ShallowWater):
        height = value if family.parameter == "dam_height" else family.fixed_dam_height
        fields = shallow_water.random_initial(seeds, all_of(height), family.grid, settings)
        parameter = value if family.parameter == "gravity" else settings.gravity
    else:
        fields = SOLVERS[type(settings)].random_initial(seeds, family.grid, settings)
        own = OTHER_PARAMETER[type(settings)]
        parameter = value if family.parameter == own else family.fixed[own]
    return fields.to(device), all_of(parameter).to(device)


def simulate(
    family: Family, seeds: Sequence[np.random.SeedSequence], value: float, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """Solve one trajectory per seed at a value of the parameter: [B, T, C, H, W] float64.

    Raises:
        UserError: a setting or the input is refused by the solver.
        DivergedError: a solution diverged.
    """
    fields, parameter = initial_states(family, seeds, value, device)
    settings = settings_at(family, value)
    solution: torch.Tensor = SOLVERS[type(settings)].simulate(
        fields, parameter, family.snapshots, family.interval, settings
    )
    return solution


def require_sound(family: Family) -> None:
    """Refuse a family that cannot be generated. Raises `UserError`."""
    name, files = f"family {family.name}", isinstance(family.settings, RegimeFolder)
    if not files:
        equation = type(family.settings)
        if family.parameter not in PARAMETERS[equation]:
            choices = " or ".join(PARAMETERS[equation])
            raise UserError(f"{name}: {equation.__name__} has no parameter {family.parameter!r}: give {choices}")
        if family.grid < 2:
            raise UserError(f"{name}: grid is {family.grid}: give at least 2")
    # Only the parameter of a user's files may have any sign, as long as the scale permits it.
    positive = not files or family.scale != "linear"
    if not family.low < family.high or (positive and family.low <= 0):
        wanted = "0 < low < high" if positive else "low < high"
        raise UserError(f"{name}: low is {family.low:g} and high is {family.high:g}: give {wanted}")
    if family.snapshots < 2 or not family.interval > 0:
        raise UserError(f"{name}: give at least 2 for snapshots, and a positive interval")
    for split, coordinates in family.coordinates.items():
        if split not in SPLITS:
            raise UserError(f"{name}: unknown split {split!r}: choose from {', '.join(SPLITS)}")
        if not files and family.trajectories.get(split, 0) < 1:
            raise UserError(f"{name}: trajectories needs a positive number for split {split}")
        if len({f"{coordinate:+.3f}" for coordinate in coordinates}) < len(coordinates):
            raise UserError(f"{name}: two coordinates of {split} are equal to three decimals: give different ones")
        for coordinate in coordinates:
            if positive and not family.value(coordinate) > 0:
                raise UserError(
                    f"{name}: {family.parameter} is {family.value(coordinate):g} at s = {coordinate:g} ({split}): "
                    "use the log scale or a smaller range"
                )
