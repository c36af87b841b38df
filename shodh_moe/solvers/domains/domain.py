"""The base class of all domains."""

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
    """Number of independent simulations in each split. Splits share no trajectory."""

    train: Positive = 16
    valid: Positive = 4
    test: Positive = 4

    @property
    def total(self) -> int:
        return self.train + self.valid + self.test


class Domain(Section, changes="data"):
    """A kind of flow: its keys in a config, and the setup of one trajectory.

    Lattice units: cell = 1, time step = 1, density = 1.
    """

    # Keys that are not serialized while they have their default. They were added after the first datasets, whose folder
    # names must not change.
    added_keys: ClassVar[frozenset[str]] = frozenset({"smagorinsky", "scalar"})

    trajectories: Trajectories = Trajectories()
    viscosity: PositiveFloat = 0.02
    speed: PositiveFloat = Field(0.03, description="target speed of the fluid; +-30 % by trajectory")
    spinup_steps: NonNegative = Field(100, description="time steps before the first stored snapshot")
    steps_per_snapshot: Positive = 25
    smagorinsky: NonNegativeFloat = Field(0.0, description="constant of Smagorinsky's eddy viscosity; 0: off")
    scalar: ScalarConfig | None = Field(None, description="a passive concentration carried by the flow; null: none")

    def setup(self, grid: Grid, rng: np.random.Generator) -> FlowSetup:
        """Draw the geometry, initial state and driving force of one trajectory from ``rng``.

        Raises:
            ValueError: these settings give no valid flow; the message says which setting to change and how.
            UserError: a file that the settings name cannot be used.
        """
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """Return everything besides grid, seed, trajectory number and number of snapshots that a trajectory depends on.

        The values are JSON-like.
        """
        return self.model_dump(mode="json", exclude={"trajectories"})

    @model_serializer(mode="wrap")
    def _omit_added_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unset = {name for name in self.added_keys if getattr(self, name) == type(self).model_fields[name].default}
        return {name: value for name, value in handler(self).items() if name not in unset}


class PulsedDomain(Domain):
    """A domain whose drive has a pulse, a part that varies with time."""

    pulse: Fraction = Field(0.5, description="largest relative amplitude of the sinusoidal part of the drive")
    pulse_period: PositiveFloat = Field(400.0, description="typical pulse period in time steps")


def drawn_speed(domain: Domain, rng: np.random.Generator) -> float:
    """Draw the speed of one trajectory, within 30 % of the domain's speed."""
    return domain.speed * rng.uniform(0.7, 1.3)


def choose(kinds: list[Any], rng: np.random.Generator) -> Any:
    """Pick one of ``kinds`` at random. A single kind draws nothing from ``rng``."""
    return kinds[int(rng.random() * len(kinds))] if len(kinds) > 1 else kinds[0]
