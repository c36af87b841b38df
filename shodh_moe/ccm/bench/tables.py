"""The summary of the benchmark as GitHub Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from shodh_moe.ccm.bench.aims import OOD, PAPER, READOUTS, REDUCTION, ROWS, family_title
from shodh_moe.ccm.readout import BEND_TOLERANCE, FLAT
from shodh_moe.report import page
from shodh_moe.report.page import Block, Section, Text
from shodh_moe.report.table import Table

BLEW_UP = "blew up"
NOT_MEASURED = "-"


def markdown(summary: dict[str, Any]) -> str:
    """Format the sections on the aims, each family and the cost. ``summary`` is what `summarise` returns."""
    sections = [Section("Aims", [_aims(summary["aims"]), *_paper(summary)])]
    if backbones := list(_backbones(summary)):
        sections.append(Section("Backbones", backbones))
    for name, family in summary["families"].items():
        title = family_title(name)
        sections.append(Section(title[0].upper() + title[1:], list(_family(family, summary["resamples"]))))
    if paths := list(_paths(summary)):
        sections.append(Section("Paths", paths))
    if variants := list(_variants(summary)):
        sections.append(Section("Variants", variants))
    sections.append(Section("Cost", list(_cost(summary))))
    return page.markdown(sections)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> Table:
    """A table whose first ``words`` columns are text and the others numbers."""
    return Table(head, rows, frozenset(range(words, len(head))))


def _error(value: float | None) -> str:
    if value is None:
        return BLEW_UP
    return f"{value:#.3g}" if value < 100 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def _estimate(estimate: dict[str, Any] | None) -> str:
    """Format as ``0.0815 [0.0790, 0.0841]``."""
    if estimate is None:
        return NOT_MEASURED
    if estimate["value"] is None:
        return BLEW_UP
    return f"{_error(estimate['value'])} [{_error(estimate['low'])}, {_error(estimate['high'])}]"


def _percent(estimate: dict[str, Any] | None) -> str:
    """Format as ``54.2 % [48.1, 59.0]``."""
    if estimate is None:
        return NOT_MEASURED
    if estimate["value"] is None:
        return BLEW_UP
    ends = [NOT_MEASURED if end is None else f"{100 * end:.1f}" for end in (estimate["low"], estimate["high"])]
    return f"{100 * estimate['value']:.1f} % [{ends[0]}, {ends[1]}]"


def _aims(records: list[dict[str, Any]]) -> Table:
    """A table with one row per family and aim, and one column per readout."""
    lines: dict[tuple[str, str], list[str]] = {}
    for record in records:
        reduction, target = record["aim"] == REDUCTION, record["target"]
        wanted = f">= {100 * target:.0f} %" if reduction else f"<= {target:.2f}"
        line = lines.setdefault(
            (record["family"], record["aim"]),
            [family_title(record["family"]), record["aim"], wanted, *[NOT_MEASURED] * len(READOUTS)],
        )
        value = record["value"]
        shown = BLEW_UP if value is None else f"{100 * value:.1f} %" if reduction else f"{value:.3f}"
        where = f" at {record['where']}" if record["where"].startswith("s =") else ""
        line[3 + READOUTS.index(record["readout"])] = f"{'met' if record['held'] else '**missed**'}: {shown}{where}"
    return _table(("family", "aim", "target", *(ROWS[readout] for readout in READOUTS)), list(lines.values()), 6)


def _paper(summary: dict[str, Any]) -> Iterator[Block]:
    known = [
        f"{family_title(name)} {100 * PAPER[name][0]:.1f} % ({ROWS[PAPER[name][1]]})"
        for name in dict.fromkeys(family["name"] for family in summary["families"].values())
        if name in PAPER
    ]
    if known:
        yield Text(
            "Each readout is judged separately: picking the one with the smallest test error would be a choice made on "
            f"test data. Reductions that arXiv 2605.14546 reports, on its own data and splits: {', '.join(known)}."
        )


def _backbones(summary: dict[str, Any]) -> Iterator[Block]:
    """For each family that several networks were trained on: the reduction of the OOD error by row and network."""
    families = summary["families"]
    for name, keys in summary.get("backbones", {}).items():
        yield Text(
            f"{family_title(name)[0].upper()}{family_title(name)[1:]}: reduction of the OOD error relative to the same "
            "network's anchor, whose own error is the first line. FNO: width/modes."
        )
        errors = [
            "nRMSE of the anchor",
            *(_estimate(families[key]["rows"]["anchor"].get("ood")) for key in keys.values()),
        ]
        rows = [row for row in ROWS if row != "anchor" and any(row in families[key]["rows"] for key in keys.values())]
        lines = [[ROWS[row], *(_percent(_reduction(families[key], row)) for key in keys.values())] for row in rows]
        yield _table(("row", *keys), [errors, *lines])


def _paths(summary: dict[str, Any]) -> Iterator[Block]:
    """For each family with variants: its paths, and whether the aims of curved paths are met."""
    for key, found in summary.get("paths", {}).items():
        title = family_title(key)
        yield Text(
            f"{title[0].upper()}{title[1:]}: the line between the experts (unchanged), and other paths. For each "
            "readout the path with the smallest validation error is chosen; the one with two networks (outputs) is "
            "left out. Oracle: OOD error relative to the best alpha on the line, mean over regimes. Gap: share of the "
            "distance between the line and the conditioned network."
        )
        lines = [
            [
                row["path"] + (" (chosen)" if row["chosen"] else ""),
                ROWS[row["readout"]],
                *(_error(row[name]) for name in ("validation", "ood")),
                *(_share(row[name]) for name in ("reduction", "oracle", "gap")),
            ]
            for row in found["rows"]
        ]
        head = ("path", "readout", "validation nRMSE", "OOD nRMSE", "reduction", "oracle", "gap closed")
        yield _table(head, lines, 2)
        aims = [
            [
                one["aim"],
                f"{ROWS[one['readout']]} on {one['path']}",
                f"{'<=' if one['target'] > 1 else '>='} {_share(one['target'])}",
                f"{'met' if one['held'] else '**missed**'}: {_share(one['value'])}",
            ]
            for one in found["aims"]
        ]
        yield _table(("aim", "row", "target", "found"), aims, 4)


def _share(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{100 * value + 0.0:.1f} %"  # no -0.0


def _variants(summary: dict[str, Any]) -> Iterator[Block]:
    """For each family with variants: one line each."""
    for key, variants in summary.get("variants", {}).items():
        title = family_title(key)
        yield Text(
            f"{title[0].upper()}{title[1:]}: OOD nRMSE, and its reduction relative to the family's own anchor. The "
            "distance is that of the two ends of the path, relative to the norm of the anchor's weights. Errors count "
            "after the frames in the last column."
        )
        rows = [
            row
            for row in ("ccm_coordinate", "ccm_prefix", "oracle")
            if any(row in v["rows"] for v in variants.values())
        ]
        lines = []
        for name, found in variants.items():
            cells = [_error(found["distance"])]
            for row in rows:
                cells += [_estimate(found["rows"].get(row, {}).get("ood")), _percent(_reduction(found, row))]
            lines.append([name, *cells, str(found["frames"])])
        head = [text for row in rows for text in (ROWS[row], "reduction")]
        yield _table(("variant", "distance", *head, "frames"), lines)


def _reduction(family: dict[str, Any], row: str) -> dict[str, Any] | None:
    found: dict[str, Any] = family["rows"].get(row, {}).get("reduction", {})
    return found.get("anchor")


def _family(family: dict[str, Any], resamples: int) -> Iterator[Block]:
    seeds = family["seeds"]
    yield Text(
        f"Parameter: {_words(family['parameter'])}. Seeds: {', '.join(map(str, seeds))}. "
        f"The first K = {family['frames']} frames are given; errors are the nRMSE of the later ones. "
        f"In brackets: 95 % interval by a paired bootstrap over seeds and trajectories ({resamples:,} resamples)."
        + (" With so few seeds the interval is rough." if len(seeds) < 5 else "")
    )
    bases = {"anchor": "OOD reduction relative to the anchor", "best_endpoint": "relative to the best endpoint"}
    yield _table(
        ("row", "interpolation nRMSE", "OOD nRMSE", "OOD low", "OOD high", *bases.values()),
        [
            (
                ROWS[row],
                *(_estimate(found.get(group)) for group in ("interpolation", "ood")),
                *(
                    _error(found[group]["value"]) if group in found else NOT_MEASURED
                    for group in ("ood_low", "ood_high")
                ),
                *(_percent(found["reduction"].get(base)) for base in bases),
            )
            for row, found in family["rows"].items()
        ],
    )
    yield Text(
        "Each OOD regime separately: nRMSE, mean over seeds and trajectories (in brackets alpha, mean over seeds)."
    )
    yield _regimes(family)
    yield from map(Text, _notes(family))


def _regimes(family: dict[str, Any]) -> Table:
    regimes = [regime for regime in family["regimes"] if regime["split"] in OOD]

    def cell(regime: dict[str, Any], row: str) -> str:
        if row not in regime["errors"]:
            return NOT_MEASURED
        alpha = regime["alpha"].get(row)
        return _error(regime["errors"][row]) + (f" ({alpha:+.2f})" if alpha is not None else "")

    head = [f"s = {regime['coordinate']:+g} ({regime['value']:.3g})" for regime in regimes]
    return _table(("row", *head), [(ROWS[row], *(cell(one, row) for one in regimes)) for row in family["rows"]])


def _notes(family: dict[str, Any]) -> Iterator[str]:
    """Paragraphs on the choices, the straightness of the path, rollouts that blew up, and missing rows."""
    by_seed: dict[str, list[str]] = {}
    for position, chosen in enumerate(family["chosen"].values()):
        for name, value in _leaves(chosen):
            by_seed.setdefault(name, [NOT_MEASURED] * len(family["seeds"]))[position] = value
    if by_seed:
        numbers = " / ".join(map(str, family["seeds"]))
        listed = "; ".join(f"{name} = {_same(values)}" for name, values in by_seed.items())
        yield f"Chosen on validation regimes (seeds {numbers}; one value where all agree): {listed}."
    if straight := list(family["straight_to"].values()):
        reached = _same([f"{one:g}" for one in straight])
        yield f"The path is straight (bend at most {BEND_TOLERANCE:g}) up to |alpha| = {reached}."
    if sharp := [value for value in family["sharpness"].values() if value is not None]:
        yield (
            f"Sharpness of the prefix's optimum, by regime: {min(sharp):.3f} to {max(sharp):.3f} "
            f"(below {FLAT:g} the frames hardly distinguish one alpha from another)."
        )
    blown = [f"{ROWS[row]} {r['blew_up']} of {r['rollouts']}" for row, r in family["rows"].items() if r["blew_up"]]
    if blown:
        yield f"Rollouts that blew up: {', '.join(blown)}."
    if family["incomplete"]:
        yield f"Left out of regimes that some seed lacks: {', '.join(ROWS[row] for row in family['incomplete'])}."


def _same(values: list[str]) -> str:
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Flatten ``{"ties": {"density": 0.5}}`` to ``("ties density", "0.5")``; validation errors are left out."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not key.startswith("validation_error"):
                yield from _leaves(inner, f"{name} {_words(key)}".strip())
    else:
        yield name, f"{value:g}" if isinstance(value, float) else str(value)


def _cost(summary: dict[str, Any]) -> Iterator[Block]:
    families = summary["families"]
    stages = dict.fromkeys(stage for family in families.values() for stage in family["cpu_seconds"])
    rows = [
        (family_title(name), *(_minutes(spent.get(stage)) for stage in stages), _minutes(sum(spent.values())))
        for name, spent in ((name, family["cpu_seconds"]) for name, family in families.items())
    ]
    if stages:
        yield Text("CPU minutes, sum over seeds:")
        yield _table(("family", *map(_words, stages), "total"), rows)
    yield Text(f"Total: {summary['cpu_seconds'] / 3600:.2f} CPU hours.")


def _minutes(seconds: float | None) -> str:
    return NOT_MEASURED if seconds is None else f"{seconds / 60:.1f}"
