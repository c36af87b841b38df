"""Numbers and tables of the tokenizer controls from the output of `shodh tokenizer evaluate`, without models or fields.

A row is a trained variant, or a direct one projected after decoding (`projected_row`). Nothing is selected by test
errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scipy.stats import t as student

from shodh_moe.kernels.differentiation import OPERATORS

# Settings of the tokenizer by variant; all others are the same. The soft penalty uses central2: a direct velocity is
# given at voxel centres, where central2 gives a second-order divergence, as local as that of the walls. In the
# simulated flow that divergence is 0.3 % (open channel) and 1.0 % (porous media) of rms(u) / h, so the penalty hardly
# contradicts the data. Staggered differences of velocities averaged to the faces would give the same.
DIRECT = {"decoder": "direct", "operator": "central2"}
VARIANTS: dict[str, dict[str, Any]] = {
    "direct": DIRECT,
    "soft-0.1": {**DIRECT, "divergence_weight": 0.1},
    "soft-1": {**DIRECT, "divergence_weight": 1.0},
    "soft-10": {**DIRECT, "divergence_weight": 10.0},
    "spectral": {"operator": "spectral"},
    "central2": {"operator": "central2"},
    "central4": {"operator": "central4"},
    "staggered": {"operator": "staggered"},
    "exact-central2": {"operator": "central2", "walls": "exact"},
    "exact-staggered": {"operator": "staggered", "walls": "exact"},
    "exact-central4": {"operator": "central4", "walls": "exact"},
    "ramp-staggered": {"operator": "staggered", "walls": "ramp"},
}
ONE_SEED = ("exact-central4", "ramp-staggered")  # examples of variants that fail
UNCONSTRAINED = tuple(name for name, settings in VARIANTS.items() if settings.get("decoder") == "direct")
AIM = 1.05  # velocity VRMSE over that of the best unconstrained tokenizer of the same seed
BANDS = ("low", "middle", "high")

# results[variant][seed] is one evaluation.
Results = Mapping[str, Mapping[int, dict[str, Any]]]
# rows[row][seed][domain] holds the measures of `measures`.
Rows = dict[str, dict[int, dict[str, dict[str, float]]]]


def projected_row(variant: str, key: str) -> str:
    """Row name of a tokenizer whose velocities are projected after decoding; ``key`` is ``<walls>/<operator>``."""
    return f"{variant} > {key}"


def operator_of(row: str) -> str:
    """The operator by which a row's divergence is zero or is penalised."""
    if " > " in row:
        return row.partition("/")[2]
    return str(VARIANTS[row]["operator"])


def title_of(row: str) -> str:
    """Title of a row in the tables."""
    variant, _, key = row.partition(" > ")
    settings = VARIANTS[variant]
    if key:
        walls, _, operator = key.partition("/")
        return f"direct + Leray, {operator}" + (", walls exact" if walls == "exact" else "")
    if "divergence_weight" in settings:
        return f"direct, soft penalty {settings['divergence_weight']:g}"
    if settings.get("decoder") == "direct":
        return "direct"
    walls = settings.get("walls", "none")
    return f"Helmholtz, {settings['operator']}" + (f", walls {walls}" if walls != "none" else "")


def measures(found: Mapping[str, Any]) -> dict[str, float]:
    """Measures of one domain of an evaluation, as a flat dict."""
    flat = {key: found[key] for key in ("velocity_vrmse", "pressure_vrmse", "velocity_nrmse")}
    flat |= {f"band_{band}": value for band, value in zip(BANDS, found["band_errors"]["velocity"], strict=True)}
    for operator, by_dtype in found["divergence"].items():
        for dtype, norms in by_dtype.items():
            flat |= {f"div_{operator}_{dtype}": norms["rms_relative"], f"div_{operator}_{dtype}_rms": norms["rms"]}
    flat |= {f"solid_{key}": value for key, value in found["solid_velocity"].items()}
    flat |= {f"ms_{key}": value for key, value in found["ms_per_sample"].items()}
    return {key: math.nan if value is None else float(value) for key, value in flat.items()}  # null: not finite


def rows_of(results: Results) -> Rows:
    """All rows: the variants in order, then the direct tokenizers projected after decoding."""
    rows: Rows = {
        variant: {
            seed: {domain: measures(found) for domain, found in evaluation["domains"].items()}
            for seed, evaluation in sorted(results[variant].items())
        }
        for variant in VARIANTS
        if results.get(variant)
    }
    for seed, evaluation in sorted(results.get("direct", {}).items()):
        for key, domains in evaluation.get("projected", {}).items():
            row = rows.setdefault(projected_row("direct", key), {})
            row[seed] = {
                domain: measures({**found, "ms_per_sample": _projected_times(evaluation["domains"][domain], found)})
                for domain, found in domains.items()
            }
    return rows


def _projected_times(decoded: Mapping[str, Any], projected: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds per sample; the projection counts as decoding."""
    times = decoded["ms_per_sample"]
    return {"encode": times["encode"], "decode": times["decode"] + projected["ms_per_sample"]["project"]}


def missing_runs(results: Results, planned: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    return [(variant, seed) for variant, seed in planned if seed not in results.get(variant, {})]


def best_on_validation(
    valid: Mapping[str, Mapping[int, Mapping[str, float]]], candidates: Sequence[str], domain: str
) -> str | None:
    """The candidate with the least validation error of a domain, averaged over the seeds common to all candidates.

    Args:
        valid: mean squared velocity error on the validation split by variant, seed and domain.
    """
    found = [name for name in candidates if valid.get(name)]
    seeds = set.intersection(*(set(valid[name]) for name in found)) if found else set()
    if not seeds:
        return None
    return min(found, key=lambda name: math.fsum(valid[name][seed][domain] for seed in seeds))


def estimate(values: Sequence[float]) -> dict[str, Any]:
    """Mean, range, and half width of Student's 95 % confidence interval of the mean (None for one value)."""
    count = len(values)
    mean = math.fsum(values) / count
    half = None
    if count > 1:
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
        half = float(student.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    return {"n": count, "mean": mean, "low": min(values), "high": max(values), "half_width_95": half}


def ratios(rows: Rows, row: str, reference: str, domain: str, key: str = "velocity_vrmse") -> dict[int, float]:
    """A row's measure over the reference's, for the seeds that both have."""
    return {
        seed: here[domain][key] / rows[reference][seed][domain][key]
        for seed, here in rows[row].items()
        if seed in rows.get(reference, {})
    }


def summarise(rows: Rows, valid: Mapping[str, Mapping[int, Mapping[str, float]]]) -> dict[str, Any]:
    """Selection on validation and estimates of every measure: {"selection", "domains": {domain: {row: ..}}}.

    ``over_unconstrained`` is the velocity VRMSE over that of the unconstrained tokenizer of the same seed that is best
    on validation (``direct`` if validation errors are missing).
    """
    domains = sorted({domain for seeds in rows.values() for here in seeds.values() for domain in here})
    selection: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for domain in domains:
        soft = best_on_validation(valid, [name for name in UNCONSTRAINED if name != "direct"], domain)
        reference = best_on_validation(valid, UNCONSTRAINED, domain) or "direct"
        selection[domain] = {"soft_penalty": soft, "unconstrained": reference}
        found[domain] = {}
        for row, seeds in rows.items():
            keys = next(iter(seeds.values()))[domain]
            here = {key: estimate([seeds[seed][domain][key] for seed in seeds]) for key in keys}
            for name, to in (("over_direct", "direct"), ("over_unconstrained", reference)):
                if relative := ratios(rows, row, to, domain):
                    here[name] = estimate(list(relative.values()))
            found[domain][row] = {"title": title_of(row), "seeds": list(seeds), **here}
    return {"selection": selection, "aim": AIM, "domains": found}


def error_table(summary: Mapping[str, Any], domain: str) -> list[str]:
    """Markdown table of each row's errors, mean (least - largest) over seeds."""
    reference = summary["selection"][domain]["unconstrained"]
    head = ["decoder", "seeds", "velocity VRMSE", f"over `{reference}`", "pressure VRMSE"]
    head += [f"velocity, {band} band" for band in BANDS]
    lines = _head(head)
    keys = ("velocity_vrmse", "over_unconstrained", "pressure_vrmse", *(f"band_{band}" for band in BANDS))
    for here in summary["domains"][domain].values():
        forms = ("{:.4f}", "{:.3f}", "{:.4f}", "{:.2g}", "{:.2g}", "{:.2g}")
        cells = [_spread(here.get(key), form) for key, form in zip(keys, forms, strict=True)]
        lines.append(_line([here["title"], str(len(here["seeds"])), *cells]))
    return lines


def exactness_table(summary: Mapping[str, Any], domain: str) -> list[str]:
    """Markdown table: divergence (own operator in bold) and velocity in solids, maximum over seeds; minimum times."""
    head = ["decoder", *(f"div, {operator}" for operator in OPERATORS), "own, float32"]
    lines = _head([*head, "in solids, rms", "in solids, max", "encode, ms", "decode, ms"])
    for row, here in summary["domains"][domain].items():
        own = operator_of(row)
        cells = []
        for operator in OPERATORS:
            value = _largest(here.get(f"div_{operator}_float64"))
            cells.append(f"**{value}**" if operator == own else value)
        cells.append(_largest(here.get(f"div_{own}_float32")))
        cells += [_largest(here.get(key)) for key in ("solid_rms_relative", "solid_max_relative")]
        cells += [f"{here[key]['low']:.0f}" if key in here else "" for key in ("ms_encode", "ms_decode")]
        lines.append(_line([here["title"], *cells]))
    return lines


def markdown(summary: Mapping[str, Any], missing: Sequence[tuple[str, int]]) -> str:
    """The Markdown page: two tables per domain, the selection, the rows that reach the goal, and missing runs."""
    lines: list[str] = []
    for domain in summary["domains"]:
        name = domain.replace("_", " ")
        chosen = summary["selection"][domain]
        lines += [
            f"### {name}: errors",
            "",
            "Test split; mean (least to largest) over seeds. Bands: power of the error over that of the flow.",
            f"Best on validation: of the unconstrained `{chosen['unconstrained']}`; of the soft penalties "
            + (f"`{chosen['soft_penalty']}`." if chosen["soft_penalty"] else "none is there."),
            "",
            *error_table(summary, domain),
            "",
            f"### {name}: exactness and time",
            "",
            "h rms(div u) / rms(u), h = 1 cell, float64 unless said, **the row's own operator**; velocity in solids",
            "over the rms of the flow. The largest over seeds; times: the least (the machine is shared).",
            "",
            *exactness_table(summary, domain),
            "",
        ]
    if missing:
        lines += ["Missing: " + ", ".join(f"{variant} seed {seed}" for variant, seed in missing) + ".", ""]
    return "\n".join(lines)


def _spread(found: Mapping[str, Any] | None, form: str) -> str:
    if found is None:
        return "missing"
    mean, low, high = (form.format(found[key]) for key in ("mean", "low", "high"))
    return mean if found["n"] == 1 else f"{mean} ({low} to {high})"


def _largest(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "missing"
    return "0" if found["high"] == 0 else f"{found['high']:.1e}"


def _head(cells: Sequence[str]) -> list[str]:
    return [_line(cells), "|---" * len(cells) + "|"]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
