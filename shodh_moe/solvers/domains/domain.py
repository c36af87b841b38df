"""What every domain has: the base class of their configs, which are also what sets their flows up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from shodh_moe.base.section import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section
from shodh_moe.solvers.domains.scalar import ScalarConfig

if TYPE_CHECKING:
    from shodh_moe.solvers.flow import FlowSetup

Grid = tuple[int, int, int]


class Trajectories(Section, changes="data"):
    """How many independent simulations each split gets. A split never shares a trajectory."""

    train: Positive = 16
    valid: Positive = 4
    test: Positive = 4

    @property
    def total(self) -> int:
        return self.train + self.valid + self.test


class Domain(Section, changes="data"):
    """A kind of flow: its keys in a config, and how one trajectory of it begins.

    Lattice units: cell = 1, time step = 1, density = 1.
    """

    # Keys that are left out of what is written while they have their default: they came later, and the data made
    # before them keep their folder and are not made again.
    later: ClassVar[frozenset[str]] = frozenset({"smagorinsky", "scalar"})

    trajectories: Trajectories = Trajectories()
    viscosity: PositiveFloat = 0.02
    speed: PositiveFloat = Field(0.03, description="target speed of the fluid; +-30 % by trajectory")
    spinup_steps: NonNegative = Field(100, description="time steps before the first stored snapshot")
    steps_per_snapshot: Positive = 25
    smagorinsky: NonNegativeFloat = Field(0.0, description="constant of Smagorinsky's eddy viscosity; 0: none")
    scalar: ScalarConfig | None = Field(None, description="a passive concentration to carry along; null: none")

    def setup(self, grid: Grid, rng: np.random.Generator) -> FlowSetup:
        """Geometry, initial state and drive of one trajectory, drawn from ``rng``.

        Raises:
            ValueError: none can be made with these settings; says which setting to change and how.
            UserError: a file that the settings name cannot be used.
        """
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """All that the bits of a trajectory depend on, beside grid, seed, number and count of snapshots; JSON-like."""
        return self.model_dump(mode="json", exclude={"trajectories"})

    @model_serializer(mode="wrap")
    def _without_later_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unset = {name for name in self.later if getattr(self, name) == type(self).model_fields[name].default}
        return {name: value for name, value in handler(self).items() if name not in unset}


class PulsedDomain(Domain):
    """A domain whose drive has a part that varies with time, a pulse."""

    pulse: Fraction = Field(0.5, description="largest relative amplitude of the sinusoidal part of the drive")
    pulse_period: PositiveFloat = Field(400.0, description="typical pulse period in time steps")


def drawn_speed(domain: Domain, rng: np.random.Generator) -> float:
    """The speed of one trajectory: the domain's +-30 %."""
    return domain.speed * rng.uniform(0.7, 1.3)


def choose(kinds: list[Any], rng: np.random.Generator) -> Any:
    """One of ``kinds`` at random; nothing is drawn for a single one."""
    return kinds[int(rng.random() * len(kinds))] if len(kinds) > 1 else kinds[0]
