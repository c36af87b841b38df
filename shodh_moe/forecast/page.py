"""The report: sections of text, tables and figures, as Markdown and as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from shodh_moe.evaluation.divergence import NORM
from shodh_moe.forecast.config import OURS
from shodh_moe.forecast.verdict import title
from shodh_moe.report import page as report_page
from shodh_moe.report.figure import Figure
from shodh_moe.report.page import Block, Box, Heading, Page, Section, Text
from shodh_moe.report.style import words
from shodh_moe.report.table import Table, number

Summary = dict[str, Any]
TITLE = "Forecasts of networks that were trained for the same time"
CAPTIONS = {
    "error": "Velocity nRMSE of forecasts that feed their own predictions back. Bands: smallest and largest seed.",
    "fields": "Speed in the middle plane of a test flow, and the length of the velocity's error, with the first seed.",
}
BLEW_UP = "blew up"
LATE = 0.02  # share of the time by which our model may exceed it without a remark


def markdown(summary: Summary) -> str:
    """Format the summary as GitHub Markdown, without figures."""
    return report_page.markdown(sections(summary))


def write_page(summary: Summary, pictures: Sequence[Path], folder: Path) -> Path:
    """Write ``folder/index.html`` with the figures of `pictures.draw`, and return its path."""
    return Page(TITLE, sections(summary, pictures)).write(folder / "index.html")


def sections(summary: Summary, pictures: Sequence[Path] = ()) -> list[Section]:
    """List the sections, the verdict first."""
    models, domains = summary["models"], list(summary["models"][OURS]["domains"])

    def figures(prefix: str) -> list[Block]:
        return [Figure(path, CAPTIONS[prefix], CAPTIONS[prefix]) for path in pictures if path.stem.startswith(prefix)]

    return [
        Section("Verdict", [Box(summary["verdict"]), Text(_comparison(summary))]),
        Section("Velocity error by step", [*figures("error"), *_by_step(summary, domains, "nrmse", "velocity")]),
        Section("Pressure error by step", list(_by_step(summary, domains, "nrmse", "pressure"))),
        Section("VRMSE of the velocity by step", list(_by_step(summary, domains, "vrmse", "velocity"))),
        Section("VRMSE of the pressure by step", list(_by_step(summary, domains, "vrmse", "pressure"))),
        Section("Spectra", [Text(_SPECTRA), *_spectra(models, domains, summary["steps"])]),
        Section("Mass and walls", [Text(_conserved_text(summary)), *_conserved(models, domains)]),
        Section("Fields", figures("fields")) if pictures else Section("Fields", [Text("See the HTML page.")]),
        Section("Training and cost", [Text(_COST), _training(models), _cost(models)]),
        Section("Learning rates", [Text(_RATES), _rates(models)]),
    ]


_SPECTRA = (
    "Three bands of wave numbers, from long to short waves. Error: power of the velocity's error over the true power. "
    "Energy: power of the forecast over the true power. At the first and at the last step, mean over seeds."
)
_COST = (
    "Seconds of training, with the smallest and the largest seed; those of our model include the tokenizer, the "
    "encoding of the data, and the training of the transformer. A forecast is made on all cores. Its memory is what "
    "model and forecast need beyond the libraries."
)
_RATES = "Velocity nRMSE on validation flows, mean over steps and domains, after a trial of each learning rate."


def _comparison(summary: Summary) -> str:
    trained = [name for name, model in summary["models"].items() if "seeds" in model]
    seeds = len(summary["models"][OURS]["seeds"])
    size = " x ".join(map(str, summary["grid"]))
    several, longest = "s" if seeds > 1 else "", max(summary["models"][OURS]["seconds"])
    late = f" Our model took longer: up to {longest:.0f} s." if longest > (1 + LATE) * summary["seconds"] else ""
    return (
        f"Networks: {', '.join(map(title, trained))}. Each had {summary['seconds']:g} s of training on "
        f"{summary['threads']} threads, {seeds} seed{several}, and before that a trial of "
        f"{summary['trial_seconds']:g} s for each of the same number of learning rates.{late} Grid {size}, "
        f"{summary['history']} given snapshots, {summary['steps']} forecast ones. Means over seeds are compared."
    )


def _by_step(summary: Summary, domains: list[str], kind: str, field: str) -> Iterator[Block]:
    for domain in domains:
        rows = []
        for name, model in summary["models"].items():
            if domain in model["domains"]:
                found, several = model["domains"][domain][kind][field], len(model.get("seeds", [])) > 1
                values = zip(found["mean"], found["low"], found["high"], strict=True)
                rows.append([title(name), *(_error(*value, several) for value in values)])
        yield Heading(words(domain))
        yield _table(["", *(str(step) for step in range(1, summary["steps"] + 1))], rows)


def _error(mean: float | None, low: float | None, high: float | None, several: bool) -> str:
    if mean is None:
        return BLEW_UP
    return f"{_short(mean)} [{_short(low)}, {_short(high)}]" if several else _short(mean)


def _short(value: float | None) -> str:
    return BLEW_UP if value is None else f"{value:.3f}" if value < 100 else f"{value:.1e}"


def _spectra(models: dict[str, Any], domains: list[str], steps: int) -> Iterator[Block]:
    ends = [0, steps - 1] if steps > 1 else [0]
    head = [f"{what}, step {step + 1}" for what in ("error", "energy") for step in ends]
    for domain in domains:
        rows = []
        for name, model in models.items():
            if domain in model["domains"]:
                own = model["domains"][domain]
                cells = [own[kind][step] for kind in ("band_errors", "band_energy") for step in ends]
                rows.append([title(name), *(" / ".join(_short(value) for value in cell) for cell in cells)])
        yield Heading(words(domain))
        yield _table(["", *head], rows)


def _conserved_text(summary: Summary) -> str:
    return (
        f"Divergence of the forecast velocity by the operator `{summary['operator']}`: {NORM}. Our model's is measured "
        "on faces if the operator is staggered; all others are averaged to faces, as the true flow is. Velocity in "
        "solids: its rms over the true rms in the fluid, mean over steps."
    )


def _conserved(models: dict[str, Any], domains: list[str]) -> Iterator[Block]:
    rows = []
    for domain in domains:
        true = models[OURS]["domains"][domain]["divergence_true"]
        rows.append([words(domain), "true flow", f"{true:.1e}", "-"])
        for name, model in models.items():
            if domain in model["domains"]:
                own = model["domains"][domain]
                inside = own["solid_velocity"]
                mean = None if inside is None or None in inside else fmean(inside)
                divergence = BLEW_UP if own["divergence"] is None else f"{own['divergence']:.1e}"
                rows.append([words(domain), title(name), divergence, "-" if mean is None else f"{mean:.1e}"])
    yield _table(["domain", "", "divergence", "velocity in solids"], rows, names=2)


def _training(models: dict[str, Any]) -> Table:
    rows = []
    for name, model in models.items():
        if "seeds" in model:
            stages = model["stages"][0]
            detail = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in stages.items()) if stages else "-"
            row = [
                f"{model['parameters']['total']:,}",
                *(_range(model[key]) for key in ("steps", "samples", "seconds")),
            ]
            rows.append([title(name), *row, detail, ", ".join(map(str, model["diverged"])) or "-"])
    head = ["", "parameters", "steps", "samples", "seconds", "of them (first seed)", "diverged seeds"]
    return _table(head, rows)


def _cost(models: dict[str, Any]) -> Table:
    rows = []
    for name, model in models.items():
        if "seeds" in model:
            seconds = fmean(one["seconds"] for one in model["cost"])
            memory = fmean(one["memory_bytes"] for one in model["cost"])
            rows.append([title(name), f"{seconds:.2f}", f"{memory / 2**20:,.0f}"])
    return _table(["", "seconds of a forecast", "memory in MiB"], rows)


def _range(values: list[Any]) -> str:
    low, high = f"{min(values):,.0f}", f"{max(values):,.0f}"
    return low if low == high else f"{low} to {high}"


def _rates(models: dict[str, Any]) -> Table:
    rows = []
    for name, model in models.items():
        rates = list(model.get("trials", {}))
        for rate, error in model.get("trials", {}).items():
            chosen = "yes" if float(rate) == model["learning_rate"] else ""
            if chosen and rate in (rates[0], rates[-1]):
                chosen = f"yes, the {'smallest' if rate == rates[0] else 'largest'} tried"
            rows.append([title(name), rate, "diverged" if error is None else number(error), chosen])
    return _table(["", "learning rate", "validation error", "chosen"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1) -> Table:
    return Table(head, rows, frozenset(range(names, len(head))))
