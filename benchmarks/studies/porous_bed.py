"""Make the tables and figure of the porous bed in docs/validation.md and docs/domains.md (a minute on one core).

    python benchmarks/studies/porous_bed.py [--images docs/images]

Prints Markdown tables, all at 32^3, and writes porous_bed.png.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, for `studies`

from shodh_moe.base.files import atomic_file
from shodh_moe.report.run.fields import mid_slice
from shodh_moe.report.style import TICK, panels, png
from shodh_moe.solvers import Simulation, simulate
from shodh_moe.solvers.domains import PorousBed
from shodh_moe.solvers.domains.porous_bed import sphere_bed
from shodh_moe.solvers.domains.porous_media import kozeny_carman
from shodh_moe.solvers.geometry import dense_layers
from studies.lattice_flows import Array, flow, steady, wall_force
from studies.lattice_tables import Table

GRID = (32, 32, 32)
# Domain settings, seed of the bed.
BEDS = (
    (PorousBed(porosity=[0.6, 0.6], height=[0.55, 0.55]), 0),
    (PorousBed(porosity=[0.7, 0.7], height=[0.55, 0.55]), 0),
    (PorousBed(porosity=[0.7, 0.7], height=[0.55, 0.55]), 1),
    (PorousBed(porosity=[0.7, 0.7], height=[0.45, 0.45]), 0),
    (PorousBed(porosity=[0.85, 0.85], height=[0.55, 0.55]), 0),
)


@dataclass
class SteadyBed:
    """Steady creeping flow over and through a bed, driven by a uniform force along x.

    The interface is the plane between layers ``height`` and ``height`` + 1, below which all spheres lie.
    """

    solid_XYZ: NDArray[np.bool_]
    height: int
    grain: float
    viscosity: float
    force: float
    profile_Z: Array  # mean of u over each layer, solids included
    drag_Z: Array  # force along x on the solid cells of each layer

    @property
    def deep(self) -> slice:
        """The dense layers without the two next to the floor and the one next to the loose top."""
        return slice(3, dense_layers(self.height, self.grain))

    @property
    def darcy(self) -> float:
        """Darcy velocity: mean of u deep in the bed, solids included."""
        return float(self.profile_Z[self.deep].mean())

    @property
    def permeability(self) -> float:
        return self.viscosity * self.darcy / self.force

    def slip(self, below: int = 0) -> float:
        """Velocity on the plane ``below`` layers under the interface."""
        return float(self.profile_Z[self.height - below : self.height - below + 2].mean())

    def alpha(self, below: int = 0) -> float:
        """Beavers and Joseph's slip coefficient, with the interface moved down by ``below`` layers.

        alpha = sqrt(K) u' / (u_B - u_D). The shear u' at the interface is that of the force on the fluid above it.
        """
        above = float((~self.solid_XYZ[:, :, self.height - below + 1 :]).mean((0, 1)).sum())
        shear = self.force * above / self.viscosity
        return math.sqrt(self.permeability) * shear / (self.slip(below) - self.darcy)


def steady_bed(config: PorousBed, seed: int, grid: tuple[int, int, int] = GRID) -> SteadyBed:
    """Simulate Stokes flow (viscosity 0.5, so that it becomes steady soon) with the bed drawn from ``seed``."""
    solid_XYZ, height, _ = sphere_bed(grid, config, np.random.default_rng(seed))
    viscosity, force = 0.5, 1e-6
    moving = flow(solid_XYZ, viscosity, lid=True)
    profile_Z = steady(moving, [force, 0, 0], 200, 1e-6)[0].mean((0, 1))
    return SteadyBed(solid_XYZ, height, config.grain, viscosity, force, profile_Z, wall_force(moving))


def steady_table() -> Table:
    rows = []
    for config, seed in BEDS:
        bed = steady_bed(config, seed)
        radius = round(config.grain)
        dense_XYZ = bed.solid_XYZ[:, :, 1 : 1 + dense_layers(bed.height, config.grain)]
        total = bed.force * float((~bed.solid_XYZ).sum())
        rows.append(
            [
                f"{config.porosity[0]:g}",
                str(bed.height),
                f"{bed.permeability:.2f}",
                f"{kozeny_carman(dense_XYZ, config.grain):.2f}",
                f"{bed.slip() / bed.darcy:.0f}",
                f"{bed.profile_Z[bed.height + 1 :].mean() / bed.darcy:.0f}",
                f"{bed.alpha():.2f}",
                f"{bed.alpha(radius):.2f}",
                f"{bed.drag_Z.sum() / total - 1:+.0e}",
                f"{bed.drag_Z[0] / total:.3f}",
            ]
        )
    header = ["porosity", "height", "K", "Kozeny-Carman", "u_B / u_D", "U / u_D", "alpha", "alpha, a radius lower"]
    return Table("Steady creeping flow, spheres of radius 3", [*header, "drag / force - 1", "share of the floor"], rows)


def unsteady_table(trajectories: int) -> Table:
    rows = []
    for number in range(trajectories):
        start = time.perf_counter()
        config, result = PorousBed(), simulate("porous_bed", PorousBed(), GRID, 0, number, 24)
        seconds, drawn = time.perf_counter() - start, result.parameters
        darcy = float(np.sqrt((bed_velocity(result, config) ** 2).sum(1).mean()))
        rows.append(
            [
                str(number),
                f"{drawn['porosity']:.2f}",
                str(drawn["bed_height"]),
                f"{drawn['reynolds']:.0f}",
                f"{darcy * 2 * config.grain / config.viscosity:.1f}",
                f"{darcy / float(drawn['mean_speed']):.3f}",
                f"{drawn['mach']:.2f}",
                f"{seconds:.1f}",
            ]
        )
    header = ["trajectory", "porosity", "height", "Re of the stream", "Re of the bed", "u_D / U", "Mach", "seconds"]
    return Table("Defaults, seed 0, 24 snapshots", header, rows)


def bed_velocity(result: Simulation, config: PorousBed) -> Array:
    """Mean velocity [T, 3] of the bed's dense layers, solids included."""
    top = 1 + dense_layers(int(result.parameters["bed_height"]), config.grain)
    return np.asarray(result.velocity_T3XYZ[..., 1:top].mean((2, 3, 4), dtype=np.float64))


def picture(folder: Path) -> None:
    figure, (left, middle, right) = panels(3, 3, height=2.6)
    result = simulate("porous_bed", PorousBed(), GRID, 0, 3, 24)
    height = int(result.parameters["bed_height"])
    # Move the plane with most solids to the middle, the plane that `mid_slice` shows.
    shift = GRID[1] // 2 - int(result.solid_XYZ.sum((0, 2)).argmax())
    speed_XYZ = np.roll(np.linalg.norm(result.velocity_T3XYZ[-1], axis=0), shift, 1)
    speed, across, up = mid_slice("porous_bed", speed_XYZ)
    solid, _, _ = mid_slice("porous_bed", np.roll(result.solid_XYZ, shift, 1))
    # The slow flow of the bed shows on a logarithmic scale only.
    left.imshow(np.log10(np.maximum(speed, 1e-6)), origin="lower", cmap="viridis", vmin=-4, vmax=-1.1)
    left.imshow(np.ma.masked_equal(solid, 0), origin="lower", cmap=ListedColormap(["0.75"]))
    left.set_title("speed, logarithmic scale", fontsize=TICK)
    left.set_xticks([])
    left.set_yticks([])
    layers = np.arange(GRID[2]) - 0.5
    profile_TZ = result.velocity_T3XYZ[:, 0].mean((1, 2), dtype=np.float64)
    for number in range(0, 24, 4):
        middle.plot(profile_TZ[number, 1:], layers[1:], color=str(0.75 - number / 32), linewidth=1)
    middle.set_title("mean of u in each layer, six times", fontsize=TICK)
    middle.set_xlabel("cells per time step", fontsize=TICK)
    bed = steady_bed(*BEDS[1])
    right.semilogx(bed.profile_Z[1:] / bed.darcy, layers[1:], color="0.2", linewidth=1.2)
    right.set_title("the same in steady creeping flow", fontsize=TICK)
    right.set_xlabel("over the Darcy velocity", fontsize=TICK)
    for axis, crest in ((middle, height), (right, bed.height)):
        axis.axhline(crest, color="C3", linewidth=0.8, linestyle="--")
        axis.set_ylabel("z, cells from the floor", fontsize=TICK)
    left.set_xlabel(across, fontsize=TICK)
    left.set_ylabel(up, fontsize=TICK)
    with atomic_file(folder / "porous_bed.png") as temporary:
        temporary.write_bytes(png(figure))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=Path("docs/images"), help="folder of the figure")
    parser.add_argument("--trajectories", type=int, default=6, help="flows for the table of unsteady flows")
    options = parser.parse_args()
    print(steady_table().markdown(), flush=True)
    print(unsteady_table(options.trajectories).markdown(), flush=True)
    picture(options.images)


if __name__ == "__main__":
    main()
