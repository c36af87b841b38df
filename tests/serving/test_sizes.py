"""Flows on several grids are forecast by one service."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shodh_moe.data.dataset import Fields, Source
from shodh_moe.inference import load_model
from shodh_moe.serving.batching import Batcher
from shodh_moe.serving.limits import Limits
from tests.trained import make_run

BOX = (("periodic", "periodic"),) * 3
OPEN = (("open", "open"),) * 3


@pytest.mark.parametrize("keys", [{}, {"boundaries": True, "positions": "periodic_aware"}])
def test_flows_of_one_grid_are_computed_together(tmp_path: Path, keys: dict[str, object]) -> None:
    model, batches = load_model(make_run(tmp_path, keys)), []
    generator = torch.Generator().manual_seed(0)

    def flow(grid: tuple[int, int, int], boundaries: object) -> Fields:
        velocity = torch.randn(2, 3, *grid, generator=generator)
        tensors = {"velocity": velocity, "pressure": velocity[:, :1], "solid": torch.zeros(1, *grid)}
        return Fields(tensors, Source(boundaries=boundaries))

    flows = [flow((16, 16, 8), BOX), flow((8, 16, 16), BOX), flow((16, 16, 8), OPEN), flow((16, 16, 8), BOX)]
    batcher = Batcher(model, Limits(), lambda size, steps: batches.append(size))
    try:
        futures = [batcher.submit(one, 2) for one in flows]
        found = [future.result(100) for future in futures]
    finally:
        batcher.close()
    for one, forecast in zip(flows, found, strict=True):
        expected = model.forecast(one, 2)["velocity"]
        torch.testing.assert_close(forecast["velocity"], expected, rtol=1e-4, atol=1e-5)
    assert sum(batches) == 4
    assert len(batches) >= 2
