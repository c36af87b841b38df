"""The summary of the audit as sections of text, tables and figures, written as Markdown and as one HTML page."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shodh_moe.audit import tables, verdict
from shodh_moe.audit.results import MIN_SEEDS
from shodh_moe.report import page as report_page
from shodh_moe.report.figure import Figure
from shodh_moe.report.page import Block, Box, Page, Preformatted, Section, Text
from shodh_moe.report.style import words
from shodh_moe.report.table import Table

Row = dict[str, Any]
TITLE = "Does the mixture of experts end negative transfer?"
GOOD, BAD = ("shown", "no harm to end"), ("refuted",)
ESTIMATES = f"""Mean over seeds and 95 % Student t interval over seeds. No interval is given with fewer than {MIN_SEEDS}
seeds, or where a run diverged."""
QUESTIONS = {
    "dense_total": "Is it the routing rather than only more parameters? Mixture against the dense model of the same "
    "total size, which computes more for each token:",
    "random": "Does it matter that the routing is learned? Mixture against frozen random routing:",
    "oracle": f"Is it as good as knowing the domain, within {verdict.MARGIN:.0%}? Mixture against oracle routing:",
    "no_shared": "Do shared experts matter? Mixture against the same without them:",
    "splits": "Does the router give each domain an expert of its own?",
    "reads_mask": "Does the router only read the solid mask?",
}
CAPTIONS = {
    "transfer": "Right of the black line joint training costs accuracy. Paired by seed.",
    "four": "Left of the black line the mixture is better than the dense model of the same active size.",
    "load": """Every seed is a line. Domains that part and stay apart have experts of their own: of which number
    differs between seeds, so the share is that at the expert which serves the first domain in the end.""",
    "gradients": """Below 0 a step that helps one domain hurts the other. Dotted: how well two halves of one domain's
    batch agree, the most that could be hoped for. A line ends where an expert sees one domain only.""",
    "swap": "Bars: mean over seeds. 1 (black line): it does not matter which expert the tokens go to.",
    "relearning": "A solid line below the dashed one: what was learned before helps.",
    "routing_map": "Colour: the expert of each token in the middle plane, beside the solid fraction (one run).",
}


def markdown(summary: Row) -> str:
    """GitHub Markdown without figures. ``summary`` is what `summarise` returns."""
    return report_page.markdown(sections(summary))


def write_page(summary: Row, pictures: Sequence[Path], folder: Path) -> Path:
    """Write ``folder/index.html`` and return its path.

    Args:
        summary: what `shodh_moe.audit.summary.summarise` returns.
        pictures: the PNG files that `shodh_moe.audit.pictures.draw` wrote; the page contains them.
        folder: made if missing.

    Raises:
        UserError: the folder cannot be written.
    """
    return Page(TITLE, sections(summary, pictures)).write(folder / "index.html")


def sections(summary: Row, pictures: Sequence[Path] = ()) -> list[Section]:
    """The sections that have something to show, in the order a reader needs them; the verdict is the first."""

    def section(title: str, text: str, table: Table, *more: Table, figures: Sequence[str] = ()) -> Section:
        """``figures``: the first part of the names of the figures that belong here."""
        blocks: list[Block] = [Text(" ".join(text.split()))] if text else []
        for name in figures:
            caption = " ".join(CAPTIONS[name].split())
            blocks += [Figure(path, caption, caption) for path in pictures if path.stem.startswith(name)]
        return Section(title, [*blocks, *(one for one in (table, *more) if one.rows)])

    found = [
        section("Runs that diverged", _diverged_text(summary["diverged"]), tables.diverged(summary["diverged"])),
        section("Negative transfer", f"""(error - error of a model of the domain alone) / error of that model, paired
            by seed. That model has the same active size and saw the same samples of the domain. {ESTIMATES}""",
            tables.differences(summary["transfer"]), figures=["transfer"]),
        section("Mixture of experts against the other arms", f"""Relative difference of the error, paired by seed:
            below 0 the mixture is better. {ESTIMATES}""",
            tables.differences(summary["pairs"]), figures=["four"]),
        section("Errors", f"On held-out trajectories. {ESTIMATES}", tables.errors(summary["errors"])),
        section("Arms", "", tables.arms(summary["arms"])),
        section("Routing", """Purity: share of a domain's tokens at its majority expert. Bifurcated: the majority
            experts differ and every purity is at least 0.99, on held-out data. The step is the first record of training
            from which on every layer stays bifurcated.""",
            tables.bifurcation(summary["bifurcation"]), tables.purity(summary["routing"]),
            figures=["load", "routing_map"]),
        section("What the expert tells", """Mutual information of the expert with the domain, the solid fraction and
            the speed of a token, in nats. With the solid fraction known it says what the router reads beyond the
            mask.""",
            tables.information(summary["routing"])),
        section("Swapped experts", """How many times the domain's latent MSE grows when tokens go to another domain's
            majority expert, in one layer alone or in all of them. There is nothing to swap on seeds where the domains
            have the same expert.""",
            tables.swap(summary["swap"]), figures=["swap"]),
        section("Geometry never seen", "", tables.unseen(summary["unseen"])),
        section("Four domains", """Distinct majority experts in each layer, by seed, and the load of the experts on the
            first seed.""",
            tables.load(summary["routing"])),
        section("Gradients", """Cosine between the gradients of two domains (mean over pairs), and in brackets between
            two halves of one domain's batch, at the first, middle and last record. Conflicting: share of records below
            0. Norms: the larger over the smaller one, geometric mean over pairs, at the last record.""",
            tables.gradients(summary["gradients"]), figures=["gradients"]),
        section("Plasticity", "", tables.plasticity(summary["plasticity"])),
        section("Relearning", """Validation latent MSE of a domain not trained on, after as many steps from the
            checkpoint and from scratch. The last column: the step at which training from the checkpoint is as good as
            training from scratch in the end, by seed.""",
            tables.relearning(summary["relearning"]), figures=["relearning"]),
        section("Learning rates", """Chosen on validation data alone: mean over domains of latent MSE over that of
            persistence.""",
            tables.tuning(summary["tuning"])),
    ]  # fmt: skip
    shown = [one for one in found if any(isinstance(block, Table) for block in one.blocks)]
    return [Section("Verdict", [_verdict(summary)]), *shown, Section("Rule of the verdicts", [_rule()])]


def _rule() -> Preformatted:
    rule = inspect.cleandoc(verdict.__doc__ or "").partition("\n\n")[2]
    return Preformatted(rule.replace("``", ""), markdown=rule)


def _verdict(summary: Row) -> Box:
    verdicts = summary["verdicts"]
    lines = [
        f"{TITLE.removesuffix('?')} ({words(_domains(summary, name))})? **{one['answer']}**: {one['reason']}."
        for name, one in verdicts["ends_negative_transfer"].items()
    ]
    if "main" not in verdicts["ends_negative_transfer"]:
        lines.insert(0, f"{TITLE} **{verdict.NOT_SHOWN}**: runs are missing.")
    lines += [
        f"{question} **{verdicts[key]['answer']}**: {verdicts[key]['reason']}." for key, question in QUESTIONS.items()
    ]
    answer = verdicts["ends_negative_transfer"].get("main", {}).get("answer")
    return Box(lines, "good" if answer in GOOD else "bad" if answer in BAD else "")


def _domains(summary: Row, name: str) -> str:
    return " and ".join(dict.fromkeys(row["domain"] for row in summary["transfer"] if row["set"] == name))


def _diverged_text(rows: list[Row]) -> str:
    return f"Runs that diverged: {len(rows)}. Their arms have no interval, and no verdict is in their favour."
