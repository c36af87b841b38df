"""The profile of a layer: peak memory, and the part to which each operation belongs."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.usefixtures("importable")
CPU = torch.device("cpu")


def test_the_peak_is_the_memory_held_at_once() -> None:
    from support.layer_profile import peak_bytes

    def call(number: int) -> torch.Tensor:
        first = torch.empty(number)
        second = torch.empty(number)
        del first
        return second + 1.0  # two at a time

    assert peak_bytes(call, 1_000_000, CPU) == pytest.approx(8_000_000, rel=0.01)


@pytest.mark.parametrize(
    ("name", "shapes", "part"),
    [
        ("aten::mm", [[80, 128], [128, 512]], "experts' products"),
        ("aten::addmm_", [[128, 512], [128, 80], [80, 512]], "experts' products"),
        ("aten::mm", [[256, 128], [128, 4]], "gating"),
        ("aten::mul", [[80, 256], [80, 256]], "activation"),
        ("aten::silu_backward", [[80, 256], [80, 256]], "activation"),
        ("shodh::combine_backward", [[256, 128]], "dispatch, combine"),
        ("aten::_softmax", [[256, 4]], "gating"),
        ("aten::cat", [[80, 128], [80, 128]], "dispatch, combine"),
        ("aten::view", [[]], "other"),
    ],
)
def test_part_of_an_operation(name: str, shapes: list[list[int]], part: str) -> None:
    from support.layer_profile import part_of

    assert part_of(name, shapes, width=128, hidden=256, experts=4) == part


def test_shares_add_up() -> None:
    from support.layer_profile import shares

    a = torch.randn(256, 256)
    found = shares(lambda x: torch.softmax(x @ x, 1), a, CPU, width=256, hidden=512, experts=4)
    assert sum(found.values()) == pytest.approx(1)
    assert found["experts' products"] > 0
    assert found["gating"] > 0
