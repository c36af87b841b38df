"""Three equations in the plane, batched over trajectories, each with a physical parameter of its own.

`reaction_diffusion` (FitzHugh-Nagumo, no flux through the sides), `navier_stokes` (vorticity on a torus, forced) and
`shallow_water` (radial dam breaks). Each has a dataclass of settings, `random_initial` and
`simulate(initial_BCHW, parameter_B, snapshots, interval, settings) -> fields_BTCHW`: float32 or float64 as the initial
fields, on their device; all quantities without units. Rows (H) run along y, columns (W) along x. How well each solves
its equation is measured in docs/validation.md.
"""

from shodh_moe.solvers.planar import navier_stokes, reaction_diffusion, shallow_water

# Raise it whenever the same request no longer gives the same fields: old files are then made again.
PLANAR_VERSION = 1

__all__ = ["PLANAR_VERSION", "navier_stokes", "reaction_diffusion", "shallow_water"]
