"""Draw roofline and bar charts of benchmark results beside each JSON file.

    python benchmarks/support/plot.py RESULT.json [RESULT.json ...]

The roofs are the copy bandwidth and the matrix-product rate measured in the same run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from shodh_moe.base.command import OneLineParser, exit_code
from shodh_moe.base.errors import UserError
from shodh_moe.base.files import atomic_file

COLORS = {
    "shodh": "#d1495b",
    "deepspeed": "#00798c",
    "torch": "#6c757d",
    "torch.fft": "#00798c",
    "torch.compile": "#edae49",
    "torch.compile of fft": "#edae49",
    "matrix products": "#6c757d",
}
MORE_COLORS = ("#30638e", "#8f5ba8", "#5b8c5a", "#a0632d")
HIDDEN = {"pass", "dtype", "tokens", "width", "kept", "hidden"}  # constant within a chart, or too long to show


def read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        results, _ = content["results"], content["ceilings"]["copy_gb_s"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a benchmark result: {type(error).__name__}: {error}") from error
    if not results:
        raise UserError(f"{path} contains no results")
    return content


def color_of(implementation: str, others: list[str]) -> str:
    return COLORS.get(implementation) or MORE_COLORS[others.index(implementation) % len(MORE_COLORS)]


def label_of(case: dict[str, Any]) -> str:
    """Describe a case in a few words; for dispatch, name its form instead of the number of slots."""
    words = []
    for key, value in case.items():
        if key == "capacity":
            words += ["dropless"] if value == "dropless" else []
        elif key == "experts":
            words.append(f"E={value}")
        elif key == "grid":
            words.append(f"{value}³")
        elif key == "shared":
            words += ["+shared"] if value else []
        elif key == "drop_order":
            words.append(f"by {value}")
        elif key not in HIDDEN:
            words.append(str(value))
    return " ".join(words)


def groups(results: list[dict[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Results by operation, pass and dtype."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in results:
        case = row["case"]
        found.setdefault((row["op"], case.get("pass", ""), case.get("dtype", "")), []).append(row)
    return found


def title(content: dict[str, Any]) -> str:
    machine = content["machine"]
    note = "   QUICK: tiny sizes, not a measurement" if content["quick"] else ""
    where = f"{machine['device_name']}, torch {machine['packages']['torch']}, {machine['date'][:10]}"
    return f"{content['benchmark']} on {where}{note}"


def extra_names(results: list[dict[str, Any]]) -> list[str]:
    return sorted({row["implementation"] for row in results} - set(COLORS))


def roofline(content: dict[str, Any], target: Path) -> None:
    """Draw one panel per operation: GFLOP/s over intensity (FLOP per minimal byte), below the measured roofs."""
    with_flops = [row for row in content["results"] if row["flops"]]
    panels = sorted({row["op"] for row in with_flops})
    if not panels:
        return
    copy, gemm = content["ceilings"]["copy_gb_s"], content["ceilings"]["gemm_gflop_s"]
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(7.5 * columns, 5.2 * rows), squeeze=False)
    others = extra_names(content["results"])
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, op in zip(axes.flat, panels, strict=False):
        op_rows = [row for row in with_flops if row["op"] == op]
        _roofs(axis, [row["flops"] / row["bytes"] for row in op_rows], copy, gemm)
        names = sorted({row["implementation"] for row in op_rows}, key=lambda name: name == "shodh")
        for row in sorted(op_rows, key=lambda row: names.index(row["implementation"])):
            ours, both = row["implementation"] == "shodh", row["case"].get("pass") == "forward+backward"
            # All implementations of a case have the same intensity; shift them to keep them apart.
            aside = 10 ** (0.015 * (names.index(row["implementation"]) - (len(names) - 1) / 2))
            axis.plot(
                row["flops"] / row["bytes"] * aside, row["gflop_s"], "s" if both else "o", markersize=8 if ours else 6,
                color=color_of(row["implementation"], others), markeredgecolor="black" if ours else "white",
                markeredgewidth=0.8,
            )  # fmt: skip
        _name_cases(axis, op_rows)
        axis.set_title(op)
        axis.set_xlabel("FLOP per byte that must move")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_ylim(top=axis.get_ylim()[1] * 2)  # leaves room for the names of the roofs
        axis.set_ylabel("GFLOP/s")
        axis.grid(True, which="both", alpha=0.2)
    _legend(figure, content["results"], others, passes=True)
    figure.suptitle(title(content), fontsize=11)
    figure.tight_layout(rect=(0, 0.5 / figure.get_figheight(), 1, 0.97))
    _save(figure, target)


def _roofs(axis: Any, intensities: list[float], copy: float, gemm: dict[str, float]) -> None:
    """Draw the copy bandwidth up to the fastest matrix product, and a line for each dtype's matrix product."""
    x = np.geomspace(min(intensities) / 2.5, max(intensities) * 2.5, 100)
    axis.loglog(x, np.minimum(copy * x, max(gemm.values())), color="black", linewidth=1.2)
    style = {"xytext": (0, 6), "textcoords": "offset points", "fontsize": 8}
    axis.annotate(f"copy {copy:.3g} GB/s", (x[0], copy * x[0]), ha="left", **style)
    for name, rate in gemm.items():
        if rate < copy * x[-1]:
            axis.axhline(rate, color="black", linewidth=0.8, linestyle="--")
            axis.annotate(f"matrix product {name} {rate:.3g} GFLOP/s", (x[0], rate), ha="left", **style)


def _name_cases(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Label our point in each column with its case, if columns are far enough apart."""
    named: list[float] = []
    for row in sorted((r for r in rows if r["implementation"] == "shodh"), key=lambda r: -r["gflop_s"]):
        x = np.log10(row["flops"] / row["bytes"])
        if all(abs(x - other) > 0.06 for other in named):
            named.append(x)
            axis.annotate(
                label_of({k: v for k, v in row["case"].items() if k not in ("drop_order", "shared")}),
                (row["flops"] / row["bytes"], row["gflop_s"]), xytext=(6, 5),
                textcoords="offset points", fontsize=7, rotation=25,
            )  # fmt: skip


def bars(content: dict[str, Any], target: Path) -> None:
    """Draw each implementation's time over ours, one panel per operation, pass and dtype."""
    found = groups(content["results"])
    others = extra_names(content["results"])
    names = list(dict.fromkeys(row["implementation"] for row in content["results"]))
    columns = min(len(found), 2)
    rows = -(-len(found) // columns)
    heights = []
    for start in range(0, len(found), columns):
        in_row = list(found.values())[start : start + columns]
        heights.append(max(len({label_of(r["case"]) for r in group}) for group in in_row) + 1.0)
    figure, axes = plt.subplots(
        rows, columns, figsize=(7.5 * columns, 1.0 * sum(heights) + 1.5), squeeze=False, height_ratios=heights
    )
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    for axis, ((op, which, dtype), group) in zip(axes.flat, found.items(), strict=False):
        _bar_panel(axis, group, names, others)
        axis.set_title(f"{op}, {which}, {dtype}", fontsize=10)
    _legend(figure, content["results"], others, passes=False)
    figure.suptitle(title(content), fontsize=11)
    figure.tight_layout(rect=(0, 0.5 / figure.get_figheight(), 1, 1 - 0.3 / figure.get_figheight()))
    _save(figure, target)


def _bar_panel(axis: Any, group: list[dict[str, Any]], names: list[str], others: list[str]) -> None:
    cases = list(dict.fromkeys(json.dumps(row["case"]) for row in group))
    here = [name for name in names if any(row["implementation"] == name for row in group)]
    height = 0.8 / len(here)
    for row in group:
        place = (
            cases.index(json.dumps(row["case"])) + (here.index(row["implementation"]) - (len(here) - 1) / 2) * height
        )
        ms = row["seconds"] * 1e3
        errors = [[(row["seconds"] - row["seconds_p20"]) * 1e3], [(row["seconds_p80"] - row["seconds"]) * 1e3]]
        axis.barh(place, ms, height * 0.9, color=color_of(row["implementation"], others), xerr=errors, ecolor="#333333")
        axis.annotate(
            f"{ms:.3g} ({row['share_of_copy']:.0%})", (row["seconds_p80"] * 1e3, place), xytext=(4, 0),
            textcoords="offset points", fontsize=7, va="center",
        )  # fmt: skip
    axis.set_yticks(range(len(cases)), [label_of(json.loads(case)) for case in cases], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("ms, median; whiskers 20 % and 80 %; share of the copy bandwidth in brackets", fontsize=8)
    axis.set_xlim(0, axis.get_xlim()[1] * 1.15)
    axis.grid(True, axis="x", alpha=0.2)


def _legend(figure: Any, results: list[dict[str, Any]], others: list[str], passes: bool) -> None:
    names = list(dict.fromkeys(row["implementation"] for row in results))
    handles = [plt.Line2D([], [], marker="s", linestyle="", color=color_of(name, others)) for name in names]
    if passes:
        for marker, text in (("o", "forward"), ("s", "forward+backward")):
            handles.append(plt.Line2D([], [], marker=marker, linestyle="", color="white", markeredgecolor="black"))
            names.append(text)
    # About 15 characters fit in an inch; a longer legend takes several lines.
    widest = max(len(name) for name in names) + 8
    columns = max(min(len(names), int(figure.get_figwidth() * 15 / widest)), 1)
    figure.legend(handles, names, loc="lower center", ncol=columns, fontsize=8, frameon=False)


def _save(figure: Any, target: Path) -> None:
    with atomic_file(target) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)
    print(target)


def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json", help="result of a microbenchmark")
    parser.add_argument("--present", action="store_true", help="skip files that do not exist")
    options = parser.parse_args(arguments)

    def work() -> None:
        for path in options.results:
            if options.present and not path.exists():
                continue
            content = read(path)
            roofline(content, path.with_name(f"{path.stem}_roofline.png"))
            bars(content, path.with_name(f"{path.stem}_times.png"))

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
