"""Rows of the audit's summary other than errors: routing, swaps, unseen geometry, gradients, plasticity, relearning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from statistics import fmean
from typing import Any

from shodh_moe.audit.kinship import distances, groups, majority_of
from shodh_moe.audit.results import (
    Estimate,
    Run,
    Seeds,
    Sets,
    arms_of,
    domains_of,
    error_of,
    estimate,
    finished,
    measured,
    relative_difference,
)

INFORMATION = ("domain", "solid_fraction", "speed", "domain_given_solid_fraction", "domain_given_speed")
CURVES = ("from_checkpoint", "from_scratch")
LEAST_INFORMATION = 0.01  # nats; with less, the expert counts as carrying no information about the domain


def bifurcated(run: Run) -> bool:
    """Whether every layer of the run is bifurcated on held-out data."""
    return bool((run.get("routing") or {}).get("bifurcated"))


def beyond_mask(run: Run) -> float | None:
    """I(expert; domain | solid fraction) / I(expert; domain), each a mean over layers; None without information."""
    layers = [layer["mutual_information"] for layer in (run.get("routing") or {}).get("layers", [])]
    total = fmean(one["domain"] for one in layers) if layers else 0.0
    return fmean(one["domain_given_solid_fraction"] for one in layers) / total if total >= LEAST_INFORMATION else None


def _routed(sets: Sets) -> Iterator[tuple[str, str, Seeds]]:
    """Yield set, arm and runs of the arms that have a router and at least one run that did not diverge."""
    for name, arm, seeds in arms_of(sets):
        if any(run.get("routing") for run in finished(seeds).values()):
            yield name, arm, seeds


def _over_seeds(seeds: Seeds, layers: dict[int, Run], key: str, entry: str) -> Estimate:
    values = {seed: None if run["diverged"] else layers[seed][key].get(entry) for seed, run in seeds.items()}
    return estimate({seed: v for seed, v in values.items() if v is not None or seeds[seed]["diverged"]})


def routing(sets: Sets) -> list[dict[str, Any]]:
    """Purity, information, load and bifurcation, one row per arm and layer."""
    rows = []
    for name, arm, seeds in _routed(sets):
        first, example = next(iter(finished(seeds).items()))
        for place, layer in enumerate(example["routing"]["layers"]):
            here = {seed: run["routing"]["layers"][place] for seed, run in finished(seeds).items()}
            rows.append(
                {
                    "set": name,
                    "arm": arm,
                    "layer": layer["layer"],
                    "purity": {d: _over_seeds(seeds, here, "purity", d) for d in domains_of(seeds)},
                    "information": {k: _over_seeds(seeds, here, "mutual_information", k) for k in INFORMATION},
                    "bifurcated": {seed: one["bifurcated"] for seed, one in here.items()},
                    "experts_used": {seed: len(set(one["majority_expert"].values())) for seed, one in here.items()},
                    "load": layer["load"],
                    "load_seed": first,
                }
            )
    return rows


def bifurcation(sets: Sets) -> list[dict[str, Any]]:
    """By seed, whether all layers are bifurcated on held-out data, and the training step from which they stayed so."""
    return [
        {
            "set": name,
            "arm": arm,
            "bifurcated": {s: bifurcated(run) for s, run in finished(seeds).items()},
            "step": {s: (run.get("bifurcation") or {}).get("step") for s, run in finished(seeds).items()},
            "diverged": [s for s, run in seeds.items() if run["diverged"]],
        }
        for name, arm, seeds in arms_of(sets)
        if next(iter(seeds.values()))["experts"]
    ]


def swap(sets: Sets) -> list[dict[str, Any]]:
    """Factor by which errors grow when domains swap experts, one row per arm and domain."""
    rows = []
    for name, arm, seeds in _routed(sets):
        for domain in domains_of(seeds):
            swaps = {s: (run.get("swap") or {}).get(domain) for s, run in finished(seeds).items()}
            found = {s: one for s, one in swaps.items() if one}
            if not found:
                continue
            layers = len(next(iter(found.values()))["layers"])
            rows.append(
                {
                    "set": name,
                    "arm": arm,
                    "domain": domain,
                    "all": estimate(
                        {s: one["all"] for s, one in found.items() if one["all"] is not None}
                        | {s: None for s, run in seeds.items() if run["diverged"]}
                    ),
                    "layers": [
                        estimate({s: one["layers"][i] for s, one in found.items() if one["layers"][i] is not None})
                        for i in range(layers)
                    ],
                    "not_split": [s for s in swaps if s not in found or found[s]["all"] is None],
                }
            )
    return rows


def place(sets: Sets) -> list[dict[str, Any]]:
    """Information of the expert about bed or stream, mean over layers, one row per arm and domain with beds."""

    def value(run: Run, domain: str, key: str) -> float | None:
        one = (run.get("place") or {}).get(domain)
        return fmean(one[key]) if one else None

    rows = []
    for name, arm, seeds in arms_of(sets):
        found = dict.fromkeys(domain for run in finished(seeds).values() for domain in run.get("place") or {})
        rows += [
            {
                "set": name,
                "arm": arm,
                "domain": domain,
                "information": measured(seeds, partial(value, domain=domain, key="information")),
                "entropy": measured(seeds, partial(value, domain=domain, key="entropy")),
            }
            for domain in found
        ]
    return rows


def kinship(sets: Sets) -> list[dict[str, Any]]:
    """Which domains share an expert, and errors on the experts of others, one row per arm and seed of the set four."""
    return [
        {
            "set": name,
            "arm": arm,
            "seed": seed,
            "groups": groups(majority_of(run["routing"])),
            "majority": majority_of(run["routing"]),
            "growth": run["kinship"],
            "distances": distances(run["kinship"], majority_of(run["routing"])),
        }
        for name, arm, seeds in arms_of(sets)
        for seed, run in finished(seeds).items()
        if run.get("kinship")
    ]


def unseen(sets: Sets) -> list[dict[str, Any]]:
    """Errors on unseen geometry, their growth relative to the test split, and routing, one row per arm and domain."""
    rows = []
    for name, arm, seeds in arms_of(sets):
        for domain in domains_of(seeds):

            def error(run: Run, key: str = "latent_mse", domain: str = domain) -> float | None:
                value = ((run.get("unseen") or {}).get("errors") or {}).get(domain, {}).get(key)
                return None if value is None else float(value)

            def persistence(run: Run, error: Callable[..., float | None] = error) -> float | None:
                return error(run, "latent_mse_persistence")

            def purity(run: Run, domain: str = domain) -> float | None:
                layers = ((run.get("unseen") or {}).get("routing") or {}).get("layers", [])
                found = [layer["purity"][domain] for layer in layers if layer["purity"].get(domain) is not None]
                return min(found) if found else None

            here = {s: error(run) for s, run in seeds.items() if run["diverged"] or error(run) is not None}
            if not here:
                continue
            rows.append(
                {
                    "set": name,
                    "arm": arm,
                    "domain": domain,
                    "latent_mse": estimate(here),
                    "latent_mse_persistence": measured(seeds, persistence).value,
                    "growth": relative_difference(here, error_of(seeds, domain, "latent_mse")),
                    "least_purity": measured(seeds, purity),
                    "bifurcated": {
                        s: bool(run["unseen"]["routing"]["bifurcated"])
                        for s, run in finished(seeds).items()
                        if (run.get("unseen") or {}).get("routing")
                    },
                }
            )
    return rows


def gradient_group(name: str) -> str:
    """Map all experts to one group, and all paths, because it differs between seeds which of them serves a domain."""
    kind, _, number = name.partition(" ")
    return f"{kind}s" if number else name


def gradient_means(record: dict[str, Any], kind: str) -> dict[str, float]:
    """Mean of ``kind`` by group in one record: of ``cosine`` over pairs of domains, or of ``within`` over domains."""
    values: dict[str, list[float]] = {}
    for group, one in record["groups"].items():
        found = [value for value in one.get(kind, {}).values() if value is not None]
        values.setdefault(gradient_group(group), []).extend(found)
    return {group: fmean(found) for group, found in values.items() if found}


def _norm_ratio(record: dict[str, Any], group: str) -> float | None:
    """Ratio of the larger to the smaller gradient norm, geometric mean over pairs of domains."""
    here = [one["ratio"].values() for name, one in record["groups"].items() if gradient_group(name) == group]
    logs = [abs(math.log(value)) for values in here for value in values if value]
    return math.exp(fmean(logs)) if logs else None


def gradients(sets: Sets) -> list[dict[str, Any]]:
    """Gradient cosines at the first, middle and last record, one row per arm and parameter group."""
    rows = []
    for name, arm, seeds in arms_of(sets):
        recorded = {s: run["gradients"] for s, run in finished(seeds).items() if run.get("gradients")}
        groups = dict.fromkeys(gradient_group(g) for records in recorded.values() for r in records for g in r["groups"])
        for group in groups:
            row: dict[str, Any] = {"set": name, "arm": arm, "group": group}
            for when, place in (("first", 0), ("middle", None), ("last", -1)):
                chosen = {s: records[len(records) // 2 if place is None else place] for s, records in recorded.items()}
                row[when] = {"step": next(iter(chosen.values()))["step"]}
                for key, kind in (("between", "cosine"), ("within", "within")):
                    means = {s: gradient_means(record, kind).get(group) for s, record in chosen.items()}
                    row[when][key] = estimate({s: value for s, value in means.items() if value is not None})
            ends = {s: _norm_ratio(records[-1], group) for s, records in recorded.items()}
            row["norm_ratio"] = estimate({s: value for s, value in ends.items() if value is not None})
            all_means = [gradient_means(r, "cosine").get(group) for records in recorded.values() for r in records]
            known = [value for value in all_means if value is not None]
            row["conflicting"] = sum(value < 0 for value in known) / len(known) if known else None
            rows.append(row)
    return rows


def _dormant(group: str, run: Run) -> float | None:
    share = (run.get("plasticity") or {}).get("dormant", {}).get(group)
    return None if share is None else float(share)


def plasticity(sets: Sets) -> list[dict[str, Any]]:
    """Dormant units and effective rank, one row per arm."""
    rows = []
    for name, arm, seeds in arms_of(sets):
        found = [run["plasticity"] for run in finished(seeds).values() if run.get("plasticity")]
        if found or not finished(seeds):
            groups = dict.fromkeys(group for one in found for group in one["dormant"])
            rows.append(
                {
                    "set": name,
                    "arm": arm,
                    "dormant": {group: measured(seeds, partial(_dormant, group)) for group in groups},
                    "effective_rank": measured(seeds, lambda run: (run.get("plasticity") or {}).get("effective_rank")),
                    "width": found[0]["width"] if found else None,
                }
            )
    return rows


def relearning(sets: Sets) -> list[dict[str, Any]]:
    """Errors after learning a new domain from the checkpoint and from scratch, in equally many steps; a row per arm."""
    rows = []
    for name, arms in sets.items():
        relearned = [run["relearning"] for seeds in arms.values() for run in seeds.values() if run.get("relearning")]
        for arm, seeds in arms.items():
            found = {s: run["relearning"] for s, run in finished(seeds).items() if run.get("relearning")}
            lost: dict[int, float | None] = {s: None for s, run in seeds.items() if run["diverged"]}
            if not relearned or arm.startswith("single") or not (found or lost):
                continue
            ends = {key: {s: one[key][-1] for s, one in found.items()} | lost for key in CURVES}
            rows.append(
                {
                    "set": name,
                    "arm": arm,
                    "domain": relearned[0]["domain"],
                    "steps": relearned[0]["steps"][-1],
                    **{key: estimate(values) for key, values in ends.items()},
                    "difference": relative_difference(*(ends[key] for key in CURVES)),
                    "steps_to_scratch": {s: _reached(one) for s, one in found.items()},
                }
            )
    return rows


def _reached(one: dict[str, Any]) -> int | None:
    """The first step at which training from the checkpoint reaches the final error of training from scratch."""
    goal = one["from_scratch"][-1]
    pairs = zip(one["steps"], one["from_checkpoint"], strict=True)
    return next((step for step, e in pairs if goal is not None and e is not None and e <= goal), None)
