"""Three equations in the plane, batched over trajectories, each with its own physical parameter.

`reaction_diffusion` (FitzHugh-Nagumo, no flux through the sides), `navier_stokes` (vorticity on a torus, forced) and
`shallow_water` (radial dam breaks). Each has a dataclass of settings, `random_initial` and
`simulate(initial_BCHW, parameter_B, snapshots, interval, settings) -> fields_BTCHW`: dtype and device are those of
the initial fields, float32 or float64, and all quantities are dimensionless. Rows (H) run along y, columns (W) along x.
docs/validation.md measures the accuracy of each.
"""

from shodh_moe.solvers.planar import navier_stokes, reaction_diffusion, shallow_water

# Increase this whenever the same request no longer gives the same fields, so that old files are regenerated.
PLANAR_VERSION = 1

__all__ = ["PLANAR_VERSION", "navier_stokes", "reaction_diffusion", "shallow_water"]
