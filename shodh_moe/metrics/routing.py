"""Routing metrics on held-out data, from counts of tokens per layer, domain and expert.

Counts are of the routers' choices, before any token is dropped for lack of capacity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

PURITY_THRESHOLD = 0.99


def load_shares(counts_E: Tensor | Sequence[float]) -> list[float]:
    """Share of a domain's tokens at each expert, ``counts_E / sum``; all zero if there are no tokens."""
    counts = torch.as_tensor(counts_E, dtype=torch.float64)
    total = counts.sum()
    return (counts / total if total > 0 else counts).tolist()


def purity(counts_E: Tensor | Sequence[float]) -> float:
    """Share of a domain's tokens at its majority expert: from 1/E (spread evenly) to 1 (all at one)."""
    return max(load_shares(counts_E))


def majority_expert(counts_E: Tensor | Sequence[float]) -> int:
    """The expert with most of a domain's tokens; the lowest number wins a tie."""
    shares = load_shares(counts_E)
    return shares.index(max(shares))


def bifurcated(counts: Mapping[str, Tensor | Sequence[float]], threshold: float = PURITY_THRESHOLD) -> bool:
    """Whether a layer gives each domain its own expert. ``counts``: {domain: [E]}.

    True if no two domains share a majority expert and every purity is at least ``threshold`` (we chose its default).
    False for a single domain.
    """
    majorities = {majority_expert(counts_E) for counts_E in counts.values()}
    pure = all(purity(counts_E) >= threshold for counts_E in counts.values())
    return len(counts) > 1 and len(majorities) == len(counts) and pure


def mutual_information(counts_DE: Tensor | Sequence[Sequence[float]]) -> float:
    """Mutual information of category (rows) and expert (columns), in nats, from joint counts [D, E].

        I = sum_de p_de ln( p_de / (p_d p_e) ),   0 <= I <= min(ln D, ln E)

    It is 0 if the expert is independent of the category. Categories may be domains, or bins of the local solid
    fraction. This is the plug-in estimate: with N tokens it is biased upwards by about (D-1)(E-1)/(2 N).
    """
    counts = torch.as_tensor(counts_DE, dtype=torch.float64)
    if counts.ndim != 2:
        raise ValueError(f"joint counts need the axes [categories, experts], not shape {tuple(counts.shape)}")
    if counts.sum() <= 0:
        return 0.0
    joint = counts / counts.sum()
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    # xlogy is 0 at 0; the guard keeps 0/0 (an empty row or column) out of the logarithm.
    terms = torch.special.xlogy(joint, torch.where(joint > 0, joint / independent, 1.0))
    return max(float(terms.sum()), 0.0)


def conditional_mutual_information(counts_CDE: Tensor | Sequence[Sequence[Sequence[float]]]) -> float:
    """Mutual information of domain and expert within each category, in nats, from joint counts [C, D, E].

        I(E; D | C) = sum_c p_c I(E; D | C = c),   0 <= I <= min(ln D, ln E)

    (Cover and Thomas, Elements of Information Theory, 2.5.) With the local solid fraction as the category, it measures
    what experts know about the domain beyond what the mask shows: 0 if they follow only the mask. The plug-in estimate
    is biased upwards by about C (D-1)(E-1)/(2 N).
    """
    counts = torch.as_tensor(counts_CDE, dtype=torch.float64)
    if counts.ndim != 3:
        raise ValueError(f"joint counts need the axes [categories, domains, experts], not shape {tuple(counts.shape)}")
    tokens_C, total = counts.sum((1, 2)), counts.sum()
    if total <= 0:
        return 0.0
    return sum(
        float(tokens / total) * mutual_information(table) for tokens, table in zip(tokens_C, counts, strict=True)
    )


def joint_counts(category_N: Tensor, expert_N: Tensor, categories: int, experts: int) -> Tensor:
    """Counts [D, E] of tokens by category and expert (both integer [N]), the input of `mutual_information`.

    Raises:
        ValueError: a category is not from 0 to ``categories`` - 1, or an expert not from 0 to ``experts`` - 1.
    """
    category, expert = category_N.long().flatten(), expert_N.long().flatten()
    for name, number_N, size in (("category", category, categories), ("expert", expert, experts)):
        if number_N.numel() and (number_N.min() < 0 or number_N.max() >= size):
            raise ValueError(
                f"{name} numbers run from {int(number_N.min())} to {int(number_N.max())}, not below {size}"
            )
    return torch.bincount(category * experts + expert, minlength=categories * experts).reshape(categories, experts)


def solid_fraction_category(solid_fraction_N: Tensor, categories: int = 4) -> Tensor:
    """Category of each token, int64 [N] from 0 to ``categories`` - 1, by the share of its cells that are solid.

    The first category is all fluid and the last all solid; the others split the open interval (0, 1) evenly. With 4
    categories, the two in the middle are "less than half solid" and "at least half solid". The definition is ours.

    Raises:
        ValueError: fewer than 3 categories.
    """
    if categories < 3:
        raise ValueError(f"solid fractions need at least 3 categories (fluid, mixed, solid), not {categories}")
    fraction, mixed = solid_fraction_N.double(), categories - 2
    between = (fraction * mixed).floor().long().clamp(0, mixed - 1) + 1
    return torch.where(fraction <= 0, 0, torch.where(fraction >= 1, categories - 1, between))


def router_entropy(probabilities_NE: Tensor) -> float:
    """Mean over tokens of -sum_e p_e ln p_e in nats: 0 for a certain router, ln E for an undecided one."""
    p = probabilities_NE.double()
    return float(-torch.special.xlogy(p, p).sum(-1).mean())


def summarise_routing(
    counts: Sequence[Mapping[str, Tensor | Sequence[float]]],
    dropped_fraction: Sequence[Mapping[str, float]] | None = None,
    entropy: Sequence[Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """Build the ``routing`` section of metrics.json.

    The top-level ``bifurcated`` is true if every layer is bifurcated; ``mutual_information.domain`` is in nats.

    Args:
        counts: number of tokens, ``counts[layer][domain][expert]``.
        dropped_fraction: share of dropped tokens, ``dropped_fraction[layer][domain]``.
        entropy: `router_entropy` in nats, ``entropy[layer][domain]``.
    """
    layers = []
    for number, layer in enumerate(counts):
        entry: dict[str, Any] = {
            "layer": number,
            "load": {domain: load_shares(counts_E) for domain, counts_E in layer.items()},
            "purity": {domain: purity(counts_E) for domain, counts_E in layer.items()},
            "majority_expert": {domain: majority_expert(counts_E) for domain, counts_E in layer.items()},
            "bifurcated": bifurcated(layer),
            "mutual_information": {
                "domain": mutual_information(torch.stack([torch.as_tensor(c).double() for c in layer.values()]))
            },
        }
        if dropped_fraction is not None:
            entry["dropped_fraction"] = dict(dropped_fraction[number])
        if entropy is not None:
            entry["entropy"] = dict(entropy[number])
        layers.append(entry)
    return {"layers": layers, "bifurcated": bool(layers) and all(entry["bifurcated"] for entry in layers)}
