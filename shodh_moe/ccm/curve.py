"""Paths through weight space other than the line of two experts, and one alpha for each group of layers.

A curve maps alpha to an expert. All of them pass through the experts of the two ends at alpha = -1 and 1, bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.ccm.expert import Expert, compose, require_same_network
from shodh_moe.ccm.readout import BANK, FRAMES, finite_error, golden_section, rollout_errors
from shodh_moe.checkpoint.state import load_state
from shodh_moe.merging.axes import parabola
from shodh_moe.merging.recipe import affine_sum

Curve = Callable[[float], Expert]

# The layers of both networks, as regular expressions for the names of their parameters.
LAYERS = {
    "lift": r"^(lift|embed|aggregate)\.",
    "spectral": r"^spectral\.|\.attention\.",
    "pointwise": r"^pointwise\.|\.(mlp|norm1|norm2)\.",
    "projection": r"^(hidden|cell|out)\.",
}
# The groups that get an alpha of their own: input, middle and output.
GROUPS = {"input": ("lift",), "blocks": ("spectral", "pointwise"), "output": ("projection",)}


def line(low: Expert, high: Expert) -> Curve:
    """The straight path between two experts."""
    return lambda alpha: compose(low, high, alpha)


def quadratic(low: Expert, middle: Expert, high: Expert, at: float = 0.0, bow: float = 1.0) -> Curve:
    """The parabola through ``low`` at alpha = -1, ``middle`` at ``at`` and ``high`` at 1.

    Args:
        middle: a third expert of the same anchor, or the anchor itself.
        at: its alpha, between -1 and 1.
        bow: share of the parabola's distance from the straight path; with 0 the path is straight.

    Raises:
        UserError: ``at`` is not between the ends, or the networks or units differ.
    """
    if not -1 < at < 1:
        raise UserError(
            f"{middle.path} is at alpha = {at:g}, not between {low.path} (-1) and {high.path} (1): give an expert of a "
            "regime between theirs"
        )
    require_same_network([low, middle, high])

    def on_curve(alpha: float) -> Expert:
        coefficients = parabola(alpha, at, bow)
        inputs = [one.weights() for one in (low, middle, high)]
        with torch.no_grad():
            return low.with_weights(
                {name: affine_sum(coefficients, [one[name] for one in inputs]) for name in inputs[0]}
            )

    return on_curve


def require_one_anchor(experts: list[Expert], anchor: Expert | None = None) -> None:
    """Refuse experts that were not fine-tuned from one anchor. Raises `UserError`.

    Args:
        anchor: if given, the one that all experts must have been fine-tuned from.
    """

    def began_from(expert: Expert) -> str | None:
        found = load_state(expert.path).get("start") or {}
        return found.get("sha256")

    first = experts[0]
    wanted = load_state(anchor.path)["sha256"] if anchor else began_from(first)
    for other in experts:
        if began_from(other) is None:
            raise UserError(f"{other.path} was not fine-tuned from an anchor: give experts of one anchor")
        if began_from(other) != wanted:
            theirs = f"{anchor.path}" if anchor else f"the anchor of {first.path}"
            raise UserError(f"{other.path} was not fine-tuned from {theirs}: give experts of one anchor")


def layer_of(parameter: str) -> str:
    """The key of `LAYERS` to which a parameter belongs."""
    for layer, names in LAYERS.items():
        if re.search(names, parameter):
            return layer
    raise UserError(f"{parameter} belongs to none of the layers {', '.join(LAYERS)}: this network has no groups")


def by_layer(low: Expert, high: Expert, alphas: dict[str, float]) -> Expert:
    """Compose two experts with an alpha for each of `LAYERS`; a layer without one gets 0, the average."""
    inputs = (low.weights(), high.weights())

    def tensor(name: str) -> Tensor:
        alpha = alphas.get(layer_of(name), 0.0)
        return affine_sum([(1 - alpha) / 2, (1 + alpha) / 2], [one[name] for one in inputs])

    with torch.no_grad():
        return low.with_weights({name: tensor(name) for name in inputs[0]})


def by_group(low: Expert, high: Expert, alphas: dict[str, float]) -> Expert:
    """Compose two experts with an alpha for each of `GROUPS`."""
    return by_layer(low, high, {layer: alphas[group] for group, layers in GROUPS.items() for layer in layers})


def group_names(group: str) -> str:
    """A regular expression for the names of the parameters of one of `GROUPS`."""
    return "|".join(LAYERS[layer] for layer in GROUPS[group])


def fit_groups(
    low: Expert, high: Expert, fields_NTCHW: Tensor, start: float, frames: int = FRAMES, sweeps: int = 2
) -> tuple[dict[str, float], float]:
    """Find the alphas by group that best predict the first frames, by golden section in one group after the other.

    Args:
        fields_NTCHW: trajectories of one regime; only their first ``frames`` frames are used.
        start: the alpha of all groups to begin with, from `readout.fit_prefix`.
        sweeps: how often each group is searched.

    Returns:
        the alphas, and their nRMSE; it is never larger than that of ``start``.
    """
    history, seen = low.config.network.history, fields_NTCHW[:, :frames]

    def error(alphas: dict[str, float]) -> float:
        return finite_error(rollout_errors(by_group(low, high, alphas), seen, 0.0, history).mean())

    def search(alphas: dict[str, float], group: str) -> tuple[float, float]:
        near = max(alphas[group] - 0.5, BANK[0]), min(alphas[group] + 0.5, BANK[-1])
        return golden_section(lambda alpha: error({**alphas, group: alpha}), *near)

    alphas = dict.fromkeys(GROUPS, start)
    smallest = error(alphas)
    for _ in range(sweeps):
        for group in GROUPS:
            found, value = search(alphas, group)
            if value < smallest:
                alphas, smallest = {**alphas, group: found}, value
    return alphas, smallest


def random_direction(low: Expert, high: Expert, seed: int) -> tuple[Expert, Expert]:
    """Two ends around the experts' average along a random direction, as long as the experts' own in every tensor."""
    random = torch.Generator().manual_seed(seed)

    def direction(values: Tensor) -> Tensor:
        noise = torch.randn(values.shape, generator=random, dtype=torch.float64).to(values)
        return noise * (torch.linalg.vector_norm(values) / torch.linalg.vector_norm(noise))

    return _around(low, high, {name: direction(values) for name, values in _direction(low, high).items()})


def direction_of_twins(low: Expert, high: Expert, one: Expert, other: Expert) -> tuple[Expert, Expert]:
    """Two ends around the experts' average along the direction between two experts of a single regime.

    The direction is scaled to the length of that between ``low`` and ``high``.
    """
    twins = _direction(one, other)
    factor = length(_direction(low, high)) / max(length(twins), 1e-30)
    return _around(low, high, {name: factor * values for name, values in twins.items()})


def distance(low: Expert, high: Expert, anchor: Expert) -> float:
    """The distance of two experts, relative to the norm of the anchor's weights."""
    return 2 * length(_direction(low, high)) / length(anchor.weights())


def length(tensors: dict[str, Tensor]) -> float:
    """The norm of all tensors together."""
    return float(torch.stack([torch.linalg.vector_norm(one.detach().double()) for one in tensors.values()]).norm())


@torch.no_grad()
def _direction(low: Expert, high: Expert) -> dict[str, Tensor]:
    ends = high.weights()
    return {name: (ends[name] - values) / 2 for name, values in low.weights().items()}


@torch.no_grad()
def _around(low: Expert, high: Expert, direction: dict[str, Tensor]) -> tuple[Expert, Expert]:
    middle = compose(low, high, 0.0).weights()
    one, other = (
        low.with_weights({name: middle[name] + sign * direction[name] for name in middle}) for sign in (-1, 1)
    )
    return one, other
