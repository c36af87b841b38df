"""The curl against torch.fft, torch.compile of torch.fft, and products with dense matrices.

    python benchmarks/spectral_curl.py [--device cpu|cuda] [--json FILE] [--grids 64,128] [--operators spectral]

Besides times it reports the relative error against FP64, and h * rms(div u) / rms(u) with the divergence of the same
operator, once with everything in FP64 and once in the dtype of the case.
Shapes: B batch, 3 components, X Y Z space.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shodh_moe.kernels import curl, divergence
from support.common import DTYPES, OURS, Report, run, sizes
from support.peers import FourierCurl, MatrixCurl, compiled, wider
from support.timing import BOTH, FORWARD, Times, passes, release, rotating

OPERATORS = ("spectral", "central2", "central4", "staggered")


def curl_bytes(points: int, dtype: torch.dtype) -> dict[str, int]:
    """Minimal traffic. Forward reads A and writes u once, three numbers per point; u of a 16-bit A is float32.

    Backward is the same operation in reverse.
    """
    once = 3 * points * (dtype.itemsize + max(dtype.itemsize, 4))
    return {FORWARD: once, BOTH: 2 * once}


def curl_flops(grid: int, operator: str) -> dict[str, int]:
    """FLOP of six derivatives and three subtractions per point.

    A spectral derivative counts as a product with a dense matrix (2 N per point) for every implementation; a stencil
    counts its multiplications and additions.
    """
    per_derivative = {"spectral": 2 * grid, "central2": 2, "central4": 5, "staggered": 2}[operator]
    once = grid**3 * (6 * per_derivative + 3)
    return {FORWARD: once, BOTH: 2 * once}


def smooth_potential(grid: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Noise with a decaying spectrum, like that of decoded potentials, [1, 3, X, Y, Z]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, 3, grid, grid, grid, generator=generator).to(device)
    hat = torch.fft.rfftn(noise, dim=(-3, -2, -1))
    k = torch.fft.fftfreq(grid, 1 / grid, device=device)
    kz = torch.fft.rfftfreq(grid, 1 / grid, device=device)
    squared = k[:, None, None] ** 2 + k[None, :, None] ** 2 + kz**2
    return torch.fft.irfftn(hat / (1 + squared / 16), s=(grid,) * 3, dim=(-3, -2, -1)).to(dtype)


def relative_divergence(u_B3XYZ: Tensor, operator: str, spacing: float) -> float:
    """h * rms(div u) / rms(u), both rms values summed in FP64."""
    div = divergence(u_B3XYZ, operator, spacing).double()
    return float(spacing * div.square().mean().sqrt() / u_B3XYZ.double().square().mean().sqrt())


def quality(call: Any, a_B3XYZ: Tensor, exact: Any, call64: Any, operator: str, spacing: float) -> dict[str, float]:
    """Errors of an implementation, which are not timed. ``call64``: the implementation in FP64, if it has one."""
    u, u64 = call(a_B3XYZ), exact(a_B3XYZ.double())
    found = {
        "relative_error": float((u.double() - u64).norm() / u64.norm()),
        "div_own_dtype": relative_divergence(u, operator, spacing),
    }
    if call64 is not None:
        found["div_fp64"] = relative_divergence(call64(a_B3XYZ.double()), operator, spacing)
    return found


def bench_curl(report: Report, grid: int, operator: str, dtype: torch.dtype) -> None:
    device, options = report.device, report.options
    shape, spacing = (grid, grid, grid), 2 * math.pi / grid
    case = {"grid": grid, "operator": operator, "dtype": str(dtype)[6:]}

    def make(seed: int) -> dict[str, Any]:
        a_B3XYZ = smooth_potential(grid, seed, device, dtype)
        grad_B3XYZ = torch.randn(a_B3XYZ.shape, device=device, dtype=wider(dtype))
        return {"a": a_B3XYZ.requires_grad_(), "grads": (grad_B3XYZ,)}

    ours = partial(curl, operator=operator, spacing=spacing)
    fourier = FourierCurl(shape, operator, spacing, dtype, device)
    forms: dict[str, Any] = {
        OURS: lambda a: ours(a, None),
        "torch.fft": fourier,
        "torch.compile of fft": compiled(fourier.__call__, options.no_compile or options.quick),
        "matrix products": MatrixCurl(shape, operator, spacing, dtype, device),
    }
    wide: dict[str, Any] = {
        OURS: forms[OURS],
        "torch.fft": FourierCurl(shape, operator, spacing, torch.float64, device),
        "matrix products": MatrixCurl(shape, operator, spacing, torch.float64, device),
    }
    sample = smooth_potential(grid, 99, device, dtype)

    def extra(name: str, times: Times) -> dict[str, float]:
        with torch.no_grad():
            return quality(forms[name], sample, wide["matrix products"], wide.get(name), operator, spacing)

    calls = {name: (lambda i, f=form: (f(i["a"]),)) if callable(form) else form for name, form in forms.items()}
    bytes_, flops = curl_bytes(grid**3, dtype), curl_flops(grid, operator)
    sets = rotating(make, bytes_[FORWARD], device)
    for name, timed in passes(calls):
        with_errors = {"extra": extra} if name == FORWARD else {}
        report.measure("curl", case | {"pass": name}, timed, sets, bytes_[name], flops[name], **with_errors)
    del sets
    release(device)


def work(report: Report) -> None:
    options, cuda = report.options, report.device.type == "cuda"
    grids = options.grids or ([16] if options.quick else [64, 128, 256] if cuda else [64, 128])
    default = ["float32", "float64", "bfloat16"] if cuda else ["float32"]
    # Grid 128, which has a performance goal, runs first in case time runs out.
    for dtype in options.dtypes or default:
        for grid in sorted(grids, key=lambda n: (n != 128, n)):
            for operator in options.operators or OPERATORS:
                if grid == 256 and dtype == "float64" and operator != "spectral":
                    continue
                if not report.out_of_time("curl", {"grid": grid, "operator": operator, "dtype": dtype}):
                    bench_curl(report, grid, operator, DTYPES[dtype])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--grids", type=sizes, help="points along each axis; default: 64,128 on cpu; 64,128,256 on cuda"
    )
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, help="default: all")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=tuple(DTYPES),
        help="default: float32 on cpu; float32, float64 and bfloat16 on cuda",
    )


def main(arguments: list[str] | None = None) -> int:
    return run("spectral_curl", (__doc__ or "").splitlines()[0], work, arguments, add_arguments)


if __name__ == "__main__":
    sys.exit(main())
