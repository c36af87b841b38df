"""Assembles the report of a run: one self-contained page, and its pictures as files beside it."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from shodh_moe.base.files import atomic_file
from shodh_moe.report import curves, fields, page, routing_pictures, style, tables
from shodh_moe.report.load import RunData, load_run


def write_report(run_folder: Path) -> Path:
    """Writes ``<run>/report/index.html`` and ``<run>/report/*.png``; returns the page's path.

    Reads metrics.json, metrics.jsonl, evaluation.npz, config.yaml and environment.json (`UserError` where one is
    missing) and tokenizer_metrics.jsonl if it is there. Pictures whose data are missing are left out, and the page
    says so. Every file is written under a temporary name and renamed, the page last.
    """
    run_folder = Path(run_folder)
    run = load_run(run_folder)
    folder = run_folder / "report"
    folder.mkdir(exist_ok=True)
    builder = _Page(run, folder)
    content = page.PAGE.substitute(title=html.escape(f"{run.name}: report"), body=builder.body())
    return _write(folder / "index.html", content.encode("utf-8"))


def _write(path: Path, content: bytes) -> Path:
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)
    return path


class _Page:
    """The sections of one report, in the order a reader needs them."""

    def __init__(self, run: RunData, folder: Path) -> None:
        self.run = run
        self.folder = folder

    def body(self) -> str:
        sections = {
            "Summary": self.summary(),
            "Flow fields": self.fields(),
            "Spectra": self.spectra(),
            "Rollout": self.rollout(),
            "Routing": self.routing(),
            "Training": self.training(),
            "Divergence": self.divergence(),
            "Cost": self.table(
                tables.cost(self.run.metrics), "Measured while training.", "Throughput and memory were not recorded."
            ),
            "Environment": self.table(tables.environment(self.run.environment), "", "The environment file is empty."),
            "Config": f"<pre>{html.escape(self.run.config)}</pre>",
        }
        anchors = {name: name.lower().replace(" ", "-") for name in sections}
        links = "".join(f'<a href="#{anchors[name]}">{name}</a>' for name in sections)
        parts = [f'<h2 id="{anchors[name]}">{name}</h2>\n{content}' for name, content in sections.items()]
        step = tables.number(self.run.metrics.get("step"))
        what = f"Evaluation on held-out trajectories at training step {step}."
        head = f'<h1>{html.escape(self.run.name)}</h1>\n<p class="sub">{what} {page.INTRODUCTION}</p>'
        return "\n".join([head, f"<nav>{links}</nav>", *parts])

    def summary(self) -> str:
        rows = tables.summary(self.run.metrics)
        return self.verdict() + self.table(rows, page.SUMMARY, "metrics.json holds no numbers for any domain.")

    def verdict(self) -> str:
        """The two questions a reader has first, answered in a box."""
        answers = {domain: _both(scores) for domain, scores in self.run.metrics.get("domains", {}).items()}
        lines = [
            f"<b>{html.escape(style.words(d))}</b>: beats both baselines, latent and physical MSE: <b>{_plain(a)}</b>"
            for d, a in answers.items()
        ]
        bifurcated = self.run.metrics.get("routing", {}).get("bifurcated")
        if bifurcated is not None:
            lines.append(
                f"Every layer gives each domain its own expert (bifurcated): <b>{tables.number(bool(bifurcated))}</b>"
            )
        mood = (
            "good"
            if answers and all(a == "yes" for a in answers.values())
            else "bad"
            if "no" in answers.values()
            else ""
        )
        return f'<div class="verdict {mood}">{"".join(f"<p>{line}</p>" for line in lines)}</div>' if lines else ""

    def fields(self) -> str:
        parts = [
            self.picture(
                f"fields_{domain}",
                fields.field_slices(self.run, domain),
                f"Slices of {style.words(domain)}",
                "",
                f"The evaluation kept no example fields of {style.words(domain)}.",
            )
            for domain in self.run.domains
        ]
        return f"<p>{page.FIELDS}</p>" + "".join(parts)

    def spectra(self) -> str:
        picture = self.picture(
            "spectra",
            fields.energy_spectra(self.run),
            "Energy spectra",
            page.SPECTRA,
            "The evaluation kept no spectra.",
        )
        bands = tables.band_errors(self.run.metrics)
        return picture + (self.table(bands, page.BANDS, "") if bands.rows else "")

    def rollout(self) -> str:
        figure = fields.rollout_error(self.run)
        return self.picture("rollout", figure, "Rollout error", page.ROLLOUT, "The evaluation kept no rollout.")

    def routing(self) -> str:
        load = routing_pictures.expert_load(self.run)
        parts = [
            self.picture("expert_load", load, "Expert load", page.LOAD, "metrics.json holds no expert loads."),
            self.table(tables.routing(self.run.metrics), page.ROUTING_TABLE, ""),
        ]
        information = tables.mutual_information(self.run.metrics)
        if information.rows:
            parts += ["<h3>Mutual information of the expert</h3>", self.table(information, page.INFORMATION, "")]
        parts.append(f"<h3>Where each expert works</h3><p>{page.ROUTING_MAP}</p>")
        for domain in self.run.domains:
            name = style.words(domain)
            figure = routing_pictures.routing_map(self.run, domain)
            parts.append(
                self.picture(
                    f"routing_map_{domain}", figure, f"Routing map of {name}", "", f"No routing map of {name} was kept."
                )
            )
        return "".join(parts)

    def training(self) -> str:
        losses, loads = curves.loss_curves(self.run), routing_pictures.load_over_steps(self.run)
        return self.picture("losses", losses, "Losses", page.LOSSES, "metrics.jsonl holds no losses.") + self.picture(
            "routing_over_steps",
            loads,
            "Routing during training",
            page.LOAD_STEPS,
            "metrics.jsonl holds no routing records.",
        )

    def divergence(self) -> str:
        norm = tables.divergence_norm(self.run.metrics)
        shared = f"Norm of every row: <code>{html.escape(norm)}</code>. " if norm else ""
        rows = tables.divergence(self.run.metrics)
        return self.table(rows, shared + page.DIVERGENCE, "The divergence was not measured.")

    def picture(self, name: str, figure: Figure | None, alternative: str, caption: str, absent: str) -> str:
        """Writes one PNG and returns it embedded; without data, the sentence that says so (and no stale file)."""
        path = self.folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
            return f'<p class="none">{html.escape(absent)}</p>'
        content = style.png(figure)
        _write(path, content)
        encoded = base64.b64encode(content).decode("ascii")
        below = f"<figcaption>{caption}</figcaption>" if caption else ""
        return f'<figure><img alt="{html.escape(alternative)}" src="data:image/png;base64,{encoded}">{below}</figure>'

    def table(self, table: tables.Table, caption: str, absent: str) -> str:
        if not table.rows:
            return f'<p class="none">{html.escape(absent)}</p>' if absent else ""
        return tables.to_html(table) + (f"<p>{caption}</p>" if caption else "")


def _both(scores: dict[str, Any]) -> str:
    answers = {tables.beats_baselines(scores, quantity) for quantity in ("latent_mse", "physical_mse")}
    return next(answer for answer in ("no", "-", "yes") if answer in answers)


def _plain(answer: str) -> str:
    return "not measured" if answer == "-" else answer
