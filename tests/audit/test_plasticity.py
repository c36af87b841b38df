from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from shodh_moe.audit.plasticity import dormant_units, effective_rank, plasticity
from shodh_moe.model import LatentTransformer
from shodh_moe.parallel import ExpertParallel
from shodh_moe.tokenizer.latents import LatentSamples, load_latents
from tests import tiny
from tests.tiny import LAYER
from tests.training.synthetic import write_latents

HIDDEN = 8


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> LatentSamples:
    folder: Path = tmp_path_factory.mktemp("latents")
    write_latents(folder)
    return LatentSamples(load_latents(folder, "valid"), 2)


def _transformer(**moe: Any) -> LatentTransformer:
    model = {
        "dim": 8,
        "depth": 2,
        "heads": 1,
        "patch": 1,
        "norms": "pre",
        "moe": LAYER | {"expert_hidden": HIDDEN, **moe},
    }
    return LatentTransformer(tiny.config(model=model).model, 6, 0, ExpertParallel()).eval()


def test_dormant_units_by_hand() -> None:
    # The mean is 10, so the threshold is 0.25; a unit equal to it is dormant.
    assert dormant_units(torch.tensor([0.0, 0.25, 0.26, 39.49])).tolist() == [True, True, False, False]
    assert dormant_units(torch.tensor([1.0, 3.0]), tau=0.5).tolist() == [True, False]
    assert dormant_units(torch.zeros(3)).all()


def test_the_share_of_dead_units_is_reported(samples: LatentSamples) -> None:
    """Units are dead by their gate in one of two blocks, and by the weights of one of two experts in both."""
    transformer = _transformer()
    with torch.no_grad():
        transformer.blocks[0].moe.shared[0].gate_up.weight[:2] = 0  # the gates of 2 of 8 units
        for block in transformer.blocks:
            block.moe.experts.gate_up_LDF[1, :, HIDDEN : HIDDEN + 4] = 0  # up weights of 4 of 8 units
    found = plasticity(transformer, samples, 5, 3)
    assert found["dormant"]["shared"] == 2 / 16
    assert found["dormant"]["expert 1"] >= 0.5
    assert found["width"] == 8
    assert 1 <= found["effective_rank"] <= 8


def test_layers_do_not_mix_their_scales(samples: LatentSamples) -> None:
    """A block or network with only small activations is not dormant, since its own mean is small too."""
    transformer = _transformer(num_experts=0, shared_experts=2)
    with torch.no_grad():
        transformer.blocks[0].moe.shared[1].gate_up.weight *= 1e-3
    assert plasticity(transformer, samples, 5, 3)["dormant"] == {"shared": 0.0}


def test_an_expert_without_tokens_is_entirely_dormant(samples: LatentSamples) -> None:
    transformer = _transformer(num_experts=3, router={"kind": "oracle"}, shared_experts=0)
    assert plasticity(transformer, samples, 5, 3)["dormant"] == {"expert 0": 0.0, "expert 1": 0.0, "expert 2": 1.0}


def test_an_expert_is_judged_by_its_own_tokens(samples: LatentSamples) -> None:
    """Compare each expert with a model in which it is the shared expert and sees only its domain."""
    transformer = _transformer(router={"kind": "oracle"}, shared_experts=0)
    with torch.no_grad():
        transformer.blocks[0].moe.experts.gate_up_LDF[0] *= torch.logspace(-4, 1, 2 * HIDDEN)
    inputs: list[Tensor] = []
    first = transformer.blocks[0].moe
    with first.register_forward_pre_hook(lambda module, args: inputs.append(args[0])), torch.no_grad():
        transformer(*samples.batch([(0, n) for n in range(5)]).inputs)
    gate, up = (inputs[0] @ first.experts.gate_up_LDF[0].detach()).chunk(2, dim=1)
    mean_F = (F.silu(gate) * up).abs().mean(0)
    dormant = int((mean_F <= 0.025 * mean_F.mean()).sum())
    assert 0 < dormant < HIDDEN
    assert plasticity(transformer, samples, 5, 2)["dormant"]["expert 0"] == dormant / (2 * HIDDEN)


def test_batches_do_not_matter_and_hooks_are_removed(samples: LatentSamples) -> None:
    transformer = _transformer()
    found = plasticity(transformer, samples, 5, 10)
    assert plasticity(transformer, samples, 5, 3) == found | {
        "effective_rank": pytest.approx(found["effective_rank"], rel=1e-5)
    }
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in transformer.modules())
    with pytest.raises(ValueError, match="training mode"):
        plasticity(transformer.train(), samples, 5, 3)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in transformer.modules())


def test_effective_rank_of_the_features(samples: LatentSamples) -> None:
    """The effective rank comes from the singular values of the centred features, and is 0 if all tokens are equal."""
    transformer, seen = _transformer(), []
    with transformer.head.register_forward_pre_hook(lambda head, args: seen.append(args[0].flatten(0, 1))):
        found = plasticity(transformer, samples, 5, 3)["effective_rank"]
    x_TD = torch.cat(seen).double()
    s = torch.linalg.svdvals(x_TD - x_TD.mean(0))
    share = s / s.sum()
    assert found == pytest.approx(float((-(share * share.log()).sum()).exp()))
    with torch.no_grad():
        for parameter in (transformer.embed.weight, *(block.attention.out.weight for block in transformer.blocks)):
            parameter.zero_()
        transformer.embed.bias.fill_(1)
    assert plasticity(transformer, samples, 5, 3)["effective_rank"] == 0


@settings(max_examples=20, deadline=None)
@given(rank=st.integers(1, 6), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_effective_rank_of_equal_singular_values_is_their_number(rank: int, scale: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(n, rank, generator=random, dtype=torch.float64))[0] for n in (9, 6))
    x_TD = scale * u @ v.T
    assert effective_rank(x_TD.T @ x_TD) == pytest.approx(rank)


def test_effective_rank_golden() -> None:
    # Singular values 3 and 1: shares 3/4 and 1/4, so 4 / 3^(3/4).
    assert effective_rank(torch.diag(torch.tensor([9.0, 1.0, 0.0]))) == pytest.approx(4 / 3**0.75)
    assert effective_rank(torch.zeros(3, 3)) == 0
