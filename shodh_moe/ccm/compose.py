"""Merging experts in memory, by the same formulas as `shodh merge`: for readouts and for comparing methods."""

from __future__ import annotations

import torch
from torch import Tensor

from shodh_moe.ccm.expert import Expert
from shodh_moe.merging.methods import recipe, weighted_sum
from shodh_moe.merging.settings import Lookup, Setting


def compose(low: Expert, high: Expert, alpha: float) -> Expert:
    """The expert at ``alpha`` on the line: (1 - alpha)/2 low + (1 + alpha)/2 high (DESIGN 3.7)."""
    inputs, coefficients = (low.weights(), high.weights()), [(1 - alpha) / 2, (1 + alpha) / 2]
    with torch.no_grad():
        return low.with_weights({name: weighted_sum(coefficients, [one[name] for one in inputs]) for name in inputs[0]})


def from_anchor(method: str, anchor: Expert, models: list[Expert], parameters: dict[str, Setting]) -> Expert:
    """Task arithmetic, TIES or DARE; parameters as the configs of `shodh merge` have them (docs/merging.md)."""
    inputs, lookup = (
        [anchor.weights(), *(model.weights() for model in models)],
        Lookup(parameters, [{} for _ in models]),
    )
    with torch.no_grad():
        return anchor.with_weights({name: _tensor(method, lookup, name, inputs) for name in inputs[0]})


def _tensor(method: str, lookup: Lookup, name: str, inputs: list[dict[str, Tensor]]) -> Tensor:
    tensors = [one[name] for one in inputs]
    flat = [tensor.detach().flatten() for tensor in tensors]
    made = recipe(method, lookup, name, flat[0].numel(), len(flat) - 1, True, flat[0].dtype, None)
    for number in range(made.passes):
        made.observe(number, 0, [values.clone() for values in flat])
        made.end_pass(number)
    return made.result(0, flat).view(tensors[0].shape)
