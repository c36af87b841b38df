"""The tokenizer starts from principal components of its training data, on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from shodh_moe.config import TokenizerConfig
from shodh_moe.data import TrajectoryRecord, list_trajectories
from shodh_moe.data.loader import Snapshots
from shodh_moe.tokenizer import Tokenizer
from shodh_moe.tokenizer.start import STARTED, start_from_principal_components
from tests.tiny import CONFIG, config
from tests.tokenizer.helpers import snapshots


def low_rank(grid: tuple[int, int, int] = (16, 16, 16)) -> Snapshots:
    """Stand-in for a dataset: patches of velocity and pressure from a space of 6 dimensions, no solids."""
    generator = torch.Generator().manual_seed(5)
    basis = torch.randn(6, 4, 8, 8, 8, generator=generator)

    class Fields(Snapshots):
        def read(self, index: int, out_5XYZ: np.ndarray) -> None:
            weights = torch.randn(6, 2, 2, 2, generator=torch.Generator().manual_seed(index))
            out_5XYZ[:4] = torch.einsum("rcijk,rxyz->cxiyjzk", basis, weights).reshape(4, *grid)
            out_5XYZ[4] = 0

    return Fields([TrajectoryRecord(Path("none"), 0, "d", 8, grid)])


def test_principal_components_reconstruct_a_field_of_low_rank() -> None:
    """Without shifts (not periodic) the patches span 6 dimensions, so 16 channels represent them exactly."""
    data = low_rank()
    tokenizer = Tokenizer(TokenizerConfig.model_validate(CONFIG["tokenizer"]), [16, 16, 16])
    fields = data.batch(range(8))

    def error() -> float:
        raw, pressure = tokenizer.decoder(tokenizer.encoder(fields), fields[:, 4:])
        return float(
            (torch.cat([raw, pressure], dim=1) - fields[:, :4]).square().mean() / fields[:, :4].square().mean()
        )

    with torch.no_grad():
        assert error() > 0.1
        start_from_principal_components(tokenizer, data, seed=0)
        assert error() < 1e-8
    assert not tokenizer.geometry_basis_CP.any(), "without solids the geometry has no component"


def test_overlapping_patches_keep_more_of_a_smooth_field(dataset: Path) -> None:
    """Their principal components are those of the turned fields, and orthonormal."""
    data, errors = snapshots(dataset), []
    fields = data.batch(range(10))
    for patches in ("apart", "overlapping"):
        tokenizer = Tokenizer(config(tokenizer={**CONFIG["tokenizer"], "patches": patches}).tokenizer, [16, 16, 16])
        with torch.no_grad():
            start_from_principal_components(tokenizer, data, seed=0)
            rows = tokenizer.encoder.project.weight.flatten(1)
            torch.testing.assert_close(rows @ rows.T, torch.eye(16), rtol=0, atol=1e-5)
            open_box = torch.zeros_like(fields[:, 4:])
            decoded = torch.cat(tokenizer.decoder(tokenizer.encoder(fields), open_box), dim=1)
        errors.append(float((decoded - fields[:, :4]).square().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_the_start_is_deterministic_including_signs(dataset: Path) -> None:
    states = []
    for seed in (0, 1):  # seeds of the initial weights, which the start must overwrite
        torch.manual_seed(seed)
        tokenizer = Tokenizer(config().tokenizer, [16, 16, 16])
        start_from_principal_components(tokenizer, snapshots(dataset), seed=0)
        states.append({k: v.clone() for k, v in tokenizer.state_dict().items()})
    for name in ("encoder.project.weight", "decoder.patches.weight", "geometry_basis_CP", "geometry_mean_P"):
        assert states[0][name].abs().sum() > 0
        assert torch.equal(states[0][name], states[1][name])
    rows = states[0]["encoder.project.weight"].flatten(1)
    assert (rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all(), "the largest entry is positive"
    torch.testing.assert_close(rows @ rows.T, torch.eye(16), atol=1e-5, rtol=0)


def test_a_constant_geometry_gives_no_noise(dataset: Path) -> None:
    """If all training masks are equal, only rounding errors remain, which must not be amplified."""

    class AllSolid(Snapshots):
        def read(self, index: int, out_5XYZ: np.ndarray) -> None:
            super().read(index, out_5XYZ)
            out_5XYZ[4] = 1

    data = AllSolid(list_trajectories(dataset, "train"))
    tokenizer = Tokenizer(config().tokenizer, [16, 16, 16])
    start_from_principal_components(tokenizer, data, seed=0)
    assert tokenizer.encode_geometry(torch.ones(1, 1, 16, 16, 16)).abs().max() < 1e-3


def test_ranks_that_divide_the_snapshots_find_the_same_start(dataset: Path) -> None:
    """Each rank reads its part of the snapshots, and the second rank adds the sums of the first."""
    alone, first, second = (Tokenizer(config().tokenizer, [16, 16, 16]) for _ in range(3))
    data = snapshots(dataset)
    start_from_principal_components(alone, data, seed=0)
    parts: list[torch.Tensor] = []
    start_from_principal_components(first, data, 0, 0, 2, lambda sums: parts.append(sums.clone()))
    start_from_principal_components(second, data, 0, 1, 2, lambda sums: sums.add_(parts.pop(0)))
    assert parts == []
    for name in STARTED:
        torch.testing.assert_close(second.state_dict()[name], alone.state_dict()[name], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(first.encoder.project.weight, alone.encoder.project.weight, atol=1e-2)
