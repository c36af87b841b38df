"""Straighten the predictions along the line between two experts, from the network's Jacobian.

With h = (theta_high - theta_low)/2, the line is theta(alpha) = theta(0) + alpha h, and l(alpha) = (1 - alpha)/2
f(theta_low) + (1 + alpha)/2 f(theta_high) extrapolates the experts' own predictions. A regime's one-step map is nearly
linear in its coordinate, and then l is the better prediction, but it costs two networks. To second order in h,

    l(alpha) - f(theta(alpha)) = (1 - alpha^2)/2 h^T H h        H: second derivatives of f at theta(0)

A change (1 - alpha^2) v of the weights changes predictions by (1 - alpha^2) J v to first order. So one v corrects the
whole path, which becomes the parabola through theta_low, theta(0) + v and theta_high:

    v = argmin |J v - (l(0) - f(theta(0)))|^2                    J: Jacobian of f, here at theta(0) or at the anchor

No truth is needed: the targets are the experts' own predictions, for any inputs like those of the family. Where f is
linear in its weights, l = f(theta) and v = 0. This derivation is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

from shodh_moe.ccm.expert import Expert, compose, require_same_network

ITERATIONS = 20
Weights = dict[str, Tensor]


def straightened_middle(
    low: Expert, high: Expert, frames_NTCHW: Tensor, at: Expert | None = None, iterations: int = ITERATIONS
) -> Expert:
    """The point theta(0) + v, through which the parabola of two experts makes their predictions straight.

    Args:
        low, high: experts of one anchor, not conditioned on the coordinate.
        frames_NTCHW: inputs of the network, T = ``history`` frames each, in physical units. Their graph is in memory.
        at: where the Jacobian is taken, such as the anchor; default: at theta(0), the experts' average.
        iterations: of `least_squares`; each takes about as long as five predictions of all frames. Fewer iterations
            give a shorter v.

    Raises:
        UserError: the networks or units differ.
    """
    require_same_network([low, high, *([at] if at else [])])
    average = compose(low, high, 0.0)
    network = average.network
    frames = average.scale.normalise(frames_NTCHW.to(next(network.parameters())))

    def predict(weights: Weights) -> Tensor:
        predicted: Tensor = functional_call(network, weights, (frames,))
        return predicted

    with torch.no_grad():
        wanted = (predict(_weights(low)) + predict(_weights(high))) / 2 - predict(_weights(average))
    v = least_squares(predict, _weights(at or average), wanted, iterations)
    return average.with_weights({name: values + v[name] for name, values in _weights(average).items()})


def least_squares(
    function: Callable[[Weights], Tensor], at: Weights, wanted: Tensor, iterations: int = ITERATIONS
) -> Weights:
    """Minimise |J v - wanted|^2 over v, with J the Jacobian of ``function`` at ``at``, by conjugate gradients from 0.

    CGLS (Hestenes and Stiefel 1952, section 10), with one jvp and one vjp for each direction, so that J is never
    stored. It stops early where the gradient vanishes.
    """
    transposed = vjp(function, at)[1]
    gradient: Weights = transposed(wanted)[0]
    found = {name: torch.zeros_like(values) for name, values in at.items()}
    direction, size = dict(gradient), _dot(gradient, gradient)
    first = size
    for _ in range(iterations):
        if size <= 1e-14 * first:  # also where it is 0 from the beginning
            break
        change: Tensor = jvp(function, (at,), (direction,))[1]
        step = size / float(change.double().square().sum())
        found = {name: values + step * direction[name] for name, values in found.items()}
        wanted = wanted - step * change
        gradient = transposed(wanted)[0]
        previous, size = size, _dot(gradient, gradient)
        direction = {name: values + size / previous * direction[name] for name, values in gradient.items()}
    return {name: values.detach() for name, values in found.items()}


def extrapolated(low: Expert, high: Expert, alpha: float) -> Expert:
    """An expert that predicts with both networks, at every step, and extrapolates their predictions to ``alpha``."""
    network: Any = _Extrapolated(low.network, high.network, alpha)
    return Expert(low.path, low.config, low.scale, network.eval())


class _Extrapolated(nn.Module):
    def __init__(self, low: nn.Module, high: nn.Module, alpha: float):
        super().__init__()
        self.low, self.high, self.alpha = low, high, alpha
        self.history: Any = low.history

    def forward(self, history_BTCHW: Tensor, condition: Tensor | None = None) -> Tensor:
        low, high = (network(history_BTCHW, condition) for network in (self.low, self.high))
        mixed: Tensor = (1 - self.alpha) / 2 * low + (1 + self.alpha) / 2 * high
        return mixed


def _weights(expert: Expert) -> Weights:
    return {name: values.detach() for name, values in expert.weights().items()}


def _dot(one: Weights, other: Weights) -> float:
    return sum(float((values.double() * other[name].double()).sum()) for name, values in one.items())
