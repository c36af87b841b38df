"""Merges that mergekit computed: their inputs, their settings, and the script that wrote mergekit.json.

    pip install --no-deps mergekit==0.1.5
    python -m tests.merging.mergekit_cases

The file's results are mergekit's own (https://github.com/arcee-ai/mergekit), called as a library. DELLA draws random
numbers: here mergekit's ``torch.bernoulli`` compares its probabilities with our random numbers, so that both make the
same choice exactly if their probabilities agree.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shodh_moe.merging.sparsify import random_numbers

FILE = Path(__file__).with_name("mergekit.json")
SHAPES = {"matrix": (6, 7), "bias": (13,), "cube": (2, 5, 3)}
WEIGHTS = [{"weight": 0.7}, {"weight": 0.5}, {"weight": -0.2}]
WITH_BASE = ("slerp", "task_arithmetic", "ties", "breadcrumbs", "della", "model_stock")  # beginnings of names


@dataclass(frozen=True)
class Case:
    """One merge of a base and three models; slerp merges the first model with the base.

    Attributes:
        distance: of the models from the base, whose numbers are between -1 and 1; None: unrelated models.
        shared: parameters for all models; ``own``: those of each model.
    """

    method: str
    shared: dict[str, Any] = field(default_factory=dict)
    own: list[dict[str, float]] = field(default_factory=lambda: [{}, {}, {}])
    distance: float | None = 0.3
    double: bool = False

    @property
    def based(self) -> bool:
        return self.method.startswith(WITH_BASE)

    def inputs(self) -> dict[str, list[Tensor]]:
        """The base and the models, by the name of the tensor."""
        dtype = torch.float64 if self.double else torch.float32
        models = {name: [_random(name, i) for i in range(4)] for name in SHAPES}
        if self.distance is not None:
            models = {name: [b, *(b + self.distance * x for x in xs)] for name, (b, *xs) in models.items()}
        count = 2 if self.method == "slerp" else 4
        return {name: [tensor.float().to(dtype) for tensor in all[:count]] for name, all in models.items()}


def _random(name: str, i: int) -> Tensor:
    shape = SHAPES[name]
    drawn = random_numbers(7, name, i, 0, int(np.prod(shape)))
    return torch.from_numpy(drawn * 2.0**-63 - 1).reshape(shape)


CASES = {
    "linear": Case("linear", {"normalize": True}, WEIGHTS),
    "slerp": Case("slerp", {"t": 0.3}, distance=None),
    "task_arithmetic": Case("task_arithmetic", {"lambda": 0.8}, WEIGHTS),
    "ties": Case("ties", {"density": 0.6}, WEIGHTS),
    "karcher": Case("karcher"),
    "karcher_unrelated": Case("karcher", distance=None),
    "karcher_double": Case("karcher", {"tol": 1e-9}, distance=None, double=True),
    "karcher_two_iterations": Case("karcher", {"max_iter": 2}, distance=None, double=True),
    "karcher_near": Case("karcher", distance=1e-3, double=True),
    "model_stock": Case("model_stock"),
    "model_stock_unrelated": Case("model_stock", distance=None),
    # The norms' product is below mergekit's limit of 1e-6.
    "model_stock_near": Case("model_stock", distance=1e-4, double=True),
    "model_stock_filter_wise": Case("model_stock", {"filter_wise": True}, double=True),
    "model_stock_filter_wise_near": Case("model_stock", {"filter_wise": True}, distance=1e-3, double=True),
    "breadcrumbs": Case("breadcrumbs", {"density": 0.5, "gamma": 0.15}, WEIGHTS),
    "breadcrumbs_rescale": Case("breadcrumbs", {"density": 0.3, "rescale": True, "normalize": True}, WEIGHTS),
    "breadcrumbs_own": Case(
        "breadcrumbs",
        {"weight": 0.4, "lambda": 1.5},
        [{"density": 0.9, "gamma": 0.4}, {"density": 1.0, "gamma": 0.1}, {"density": 0.2, "gamma": 0.0}],
    ),
    "breadcrumbs_ties": Case("breadcrumbs_ties", {"density": 0.6, "gamma": 0.1, "normalize": True}, WEIGHTS),
    "della": Case("della", {"density": 0.5, "epsilon": 0.3}, WEIGHTS),
    "della_own": Case(
        "della",
        {"weight": 1.0, "rescale": False, "normalize": False},
        [{"density": 0.7, "epsilon": 0.2}, {"density": 1.0}, {"density": 0.4}],
    ),
    "della_linear": Case("della_linear", {"density": 0.4, "epsilon": 0.35, "lambda": 1.2}, WEIGHTS),
}


def by_mergekit(case: Case) -> dict[str, Tensor]:
    """Merge with mergekit; needs it to be installed."""
    from mergekit.merge_methods.base import TensorGroup
    from mergekit.merge_methods.registry import get

    parameters: dict[str, Any] = {}
    for key in {key for settings in (case.shared, *case.own) for key in settings}:
        by_model = {i + 1: own.get(key, case.shared.get(key)) for i, own in enumerate(case.own)}
        # density and epsilon have defaults, which only some of the models override.
        given = {i: value for i, value in by_model.items() if value is not None}
        shared = key not in ("weight", "density", "gamma", "epsilon")
        default = {"epsilon": 0.15}
        parameters[key] = case.shared[key] if shared else {i: given.get(i, default.get(key)) for i in by_model}
    merged = {}
    bernoulli = torch.bernoulli
    for name, tensors in case.inputs().items():
        first = 0 if case.based else 1
        ids, base = range(first, len(tensors)), 0 if case.based else None
        group = TensorGroup.from_tensors(tensors[first:], ids=ids, name=name, base_index=base)
        dropping = [i for i, own in enumerate(case.own) if own.get("density", case.shared.get("density", 1)) < 1]
        models = iter(dropping)

        def drawn(probabilities: Tensor, name: str = name, models: Any = models) -> Tensor:
            numbers = random_numbers(0, name, next(models), 0, probabilities.numel()) * 2.0**-64
            return (torch.from_numpy(numbers).view(probabilities.shape) < probabilities.double()).float()

        torch.bernoulli = drawn
        try:
            (merged[name],) = get(case.method)([group], parameters=parameters)
        finally:
            torch.bernoulli = bernoulli
    return merged


def main() -> None:
    """Write mergekit.json."""
    from importlib.metadata import version

    results = {
        key: {name: x.flatten().tolist() for name, x in by_mergekit(case).items()} for key, case in CASES.items()
    }
    lines = [
        f"  {json.dumps(key)}: {{\n"
        + ",\n".join(f"    {json.dumps(name)}: [{_written(values, CASES[key])}]" for name, values in one.items())
        + "\n  }"
        for key, one in results.items()
    ]
    FILE.write_text(f'{{\n  "version": "mergekit {version("mergekit")}",\n' + ",\n".join(lines) + "\n}\n")


def _written(values: list[float], case: Case) -> str:
    return ", ".join(format(value, ".17g" if case.double else ".9g") for value in values)


if __name__ == "__main__":
    main()
