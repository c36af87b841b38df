"""Make the figure and table of docs/domains.md from simulated flows (about five minutes on one core).

    python benchmarks/studies/domain_pictures.py [--images docs/images]

Prints a Markdown table of Reynolds and Mach numbers at 32^3 and writes domains.png, slices at 64^3.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap

from shodh_moe.base.files import atomic_file
from shodh_moe.report.run.fields import mid_slice
from shodh_moe.report.style import TICK, panels, png
from shodh_moe.solvers import Simulation, simulate
from shodh_moe.solvers.domains import (
    DOMAINS,
    DecayingTurbulence,
    Domain,
    ObstacleWake,
    OpenChannel,
    PorousMedia,
)

# Domain, caption, settings at 64^3 with enough time for the flow to develop, and the index of a trajectory whose bodies
# are well placed for a slice.
PICTURES: list[tuple[str, str, Domain, int]] = [
    ("open_channel", "spheres", OpenChannel(roughness=0.25, spinup_steps=500), 1),
    ("porous_media", "blobs", PorousMedia(geometry=["blobs"], porosity=[0.6, 0.6], grain=7.0), 1),
    ("obstacle_wake", "one cylinder", ObstacleWake(bodies=["cylinder"], count=[1, 1], spinup_steps=1400), 2),
    ("decaying_turbulence", "k4", DecayingTurbulence(spinup_steps=200), 1),
    ("open_channel", "dunes", OpenChannel(bed=["dunes"], roughness=0.25, spinup_steps=500), 1),
    ("porous_media", "fractures", PorousMedia(geometry=["fractures"], fractures=[4, 4], spinup_steps=500), 1),
    ("obstacle_wake", "three bodies", ObstacleWake(count=[3, 3], spinup_steps=1200), 10),
    ("decaying_turbulence", "von_karman", DecayingTurbulence(spectrum="von_karman", spinup_steps=200), 1),
]


def picture(folder: Path) -> None:
    figure, axes = panels(len(PICTURES), 4, height=2.9, images=True)
    for axis, (domain, what, config, trajectory) in zip(axes, PICTURES, strict=True):
        flow = simulate(domain, config, (64, 64, 64), 0, trajectory, 1)
        speed_XYZ, solid_XYZ = np.linalg.norm(flow.velocity_T3XYZ[0], axis=0), flow.solid_XYZ
        if domain in ("open_channel", "obstacle_wake"):
            # Move the plane with most solids to the middle, the plane that `mid_slice` shows.
            across_axis = 1 if domain == "open_channel" else 2
            most = int(solid_XYZ.sum(tuple({0, 1, 2} - {across_axis})).argmax())
            speed_XYZ, solid_XYZ = (np.roll(a, 32 - most, across_axis) for a in (speed_XYZ, solid_XYZ))
        speed, across, up = mid_slice(domain, speed_XYZ)
        solid, _, _ = mid_slice(domain, solid_XYZ)
        axis.imshow(speed, origin="lower", cmap="viridis", vmin=0)
        axis.imshow(np.ma.masked_equal(solid, 0), origin="lower", cmap=ListedColormap(["0.75"]))
        reynolds = flow.parameters["reynolds"]
        axis.set_title(f"{domain}\n{what}, Re {reynolds:.0f}", fontsize=TICK)
        axis.set_xlabel(across, fontsize=TICK)
        axis.set_ylabel(up, fontsize=TICK)
        axis.set_xticks([])
        axis.set_yticks([])
        print(f"picture: {domain}, {what}", flush=True)
    with atomic_file(folder / "domains.png") as temporary:
        temporary.write_bytes(png(figure))


def change(flow: Simulation) -> float:
    """Mean over snapshots of rms(u[t + 1] - u[t]) / rms(u[t + 1])."""
    u = flow.velocity_T3XYZ.astype(np.float64)
    return float(np.sqrt((np.diff(u, axis=0) ** 2).sum((1, 2, 3, 4)) / (u[1:] ** 2).sum((1, 2, 3, 4))).mean())


def table(trajectories: int) -> None:
    print("| domain | Reynolds number | its length, cells | Mach number | cell Reynolds number | change per snapshot |")
    print("|---|---|---|---|---|---|")
    for domain, kind in DOMAINS.items():
        flows = [simulate(domain, kind(), (32, 32, 32), 0, number, 8) for number in range(trajectories)]
        cells = []
        for key, digits in (("reynolds", 0), ("length", 1), ("mach", 2), ("cell_reynolds", 0)):
            values = [float(flow.parameters[key]) for flow in flows]
            cells.append(f"{min(values):.{digits}f} to {max(values):.{digits}f}")
        changes = [change(flow) for flow in flows]
        print(f"| `{domain}` | {' | '.join(cells)} | {min(changes):.2f} to {max(changes):.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=Path("docs/images"), help="folder of the figure")
    parser.add_argument("--trajectories", type=int, default=6, help="flows per domain for the table")
    options = parser.parse_args()
    table(options.trajectories)
    picture(options.images)


if __name__ == "__main__":
    main()
