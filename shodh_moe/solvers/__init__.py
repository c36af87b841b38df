"""Flow solvers that make the training data: a lattice Boltzmann method and the domains simulated with it.

Everything is in lattice units (cell size, time step and mean density are 1) and deterministic: the same config,
seed and trajectory number give the same bits, whatever the number of threads or of other trajectories.
"""

from shodh_moe.solvers.lattice_boltzmann import DivergedError, LatticeBoltzmann
from shodh_moe.solvers.seeds import SPLIT_BASE, trajectory_seed
from shodh_moe.solvers.simulate import Simulation, prepare, simulate

# Raise it whenever the same config and seed no longer give the same flow: old files are then made again.
SOLVER_VERSION = 1

__all__ = [
    "SOLVER_VERSION",
    "SPLIT_BASE",
    "DivergedError",
    "LatticeBoltzmann",
    "Simulation",
    "prepare",
    "simulate",
    "trajectory_seed",
]
