"""Made-up results in the audit's format: dense joint training harms, the mixture does not."""

from __future__ import annotations

import math
from typing import Any

MAIN, HARD = ("open_channel", "porous_media"), ("open_channel", "obstacle_wake")
FOUR = ("obstacle_wake", "open_channel", "porous_media", "urban_canyon")
# Ratio of an arm's error to the error of a single-domain model.
RATIO = {
    "moe": 0.97, "layer": 1.35, "dense_active": 1.3, "dense_total": 1.12, "dense_wide": 1.1, "film": 1.25,
    "oracle": 0.965, "random": 1.2, "random_start": 0.98, "no_shared": 1.0, "shared_expert": 0.99,
    "shared_attention": 0.975,
}  # fmt: skip
ROUTED = ("moe", "layer", "oracle", "random", "random_start", "no_shared", "shared_expert", "shared_attention")
LAYERS = 2


def noise(*key: object) -> float:
    """Return a number in -1 .. 1 that depends only on the key."""
    total = sum((place + 1) * ord(letter) for place, letter in enumerate("|".join(map(str, key))))
    return math.sin(12.9898 * total)


def errors_of(factor: float, domains: tuple[str, ...], seed: int, salt: str) -> dict[str, dict[str, float]]:
    def one(place: int, domain: str) -> dict[str, float]:
        base = 1e-3 * (1 + place) * (1 + 0.1 * noise("seed", seed, domain))
        error = factor * base * (1 + 0.005 * noise(salt, seed, domain))
        found = {"latent_mse": error, "physical_mse": 2 * error, "velocity_vrmse": math.sqrt(error)}
        return found | {f"{name}_persistence": 5 * base for name in found}

    return {domain: one(place, domain) for place, domain in enumerate(domains)}


def routing_of(arm: str, domains: tuple[str, ...], experts: int, seed: int) -> dict[str, Any]:
    split = arm != "random"
    layers = []
    for layer in range(LAYERS):
        load, majority = {}, {}
        for place, domain in enumerate(domains):
            best = (place + seed + layer) % experts
            share = (0.995 if split else 0.6) if experts > 1 else 1.0
            load[domain] = [share if expert == best else (1 - share) / (experts - 1) for expert in range(experts)]
            majority[domain] = best
        information = {"domain": 0.69 if split else 0.02, "solid_fraction": 0.3, "speed": 0.1}
        information |= {"domain_given_solid_fraction": 0.4 if split else 0.0, "domain_given_speed": 0.5}
        layers.append(
            {
                "layer": layer,
                "load": load,
                "purity": {domain: max(one) for domain, one in load.items()},
                "majority_expert": majority,
                "bifurcated": split and experts >= len(domains),
                "mutual_information": information,
            }
        )
    return {"layers": layers, "bifurcated": all(layer["bifurcated"] for layer in layers)}


def bifurcation_of(routing: dict[str, Any], seed: int) -> dict[str, Any]:
    loads = []
    for step in range(0, 2001, 100):
        done = 1 / (1 + math.exp(-(step - 700 - 150 * seed) / 120))
        load = [
            {d: [done * x + (1 - done) / len(final) for x in final] for d, final in layer["load"].items()}
            for layer in routing["layers"]
        ]
        loads.append({"step": step, "load": load})
    return {"step": 1200 + 100 * seed if routing["bifurcated"] else None, "loads": loads}


def gradients_of(arm: str, domains: tuple[str, ...], experts: int, seed: int) -> list[dict[str, Any]]:
    groups = ["attention", "shared", "rest"]
    if experts:
        groups += ["router", *(f"{part} {e}" for part in ("expert", "path") for e in range(experts))]
    pairs = [f"{a}|{b}" for i, a in enumerate(domains) for b in domains[i + 1 :]]

    def group(name: str, step: int) -> dict[str, Any]:
        level = -0.2 if arm.startswith("dense") else 0.15
        cosine = 0.5 * math.exp(-step / 500) + level + 0.05 * noise(name, step, seed)
        split = name.startswith("expert") and step > 1200
        return {
            "cosine": dict.fromkeys(pairs, None if split else cosine),
            "ratio": dict.fromkeys(pairs, None if split else 1.5),
            "within": {domain: 0.6 + 0.1 * noise(name, domain, step, seed) for domain in domains},
        }

    return [{"step": step, "groups": {name: group(name, step) for name in groups}} for step in range(0, 2001, 200)]


def kinship_of(routing: dict[str, Any]) -> dict[str, list[float]]:
    majority = routing["layers"][0]["majority_expert"]
    experts = len(next(iter(routing["layers"][0]["load"].values())))
    return {d: [1.0 if e == own else 3.0 + e for e in range(experts)] for d, own in majority.items()}


def result(name: str, arm: str, domains: tuple[str, ...], seed: int, experts: int = 2) -> dict[str, Any]:
    """Make the result of one run; ``domains`` has one entry for the arm ``single``."""
    routed = arm in ROUTED
    factor = RATIO.get(arm, 1.0) * (1 + 0.1 * (8 - experts) / 8 if name == "four" and routed else 1.0)
    salt = arm if arm != "single" else f"single {domains[0]}"
    known = MAIN if name == "main" else HARD if name == "hard" else FOUR
    errors = {domain: one for domain, one in errors_of(factor, known, seed, salt).items() if domain in domains}
    unseen = {
        domain: {"latent_mse": 1.4 * one["latent_mse"], "latent_mse_persistence": one["latent_mse_persistence"]}
        for domain, one in errors.items()
    }
    routing = routing_of(arm, domains, experts, seed) if routed else None
    swap = None
    if routing is not None and arm != "random":
        growth = [20.0 + 5 * layer + 2 * noise(layer, seed) for layer in range(LAYERS)]
        swap = {domain: {"layers": growth, "all": 300.0 + 40 * noise(domain, seed)} for domain in domains}
    curves = {"from_checkpoint": 0.6 if routed else 0.9, "from_scratch": 1.0}
    steps = list(range(0, 401, 40))
    relearning: dict[str, Any] = {"domain": "obstacle_wake", "steps": steps}
    for key, level in curves.items():
        relearning[key] = [0.01 * level * math.exp(-s / 150) + 1e-3 * (1 + seed / 10) for s in steps]
    return {
        "set": name,
        "arm": arm,
        "experts": experts if routed else 0,
        "seed": seed,
        "domains": list(domains),
        "run": f"{name}-{arm}-{'-'.join(domains)}-{experts}-{seed}",
        "parameters": {"total": 1_200_000 if arm != "dense_active" else 800_000, "active": 800_000},
        "learning_rate": 3e-4,
        "steps": 2000,
        "diverged": None,
        "errors": errors,
        "routing": routing,
        "bifurcation": bifurcation_of(routing, seed) if routing is not None else None,
        "swap": swap,
        "kinship": kinship_of(routing) if name == "four" and routing is not None else None,
        "place": {},
        "unseen": {"errors": unseen, "routing": routing},
        "gradients": [] if arm == "single" else gradients_of(arm, domains, experts if routed else 0, seed),
        "plasticity": {
            "dormant": {"shared": 0.02 + 0.01 * seed, **({"experts": 0.05} if routed else {})},
            "effective_rank": 40.0 - (0 if routed else 12) + seed,
            "width": 128,
        },
        "relearning": relearning if name == "main" and arm != "single" else None,
    }


def diverge(run: dict[str, Any], why: str = "loss is not finite at step 120") -> None:
    """Turn a result of `result` into that of a diverged run."""
    for key in ("errors", "routing", "bifurcation", "swap", "kinship", "place", "unseen", "plasticity", "relearning"):
        run[key] = None
    run["gradients"] = []
    run["diverged"] = why


def main_results(seeds: int = 3) -> list[dict[str, Any]]:
    """Results of the main set only."""
    joint = [result("main", arm, MAIN, seed) for arm in RATIO for seed in range(seeds)]
    return joint + [result("main", "single", (domain,), seed) for domain in MAIN for seed in range(seeds)]


def all_results(seeds: int = 3) -> list[dict[str, Any]]:
    """Results of all sets."""
    found = main_results(seeds)
    for seed in range(seeds):
        found += [result("hard", arm, HARD, seed) for arm in ("moe", "dense_active")]
        found += [result("hard", "single", (domain,), seed) for domain in HARD]
        found += [result("four", "moe", FOUR, seed, experts) for experts in (2, 4, 8)]
        found.append(result("four", "dense_active", FOUR, seed))
    return found


def tuning() -> dict[str, Any]:
    """Return what `shodh_moe.audit.arms.tuning` returns; the largest rate diverged."""
    rates = {"learning_rates": [1e-4, 3e-4, 1e-3], "valid_latent_mse": [0.4, 0.2, math.inf], "chosen": 3e-4}
    names = [*RATIO, *(f"single:{domain}" for domain in MAIN)]
    return {name: rates | {"at_edge": name == "dense_total"} for name in names}
