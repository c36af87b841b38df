"""The report of a run as one page, with its figures as files beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import figure as matplotlib_figure

from shodh_moe.report.figure import Figure, write_figures
from shodh_moe.report.page import Block, Box, Heading, Link, Note, Page, Preformatted, Section, Text
from shodh_moe.report.run import curves, fields, flow_3d, routing, tables, texts
from shodh_moe.report.run.load import RunData, load_run
from shodh_moe.report.style import words
from shodh_moe.report.table import Table, number


def write_report(run_folder: Path) -> Path:
    """Write ``<run>/report/index.html``, ``flow_3d.html`` and ``*.png``; return the path of the page.

    Reads metrics.json, metrics.jsonl, evaluation.npz, config.yaml, environment.json and, if it exists,
    tokenizer_metrics.jsonl. Figures without data are left out, and the page says so. Every file is written under a
    temporary name and then renamed, the page last.

    Raises:
        UserError: a file is missing or damaged.
    """
    run = load_run(Path(run_folder))
    folder = Path(run_folder) / "report"
    folder.mkdir(exist_ok=True)
    step = number(run.metrics.get("step"))
    subtitle = f"Evaluation on held-out trajectories at training step {step}. {texts.INTRODUCTION}"
    page = Page(run.name, _sections(run, folder), subtitle, f"{run.name}: report")
    return page.write(folder / "index.html")


def _sections(run: RunData, folder: Path) -> list[Section]:
    """The sections in the order a reader needs them; writes their figures into ``folder``."""
    metrics = run.metrics
    summary = _table(tables.summary(metrics), texts.SUMMARY, "metrics.json holds no numbers for any domain.")
    cost = _table(tables.cost(metrics), "Measured while training.", "Throughput and memory were not recorded.")
    return [
        Section("Summary", [*_verdict(metrics), *summary]),
        Section("Flow fields", _flow_fields(run, folder)),
        Section("Spectra", _spectra(run, folder)),
        Section("Rollout", [_rollout(run, folder)]),
        Section("Routing", _routing(run, folder)),
        Section("Training", _training(run, folder)),
        Section("Divergence", _divergence(metrics)),
        Section("Cost", cost),
        Section("Environment", _table(tables.environment(run.environment), "", "The environment file is empty.")),
        Section("Config", [Preformatted(run.config)]),
    ]


def _verdict(metrics: tables.Metrics) -> list[Block]:
    """Return a box that answers a reader's first two questions."""
    answers = {domain: _beats_both(scores) for domain, scores in metrics.get("domains", {}).items()}
    lines = [
        f"**{words(domain)}**: beats both baselines, latent and physical MSE: "
        f"**{'not measured' if answer == '-' else answer}**"
        for domain, answer in answers.items()
    ]
    bifurcated = metrics.get("routing", {}).get("bifurcated")
    if bifurcated is not None:
        lines.append(f"Every layer gives each domain its own expert (bifurcated): **{number(bool(bifurcated))}**")
    if not lines:
        return []
    if answers and all(answer == "yes" for answer in answers.values()):
        return [Box(lines, "good")]
    return [Box(lines, "bad" if "no" in answers.values() else "")]


def _beats_both(scores: dict[str, Any]) -> str:
    answers = {tables.beats_baselines(scores, quantity) for quantity in ("latent_mse", "physical_mse")}
    return next(answer for answer in ("no", "-", "yes") if answer in answers)


def _flow_fields(run: RunData, folder: Path) -> list[Block]:
    blocks: list[Block] = [Text(texts.FIELDS)]
    for domain in run.domains:
        drawing, name = fields.field_slices(run, domain), words(domain)
        absent = f"The evaluation kept no example fields of {name}."
        blocks.append(_figure(folder / f"fields_{domain}.png", drawing, f"Slices of {name}", "", absent))
    if path := flow_3d.write_flow_3d(run, folder):
        blocks.append(Link(path.name, "The same fields in 3D"))
    return blocks


def _spectra(run: RunData, folder: Path) -> list[Block]:
    drawing, absent = fields.energy_spectra(run), "The evaluation kept no spectra."
    figure = _figure(folder / "spectra.png", drawing, "Energy spectra", texts.SPECTRA, absent)
    return [figure, *_table(tables.band_errors(run.metrics), texts.BANDS)]


def _rollout(run: RunData, folder: Path) -> Block:
    drawing, absent = fields.rollout_error(run), "The evaluation kept no rollout."
    return _figure(folder / "rollout.png", drawing, "Rollout error", texts.ROLLOUT, absent)


def _routing(run: RunData, folder: Path) -> list[Block]:
    drawing, absent = routing.expert_load(run), "metrics.json holds no expert loads."
    blocks: list[Block] = [_figure(folder / "expert_load.png", drawing, "Expert load", texts.LOAD, absent)]
    blocks += _table(tables.routing(run.metrics), texts.ROUTING_TABLE)
    if information := _table(tables.mutual_information(run.metrics), texts.INFORMATION):
        blocks += [Heading("Mutual information of the expert"), *information]
    blocks += [Heading("Where each expert works"), Text(texts.ROUTING_MAP)]
    for domain in run.domains:
        drawing, name = routing.routing_map(run, domain), words(domain)
        absent = f"No routing map of {name} was kept."
        blocks.append(_figure(folder / f"routing_map_{domain}.png", drawing, f"Routing map of {name}", "", absent))
    return blocks


def _training(run: RunData, folder: Path) -> list[Block]:
    losses, absent = curves.loss_curves(run), "metrics.jsonl holds no losses."
    loads, no_loads = routing.load_over_steps(run), "metrics.jsonl holds no routing records."
    return [
        _figure(folder / "losses.png", losses, "Losses", texts.LOSSES, absent),
        _figure(folder / "routing_over_steps.png", loads, "Routing during training", texts.LOAD_STEPS, no_loads),
    ]


def _divergence(metrics: tables.Metrics) -> list[Block]:
    norm = tables.divergence_norm(metrics)
    shared = f"Norm of every row: `{norm}`. " if norm else ""
    return _table(tables.divergence(metrics), shared + texts.DIVERGENCE, "The divergence was not measured.")


def _figure(
    path: Path, drawing: matplotlib_figure.Figure | None, alternative: str, caption: str, absent: str
) -> Figure | Note:
    """Write the drawing to ``path`` and return its figure; without a drawing, return a note that says ``absent``."""
    written = write_figures({path.stem: drawing}, path.parent)
    return Figure(path, alternative, caption) if written else Note(absent)


def _table(table: Table, caption: str, absent: str = "") -> list[Block]:
    """Return the table above its caption; if it has no rows, a note that says ``absent`` (no note if that is empty)."""
    if not table.rows:
        return [Note(absent)] if absent else []
    return [table, Text(caption)] if caption else [table]
