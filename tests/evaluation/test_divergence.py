"""The divergence table measures: a curl scores rounding error, a compressive flow does not."""

from __future__ import annotations

import pytest
import torch

from shodh_moe.evaluation.divergence import divergence_table
from shodh_moe.kernels import curl, divergence


def test_rows_state_the_precision_and_separate_exact_from_inexact_fields():
    torch.manual_seed(0)
    u = curl(torch.randn(1, 3, 8, 8, 8, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64))
    table = divergence_table(
        {torch.float64: u, torch.float32: u.float()}, {"open_channel": torch.randn_like(u)}, "spectral"
    )
    exact, single, data = table
    assert (exact["dtype"], single["dtype"], data["dtype"]) == ("float64", "float32", "float64")
    assert exact["rms_relative"] < 1e-14
    assert 1e-9 < single["rms_relative"] < 1e-5
    assert data["rms_relative"] > 0.1
    assert "open_channel" in data["what"]
    assert all({"operator", "norm", "spacing", "rms", "max"} <= row.keys() for row in table)


def test_staggered_predictions_are_on_faces_and_data_are_averaged_to_faces():
    torch.manual_seed(0)
    faces = curl(torch.randn(1, 3, 8, 8, 8, dtype=torch.float64), operator="staggered")
    data = torch.randn_like(faces)
    exact, averaged = divergence_table({torch.float64: faces}, {"open_channel": data}, "staggered")
    assert exact["rms_relative"] < 1e-14
    assert ("on faces" in exact["what"], "averaged to faces" in averaged["what"]) == (True, True)
    # The staggered difference of means of two centres is the central difference of the centres.
    assert averaged["rms"] == pytest.approx(float(divergence(data, "central2").square().mean().sqrt()), rel=1e-12)
