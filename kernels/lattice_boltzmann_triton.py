"""Triton kernels of `kernels.lattice_boltzmann`: pull, bounce back, collide and force in one launch per time step.

Populations are stored as [19, cells] (a structure of arrays) in two buffers, with cells in C order and z contiguous.
Neighbouring lanes work on neighbouring z, so accesses to a direction are contiguous, shifted by whole cells.
A float32 update takes 19 reads and 19 writes of 4 bytes and one int32 word, 156 bytes.

A cell's word (`cell_words`) encodes everything that depends on its position: one bit per direction for a population
that comes from a solid, one for a solid cell, and one per face of the box. A program reads no neighbour's mask and
computes no coordinates; it selects the address of each population's source. Solid cells load only their word and store
nothing, so they stay zero.

Shapes: Q directions (19 or 7), N cells, 3 vector components, X Y Z space.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from shodh_moe.kernels.backend import launch, settings
from shodh_moe.kernels.lattice_boltzmann import VELOCITIES_Q3, Q, relaxation_rates

# One cell per thread, because populations are shifted by odd numbers of cells, which rules out wider loads.
BLOCK = {"BLOCK": 128, "num_warps": 4}
INDEX_LIMIT = 2**31  # with this many populations or more, indices need 64 bits

# Bits of a word: 2^(q - 1) if the population of direction q >= 1 comes from a solid, and the following.
SOLID = tl.constexpr(2**18)
X_FIRST, X_LAST = tl.constexpr(2**19), tl.constexpr(2**20)
Y_FIRST, Y_LAST = tl.constexpr(2**21), tl.constexpr(2**22)
Z_FIRST, Z_LAST = tl.constexpr(2**23), tl.constexpr(2**24)


def cell_words(solid_XYZ: Tensor, lid: bool) -> Tensor:
    """The int32 word of every cell, [N], from the bool mask of solids."""
    word_XYZ = torch.zeros_like(solid_XYZ, dtype=torch.int32)
    for q in range(1, Q):
        cx, cy, cz = (int(c) for c in VELOCITIES_Q3[q])
        blocked_XYZ = solid_XYZ.roll((cx, cy, cz), (0, 1, 2))
        if lid and cz == -1:  # at the lid it comes from the mirrored direction of a cell at the same height
            blocked_XYZ[:, :, -1] = solid_XYZ[:, :, -1].roll((cx, cy), (0, 1))
        word_XYZ |= blocked_XYZ.int() << (q - 1)
    word_XYZ |= solid_XYZ.int() * SOLID.value
    for axis, (first, last) in enumerate(((X_FIRST, X_LAST), (Y_FIRST, Y_LAST), (Z_FIRST, Z_LAST))):
        faces = word_XYZ.movedim(axis, 0)
        faces[0] |= first.value
        faces[-1] |= last.value
    return word_XYZ.view(-1)


@triton.jit
def _has(word, BIT: tl.constexpr):
    return (word & BIT) != 0


@triton.jit
def _neighbours(word, x_size, y_size, z_size, LID: tl.constexpr):
    """Offsets, in cells, of the neighbours x - 1, x + 1, y - 1, y + 1, z - 1, z + 1; 0 for z + 1 below a lid."""
    plane = y_size * z_size
    x_minus = tl.where(_has(word, X_FIRST), (x_size - 1) * plane, -plane)
    x_plus = tl.where(_has(word, X_LAST), -(x_size - 1) * plane, plane)
    y_minus = tl.where(_has(word, Y_FIRST), plane - z_size, -z_size)
    y_plus = tl.where(_has(word, Y_LAST), z_size - plane, z_size)
    z_minus = tl.where(_has(word, Z_FIRST), z_size - 1, -1)
    if LID:
        z_plus = tl.where(_has(word, Z_LAST), 0, 1)
    else:
        z_plus = tl.where(_has(word, Z_LAST), 1 - z_size, 1)
    return x_minus, x_plus, y_minus, y_plus, z_minus, z_plus


@triton.jit
def _cells(word_ptr, count, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """This program's cells, their words, and which of them are fluid."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    cell = program * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(word_ptr + cell, mask=cell < count, other=SOLID)
    return cell, word, (word & SOLID) == 0


@triton.jit
def _pull(
    f_ptr, cell, word, fluid, upstream, count, Q: tl.constexpr, OPPOSITE: tl.constexpr, MIRROR: tl.constexpr,
    LID: tl.constexpr,
):  # fmt: skip
    """Population Q from the cell at offset ``upstream``; at a lid MIRROR from there, at a solid OPPOSITE from here."""
    source = Q * count + cell + upstream
    if LID and MIRROR != Q:
        source += tl.where(_has(word, Z_LAST), (MIRROR - Q) * count, 0)
    source = tl.where(_has(word, 1 << (Q - 1)), OPPOSITE * count + cell, source)
    return tl.load(f_ptr + source, mask=fluid, other=0.0)


@triton.jit
def _relax(place, rates, even_part, a, b, cu, cf, A: tl.constexpr, WEIGHT: tl.constexpr):
    """Collide and store the populations a and b of directions A and A + 1; cu, cf: velocity and force along A."""
    out_ptr, cell, fluid, count = place
    even_rate, even_force, odd_rate, odd_force = rates
    even = WEIGHT * (even_part + (4.5 * even_rate * cu + 9.0 * even_force * cf) * cu) - 0.5 * even_rate * (a + b)
    odd = WEIGHT * 3.0 * (odd_rate * cu + odd_force * cf) - 0.5 * odd_rate * (a - b)
    tl.store(out_ptr + A * count + cell, a + even + odd, mask=fluid)
    tl.store(out_ptr + (A + 1) * count + cell, b + even - odd, mask=fluid)


@triton.jit
def flow_kernel(
    f_ptr,  # [19, N]
    out_ptr,  # [19, N]
    word_ptr,  # [N]
    force_ptr,  # [3]
    rates_ptr,  # [4]: even rate, odd rate, even time without eddies, 18 sqrt(2) C^2
    velocity_ptr,  # [3, N], read if HELD, written if KEEP
    x_size,
    y_size,
    z_size,
    LID: tl.constexpr,
    EDDIES: tl.constexpr,
    HELD: tl.constexpr,
    KEEP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One time step of BLOCK cells: `lattice_boltzmann.step`."""
    count = x_size * y_size * z_size
    cell, word, fluid = _cells(word_ptr, count, WIDE, BLOCK)
    if WIDE:
        count = tl.cast(count, tl.int64)
    x_m, x_p, y_m, y_p, z_m, z_p = _neighbours(word, x_size, y_size, z_size, LID)

    f0 = tl.load(f_ptr + cell, mask=fluid, other=0.0)
    f1 = _pull(f_ptr, cell, word, fluid, x_m, count, 1, 2, 1, LID)
    f2 = _pull(f_ptr, cell, word, fluid, x_p, count, 2, 1, 2, LID)
    f3 = _pull(f_ptr, cell, word, fluid, y_m, count, 3, 4, 3, LID)
    f4 = _pull(f_ptr, cell, word, fluid, y_p, count, 4, 3, 4, LID)
    f5 = _pull(f_ptr, cell, word, fluid, z_m, count, 5, 6, 5, LID)
    f6 = _pull(f_ptr, cell, word, fluid, z_p, count, 6, 5, 5, LID)
    f7 = _pull(f_ptr, cell, word, fluid, x_m + y_m, count, 7, 8, 7, LID)
    f8 = _pull(f_ptr, cell, word, fluid, x_p + y_p, count, 8, 7, 8, LID)
    f9 = _pull(f_ptr, cell, word, fluid, x_m + y_p, count, 9, 10, 9, LID)
    f10 = _pull(f_ptr, cell, word, fluid, x_p + y_m, count, 10, 9, 10, LID)
    f11 = _pull(f_ptr, cell, word, fluid, x_m + z_m, count, 11, 12, 11, LID)
    f12 = _pull(f_ptr, cell, word, fluid, x_p + z_p, count, 12, 11, 14, LID)
    f13 = _pull(f_ptr, cell, word, fluid, x_m + z_p, count, 13, 14, 11, LID)
    f14 = _pull(f_ptr, cell, word, fluid, x_p + z_m, count, 14, 13, 14, LID)
    f15 = _pull(f_ptr, cell, word, fluid, y_m + z_m, count, 15, 16, 15, LID)
    f16 = _pull(f_ptr, cell, word, fluid, y_p + z_p, count, 16, 15, 18, LID)
    f17 = _pull(f_ptr, cell, word, fluid, y_m + z_p, count, 17, 18, 15, LID)
    f18 = _pull(f_ptr, cell, word, fluid, y_p + z_m, count, 18, 17, 18, LID)

    g_x, g_y, g_z = tl.load(force_ptr), tl.load(force_ptr + 1), tl.load(force_ptr + 2)
    rho = f0 + (f1 + f2) + (f3 + f4) + (f5 + f6) + (f7 + f8) + (f9 + f10)
    rho += (f11 + f12) + (f13 + f14) + (f15 + f16) + (f17 + f18)
    if HELD:
        u_x = tl.load(velocity_ptr + cell, mask=fluid, other=0.0)
        u_y = tl.load(velocity_ptr + count + cell, mask=fluid, other=0.0)
        u_z = tl.load(velocity_ptr + 2 * count + cell, mask=fluid, other=0.0)
    else:
        u_x = (f1 - f2) + (f7 - f8) + (f9 - f10) + (f11 - f12) + (f13 - f14) + 0.5 * g_x
        u_y = (f3 - f4) + (f7 - f8) - (f9 - f10) + (f15 - f16) + (f17 - f18) + 0.5 * g_y
        u_z = (f5 - f6) + (f11 - f12) - (f13 - f14) + (f15 - f16) - (f17 - f18) + 0.5 * g_z
    if KEEP:
        tl.store(velocity_ptr + cell, u_x, mask=fluid)
        tl.store(velocity_ptr + count + cell, u_y, mask=fluid)
        tl.store(velocity_ptr + 2 * count + cell, u_z, mask=fluid)

    if EDDIES:  # `lattice_boltzmann.relaxation_time`
        p_xx = (f1 + f2) + (f7 + f8) + (f9 + f10) + (f11 + f12) + (f13 + f14) - (1 / 3) * rho - u_x * (u_x - g_x)
        p_yy = (f3 + f4) + (f7 + f8) + (f9 + f10) + (f15 + f16) + (f17 + f18) - (1 / 3) * rho - u_y * (u_y - g_y)
        p_zz = (f5 + f6) + (f11 + f12) + (f13 + f14) + (f15 + f16) + (f17 + f18) - (1 / 3) * rho - u_z * (u_z - g_z)
        p_xy = (f7 + f8) - (f9 + f10) - u_x * u_y + 0.5 * (u_x * g_y + g_x * u_y)
        p_xz = (f11 + f12) - (f13 + f14) - u_x * u_z + 0.5 * (u_x * g_z + g_x * u_z)
        p_yz = (f15 + f16) - (f17 + f18) - u_y * u_z + 0.5 * (u_y * g_z + g_y * u_z)
        norm = p_xx * p_xx + p_yy * p_yy + p_zz * p_zz + 2.0 * (p_xy * p_xy + p_xz * p_xz + p_yz * p_yz)
        t0 = tl.load(rates_ptr + 2)
        time = 0.5 * (t0 + tl.sqrt(t0 * t0 + tl.load(rates_ptr + 3) * tl.sqrt(norm)))
        even_rate = 1.0 / time
    else:
        even_rate = tl.load(rates_ptr)
    odd_rate = tl.load(rates_ptr + 1)

    even_force, odd_force = 1.0 - 0.5 * even_rate, 1.0 - 0.5 * odd_rate
    # The part common to all pairs of directions, before multiplication by their weight.
    e = even_rate * (rho - 1.5 * (u_x * u_x + u_y * u_y + u_z * u_z))
    e -= 3.0 * even_force * (u_x * g_x + u_y * g_y + u_z * g_z)
    tl.store(out_ptr + cell, f0 + (1 / 3) * e - even_rate * f0, mask=fluid)
    place = (out_ptr, cell, fluid, count)
    rates = (even_rate, even_force, odd_rate, odd_force)
    _relax(place, rates, e, f1, f2, u_x, g_x, 1, 1 / 18)
    _relax(place, rates, e, f3, f4, u_y, g_y, 3, 1 / 18)
    _relax(place, rates, e, f5, f6, u_z, g_z, 5, 1 / 18)
    _relax(place, rates, e, f7, f8, u_x + u_y, g_x + g_y, 7, 1 / 36)
    _relax(place, rates, e, f9, f10, u_x - u_y, g_x - g_y, 9, 1 / 36)
    _relax(place, rates, e, f11, f12, u_x + u_z, g_x + g_z, 11, 1 / 36)
    _relax(place, rates, e, f13, f14, u_x - u_z, g_x - g_z, 13, 1 / 36)
    _relax(place, rates, e, f15, f16, u_y + u_z, g_y + g_z, 15, 1 / 36)
    _relax(place, rates, e, f17, f18, u_y - u_z, g_y - g_z, 17, 1 / 36)


@triton.jit
def _relax_scalar(place, rates, c, a, b, u, A: tl.constexpr):
    """Collide and store the scalar's populations a and b of directions A and A + 1; u: velocity along A."""
    out_ptr, cell, fluid, count = place
    even_rate, odd_rate = rates
    even = even_rate * (c * (0.125 + 0.5 * u * u) - 0.5 * (a + b))
    odd = odd_rate * (0.5 * c * u - 0.5 * (a - b))
    tl.store(out_ptr + A * count + cell, a + even + odd, mask=fluid)
    tl.store(out_ptr + (A + 1) * count + cell, b + even - odd, mask=fluid)


@triton.jit
def scalar_kernel(
    g_ptr,  # [7, N]
    out_ptr,  # [7, N]
    word_ptr,  # [N]
    rates_ptr,  # [2]: even rate, odd rate
    velocity_ptr,  # [3, N]
    x_size,
    y_size,
    z_size,
    LID: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One time step of BLOCK cells: `lattice_boltzmann.scalar_step`."""
    count = x_size * y_size * z_size
    cell, word, fluid = _cells(word_ptr, count, WIDE, BLOCK)
    if WIDE:
        count = tl.cast(count, tl.int64)
    x_m, x_p, y_m, y_p, z_m, z_p = _neighbours(word, x_size, y_size, z_size, LID)
    g0 = tl.load(g_ptr + cell, mask=fluid, other=0.0)
    g1 = _pull(g_ptr, cell, word, fluid, x_m, count, 1, 2, 1, LID)
    g2 = _pull(g_ptr, cell, word, fluid, x_p, count, 2, 1, 2, LID)
    g3 = _pull(g_ptr, cell, word, fluid, y_m, count, 3, 4, 3, LID)
    g4 = _pull(g_ptr, cell, word, fluid, y_p, count, 4, 3, 4, LID)
    g5 = _pull(g_ptr, cell, word, fluid, z_m, count, 5, 6, 5, LID)
    g6 = _pull(g_ptr, cell, word, fluid, z_p, count, 6, 5, 5, LID)
    u_x = tl.load(velocity_ptr + cell, mask=fluid, other=0.0)
    u_y = tl.load(velocity_ptr + count + cell, mask=fluid, other=0.0)
    u_z = tl.load(velocity_ptr + 2 * count + cell, mask=fluid, other=0.0)
    c = g0 + (g1 + g2) + (g3 + g4) + (g5 + g6)
    even_rate, odd_rate = tl.load(rates_ptr), tl.load(rates_ptr + 1)
    rest = c * (0.25 - (u_x * u_x + u_y * u_y + u_z * u_z))
    tl.store(out_ptr + cell, g0 + even_rate * (rest - g0), mask=fluid)
    place = (out_ptr, cell, fluid, count)
    rates = (even_rate, odd_rate)
    _relax_scalar(place, rates, c, g1, g2, u_x, 1)
    _relax_scalar(place, rates, c, g3, g4, u_y, 3)
    _relax_scalar(place, rates, c, g5, g6, u_z, 5)


def _block(populations: Tensor, kernel: str) -> dict[str, int]:
    return settings(kernel, str(populations.dtype).removeprefix("torch."), BLOCK, populations.device)


def step(
    f_QN: Tensor,
    out_QN: Tensor,
    word_N: Tensor,
    shape: tuple[int, int, int],
    force: Tensor,
    rates_4: Tensor,
    velocity_3N: Tensor | None = None,
    *,
    lid: bool,
    eddies: bool = False,
    held: bool = False,
) -> None:
    """Write the flow one time step after ``f_QN`` to ``out_QN``, whose solid cells must be zero and stay zero.

    Args:
        f_QN, out_QN: two contiguous buffers, [19, X * Y * Z], float32 or float64; the other tensors have their dtype.
        word_N: `cell_words` of the solids, with the same ``lid``, int32.
        shape: X, Y, Z.
        force: [3] or longer, the force along x, y, z.
        rates_4: `flow_rates`.
        velocity_3N: with ``held``, the velocity to collide with; otherwise receives the velocity of the step.
        eddies: use Smagorinsky's eddy viscosity.
    """
    x, y, z = shape
    block = _block(f_QN, "lattice_boltzmann")
    launch(
        flow_kernel,
        (triton.cdiv(x * y * z, block["BLOCK"]),),
        f_QN,
        out_QN,
        word_N,
        force,
        rates_4,
        f_QN if velocity_3N is None else velocity_3N,  # any tensor can replace one that is not accessed
        x,
        y,
        z,
        LID=lid,
        EDDIES=eddies,
        HELD=held,
        KEEP=velocity_3N is not None and not held,
        WIDE=f_QN.numel() >= INDEX_LIMIT,
        **block,
    )


def flow_rates(viscosity: float, smagorinsky: float, like: Tensor) -> Tensor:
    """The argument ``rates_4`` of `step`, with the device and dtype of ``like``."""
    even, odd = relaxation_rates(viscosity)
    return like.new_tensor([even, 1 if smagorinsky else odd, 3 * viscosity + 0.5, 18 * math.sqrt(2) * smagorinsky**2])


def scalar_step(
    g_QN: Tensor,
    out_QN: Tensor,
    word_N: Tensor,
    shape: tuple[int, int, int],
    velocity_3N: Tensor,
    rates_2: Tensor,
    *,
    lid: bool,
) -> None:
    """Write the scalar one time step after ``g_QN`` [7, N] to ``out_QN``. Otherwise like `step`.

    ``velocity_3N`` is that of the flow at the end of the time step; ``rates_2`` are the even and the odd rate.
    """
    x, y, z = shape
    block = _block(g_QN, "lattice_boltzmann_scalar")
    launch(
        scalar_kernel,
        (triton.cdiv(x * y * z, block["BLOCK"]),),
        g_QN,
        out_QN,
        word_N,
        rates_2,
        velocity_3N,
        x,
        y,
        z,
        LID=lid,
        WIDE=g_QN.numel() >= INDEX_LIMIT,
        **block,
    )
