"""The area under the curve, against its definition."""

from __future__ import annotations

import pytest
import torch

from shodh_moe.metrics.detection import auroc


def test_auroc_is_the_share_of_pairs_in_the_right_order() -> None:
    random = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 9, (40,), generator=random), torch.randint(3, 12, (30,), generator=random)
    pairs = (b[:, None] > a).double() + 0.5 * (b[:, None] == a)
    assert auroc(a, b) == pytest.approx(float(pairs.mean()))
    assert auroc(a, b) == pytest.approx(1 - auroc(b, a))


def test_separate_scores_and_equal_ones() -> None:
    assert auroc(torch.tensor([1.0, 2.0]), torch.tensor([3.0])) == 1
    assert auroc(torch.ones(3), torch.ones(4)) == 0.5
