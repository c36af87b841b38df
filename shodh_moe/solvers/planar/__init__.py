"""Solvers of three equations in the plane, batched over trajectories; each trajectory has its own physical parameter.

`reaction_diffusion` (FitzHugh-Nagumo, no flux through the sides), `navier_stokes` (vorticity on a torus, forced) and
`shallow_water` (radial dam breaks). Each module has a dataclass of settings, `random_initial` and
`simulate(initial_BCHW, parameter_B, snapshots, interval, settings) -> fields_BTCHW`. Results have the dtype (float32 or
float64) and device of the initial fields, and all quantities are dimensionless. The row index (H) runs along y, the
column index (W) along x. docs/validation.md reports the accuracy of each.
"""

from shodh_moe.solvers.planar import navier_stokes, reaction_diffusion, shallow_water

# Increment when the same request no longer gives the same fields, so that old files are regenerated.
PLANAR_VERSION = 1

__all__ = ["PLANAR_VERSION", "navier_stokes", "reaction_diffusion", "shallow_water"]
