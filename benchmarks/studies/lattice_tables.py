"""Markdown tables of the lattice Boltzmann validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from studies.lattice_flows import Case


@dataclass
class Table:
    title: str
    header: list[str]
    rows: list[list[Any]]

    def markdown(self) -> str:
        lines = ["| " + " | ".join(map(cell, row)) + " |" for row in [self.header, *self.rows]]
        lines.insert(1, "|" + "---|" * len(self.header))
        return f"\n{self.title}:\n\n" + "\n".join(lines)


def cell(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    shown = [f"{value:.2g}" if value < 100 else f"{value:.0f}" for value in (low, high)]
    return shown[1] if high < 1.02 * low or shown[0] == shown[1] else " - ".join(shown)


def convergence_tables(cases: Sequence[Case]) -> Iterator[Table]:
    header = ["case", "norm", "viscosity", "Re", "Ma", "error by size in cells", "orders"]
    rows = []
    for case in cases:
        errors = ", ".join(f"{n}: {error:.1e}" for n, error in zip(case.sizes, case.errors, strict=True))
        orders = ", ".join(f"{order:.2f}" for order in case.orders) if max(case.errors) > 1e-9 else "rounding"
        rows.append([case.name, case.norm, case.viscosity, span(case.reynolds), span(case.mach), errors, orders])
    yield Table("Convergence", header, rows)
