"""Measure the lattice Boltzmann solver: million cell updates per second and the share of the memory bandwidth used.

    python benchmarks/lattice_boltzmann.py --json benchmarks/results/lattice_boltzmann_cpu.json

An update reads and writes 19 populations of a fluid cell (152 bytes in float32) and, on a CPU, reads the indices of
their sources (76 bytes). With a scalar it also reads and writes 7 populations and a velocity (80 bytes) and, on a CPU,
reads seven more indices (28 bytes). ``of copy`` is the share of the copy bandwidth of all threads.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from shodh_moe.kernels import lattice_boltzmann as reference
from shodh_moe.solvers import LatticeBoltzmann
from support.common import OURS, Report, run, sizes
from support.timing import Call, Missing, Times, release

VISCOSITY, SPEED = 0.02, 0.02
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "eddies": {"smagorinsky": 0.16},
    "scalar": {"diffusivity": 0.01},
}
FLOW_BYTES, TABLE_BYTES = 2 * 19 * 4, 19 * 4
SCALAR_BYTES, SCALAR_TABLE_BYTES = 2 * 7 * 4 + 2 * 3 * 4, 7 * 4
# Approximate floating-point operations of one plain update: moments 150, collision 250.
FLOPS = 400


def geometry(n: int, fluid_share: float) -> NDArray[np.bool_]:
    """Random solid blobs about n / 8 across that leave ``fluid_share`` of the box fluid."""
    if fluid_share == 1:
        return np.zeros((n, n, n), bool)
    noise = np.random.default_rng(0).standard_normal((n, n, n))
    field = ndimage.gaussian_filter(noise, n / 24, mode="wrap")
    return np.asarray(field > np.quantile(field, fluid_share))


def start(flow: Any, scalar: bool) -> Any:
    """Set a flow and its scalar to random values, far from zero and from the speed limit, and return the flow."""
    rng = np.random.default_rng(1)
    shape = flow.solid_XYZ.shape
    flow.set_velocity(SPEED * rng.standard_normal((3, *shape), dtype=np.float32))
    if scalar:
        flow.set_scalar(rng.random(shape, dtype=np.float32))
    return flow


def bench(report: Report, n: int, fluid_share: float, variant: str) -> None:
    cuda = report.device.type == "cuda"
    solid_XYZ = geometry(n, fluid_share)
    steps = 2 if report.options.quick else max(256 if cuda else 1, 2**20 // n**3)
    case = {"grid": n, "fluid": fluid_share, "variant": variant, "steps": steps}
    if report.out_of_time("lattice_boltzmann", case):
        return
    force_T3 = np.tile([1e-6, 0.0, 0.0], (steps, 1))
    scalar = variant == "scalar"
    calls: dict[str, Call | Missing] = {}
    if cuda:
        from shodh_moe.solvers.on_gpu import LatticeBoltzmannGPU

        flow = start(LatticeBoltzmannGPU(solid_XYZ, VISCOSITY, device=report.device, **VARIANTS[variant]), scalar)
        calls[OURS] = lambda _: flow.run(force_T3)
        bytes_ = FLOW_BYTES + scalar * SCALAR_BYTES
    else:
        flow = start(LatticeBoltzmann(solid_XYZ, VISCOSITY, **VARIANTS[variant]), scalar)

        def on(parallel: bool) -> Call:
            def call(_: Any) -> None:
                flow.parallel = parallel
                flow.run(force_T3)

            return call

        calls[f"{OURS}, 1 thread"] = on(False)
        if numba.get_num_threads() > 1:
            calls[f"{OURS}, {numba.get_num_threads()} threads"] = on(True)
        bytes_ = FLOW_BYTES + TABLE_BYTES + scalar * (SCALAR_BYTES + SCALAR_TABLE_BYTES)
    updates = flow.n_fluid * steps

    def extra(_: str, times: Times) -> dict[str, Any]:
        return {"million_updates_s": updates / times.median / 1e6}

    report.measure("lattice_boltzmann", case, calls, [None], updates * bytes_, updates * FLOPS, extra)
    flow.check(f"{n}^3 {variant}")


def bench_reference(report: Report, n: int) -> None:
    """Time one step of the torch reference."""
    case = {"grid": n, "fluid": 1.0, "variant": "plain", "steps": 1}
    if report.out_of_time("torch_reference", case):
        return
    solid = torch.zeros(n, n, n, dtype=torch.bool, device=report.device)
    f = reference.equilibrium(SPEED * torch.randn(3, n, n, n, device=report.device), solid)
    calls: dict[str, Call | Missing] = {"torch": lambda _: reference.step(f, solid, (1e-6, 0.0, 0.0), VISCOSITY)}
    report.measure(
        "torch_reference",
        case,
        calls,
        [None],
        n**3 * FLOW_BYTES,
        n**3 * FLOPS,
        lambda _, times: {"million_updates_s": n**3 / times.median / 1e6},
    )


def table(report: Report) -> None:
    """Print the results as Markdown: million updates per second, and the share of the copy bandwidth."""
    rows: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in report.content["results"]:
        case = row["case"]
        cell = f"{row['extra']['million_updates_s']:.1f} ({row['share_of_copy']:.0%})"
        rows.setdefault((case["grid"], case["fluid"], case["variant"]), {})[row["implementation"]] = cell
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    print("\nMillion updates of fluid cells per second (share of the copy bandwidth)\n")
    print("| grid | fluid | | " + " | ".join(names) + " |")
    print("|---:|---:|---|" + "---:|" * len(names))
    for (grid, fluid, variant), row in rows.items():
        print(f"| {grid}³ | {fluid:g} | {variant} | " + " | ".join(row.get(name, "") for name in names) + " |")


def work(report: Report) -> None:
    options = report.options
    grids = options.grids or ([8] if options.quick else [32, 64, 128])
    for n in grids:
        for fluid_share in (1.0, 0.7):
            for variant in VARIANTS:
                bench(report, n, fluid_share, variant)
                release(report.device)
    if not options.no_reference:
        bench_reference(report, min(grids[-1], 64))
    table(report)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--grids", type=sizes, help="cells along the sides of the cubic grids; default: 32,64,128")
    parser.add_argument("--no-reference", action="store_true", help="leave out the torch reference")


def main(arguments: list[str] | None = None) -> int:
    return run("lattice_boltzmann", (__doc__ or "").splitlines()[0], work, arguments, add_arguments)


if __name__ == "__main__":
    sys.exit(main())
