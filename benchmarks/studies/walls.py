"""Measure accuracy and time of making velocities divergence-free, with and without walls.

    python benchmarks/studies/walls.py [--json FILE] [--grid 128] [--data FOLDER]

For random smooth velocities over an open channel's bed and in a pack of spheres, and for every operator, kind of walls
and dtype, it reports iterations of conjugate gradients, time, divergence (computed in float64) and velocity in solid
voxels. Lengths are in cells and velocities have an rms of 1; for a box of side 1, multiply divergences by the number of
cells along a side. With --data, a generated dataset, it adds the relative L2 difference between simulated velocities
and their conserved projections, a lower bound on the error of any decoder of that kind.
Shapes: B batch, 3 components, X Y Z space.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, for `support` and `studies`

from shodh_moe.data import list_trajectories, read_snapshots
from shodh_moe.kernels import divergence
from shodh_moe.solvers.domains.open_channel import rough_bed
from shodh_moe.solvers.geometry import sphere_field, threshold
from shodh_moe.tokenizer import walls
from shodh_moe.tokenizer.helmholtz import at_centres, conserved_velocity
from support.common import DTYPES, Report, run

LOCAL = ("staggered", "central2", "central4")
HOW = [("none", "spectral"), *product(("none", "ramp", "exact"), LOCAL)]
SNAPSHOTS = 3  # snapshots per trajectory


def geometry(kind: str, size: int) -> Tensor:
    """Solid mask [1, 1, X, Y, Z]."""
    rng, shape = np.random.default_rng(0), (size, size, size)
    if kind == "open_channel":
        solid_XYZ = rough_bed(shape, 0.15, rng)
    else:
        solid_XYZ = threshold(sphere_field(shape, 5.5, 0.7, rng), 0.7)
    return torch.from_numpy(solid_XYZ)[None, None].float()


def velocity(solid_B1XYZ: Tensor) -> Tensor:
    """Smooth noise plus a mean flow, zero in solids, [1, 3, X, Y, Z], float64."""
    size = solid_B1XYZ.shape[-1]
    noise = torch.randn(1, 3, size, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k, k_z = torch.fft.fftfreq(size, 1 / size), torch.fft.rfftfreq(size, 1 / size)
    hat = torch.fft.rfftn(noise, dim=(2, 3, 4)) / (1 + (k[:, None, None] ** 2 + k[:, None] ** 2 + k_z**2) / 16)
    smooth = torch.fft.irfftn(hat, s=(size,) * 3, dim=(2, 3, 4))
    smooth = smooth / smooth.std()
    smooth[:, 0] += 1
    return smooth * (1 - solid_B1XYZ)


def rms(x: Tensor) -> float:
    """Root mean square over all components and voxels."""
    return float(x.double().square().mean().sqrt())


def projected(kind: str, w_B3XYZ: Tensor, solid_B1XYZ: Tensor, how: str, operator: str) -> dict[str, Any]:
    """One row: time and iterations of `conserved_velocity`, and the remaining divergence."""
    adjoint, solve = walls.divergence_adjoint, walls._solve
    seconds, processor = [], []
    for _ in range(2):
        with (
            mock.patch.object(walls, "divergence_adjoint", side_effect=adjoint) as adjoints,
            mock.patch.object(walls, "_solve", side_effect=solve) as solves,
        ):
            began = time.perf_counter(), time.process_time()
            u_B3XYZ = conserved_velocity(w_B3XYZ, solid_B1XYZ, operator, how)
            float(u_B3XYZ[0, 0, 0, 0, 0])  # waits for a GPU
            seconds.append(time.perf_counter() - began[0])
            processor.append(time.process_time() - began[1])
    speed = rms(u_B3XYZ)
    div_BXYZ = divergence(u_B3XYZ.double(), operator) / speed
    inside = solid_B1XYZ.expand_as(u_B3XYZ) == 1
    return {
        "geometry": kind,
        "grid": solid_B1XYZ.shape[-1],
        "operator": operator,
        "walls": how,
        "dtype": str(w_B3XYZ.dtype)[6:],
        "iterations": adjoints.call_count - solves.call_count,
        "rounds": solves.call_count,
        "seconds": min(seconds),
        "processor_seconds": min(processor),
        "divergence_rms": rms(div_BXYZ),
        "divergence_max": float(div_BXYZ.abs().max()),
        "divergence_rms_unit_box": rms(div_BXYZ) * solid_B1XYZ.shape[-1],
        "solid_velocity_max": float(at_centres(u_B3XYZ, operator)[inside].abs().max()) / speed,
    }


def floor(data: Path, split: str = "valid") -> list[dict[str, Any]]:
    """Compare simulated velocities with their projections in float64; one row per domain, operator and walls."""
    sums: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    for record in list_trajectories(data, split):
        fields, solid = read_snapshots(record)
        chosen = np.linspace(0, len(fields) - 1, SNAPSHOTS).astype(int)
        u_B3XYZ = torch.from_numpy(fields[chosen, :3]).double()
        solid_B1XYZ = torch.from_numpy(solid)[None].expand(SNAPSHOTS, -1, -1, -1, -1)
        inside = solid_B1XYZ.expand_as(u_B3XYZ) == 1
        for how, operator in HOW:
            got = at_centres(conserved_velocity(u_B3XYZ, solid_B1XYZ, operator, how), operator)
            pair = rms(got - u_B3XYZ) / rms(u_B3XYZ), rms(got[inside]) / rms(u_B3XYZ)
            sums[record.domain, how, operator].append(pair)
    return [
        {
            "domain": domain,
            "walls": how,
            "operator": operator,
            "trajectories": len(pairs),
            "relative_difference": float(np.mean([pair[0] for pair in pairs])),
            "solid_velocity_rms": float(np.mean([pair[1] for pair in pairs])),
        }
        for (domain, how, operator), pairs in sums.items()
    ]


def work(report: Report) -> None:
    options, device = report.options, report.device
    size = options.grid or (16 if options.quick else 128)
    rows = report.content["projections"] = []
    print("  geometry      walls operator   dtype    iterations  proc. s  div rms  div max  max in solids")
    for kind in ("open_channel", "porous_media"):
        solid = geometry(kind, size)
        wide = velocity(solid)
        for (how, operator), dtype in product(HOW, ("float32", "float64")):
            row = projected(kind, wide.to(device, DTYPES[dtype]), solid.to(device), how, operator)
            rows.append(row)
            print(
                f"  {kind:<13} {how:<5} {operator:<10} {dtype:<8} {row['iterations']:10d} "
                f"{row['processor_seconds']:8.3f} {row['divergence_rms']:8.1e} {row['divergence_max']:8.1e} "
                f"{row['solid_velocity_max']:8.1e}",
                flush=True,
            )
            report.save()
    if options.data:
        report.content["floor"] = floor(options.data)
        for row in report.content["floor"]:
            print(
                f"  {row['domain']:<13} {row['walls']:<5} {row['operator']:<10} difference "
                f"{row['relative_difference']:.2%}, in solids {row['solid_velocity_rms']:.2%}"
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--grid", type=int, help="points along each axis; default: 128")
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="folder of a generated dataset whose velocities are also projected"
    )


def main(arguments: list[str] | None = None) -> int:
    return run("walls", (__doc__ or "").splitlines()[0], work, arguments, add_arguments)


if __name__ == "__main__":
    sys.exit(main())
