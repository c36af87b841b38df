"""Flow solvers that generate the training data: a lattice Boltzmann method and the domains simulated with it.

Everything is in lattice units (cell size, time step and mean density are 1) and deterministic: the same config, seed
and trajectory number give the same bits, whatever the number of threads and of other trajectories.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shodh_moe.solvers.limits import DivergedError
from shodh_moe.solvers.seeds import SPLIT_BASE, trajectory_seed

if TYPE_CHECKING:
    from shodh_moe.solvers.lattice_boltzmann import LatticeBoltzmann
    from shodh_moe.solvers.simulation import Simulation, simulate

# Increment when the same config and seed no longer give the same flow, so that old files are regenerated.
SOLVER_VERSION = 1

__all__ = [
    "SOLVER_VERSION",
    "SPLIT_BASE",
    "DivergedError",
    "LatticeBoltzmann",
    "Simulation",
    "simulate",
    "trajectory_seed",
]

_HOME = {
    "LatticeBoltzmann": "lattice_boltzmann",
    "Simulation": "simulation",
    "simulate": "simulation",
}


def __getattr__(name: str) -> Any:
    # Imported on demand: a config only names domains, and numba takes a second to load.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
