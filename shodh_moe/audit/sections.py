"""The summary of the audit as sections of text and tables: the same serve the markdown and the page."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shodh_moe.audit import tables, verdict
from shodh_moe.audit.transfer import MIN_SEEDS
from shodh_moe.report.style import words
from shodh_moe.report.tables import Table

Row = dict[str, Any]
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


@dataclass(frozen=True)
class Section:
    """``pictures``: beginnings of the names of the pictures that belong here."""

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[str] = ()
    verbatim: str = ""


def markdown(summary: Row) -> str:
    """GitHub markdown without pictures; the verdict stands first. ``summary`` is what `summarise` returns."""
    parts = []
    for section in sections(summary):
        found = [_markdown_table(table) for table in section.tables if table.rows]
        parts += [f"## {section.title}", *section.text, section.verbatim, *found]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(table: Table) -> str:
    line = ["--:" if column in table.numeric else ":--" for column in range(len(table.head))]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in (table.head, line, *table.rows)
    )


def sections(summary: Row) -> list[Section]:
    """All that have something to tell, in the order a reader needs them."""
    found = [
        Section("Verdict", _verdict(summary)),
        Section("Runs that diverged", _diverged_text(summary["diverged"]), [tables.diverged(summary["diverged"])]),
        Section("Negative transfer", (_line(f"""(error - error of a model of the domain alone) / error of that model,
            paired by seed. That model has the same active size and saw the same samples of the domain.
            {ESTIMATES}"""),),
            [tables.differences(summary["transfer"])], ("transfer",)),
        Section("Mixture of experts against the other arms", (_line(f"""Relative difference of the error, paired by
            seed: below 0 the mixture is better. {ESTIMATES}"""),), [tables.differences(summary["pairs"])], ("four",)),
        Section("Errors", (_line(f"On held-out trajectories. {ESTIMATES}"),), [tables.errors(summary["errors"])]),
        Section("Arms", (), [tables.arms(summary["arms"])]),
        Section("Routing", (_line("""Purity: share of a domain's tokens at its majority expert. Bifurcated: the
            majority experts differ and every purity is at least 0.99, on held-out data. The step is the first record of
            training from which on every layer stays bifurcated."""),),
            [tables.bifurcation(summary["bifurcation"]), tables.purity(summary["routing"])], ("load", "routing_map")),
        Section("What the expert tells", (_line("""Mutual information of the expert with the domain, the solid fraction
            and the speed of a token, in nats. With the solid fraction known it says what the router reads beyond the
            mask."""),), [tables.information(summary["routing"])]),
        Section("Swapped experts", (_line("""How many times the domain's latent MSE grows when tokens go to another
            domain's majority expert, in one layer alone or in all of them. There is nothing to swap on seeds where the
            domains have the same expert."""),), [tables.swap(summary["swap"])], ("swap",)),
        Section("Geometry never seen", (), [tables.unseen(summary["unseen"])]),
        Section("Four domains", (_line("""Distinct majority experts in each layer, by seed, and the load of the experts
            on the first seed."""),), [tables.load(summary["routing"])]),
        Section("Gradients", (_line("""Cosine between the gradients of two domains (mean over pairs), and in brackets
            between two halves of one domain's batch, at the first, middle and last record. Conflicting: share of
            records below 0. Norms: the larger over the smaller one, geometric mean over pairs, at the last
            record."""),), [tables.gradients(summary["gradients"])], ("gradients",)),
        Section("Plasticity", (), [tables.plasticity(summary["plasticity"])]),
        Section("Relearning", (_line("""Validation latent MSE of a domain not trained on, after as many steps from the
            checkpoint and from scratch. The last column: the step at which training from the checkpoint is as good as
            training from scratch in the end, by seed."""),),
            [tables.relearning(summary["relearning"])], ("relearning",)),
        Section("Learning rates", (_line("""Chosen on validation data alone: mean over domains of latent MSE over that
            of persistence."""),),
            [tables.tuning(summary["tuning"])]),
        Section("Rule of the verdicts", verbatim=_rule()),
    ]  # fmt: skip
    return [one for one in found if one.title == "Verdict" or one.verbatim or any(t.rows for t in one.tables)]


def _line(text: str) -> str:
    return " ".join(text.split())


def _rule() -> str:
    return inspect.cleandoc(verdict.__doc__ or "").partition("\n\n")[2]


def _verdict(summary: Row) -> list[str]:
    verdicts = summary["verdicts"]
    lines = [
        f"Does the mixture of experts end negative transfer ({words(_domains(summary, name))})? "
        f"**{one['answer']}**: {one['reason']}."
        for name, one in verdicts["ends_negative_transfer"].items()
    ]
    if "main" not in verdicts["ends_negative_transfer"]:
        missing = f"**{verdict.NOT_SHOWN}**: runs are missing."
        lines.insert(0, f"Does the mixture of experts end negative transfer? {missing}")
    lines += [
        f"{question} **{verdicts[key]['answer']}**: {verdicts[key]['reason']}." for key, question in QUESTIONS.items()
    ]
    return lines


def _domains(summary: Row, name: str) -> str:
    return " and ".join(dict.fromkeys(row["domain"] for row in summary["transfer"] if row["set"] == name))


def _diverged_text(rows: list[Row]) -> list[str]:
    text = "Their arms have no interval, and no verdict is in their favour."
    return [f"Runs that diverged: {len(rows)}. {text}"] if rows else []
