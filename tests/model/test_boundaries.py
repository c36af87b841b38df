"""What the network is told of the faces of a box, and the symmetry that follows from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from shodh_moe.base.boundaries import UNKNOWN_BOUNDARIES, codes_of
from shodh_moe.config import ModelConfig
from shodh_moe.model import Context, LatentTransformer
from shodh_moe.model.boundaries import BoundaryEmbedding
from shodh_moe.parallel import ExpertParallel

CHANNEL = (("periodic", "periodic"), ("open", "open"), ("wall", "wall"))
BOX = (("periodic", "periodic"),) * 3


def _codes(*boundaries: Any) -> Tensor:
    return torch.tensor([codes_of(one) for one in boundaries])


def _model(seed: int = 0, **keys: Any) -> LatentTransformer:
    """A float64 model in which every part changes the prediction."""
    moe = {"num_experts": 2, "expert_hidden": 16}
    config = ModelConfig.model_validate({"dim": 48, "depth": 2, "heads": 2, "moe": moe, **keys})
    model = LatentTransformer(config, 5, seed, ExpertParallel()).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return model


def _inputs(batch: int = 2, grid: tuple[int, int, int] = (4, 6, 2)) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    history = torch.randn(batch, 2, 5, *grid, generator=g, dtype=torch.float64)
    return history, torch.randn(batch, 5, *grid, generator=g, dtype=torch.float64)


TOLD = {"boundaries": True, "positions": "periodic_aware"}


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rolling_the_input_along_a_periodic_axis_rolls_the_output(patch, axis):
    grid = tuple(2 * patch * size for size in (2, 3, 1)) if patch == 1 else (4, 8, 4)
    model, (history, geometry) = _model(patch=patch, **TOLD), _inputs(2, grid)
    context = Context(2, boundary_B32=_codes(BOX, BOX))
    out = model(history, geometry, context).latent_BCxyz
    rolled = model(history.roll(patch, 3 + axis), geometry.roll(patch, 2 + axis), context).latent_BCxyz
    torch.testing.assert_close(rolled, out.roll(patch, 2 + axis), rtol=1e-11, atol=1e-11)
    # Neither the default positions nor a box with other faces have this symmetry.
    for other, boundaries in ((_model(patch=patch), BOX), (model, CHANNEL[1:2] * 3)):
        context = Context(2, boundary_B32=_codes(boundaries, boundaries))
        out = other(history, geometry, context).latent_BCxyz
        rolled = other(history.roll(patch, 3 + axis), geometry.roll(patch, 2 + axis), context).latent_BCxyz
        if grid[axis] > 2 * patch or other is model:  # of two open positions each is one step from the other
            assert (rolled - out.roll(patch, 2 + axis)).abs().max() > 1e-3


def test_each_sample_has_its_own_boundaries():
    model, (history, geometry) = _model(**TOLD), _inputs(3)
    codes = _codes(BOX, CHANNEL, UNKNOWN_BOUNDARIES)
    together = model(history, geometry, Context(3, boundary_B32=codes)).latent_BCxyz
    for n in range(3):
        alone = model(history[n : n + 1], geometry[n : n + 1], Context(boundary_B32=codes[n : n + 1])).latent_BCxyz
        torch.testing.assert_close(alone[0], together[n], rtol=1e-10, atol=1e-10)
    same = model(history, geometry, Context(3, boundary_B32=codes[1:2].expand(3, -1, -1))).latent_BCxyz
    assert (same - together).abs().amax((1, 2, 3, 4))[[0, 2]].min() > 1e-3


def test_a_model_that_is_told_nothing_of_unknown_faces_predicts_as_one_that_is_never_told():
    told, plain, inputs = _model(**TOLD), _model(), _inputs()
    weights = {name: tensor for name, tensor in told.state_dict().items() if not name.startswith("boundaries.")}
    plain.load_state_dict(weights)
    unknown = Context(2, boundary_B32=_codes(UNKNOWN_BOUNDARIES, UNKNOWN_BOUNDARIES))
    assert torch.equal(told(*inputs, unknown).latent_BCxyz, plain(*inputs).latent_BCxyz)


def test_a_face_adds_its_vector_beside_it_and_a_periodic_axis_everywhere():
    embedding = BoundaryEmbedding(1)
    wall, opened = torch.arange(6.0).view(3, 2, 1) + 1, 10 * (torch.arange(6.0).view(3, 2, 1) + 1)
    embedding.face_32KD.data = torch.stack([wall, opened], dim=2)
    embedding.periodic_3D.data = torch.tensor([[100.0], [200.0], [300.0]])
    faces = (("periodic", "periodic"), ("open", "unknown"), ("wall", "wall"))
    added = embedding(_codes(faces, UNKNOWN_BOUNDARIES), (2, 3, 3)).view(2, 2, 3, 3)
    # x adds 100; y adds 30 (the third vector, open) at its low end; z adds 5 and 6 (the fifth and sixth, wall).
    assert added[0, 1].tolist() == [[135, 130, 136], [105, 100, 106], [105, 100, 106]]
    assert torch.equal(added[0, 0], added[0, 1])
    assert not added[1].any()


def test_vectors_start_at_zero_and_learn():
    model, context = _model(**TOLD), Context(2, boundary_B32=_codes(BOX, CHANNEL))
    made = LatentTransformer(model.config, 5, 0, ExpertParallel())
    assert made.boundaries is not None
    assert not any(parameter.any() for parameter in made.boundaries.parameters())
    model.train()
    model(*_inputs(), context).latent_BCxyz.square().sum().backward()
    assert model.boundaries is not None
    gradient_32KD = model.boundaries.face_32KD.grad
    assert gradient_32KD[1, :, 1].any(-1).all()
    assert gradient_32KD[2, :, 0].any(-1).all()
    assert not gradient_32KD[0].any()
    assert model.boundaries.periodic_3D.grad.any(-1).all()


@pytest.mark.parametrize("keys", [{"boundaries": True}, {"positions": "periodic_aware"}])
def test_a_model_that_is_told_boundaries_needs_them(keys):
    with pytest.raises(ValueError, match="boundary_B32"):
        _model(**keys)(*_inputs(), replace(Context(2)))


def test_activation_checkpointing_changes_no_bit():
    config, context, gradients = _model(**TOLD).config, Context(2, boundary_B32=_codes(BOX, CHANNEL)), []
    for on in (False, True):
        model = LatentTransformer(config, 5, 0, ExpertParallel(), activation_checkpointing=on).double()
        torch.nn.init.normal_(model.head.routed_EIO, std=0.1, generator=torch.Generator().manual_seed(2))
        model(*_inputs(), context).latent_BCxyz.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
