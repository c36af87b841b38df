"""The losses of pretraining against their formulas."""

from __future__ import annotations

from pathlib import Path

import h5py
import pytest
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.config import Config
from shodh_moe.model import Prediction, Routing
from shodh_moe.tokenizer.latents import Batch, LatentSamples, load_latents
from shodh_moe.training.losses import error_norms, total_loss
from tests.training.synthetic import write_latents


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    history, target = (
        torch.randn(4, 2, 3, 2, 2, 2, generator=generator),
        torch.randn(4, 3, 2, 2, 2, generator=generator),
    )
    domain_B = torch.tensor([0, 0, 1, 1])
    return Batch(history, torch.zeros_like(target), target[:, None], domain_B, torch.ones_like(domain_B))


def _config(loss: str, **router: float) -> Config:
    return Config.model_validate({"training": {"loss": loss}, "model": {"moe": {"router": router}}})


def _prediction(batch: Batch) -> Prediction:
    return Prediction((batch.target_BCxyz + torch.tensor([1.0, 2, 3, 4])[:, None, None, None, None]), [])


def test_each_loss_follows_its_formula():
    batch, scale_D = _batch(), torch.tensor([0.5, 1.5], dtype=torch.float64)
    change_B = (batch.history_BHCxyz[:, -1] - batch.target_BCxyz).square().mean(dim=(1, 2, 3, 4))
    size_B = batch.target_BCxyz.square().mean(dim=(1, 2, 3, 4))
    error_B = torch.tensor([1.0, 4, 9, 16])
    expected = {
        "mse": error_B.mean(),
        "domain": (1 + 4) / 0.5 / 4 + (9 + 16) / 1.5 / 4,
        "sample": (error_B / change_B).mean(),
        "relative": (error_B / size_B).sqrt().mean(),
    }
    for kind, value in expected.items():
        losses = total_loss([_prediction(batch)], batch, _config(kind), error_norms(kind, batch, scale_D))
        torch.testing.assert_close(losses.loss, torch.as_tensor(value, dtype=torch.float32), msg=kind)
        torch.testing.assert_close(losses.error_B, error_B)


def test_a_sample_that_hardly_changes_does_not_dominate():
    batch = _batch()
    batch.history_BHCxyz[0, -1] = batch.target_BCxyz[0]
    losses = total_loss([_prediction(batch)], batch, _config("sample"), error_norms("sample", batch, None))
    assert losses.loss < 100


def test_the_routers_losses_are_shares_of_the_prediction_loss():
    batch = _batch()
    balance, z, commitment = (torch.tensor(value, requires_grad=True) for value in (1.5, 20.0, 0.5))
    routing = [Routing(one, z, commitment, *[torch.zeros(1)] * 8) for one in (balance, balance + 1)]
    for scale in (1.0, 1e-3):
        latent = batch.target_BCxyz + scale
        config = _config("mse", balance_weight=0.1, z_weight=0.01, commitment_weight=0.2)
        made = Prediction(latent.requires_grad_(), routing)
        losses = total_loss([made], batch, config, error_norms("mse", batch, None))
        assert losses.loss.item() == pytest.approx(scale**2 * (1 + 0.1 * 2.0 + 0.01 * 20 + 0.2 * 0.5), rel=1e-4)
        gradients = torch.autograd.grad(losses.loss, [latent, balance, z, commitment])
        torch.testing.assert_close(gradients[0], 2 * (latent - batch.target_BCxyz) / latent.numel())
        assert float(gradients[1]) == pytest.approx(0.1 * scale**2, rel=1e-4)
        assert float(gradients[2]) == pytest.approx(0.01 * scale**2, rel=1e-4)
        assert float(gradients[3]) == pytest.approx(0.2 * scale**2, rel=1e-4)


def _samples(folder: Path) -> LatentSamples:
    return LatentSamples(load_latents(folder, "train"), 2)


def test_the_scale_of_a_domain_is_its_mean_squared_change(tmp_path):
    for name in ("old", "new"):
        write_latents(tmp_path / name)
    samples = _samples(tmp_path / "old")
    changes = [
        torch.stack([t.read().diff(dim=0).square().mean() for t in samples.trajectories if t.domain == domain]).mean()
        for domain in samples.domains
    ]
    change_D = torch.stack(changes).double()
    torch.testing.assert_close(samples.change_scale(), change_D / change_D.mean())
    assert samples.change_scale()[0] < samples.change_scale()[1]
    # A cache of this version stores the changes.
    with h5py.File(tmp_path / "new" / "train.hdf5", "a") as file:
        for name in file:
            file[name].attrs["mean_squared_change"] = 3.0 if name.startswith("open") else 1.0
    torch.testing.assert_close(_samples(tmp_path / "new").change_scale(), torch.tensor([1.5, 0.5], dtype=torch.float64))


def test_a_domain_that_never_changes_is_refused(tmp_path):
    write_latents(tmp_path)
    with h5py.File(tmp_path / "train.hdf5", "a") as file:
        for name in file:
            if name.startswith("porous"):
                file[name]["z"][:] = file[name]["z"][:1]
    with pytest.raises(UserError, match=r"latents of porous_media never change: set training\.loss to mse"):
        _samples(tmp_path).change_scale()
