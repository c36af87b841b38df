"""Checks of the planar solvers' inputs and results."""

from __future__ import annotations

import math

import torch

from shodh_moe.base.errors import UserError
from shodh_moe.solvers.limits import DivergedError


def require_input(
    initial_BCHW: torch.Tensor, channels: int, parameter_B: torch.Tensor, name: str, snapshots: int, interval: float
) -> torch.Tensor:
    """Check the arguments of a solver's ``simulate``; return ``parameter_B`` with the dtype and device of the fields.

    Args:
        initial_BCHW: initial fields, float32 or float64.
        channels: the required C.
        parameter_B: physical parameter of each trajectory.
        name: name of the parameter in messages.
        snapshots: number of snapshots, including the initial one.
        interval: time between them.

    Raises:
        UserError: a wrong shape or dtype, an initial field that is not finite, a parameter that is not positive, or no
            snapshots or no time between them.
    """
    shape = tuple(initial_BCHW.shape)
    if len(shape) != 4 or shape[1] != channels or min(shape) < 1:
        raise UserError(f"initial fields have shape {shape}: give [trajectories, {channels}, H, W]")
    if initial_BCHW.dtype not in (torch.float32, torch.float64):
        raise UserError(f"initial fields are {initial_BCHW.dtype}: convert them to float32 or float64")
    if tuple(parameter_B.shape) != shape[:1]:
        raise UserError(f"{name} has shape {tuple(parameter_B.shape)}: give {shape[0]}, one for each trajectory")
    if snapshots < 1 or not 0 < interval < math.inf:
        raise UserError(f"{snapshots} snapshots {interval} apart: give at least one and a positive finite interval")
    parameter_B = parameter_B.to(initial_BCHW)
    bad = first_bad(torch.isfinite(parameter_B) & (parameter_B > 0))
    if bad is not None:
        raise UserError(f"{name} of trajectory {bad} is {parameter_B[bad].item():g}: give a positive number")
    bad = first_bad(torch.isfinite(initial_BCHW).flatten(1).all(1))
    if bad is not None:
        raise UserError(f"initial fields of trajectory {bad} are not finite: generate them again")
    return parameter_B


def require_finite(fields_BCHW: torch.Tensor, time: float, advice: str) -> None:
    """Raise `DivergedError`, naming the first trajectory that is not finite at ``time``."""
    bad = first_bad(torch.isfinite(fields_BCHW).flatten(1).all(1))
    if bad is not None:
        raise DivergedError(f"trajectory {bad} of {len(fields_BCHW)} is not finite at time {time:g}: {advice}")


def first_bad(good_B: torch.Tensor) -> int | None:
    """Index of the first False in a bool tensor [B]; None if all are True."""
    return None if bool(good_B.all()) else int((~good_B).nonzero()[0].item())


def substeps(interval: float, longest: float) -> int:
    """Number of equal time steps, none longer than ``longest``, that make up ``interval``.

    Raises:
        UserError: ``longest`` is not a positive finite number.
    """
    if not 0 < longest < math.inf:
        raise UserError(f"step is {longest}: give the settings a positive finite time step")
    return max(1, math.ceil(interval / longest - 1e-9))
