"""The tables of a run's report, for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from shodh_moe.report.table import Table, number

Metrics = dict[str, Any]

QUANTITIES = {
    "latent_mse": "latent MSE",
    "physical_mse": "physical MSE",
    "velocity_vrmse": "velocity VRMSE",
    "pressure_vrmse": "pressure VRMSE",
    "velocity_nrmse": "velocity nRMSE",
}
SUMMARY_HEAD = ("domain", "quantity", "model", "persistence", "mean", "tokenizer alone", "beats both baselines")


def beats_baselines(scores: Metrics, quantity: str) -> str:
    """Return ``yes`` if the model's error is below both persistence and the mean predictor; ``-`` if one is unknown."""
    model, persistence, mean = (scores.get(quantity + suffix) for suffix in ("", "_persistence", "_mean"))
    if model is None or persistence is None or mean is None:
        return "-"
    return "yes" if model < persistence and model < mean else "no"  # NaN compares false: no


def summary(metrics: Metrics) -> Table:
    """Errors with their baselines, one row per domain and error measure."""
    rows: list[Sequence[str]] = []
    for domain, scores in metrics.get("domains", {}).items():
        for key, name in QUANTITIES.items():
            if scores.get(key) is not None:
                values = [scores.get(key + suffix) for suffix in ("", "_persistence", "_mean", "_reconstruction")]
                rows.append((domain, name, *map(number, values), beats_baselines(scores, key)))
    return Table(SUMMARY_HEAD, rows, frozenset({2, 3, 4, 5}))


def band_errors(metrics: Metrics) -> Table:
    """Relative error power in three bands of wave numbers."""
    rows = [
        (domain, field, *map(number, bands))
        for domain, scores in metrics.get("domains", {}).items()
        for field, bands in scores.get("band_errors", {}).items()
        if len(bands) == 3
    ]
    return Table(("domain", "field", "low k", "middle k", "high k"), rows, frozenset({2, 3, 4}))


def _divergences(metrics: Metrics) -> list[Metrics]:
    """Return every measured divergence; an entry without norm or spacing gets those of the main one."""
    main = metrics.get("divergence") or {}
    entries = metrics.get("divergence_table") or ([{"what": "prediction", **main}] if main else [])
    shared = {key: main[key] for key in ("norm", "spacing") if key in main}
    return [{**shared, **entry} for entry in entries]


def divergence_norm(metrics: Metrics) -> str:
    """Return the norm that all measured divergences share; empty if they share none."""
    norms = {entry.get("norm") for entry in _divergences(metrics)}
    return str(norms.pop()) if len(norms) == 1 and None not in norms else ""


def divergence(metrics: Metrics) -> Table:
    """Every divergence with its operator and dtype, and with its norm unless all share one (`divergence_norm`)."""
    columns = {
        "what": "what",
        "operator": "operator",
        "dtype": "dtype",
        "norm": "norm",
        "spacing": "spacing h",
        "rms_relative": "h rms(div u) / rms(u)",
        "rms": "rms(div u)",
        "max": "max |div u|",
    }
    if divergence_norm(metrics):
        del columns["norm"]
    rows = [tuple(number(entry.get(key)) for key in columns) for entry in _divergences(metrics)]
    return Table(tuple(columns.values()), rows, frozenset(range(len(columns) - 4, len(columns))))


def routing(metrics: Metrics) -> Table:
    """Purity, majority expert, dropped share and entropy per layer and domain."""
    rows: list[Sequence[str]] = []
    for position, layer in enumerate(metrics.get("routing", {}).get("layers", [])):
        for domain, load in layer.get("load", {}).items():
            cells = [layer.get(key, {}).get(domain) for key in ("purity", "dropped_fraction", "entropy")]
            majority = load.index(max(load)) if load else None
            bifurcated = layer.get("bifurcated")
            rows.append(
                (
                    number(layer.get("layer", position)),
                    domain,
                    number(majority),
                    *map(number, cells),
                    number(bifurcated),
                )
            )
    head = (
        "layer",
        "domain",
        "majority expert",
        "purity",
        "dropped share",
        "router entropy (nats)",
        "layer bifurcated",
    )
    return Table(head, rows, frozenset({0, 2, 3, 4, 5}))


def mutual_information(metrics: Metrics) -> Table:
    """Mutual information of the expert with each measured category, per layer."""
    layers = metrics.get("routing", {}).get("layers", [])
    found = [layer.get("mutual_information") or {} for layer in layers]
    kinds = list(dict.fromkeys(kind for entry in found for kind in entry))
    rows = [
        (number(layer.get("layer", i)), *(number(found[i].get(kind)) for kind in kinds))
        for i, layer in enumerate(layers)
    ]
    head = ("layer", *(f"with {kind.replace('_', ' ')} (nats)" for kind in kinds))
    return Table(head, rows if kinds else [], frozenset(range(len(head))))


def cost(metrics: Metrics) -> Table:
    """Throughput, memory and number of ranks of the run."""
    throughput = metrics.get("throughput") or {}
    peak = metrics.get("peak_memory_bytes")
    rows = [
        ("training step", number(metrics.get("step"))),
        ("ranks (world size)", number(metrics.get("world_size"))),
        ("expert-parallel size", number(metrics.get("ep_size"))),
        ("seed", number(metrics.get("seed"))),
        ("tokens per second, all ranks", number(throughput.get("tokens_per_second"))),
        ("step time, median (ms)", number(throughput.get("step_ms_median"))),
        ("peak memory (MiB)", number(peak / 2**20 if peak is not None else None)),
    ]
    return Table(("quantity", "value"), [row for row in rows if row[1] != "-"], frozenset({1}))


def environment(facts: dict[str, Any]) -> Table:
    """The content of environment.json, with nested keys joined by dots."""
    return Table(("what", "value"), [(key, number(value)) for key, value in _flat(facts)])


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield prefix + key, inner


def summary_table(metrics: Metrics) -> str:
    """Summarise an evaluation for the terminal: errors with their baselines, routing, divergence."""
    parts = [
        f"run {metrics.get('run', '?')}, step {number(metrics.get('step'))}, held-out data",
        summary(metrics).text(),
    ]
    layers = metrics.get("routing", {}).get("layers", [])
    if layers:
        split = sum(bool(layer.get("bifurcated")) for layer in layers)
        parts.append(
            f"routing bifurcated: {number(metrics['routing'].get('bifurcated'))} ({split} of {len(layers)} layers)"
        )
    main = metrics.get("divergence")
    if main:
        named = ", ".join(f"{key} {main[key]}" for key in ("operator", "dtype", "norm") if main.get(key) is not None)
        parts.append(f"relative divergence of the prediction: {number(main.get('rms_relative'))} ({named})")
    return "\n".join(parts)
