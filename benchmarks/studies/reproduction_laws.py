"""Power laws of the latent error in width, data and steps, and the tables of reproduction_trend.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import linregress

from studies.reproduction_table import PAPER, number, ratio, table

AXES = {"dim": "width", "trajectories": "training trajectories of a domain", "steps": "steps"}


@dataclass(frozen=True)
class PowerLaw:
    """error = constant * x^-exponent, fitted to the logarithms by least squares.

    Attributes:
        standard_error: of the exponent; NaN for two points, which a power law always fits.
    """

    exponent: float
    standard_error: float


def power_law(x: Sequence[float], errors: Sequence[float]) -> PowerLaw | None:
    """Fit a power law; None for fewer than two points or an error that is not positive."""
    if len(x) < 2 or min(errors) <= 0:
        return None
    fit = linregress([math.log(one) for one in x], [math.log(one) for one in errors])
    return PowerLaw(-float(fit.slope), float(fit.stderr) if len(x) > 2 else math.nan)


def markdown(runs: Sequence[dict[str, Any]], laws: Sequence[dict[str, Any]], still: Sequence[dict[str, Any]]) -> str:
    """The Markdown tables: trainings, power laws, and persistence by time between snapshots."""
    parts = ["<!-- Made by benchmarks/studies/reproduction_trend.py; edits are lost. -->"]
    if runs:
        domains = list(runs[0]["errors"])
        head = [AXES["dim"], "active parameters", AXES["trajectories"], AXES["steps"]]
        head += [f"latent MSE, {domain} (over persistence's)" for domain in domains]
        rows = []
        for run in runs:
            cells = [str(run["dim"]), f"{run['parameters']['active']:,}", str(run["trajectories"]), f"{run['steps']:,}"]
            for domain in domains:
                errors = run["errors"][domain]
                share = ratio(errors["latent_mse"], errors["latent_mse_persistence"])
                cells.append(f"{number(errors['latent_mse'])} ({share})")
            rows.append(cells)
        parts.append(table(head, rows))
    if laws:
        head = ["domain", "axis", "values", "exponent", "standard error", "error after doubling"]
        rows = [
            [
                law["domain"],
                AXES[law["axis"]],
                ", ".join(f"{value:,}" for value in law["values"]),
                f"{law['exponent']:.2f}",
                f"{law['standard_error']:.2f}" if math.isfinite(law["standard_error"]) else "",
                f"{100 * (2 ** -law['exponent'] - 1):+.0f} %",
            ]
            for law in laws
        ]
        parts.append(table(head, rows))
    if still:
        head = [
            "domain",
            "time steps between snapshots",
            "latent MSE of persistence",
            "paper's latent MSE of its model",
        ]
        rows = [
            [
                row["domain"],
                str(row["steps_per_snapshot"]),
                number(row["latent_mse_persistence"]),
                number(PAPER["latent_mse"].get(row["domain"])),
            ]
            for row in still
        ]
        parts.append(table(head, rows))
    return "\n\n".join(parts) + "\n"
