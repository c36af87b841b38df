"""Writing tensors to files, sending them to a device, and counting. tests/rehearsal checks that neither waits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shodh_moe.base.tensors import count_classes, save_tensors, sent, sent_numbers


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_saved_tensors_respect_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        save_tensors({"x": torch.arange(6.0).view(2, 3).T}, tmp_path / "x.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == mode
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], torch.arange(6.0).view(2, 3).T)


def test_a_tensor_that_is_sent_to_where_it_is_stays_there() -> None:
    x = torch.arange(3.0)
    assert sent(x, "cpu") is x
    assert sent(x, "cpu", torch.float64).dtype == torch.float64
    assert torch.equal(sent_numbers([1, 2], "cpu"), torch.tensor([1, 2]))
    assert sent_numbers([True, False], "cpu", torch.float64).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_classes_are_counted(device: str) -> None:
    counts = count_classes(torch.tensor([[2, 0], [2, 2]], device=device), 4)
    assert (counts.shape, counts.dtype) == ((4,), torch.int64)
    if device == "cpu":
        assert counts.tolist() == [1, 0, 3, 0]
