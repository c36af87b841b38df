"""The tables of the audit, for Markdown and for the page."""

from __future__ import annotations

import math
from typing import Any

from shodh_moe.audit.arm_models import ARMS
from shodh_moe.audit.results import QUANTITIES
from shodh_moe.report.run import tables as run_tables
from shodh_moe.report.style import words
from shodh_moe.report.table import Table, number

Row = dict[str, Any]
DASH = "-"
SET_TITLES = {
    "main": "Main domains",
    "long": "Main domains, more steps",
    "hard": "Domains that are hard to tell apart",
    "four": "Four domains",
    "bed": "Both kinds of flow in one sample",
}


def arm_words(name: str) -> str:
    """Spell out the name of an arm: ``mixture, 4 experts`` for ``moe_4``."""
    arm, _, rest = name.partition(":")
    if arm == "single":
        return f"{words(rest)} alone"
    if arm.startswith("moe_"):
        return f"mixture, {arm[4:]} experts"
    return ARMS[arm].words if arm in ARMS else words(arm)


def _place(row: Row) -> list[str]:
    return [row["set"], arm_words(row["arm"])]


def error(value: float | None) -> str:
    return DASH if value is None else f"{value:#.3g}" if value else "0"


def percent(value: float | None) -> str:
    """Format as ``+12.3 %``; without decimals from 1000 % on."""
    return DASH if value is None else f"{100 * value:+.1f} %" if abs(value) < 10 else f"{100 * value:+,.0f} %"


def estimate(one: Row, show: Any = error) -> str:
    """Format as ``1.20e-05 [1.10e-05, 1.30e-05]``; without an interval, say why there is none."""
    lost = f"{len(one['diverged'])} of {len(one['diverged']) + len(one['by_seed'])} seeds diverged"
    if one["value"] is None:
        return lost if one["diverged"] else DASH
    if one["diverged"]:
        return f"{show(one['value'])} ({lost})"
    if one["low"] is None:
        return f"{show(one['value'])} ({len(one['by_seed'])} seed{'s' if len(one['by_seed']) > 1 else ''})"
    return f"{show(one['value'])} [{show(one['low'])}, {show(one['high'])}]".replace(" %,", ",").replace(" %]", "]")


def _mean(one: Row, digits: int = 3) -> str:
    if one["value"] is None:
        return "diverged" if one["diverged"] else DASH
    return f"{one['value']:.{digits}f}"


def _by_seed(values: Row) -> str:
    return ", ".join(number(value) for value in values.values()) or DASH


def _numbers(first: int, last: int) -> frozenset[int]:
    return frozenset(range(first, last + 1))


def diverged(rows: list[Row]) -> Table:
    return Table(
        ("set", "arm", "seed", "run", "why"),
        [[*_place(row), str(row["seed"]), str(row["run"]), str(row["reason"])] for row in rows],
    )


def differences(rows: list[Row]) -> Table:
    against = any(not row["base"].startswith("single:") for row in rows)
    head = ("set", "arm", *(["against"] if against else []), "domain", *map(_quantity, QUANTITIES), "by latent MSE")
    cells = [
        [
            *_place(row),
            *([arm_words(row["base"])] if against else []),
            words(row["domain"]),
            *(estimate(row[quantity], percent) for quantity in QUANTITIES),
            row["answer"],
        ]
        for row in rows
    ]
    return Table(head, cells, _numbers(len(head) - 4, len(head) - 2))


def _quantity(name: str) -> str:
    return run_tables.QUANTITIES[name]


def errors(rows: list[Row]) -> Table:
    return Table(
        ("set", "arm", "domain", *map(_quantity, QUANTITIES), "latent MSE of persistence"),
        [
            [*_place(row), words(row["domain"])]
            + [estimate(row[quantity]) for quantity in QUANTITIES]
            + [error(row["latent_mse_persistence"])]
            for row in rows
        ],
        _numbers(3, 6),
    )


def arms(rows: list[Row]) -> Table:
    def cells(row: Row) -> list[str]:
        edge = {True: "yes, the best may lie outside", False: "no"}.get(row["at_edge"], DASH)
        counts = [number((row["parameters"] or {}).get(key)) for key in ("active", "total")]
        rate = DASH if row["learning_rate"] is None else f"{row['learning_rate']:.3g}"
        seeds = f"{len(row['seeds'])}" + (f", {len(row['diverged'])} diverged" if row["diverged"] else "")
        return [*_place(row), *counts, number(row["steps"]), rate, edge, seeds]

    counts = ("active parameters", "total parameters", "steps")
    head = ("set", "arm", *counts, "learning rate", "at the edge of the range", "seeds")
    return Table(head, [cells(row) for row in rows], _numbers(2, 5))


def bifurcation(rows: list[Row]) -> Table:
    def cells(row: Row) -> list[str]:
        count = f"{sum(row['bifurcated'].values())} of {len(row['bifurcated']) + len(row['diverged'])}"
        lost = f"{count}, {len(row['diverged'])} diverged" if row["diverged"] else count
        return [*_place(row), lost, ", ".join("never" if s is None else f"{s:,}" for s in row["step"].values()) or DASH]

    return Table(("set", "arm", "bifurcated seeds", "from step, by seed"), [cells(row) for row in rows])


def purity(rows: list[Row]) -> Table:
    cells = [
        [
            *_place(row),
            str(row["layer"]),
            "; ".join(f"{words(d)} {_mean(one)} ({_least(one)})" for d, one in row["purity"].items()),
            f"{sum(row['bifurcated'].values())} of {len(row['bifurcated'])}",
        ]
        for row in rows
    ]
    return Table(("set", "arm", "layer", "purity: mean over seeds (smallest)", "bifurcated seeds"), cells)


def _least(one: Row) -> str:
    """Format the smallest value over seeds, truncated rather than rounded: 0.9899 must not appear as 0.99."""
    least = min(one["by_seed"].values(), default=math.nan)
    return f"{math.floor(least * 1000) / 1000:.3f}" if math.isfinite(least) else DASH


def information(rows: list[Row]) -> Table:
    names = ("domain", "solid fraction", "speed", "domain given solid fraction", "domain given speed")
    cells = [[*_place(row), str(row["layer"]), *map(_mean, row["information"].values())] for row in rows]
    return Table(("set", "arm", "layer", *names), cells, _numbers(3, 7))


def swap(rows: list[Row]) -> Table:
    cells = [
        [
            *_place(row),
            words(row["domain"]),
            estimate(row["all"]),
            ", ".join(error(layer["value"]) for layer in row["layers"]),
            str(len(row["not_split"])),
        ]
        for row in rows
    ]
    head = ("set", "arm", "domain", "growth, all layers", "each layer alone (mean)", "seeds with nothing to swap")
    return Table(head, cells, _numbers(3, 5))


def kinship(rows: list[Row]) -> Table:
    cells = []
    for row in rows:
        shared = "; ".join(" + ".join(map(words, group)) for group in row["groups"])
        growth = "; ".join(
            f"{words(d)} {' '.join(f'{one:.3g}' for one in found)}" for d, found in row["growth"].items()
        )
        cells.append([arm_words(row["arm"]), str(row["seed"]), shared, growth])
    return Table(("arm", "seed", "domains, by the expert they share", "growth of the error on each expert"), cells)


def place(rows: list[Row]) -> Table:
    cells = [[*_place(row), words(row["domain"]), estimate(row["information"]), _mean(row["entropy"])] for row in rows]
    head = ("set", "arm", "domain", "information about bed or stream, nats", "largest possible")
    return Table(head, cells, _numbers(3, 4))


def unseen(rows: list[Row]) -> Table:
    cells = [
        [
            *_place(row),
            words(row["domain"]),
            estimate(row["latent_mse"]),
            error(row["latent_mse_persistence"]),
            estimate(row["growth"], percent),
            _mean(row["least_purity"]),
            f"{sum(row['bifurcated'].values())} of {len(row['bifurcated'])}" if row["bifurcated"] else DASH,
        ]
        for row in rows
    ]
    names = ("latent MSE", "of persistence", "relative to the test split", "smallest purity", "bifurcated seeds")
    head = ("set", "arm", "domain", *names)
    return Table(head, cells, _numbers(3, 6))


def load(rows: list[Row]) -> Table:
    cells = [
        [
            arm_words(row["arm"]),
            str(row["layer"]),
            _by_seed(row["experts_used"]),
            "; ".join(f"{words(d)} {' '.join(f'{share:.2f}' for share in load)}" for d, load in row["load"].items()),
        ]
        for row in rows
        if row["set"] == "four"
    ]
    return Table(("arm", "layer", "distinct majority experts, by seed", "load of the experts, first seed"), cells)


def gradients(rows: list[Row]) -> Table:
    def when(one: Row) -> str:
        within = one["within"]["value"]
        return f"{_signed(one['between']['value'])} ({_signed(within)})"

    cells = [
        [
            *_place(row),
            row["group"],
            *(when(row[one]) for one in ("first", "middle", "last")),
            DASH if row["conflicting"] is None else f"{row['conflicting']:.0%}",
            _mean(row["norm_ratio"], 2),
        ]
        for row in rows
    ]
    head = ("set", "arm", "parameters", "first", "middle", "last", "conflicting", "norm ratio")
    return Table(head, cells, _numbers(3, 7))


def _signed(value: float | None) -> str:
    return DASH if value is None else f"{value:+.2f}"


def _share(value: float | None) -> str:
    return DASH if value is None else f"{value:.1%}"


def plasticity(rows: list[Row]) -> Table:
    cells = [
        [
            *_place(row),
            "; ".join(f"{g} {_share(one['value'])}" for g, one in row["dormant"].items()) or DASH,
            _mean(row["effective_rank"], 1),
            number(row["width"]),
        ]
        for row in rows
    ]
    return Table(("set", "arm", "dormant units", "effective rank", "of width"), cells, _numbers(3, 4))


def relearning(rows: list[Row]) -> Table:
    cells = [
        [
            *_place(row),
            words(row["domain"]),
            number(row["steps"]),
            estimate(row["from_checkpoint"]),
            estimate(row["from_scratch"]),
            estimate(row["difference"], percent),
            ", ".join("never" if step is None else str(step) for step in row["steps_to_scratch"].values()) or DASH,
        ]
        for row in rows
    ]
    head = (
        "set",
        "arm",
        "domain",
        "steps",
        "from checkpoint",
        "from scratch",
        "difference",
        "reached at step",
    )
    return Table(head, cells, _numbers(3, 7))


def tuning(choices: Row) -> Table:
    cells = []
    for arm, one in choices.items():
        scores = [error(value) if value is not None else "diverged" for value in one["valid_latent_mse"]]
        cells.append(
            [
                arm_words(arm),
                ", ".join(f"{rate:.3g}" for rate in one["learning_rates"]),
                ", ".join(scores) or "not tried",
                f"{one['chosen']:.3g}",
                "yes" if one["at_edge"] else "no",
            ]
        )
    return Table(("arm", "learning rates", "validation error over persistence's", "chosen", "at the edge"), cells)
