"""The table of reproduction.py, which compares a run's numbers with the paper's, each with its definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

DOMAINS = ("open_channel", "porous_media")
# Numbers of Shodh-MoE as printed in arXiv 2605.15179.
PAPER: dict[str, Any] = {
    "latent_mse": {"open_channel": 2.46e-5, "porous_media": 9.76e-6},
    "physical_mse": {"open_channel": 2.48e-6, "porous_media": 1.76e-6},
    "purity": 1.0,
    "divergence": 2.8e-10,
    "steps": 20_000,
    "snapshots": 61_000,
}
UNKNOWN = "not stated"
NOTE = """The paper's numbers are of other data, another model and, where it is silent, of unknown definitions: a
smaller or larger number here is neither better nor worse. Definitions side by side: docs/reproduction.md."""


def markdown(metrics: dict[str, Any], run: dict[str, Any], environment: dict[str, Any]) -> str:
    """Make the page ``table.md``: results and settings compared with the paper's, baselines, times, the routers.

    Args:
        metrics: a run's metrics.json.
        run: the run folder's numbers from `reproduction.collect`.
        environment: the run's environment.json.
    """
    parts = [
        f"<!-- Made by benchmarks/studies/reproduction.py from run {metrics['run']}; edits are lost. -->",
        NOTE,
        table(["", "paper", "ours", "ours is"], _results(metrics, run)),
        table(["settings", "paper", "ours"], _settings(run)),
        "Held-out test trajectories, one snapshot ahead:",
        table(["domain", "error", "model", "persistence", "mean predictor", "tokenizer alone"], _baselines(metrics)),
        "Routers on held-out data:",
        table(["layer", "purity", "majority expert", "bifurcated", "nats of the domain"], _routers(metrics)),
        _times(run, environment),
    ]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def number(value: float | None) -> str:
    """Format with three digits; a dash for a value that was not measured or is not finite."""
    return "-" if value is None else f"{value:.3g}"


def _results(metrics: dict[str, Any], run: dict[str, Any]) -> list[list[str]]:
    valid = (run["validation"] or {}).get("latent_mse", {})
    rows = []
    for domain in metrics["domains"]:
        errors = metrics["domains"][domain]
        paper = number(PAPER["latent_mse"].get(domain))
        what = "mean square over normalised latents (unit variance a channel), whole split, last step"
        rows.append([f"latent MSE, validation, {domain}", paper, number(valid.get(domain)), what])
        rows.append([f"latent MSE, test, {domain}", "-", number(errors["latent_mse"]), "the same, test split"])
        share = ratio(errors["latent_mse"], errors["latent_mse_persistence"])
        rows.append([f"over persistence's, {domain}", UNKNOWN, share, 'that of the answer "nothing changes"'])
    for domain in metrics["domains"]:
        paper, ours = number(PAPER["physical_mse"].get(domain)), number(metrics["domains"][domain]["physical_mse"])
        what = "decoded velocity and pressure over their training rms; all voxels, solids too; test split"
        rows.append([f"decoded physical MSE, {domain}", paper, ours, what])
    layers = metrics["routing"]["layers"]
    least = min((share for layer in layers for share in layer["purity"].values()), default=None)
    split = sum(layer["bifurcated"] for layer in layers)
    what = "least purity: share of a domain's held-out tokens at its majority expert, over domains and layers"
    rows.append(["tokens at the domain's own expert", number(PAPER["purity"]), number(least), what])
    what = "layers whose majority experts all differ with every purity at least 0.99"
    rows.append(["bifurcated layers", UNKNOWN, f"{split} of {len(layers)}", what])
    step = run["bifurcation_step"]
    parted = "never" if step is None else f"{step:,}"
    rows.append(["bifurcated for good from step", UNKNOWN, parted, "every layer, training tokens, to the last record"])
    d = metrics["divergence"]
    what = f"h rms(div u) / rms(u), operator {d['operator']}, {d['dtype']}, decoded predictions"
    rows.append(["divergence in FP64", number(PAPER["divergence"]), number(d["rms_relative"]), what])
    return rows


def _settings(run: dict[str, Any]) -> list[list[str]]:
    count = run["parameters"]
    return [
        ["optimizer steps", f"{PAPER['steps']:,}", f"{run['steps']:,}"],
        ["fields", "128^3", "x".join(str(size) for size in run["grid"])],
        ["latents", "16^3", f"{'x'.join(str(n) for n in run['latent_grid'])}, {run['latent_channels']} channels"],
        ["snapshots", f"about {PAPER['snapshots']:,}", f"{run['snapshots']:,}, synthetic"],
        ["parameters", UNKNOWN, f"{count['total'] / 1e6:.2f} M, {count['active'] / 1e6:.2f} M active"],
        ["ranks", UNKNOWN, f"{run['world_size']}, expert parallel over {run['ep_size']}"],
    ]


def _baselines(metrics: dict[str, Any]) -> list[list[str]]:
    rows = []
    for domain, errors in metrics["domains"].items():
        for error in ("latent_mse", "physical_mse"):
            kinds = ("", "_persistence", "_mean", "_reconstruction")
            rows.append([domain, error, *(number(errors.get(error + kind)) for kind in kinds)])
    return rows


def _routers(metrics: dict[str, Any]) -> list[list[str]]:
    def cells(layer: dict[str, Any], key: str) -> str:
        return ", ".join(f"{domain} {value:.4g}" for domain, value in layer[key].items())

    return [
        [
            str(layer["layer"]),
            cells(layer, "purity"),
            cells(layer, "majority_expert"),
            "yes" if layer["bifurcated"] else "no",
            number(layer["mutual_information"]["domain"]),
        ]
        for layer in metrics["routing"]["layers"]
    ]


def _times(run: dict[str, Any], environment: dict[str, Any]) -> str:
    seconds, step = run["seconds"], run["step_ms"]
    stages = ", ".join(f"{name} {value:.0f} s" for name, value in seconds["stages"].items()) or "not noted"
    calls = f", in {seconds['calls']} calls" if seconds["calls"] > 1 else ""
    median = f" A step takes {step['median']:.1f} ms (median)." if step else ""
    where = ", ".join(environment.get("devices") or []) or f"{environment.get('cores')} CPU cores"
    return (
        f"Stages: {stages}; together {seconds['total'] / 60:.1f} minutes{calls}."
        f"{median} {where}, {environment.get('processor')}, torch {environment.get('packages', {}).get('torch')}."
    )


def ratio(error: float | None, baseline: float | None) -> str:
    return number(error / baseline) if error is not None and baseline else "-"
