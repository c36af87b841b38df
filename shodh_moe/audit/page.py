"""The summary of the audit as sections of text, tables and figures, written as Markdown and as one HTML page."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shodh_moe.audit import tables, verdict
from shodh_moe.audit.arm_models import ARMS
from shodh_moe.audit.results import MIN_SEEDS
from shodh_moe.report import page as report_page
from shodh_moe.report.figure import Figure
from shodh_moe.report.page import Block, Box, Page, Preformatted, Section, Text
from shodh_moe.report.style import words
from shodh_moe.report.table import Table

Row = dict[str, Any]
TITLE = "Does the mixture of experts end negative transfer?"
GOOD, BAD = ("shown", "no harm to end"), ("refuted",)
ESTIMATES = f"""Mean over seeds with the 95 % Student t interval over seeds. There is no interval with fewer than
{MIN_SEEDS} seeds or where a run diverged."""
QUESTIONS = {
    **{
        arm: f"{one.question} The mixture compared with the arm *{one.words}*"
        + (f", within {verdict.MARGIN:.0%}:" if arm == "oracle" else ":")
        for arm, one in ARMS.items()
        if one.question
    },
    "grouping": "With as many experts as domains in the set of four: is the learned grouping as good as an expert for "
    f"each domain, within {verdict.MARGIN:.0%}?",
    "splits": "Does the router give each domain its own expert?",
    "reads_mask": "Does the router only read the solid mask?",
}
CAPTIONS = {
    "transfer": "To the right of the black line, joint training costs accuracy. Differences are paired by seed.",
    "four": "To the left of the black line, the mixture is better than the dense model of the same active size.",
    "load": """One line per seed and domain. Where the lines of the domains separate and stay apart, each domain has
    its own expert. Which expert serves which domain differs between seeds, so the figure shows the share of tokens at
    the expert that serves the first domain at the end of training.""",
    "gradients": """Below 0, a step that helps one domain hurts the other. Dotted: agreement between two halves of one
    domain's batch, the most that two domains can be expected to reach. A line ends where an expert sees only one
    domain.""",
    "swap": "Bars: mean over seeds. At 1 (black line), it does not matter which expert the tokens go to.",
    "kinship": """Domains that share an expert join at 0. Others join at the mean logarithm of the factors by which
    their errors grow on each other's expert (average linkage): the further right, the less they have in common.""",
    "relearning": "Where a solid line lies below the dashed one, what was learned before helps.",
    "routing_map": "Colour: expert of each token in the middle plane, beside the solid fraction (one run).",
}


def markdown(summary: Row) -> str:
    """Format the summary as GitHub Markdown, without figures. ``summary`` is what `summarise` returns."""
    return report_page.markdown(sections(summary))


def write_page(summary: Row, pictures: Sequence[Path], folder: Path) -> Path:
    """Write ``folder/index.html`` and return its path.

    Args:
        summary: what `shodh_moe.audit.summary.summarise` returns.
        pictures: the PNG files that `shodh_moe.audit.pictures.draw` wrote; they are embedded in the page.
        folder: made if missing.

    Raises:
        UserError: the folder cannot be written.
    """
    return Page(TITLE, sections(summary, pictures)).write(folder / "index.html")


def sections(summary: Row, pictures: Sequence[Path] = ()) -> list[Section]:
    """List the sections that have data, starting with the verdict and ending with the rules it follows."""

    def section(title: str, text: str, table: Table, *more: Table, figures: Sequence[str] = ()) -> Section:
        """Make a section. ``figures``: prefixes of the file names of its figures."""
        blocks: list[Block] = [Text(" ".join(text.split()))] if text else []
        for name in figures:
            caption = " ".join(CAPTIONS[name].split())
            blocks += [Figure(path, caption, caption) for path in pictures if path.stem.startswith(name)]
        return Section(title, [*blocks, *(one for one in (table, *more) if one.rows)])

    found = [
        section("Runs that diverged", _diverged_text(summary["diverged"]), tables.diverged(summary["diverged"])),
        section("Negative transfer", f"""(error - error of the single-domain model) / error of the single-domain
            model, paired by seed. The single-domain model has the same active size and saw the same samples of its
            domain. {ESTIMATES}""",
            tables.differences(summary["transfer"]), figures=["transfer"]),
        section("Mixture of experts against the other arms", f"""Relative difference of the error, paired by seed;
            negative where the mixture is better. {ESTIMATES}""",
            tables.differences(summary["pairs"]), figures=["four"]),
        section("Errors", f"On held-out trajectories. {ESTIMATES}", tables.errors(summary["errors"])),
        section("Arms", "", tables.arms(summary["arms"])),
        section("Routing", """Purity: share of a domain's tokens at its majority expert. Bifurcated: the majority
            experts differ and every purity is at least 0.99, on held-out data. The step is that of the first training
            record from which every layer stays bifurcated.""",
            tables.bifurcation(summary["bifurcation"]), tables.purity(summary["routing"]),
            figures=["load", "routing_map"]),
        section("What the expert reveals", """Mutual information between a token's expert and its domain, solid
            fraction and speed, in nats. Given the solid fraction, it shows what the router knows of the domain beyond
            the mask.""",
            tables.information(summary["routing"])),
        section("Swapped experts", """Factor by which a domain's latent MSE grows when its tokens go to another
            domain's majority expert, in a single layer or in all layers. There is nothing to swap for seeds where the
            domains share a majority expert.""",
            tables.swap(summary["swap"]), figures=["swap"]),
        section("Bed and stream", """Mutual information of a token's expert and its place in samples that contain both a
            free stream and a porous bed, mean over layers.""",
            tables.place(summary["place"])),
        section("Unseen geometry", "", tables.unseen(summary["unseen"])),
        section("Four domains", """Number of distinct majority experts in each layer, by seed, and the load of the
            experts for the first seed. Below: which domains share a majority expert, and the factor by which a domain's
            latent MSE grows when each expert takes the place of its own.""",
            tables.load(summary["routing"]), tables.kinship(summary["kinship"]), figures=["kinship"]),
        section("Gradients", """Cosine between the gradients of two domains (mean over pairs) and, in brackets, between
            two halves of one domain's batch, at the first, middle and last record. Conflicting: share of records with
            a cosine below 0. Norm ratio: the larger gradient norm over the smaller one at the last record, geometric
            mean over pairs.""",
            tables.gradients(summary["gradients"]), figures=["gradients"]),
        section("Plasticity", "", tables.plasticity(summary["plasticity"])),
        section("Relearning", """Validation latent MSE of a new domain after equally many steps from the checkpoint and
            from scratch. Last column: the step, by seed, at which training from the checkpoint reaches the final error
            of training from scratch.""",
            tables.relearning(summary["relearning"]), figures=["relearning"]),
        section("Learning rates", """Chosen on validation data only, by the latent MSE relative to that of persistence,
            mean over domains.""",
            tables.tuning(summary["tuning"])),
    ]  # fmt: skip
    shown = [one for one in found if any(isinstance(block, Table) for block in one.blocks)]
    return [Section("Verdict", [_verdict(summary)]), *shown, Section("Rules of the verdicts", [_rules()])]


def _rules() -> Preformatted:
    rules = inspect.cleandoc(verdict.__doc__ or "").partition("\n\n")[2]
    return Preformatted(rules.replace("``", ""), markdown=rules)


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


def _domains(summary: Row, set_name: str) -> str:
    domains = " and ".join(dict.fromkeys(row["domain"] for row in summary["transfer"] if row["set"] == set_name))
    return f"{domains}, more steps" if set_name == "long" else domains


def _diverged_text(rows: list[Row]) -> str:
    return f"Runs that diverged: {len(rows)}. Their arms have no interval, and no verdict is in their favour."
