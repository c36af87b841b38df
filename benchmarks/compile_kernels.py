"""Compile every kernel variant that the configs use, without a GPU, and print the resources each needs.

    python benchmarks/compile_kernels.py [--target sm_90 ...] [--only WORD] [--json FILE]

The variants are those of each config in configs/ and of the microbenchmarks. The operations are called with tensors
without data, and their launches are compiled for each target. Prints registers per thread, shared memory per program
and spilled bytes per thread; exits with 1 if a variant spills or does not compile.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from shodh_moe.config import COMPRESSION
from shodh_moe.config.load import load_config
from shodh_moe.kernels import backend
from shodh_moe.model.plan import moe_capacity

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True)
class Layer:
    """Sizes of one MoE layer."""

    tokens: int
    width: int
    experts: int
    capacity: int | None  # None: dropless
    dtype: torch.dtype
    drop_order: str = "position"
    routing_width: int | None = None  # None: linear router
    top_k: int = 1


@dataclass(frozen=True)
class Field:
    """A batch of vector fields and the derivative operator on them."""

    grid: tuple[int, int, int]
    operator: str
    dtype: torch.dtype
    batch: int = 1


@dataclass(frozen=True)
class Flow:
    """A flow of the lattice Boltzmann solver: its grid and the options of its step."""

    grid: tuple[int, int, int]
    dtype: torch.dtype
    lid: bool = True
    eddies: bool = True
    mode: str = "scalar"  # scalar: carries a scalar; free: does not; held: settles the pressure at a held velocity


Size = Layer | Field | Flow


def configured() -> list[Size]:
    """Sizes used by the files in configs/."""
    sizes: list[Size] = []
    for path in sorted(CONFIGS.glob("*.yaml")):
        config = load_config(path)
        moe, patch = config.model.moe, config.model.patch
        tokens = config.training.batch_size
        for size in config.data.grid:
            tokens *= size // COMPRESSION // patch
        capacity = moe_capacity(moe, tokens)
        routing = moe.router.dim if moe.router.kind == "cosine" else None
        sizes.append(
            Layer(
                tokens, config.model.dim, moe.num_experts, capacity, torch.float32, moe.drop_order, routing, moe.top_k
            )
        )
        grid = (config.data.grid[0], config.data.grid[1], config.data.grid[2])
        for dtype in (torch.float32, torch.float64):  # training; evaluation
            sizes.append(Field(grid, config.tokenizer.operator, dtype, config.tokenizer.batch_size))
    return sizes


def benchmarked() -> list[Size]:
    """Sizes used by the microbenchmarks."""
    sizes: list[Size] = []
    for experts in (8, 64, 256):
        for dtype in (torch.float32, torch.bfloat16):
            for drop_order in ("position", "probability"):
                sizes.append(Layer(65536, 1024, experts, 65536 // experts * 5 // 4, dtype, drop_order, 64))
            sizes.append(Layer(65536, 1024, experts, None, dtype))
    for experts, top_k in ((64, 2), (256, 8)):
        for dtype in (torch.float32, torch.bfloat16):
            for drop_order in ("position", "probability"):
                capacity = 65536 * top_k // experts * 5 // 4
                sizes.append(Layer(65536, 1024, experts, capacity, dtype, drop_order, 64, top_k))
            sizes.append(Layer(65536, 1024, experts, None, dtype, top_k=top_k))
    for operator in ("spectral", "central2", "central4", "staggered"):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            sizes.append(Field((128, 128, 128), operator, dtype))
    sizes.append(Field((50, 49, 51), "spectral", torch.float32))  # odd sizes use another kernel
    sizes += flows()
    return sizes


def flows() -> list[Size]:
    """All forms of the solver's step in float32 with a lid; otherwise only the forms that need the most resources."""
    cube, float32, float64 = (64, 64, 64), torch.float32, torch.float64
    modes = ("free", "held", "scalar")
    sizes: list[Size] = [Flow(cube, float32, eddies=eddies, mode=mode) for eddies in (False, True) for mode in modes]
    sizes += [Flow(cube, float32, lid=False), Flow(cube, float32, lid=False, eddies=False, mode="free")]
    sizes += [Flow(cube, float64), Flow(cube, float64, mode="held"), Flow(cube, float64, eddies=False, mode="free")]
    sizes += [Flow((512, 512, 512), float32), Flow((50, 49, 51), float32)]  # 64-bit indices; odd sizes
    return sizes


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _launch_layer(size: Layer) -> None:
    from shodh_moe.kernels import cosine_gating, dispatch_triton, gating_triton

    n, d, e, k = size.tokens, size.width, size.experts, size.top_k
    choices = (n,) if k == 1 else (n, k)
    index_N, count_E, gate_N = _meta(*choices, dtype=torch.int64), _meta(e, dtype=torch.int64), _meta(*choices)
    x_ND, logits_NE = _meta(n, d, dtype=size.dtype), _meta(n, e)
    if size.routing_width is None or e > cosine_gating.FUSED_EXPERTS:
        gating_triton.forward(logits_NE, size.capacity or n, size.drop_order, None, k)
    else:
        r = size.routing_width
        cosine = gating_triton.Cosine(x_ND, _meta(r, d), _meta(e, r), _meta(1))
        gating_triton.forward(logits_NE, size.capacity or n, size.drop_order, None, k, cosine)
    gating_triton.backward(logits_NE, _meta(n), index_N, count_E, gate_N, _meta(), _meta(), _meta(e))
    rows = dispatch_triton.dispatch(x_ND, index_N, index_N, count_E, size.capacity)
    dispatch_triton.gather(rows, index_N, index_N, count_E)
    for shared_ND in (None, x_ND):
        dispatch_triton.gather(rows, index_N, index_N, count_E, gate_N, shared_ND)
    dispatch_triton.combine_backward(x_ND, rows, index_N, index_N, gate_N, count_E)


def _launch_field(size: Field) -> None:
    from shodh_moe.kernels import spectral_curl_triton as triton_curl

    field = _meta(size.batch, 3, *size.grid, dtype=size.dtype)
    scalar = _meta(size.batch, *size.grid, dtype=torch.float64 if size.dtype == torch.float64 else torch.float32)
    unit = [1.0, 1.0, 1.0]  # spacing
    triton_curl.curl(field, _meta(size.batch, 3, dtype=size.dtype), size.operator, unit, False)
    triton_curl.curl(field.to(scalar.dtype), None, size.operator, unit, True)
    triton_curl.divergence(field, size.operator, unit)
    triton_curl.divergence_backward(scalar, size.operator, unit)


def _launch_flow(size: Flow) -> None:
    from shodh_moe.kernels import lattice_boltzmann_triton as lattice

    x, y, z = size.grid
    f_QN, g_QN = _meta(19, x * y * z, dtype=size.dtype), _meta(7, x * y * z, dtype=size.dtype)
    word_N, velocity_3N = _meta(x * y * z, dtype=torch.int32), _meta(3, x * y * z, dtype=size.dtype)
    numbers_4 = _meta(4, dtype=size.dtype)
    lattice.step(
        f_QN, f_QN, word_N, size.grid, numbers_4, numbers_4, None if size.mode == "free" else velocity_3N,
        lid=size.lid, eddies=size.eddies, held=size.mode == "held",
    )  # fmt: skip
    if size.mode == "scalar":
        lattice.scalar_step(g_QN, g_QN, word_N, size.grid, velocity_3N, numbers_4, lid=size.lid)


def _variants(sizes: list[Size]) -> list:
    from shodh_moe.kernels.ahead_of_time import variant

    with backend.record() as launches:
        for size in sizes:
            if isinstance(size, Layer):
                _launch_layer(size)
            elif isinstance(size, Field):
                _launch_field(size)
            else:
                _launch_flow(size)
    return list(dict.fromkeys(variant(launch) for launch in launches))


def _rows(task: tuple[int, tuple[str, ...]]) -> list[dict]:
    """Compile one variant for each target. Runs in a worker process, which finds the variant by its number."""
    from shodh_moe.kernels.ahead_of_time import compile_variant

    number, targets = task
    variant = _variants(configured() + benchmarked())[number]
    rows = []
    for target in targets:
        row = {
            "kernel": variant.name,
            "constants": {key: str(value) for key, value in variant.constexprs},
            "types": " ".join(t for _, t in variant.signature if t.startswith("*")),
            **dict(variant.options),
            "target": target,
        }
        try:
            row |= asdict(compile_variant(variant, target))
        except Exception as error:  # the compiler raises errors of many types
            row["error"] = (str(error).strip() or repr(error)).splitlines()[0]
        rows.append(row)
    return rows


def main() -> int:
    from shodh_moe.kernels.ahead_of_time import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all")
    parser.add_argument("--only", metavar="WORD", default="", help="compile only kernels with this word in their name")
    parser.add_argument("--json", type=Path, help="write the table to this file as well")
    arguments = parser.parse_args()
    variants = _variants(configured() + benchmarked())
    numbers = [number for number, variant in enumerate(variants) if arguments.only in variant.name]
    print(f"{len(numbers)} kernel variants for {', '.join(arguments.target)}", flush=True)
    with ProcessPoolExecutor() as pool:
        tasks = [(number, tuple(arguments.target)) for number in numbers]
        table = [row for rows in pool.map(_rows, tasks) for row in rows]
    bad = [row for row in table if row.get("error") or row["spill_bytes"]]
    _print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1) + "\n")
    for row in bad:
        what = row.get("error") or f"{row['spill_bytes']} bytes spilled"
        print(f"BAD {row['kernel']} on {row['target']}: {what}; {row['constants']}", file=sys.stderr)
    print(f"{len(table)} compiled, {len(bad)} bad")
    return 1 if bad else 0


def _print(table: list[dict]) -> None:
    """Print one line per kernel and target: the range over its variants."""
    print(f"{'kernel':28}{'target':>8}{'variants':>10}{'registers':>12}{'shared KiB':>14}{'spilled bytes':>15}")
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in table:
        if "error" not in row:
            groups.setdefault((row["kernel"], row["target"]), []).append(row)
    for (kernel, target), rows in groups.items():

        def span(key: str, scale: float = 1.0, rows: list[dict] = rows) -> str:
            low, high = (f(row[key] for row in rows) / scale for f in (min, max))
            return f"{low:.3g}" if low == high else f"{low:.3g}-{high:.3g}"

        line = f"{kernel:28}{target:>8}{len(rows):>10}{span('registers'):>12}"
        print(f"{line}{span('shared_bytes', 1024):>14}{span('spill_bytes'):>15}")


if __name__ == "__main__":
    sys.exit(main())
