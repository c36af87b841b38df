"""Each method that mergekit has too gives mergekit's result, through the whole command and in any slicing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.merging.mergekit_cases import CASES, FILE, SHAPES, Case, by_mergekit
from tests.merging.models import merged, save

STORED = json.loads(FILE.read_text())


def ours(case: Case, folder: Path) -> dict[str, Tensor]:
    tensors = case.inputs()
    count = len(tensors["bias"])
    paths = [save({name: all[i] for name, all in tensors.items()}, folder / f"{i}.safetensors") for i in range(count)]
    entries = [(path, own) for path, own in zip(paths[1:], case.own, strict=False)]
    base = {"base_model": paths[0]} if case.based else {}
    limit = {} if case.method in ("linear", "slerp") or not case.based else {"distance_limit": 9}
    return merged(folder, case.method, entries, parameters={**case.shared, **limit}, **base)


@pytest.mark.parametrize("key", CASES)
def test_the_result_is_mergekits(key: str, tmp_path: Path) -> None:
    case = CASES[key]
    found = ours(case, tmp_path)
    for name, shape in SHAPES.items():
        expected = torch.tensor(STORED[key][name], dtype=found[name].dtype).view(shape)
        tolerance = 1e-12 if case.double else 1e-6
        torch.testing.assert_close(found[name], expected, rtol=0, atol=tolerance)
        # The result differs from every input, so that the methods are told apart.
        assert all(float((found[name] - one).abs().max()) > 100 * tolerance for one in case.inputs()[name]), name


@pytest.mark.parametrize("key", CASES)
def test_the_stored_results_are_those_of_the_installed_mergekit(key: str) -> None:
    pytest.importorskip(
        "mergekit", reason="NOT CHECKED: mergekit is not installed, so only its stored results are used"
    )
    for name, tensor in by_mergekit(CASES[key]).items():
        expected = torch.tensor(STORED[key][name], dtype=tensor.dtype)
        torch.testing.assert_close(tensor.flatten(), expected, rtol=0, atol=1e-12 if CASES[key].double else 1e-6)
