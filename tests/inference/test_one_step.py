"""One-step predictions of a trajectory equal those of its windows bit for bit, in batches of any size."""

from __future__ import annotations

import h5py
import pytest
import torch

from shodh_moe.config import ModelConfig, MoEConfig, RouterConfig
from shodh_moe.inference.one_step import predict_trajectory, predict_windows
from shodh_moe.metrics.latents import mse_beside_persistence
from shodh_moe.model import Context, LatentTransformer
from shodh_moe.parallel import ExpertParallel
from shodh_moe.tokenizer.latents import LatentSamples, LatentTrajectory
from tests.tiny import LAYER

SHAPE = (5, 4, 4, 2)


@pytest.fixture
def samples() -> LatentSamples:
    g = torch.Generator().manual_seed(1)
    file = h5py.File("one step", "w", driver="core", backing_store=False)
    trajectories = []
    for number, domain in enumerate(("a", "b", "b")):
        z = file.create_dataset(f"{number}/z", data=torch.randn(7 + number, *SHAPE, generator=g).numpy())
        geometry = torch.randn(SHAPE, generator=g)
        trajectories.append(LatentTrajectory(domain, "s", number, z, geometry, geometry[0]))
    return LatentSamples(trajectories, 2)


def _transformer(kind: str) -> LatentTransformer:
    moe = MoEConfig(**LAYER, num_experts=2, expert_hidden=16, router=RouterConfig(kind=kind))
    config = ModelConfig(dim=24, depth=2, heads=2, moe=moe)
    transformer = LatentTransformer(config, SHAPE[0], list(SHAPE[1:]), 0, ExpertParallel())
    torch.nn.init.normal_(transformer.head.weight, std=0.1)
    return transformer.eval()


@pytest.mark.parametrize("kind", ["cosine", "oracle"])
def test_a_trajectory_is_predicted_from_its_true_latents(samples: LatentSamples, kind: str) -> None:
    transformer, trajectory = _transformer(kind), samples.trajectories[2]
    latents, experts = predict_trajectory(transformer, samples, trajectory, 3)
    z_TCxyz, expected = trajectory.read(), []
    with torch.no_grad():
        for starts in ((0, 1, 2), (3, 4, 5), (6,)):
            windows = torch.stack([z_TCxyz[start : start + 2] for start in starts])
            geometry = trajectory.geometry_Cxyz.expand(len(starts), *SHAPE)
            expected.append(transformer(windows, geometry, Context(len(starts), torch.ones(len(starts)).long())))
    assert torch.equal(latents, torch.cat([out.latent_BCxyz for out in expected]))
    for layer, chosen in enumerate(experts):
        assert torch.equal(chosen.flatten(), torch.cat([out.routing[layer].expert_N for out in expected]))
    assert samples.context("b").domain_B.tolist() == [1]


def test_errors_are_compared_with_persistence(samples: LatentSamples) -> None:
    (found,) = predict_windows(_transformer("cosine"), samples, [(0, 1), (1, 8)], 4)
    history, target = found.batch.history_BHCxyz, found.batch.target_BCxyz
    errors_B2 = mse_beside_persistence(found.latent_BCxyz, history, target)
    assert found.batch.domain_B.tolist() == [0, 1]
    for n in range(2):
        assert errors_B2[n, 0] == pytest.approx(float((found.latent_BCxyz[n] - target[n]).square().mean()))
        assert errors_B2[n, 1] == pytest.approx(float((history[n, -1] - target[n]).square().mean()))


def test_training_mode_is_refused(samples: LatentSamples) -> None:
    with pytest.raises(ValueError, match="training mode"):
        next(predict_windows(_transformer("cosine").train(), samples, [(0, 0)], 1))
