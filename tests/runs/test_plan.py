"""Compare the plan with the tensors that autograd keeps and a DeepSpeed engine allocates."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

from shodh_moe.base.errors import UserError
from shodh_moe.config import Config
from shodh_moe.config.finetune import FineTuningConfig
from shodh_moe.config.load import load_config
from shodh_moe.model import LatentTransformer
from shodh_moe.model.experts import Experts, to_autocast
from shodh_moe.model.learning import prepare_fine_tuning
from shodh_moe.model.positions import token_angles
from shodh_moe.parallel import ALONE, ContextParallel, ExpertParallel
from shodh_moe.runs import plan
from shodh_moe.runs.live_bytes import LiveBytes
from shodh_moe.tokenizer.latents import Batch
from shodh_moe.training.losses import error_norms, total_loss
from tests.tiny import LAYER
from tests.training.launch import launch

WORKER = Path(__file__).with_name("worker_plan.py")


def _config(
    dim: int,
    hidden: int,
    shared: int,
    depth: int,
    grid: int,
    channels: int,
    paths: dict[str, Any] | None = None,
    norms: str = "pre",
    **training: Any,
) -> Config:
    moe = {"num_experts": 4, "expert_hidden": hidden, **LAYER, "shared_experts": shared, **(paths or {})}
    return Config.model_validate(
        {
            "data": {"grid": [8 * grid] * 3},
            "tokenizer": {"latent_channels": channels},
            "model": {"dim": dim, "depth": depth, "heads": dim // 32, "norms": norms, "moe": moe},
            "training": {"batch_size": 2, "loss": "mse", **training},
        }
    )


class _FusedNorm(torch.autograd.Function):
    """Keeps the same tensors as torch's fused CUDA kernel; on a CPU torch also keeps the normalised rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return x * scale * weight

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.zeros_like(weight)


def _experts_on_a_gpu(self: Experts, x_LTD: Tensor, filled_LG: Tensor | None = None) -> Tensor:
    x_LTD, gate_up_LDF, down_LFD = to_autocast(x_LTD, self.gate_up_LDF, self.down_LFD)
    gate, up = torch.bmm(x_LTD, gate_up_LDF).chunk(2, dim=-1)
    return torch.bmm(F.silu(gate) * up, down_LFD)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Make the model keep the same tensors on the CPU as on a GPU (both use flash attention)."""
    monkeypatch.setenv("SHODH_KERNELS", "reference")
    monkeypatch.setattr(nn.RMSNorm, "forward", lambda self, x: _FusedNorm.apply(x, self.weight))
    monkeypatch.setattr(Experts, "forward", _experts_on_a_gpu)


SIZES = {
    "small": (64, 96, 1, 3, 8, 8),
    "wide experts": (128, 512, 2, 3, 8, 16),
    "no shared expert": (96, 192, 0, 2, 12, 8),
    "many channels": (128, 256, 1, 2, 8, 128),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_planned_activations_match_what_autograd_keeps(as_on_a_gpu, size, precision, checkpointing):
    _check_activations(_config(*size, precision=precision, activation_checkpointing=checkpointing))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_planned_activations_include_norms_after_the_branches(as_on_a_gpu, precision):
    _check_activations(_config(96, 192, 1, 2, 8, 16, norms="sandwich", precision=precision))


PATHS = {
    "one path": {},
    "a path for each token": {"router": {"context": "both"}},
    "low-rank attention": {"attention": "low_rank"},
    "own attention": {"attention": "own", "router": {"context": "window"}},
}


@pytest.mark.parametrize("paths", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_planned_activations_of_paths_match_what_autograd_keeps(as_on_a_gpu, paths, precision):
    _check_activations(_config(96, 192, 1, 2, 8, 64, {"scope": "path", **paths}, precision=precision))


@pytest.mark.parametrize("moe", [{}, {"scope": "path", "attention": "own"}], ids=["layer", "path"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_planned_activations_of_low_rank_additions_match_what_autograd_keeps(as_on_a_gpu, moe, precision):
    config = _config(96, 192, 1, 2, 8, 64, moe, precision=precision)
    _check_activations(config.model_copy(update={"finetune": FineTuningConfig(train="lora")}))


@pytest.fixture
def cp():
    """One of two ranks that share samples; the other does not exist, so what it gathers from there means nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield ContextParallel(2, 0, dist.group.WORLD)
    dist.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_planned_activations_of_slabs_match_what_autograd_keeps(as_on_a_gpu, cp, precision, checkpointing):
    config = _config(
        96, 192, 1, 3, 8, 64, {"scope": "path"}, precision=precision, activation_checkpointing=checkpointing
    )
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"context_size": 2})})
    _check_activations(config, cp)


def _check_activations(config: Config, cp: ContextParallel = ALONE) -> None:
    precision, checkpointing = config.training.precision, config.training.activation_checkpointing
    channels, grid, batch = config.tokenizer.latent_channels, plan.latent_grid(config), config.training.batch_size
    model = LatentTransformer(
        config.model, channels, 0, ExpertParallel(), activation_checkpointing=checkpointing, cp=cp
    )  # fmt: skip
    grid[0] //= cp.size
    if config.finetune:
        prepare_fine_tuning(model, config.finetune, ExpertParallel())
    # Positions are cached for all layers and steps, and small.
    token_angles((grid[0], grid[1], grid[2]), config.model.dim // config.model.heads, torch.device("cpu"), cp=cp)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        history = torch.randn(batch, config.model.history, channels, *grid)
        geometry, target = torch.randn(batch, channels, *grid), torch.randn(batch, channels, *grid)
        with torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else nullcontext():
            prediction = model(history, geometry)
        label_B, boundary_B32 = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, 3, 2).long()
        samples = Batch(history, geometry, target[:, None], label_B, label_B, boundary_B32)
        losses = total_loss([prediction], samples, config, error_norms("mse", samples, None), cp)
        kept = live.now
        losses.loss.backward()
    parts = plan.activation_bytes(config)
    assert kept == pytest.approx(parts["activations"], rel=0.01)
    gradients = 4 * sum(parameter.numel() for parameter in model.parameters())
    bound = parts["activations"] + parts["backward"] + gradients
    assert 0.75 * bound < live.peak <= bound


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_planned_parameters_match_the_model(ep):
    config = _config(64, 96, 1, 3, 4, 8)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"ep_size": ep})})
    count = plan.count_parameters(config, world=4)
    model = LatentTransformer(config.model, 8, 0, ExpertParallel(ep, 0))
    assert count.rank == sum(parameter.numel() for parameter in model.parameters())
    assert count.expert == 3 * 4 * 3 * 64 * 96  # layers, experts, matrices, their sizes
    assert count.active == count.total - count.expert * 3 // 4


def test_a_token_passes_through_top_k_experts():
    config = _config(64, 96, 1, 3, 4, 8, {"top_k": 3})
    count = plan.count_parameters(config, world=1)
    assert count.active == count.total - count.expert // 4
    dropless = _config(64, 96, 1, 3, 4, 8, {"top_k": 3, "dropless": True})
    assert plan.slots(dropless) == 3 * plan.batch_tokens(dropless)
    assert plan.slots(config) == pytest.approx(1.25 * plan.slots(dropless), rel=0.01)


@pytest.mark.parametrize("attention", ["shared", "low_rank", "own"])
def test_a_token_passes_through_the_parts_of_one_path(attention):
    config = _config(64, 96, 1, 3, 4, 8, {"scope": "path", "attention": attention})
    count = plan.count_parameters(config, world=1)
    model = LatentTransformer(config.model, 8, 0, ExpertParallel())
    names = [name for name, _ in model.named_parameters()]
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert count.total == sum(sizes)
    of_paths = [any(part in name for part in ("routed", "narrow", "widen", ".experts.")) for name in names]
    one_of_four = sum(size for size, own in zip(sizes, of_paths, strict=True) if own)
    assert count.active == count.total - one_of_four * 3 // 4


@pytest.mark.parametrize("context", ["sample", "window", "token", "both"])
def test_parameters_are_counted_with_every_context_of_the_router(context):
    config = _config(64, 96, 1, 1, 4, 8, {"scope": "path", "router": {"context": context, "window": 2}})
    model = LatentTransformer(config.model, 8, 0, ExpertParallel())
    assert plan.count_parameters(config, world=1).total == sum(one.numel() for one in model.parameters())


def test_a_layout_that_does_not_fit_is_refused():
    config = _config(64, 96, 1, 1, 4, 8)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"ep_size": 4})})
    with pytest.raises(UserError, match="ep_size 4 does not divide the world size 6"):
        plan.plan(config, 6)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"context_size": 3})})
    with pytest.raises(UserError, match=r"context_size 3 does not divide the 4 tokens .* set it to 2"):
        plan.plan(config, 12)


def test_planned_disk_space_matches_the_files():
    """Expected by hand: two domains of 16 + 4 + 4 trajectories, 24 snapshots, four latent copies in training."""
    config = Config.model_validate({"data": {"grid": [16, 16, 16]}, "tokenizer": {"latent_channels": 8}})
    assert plan.snapshots(config) == 48 * 24
    assert plan.dataset_bytes(config) == 48 * (24 * 4 + 1) * 16**3 * 4
    assert plan.latent_bytes(config) == 2 * (4 * 16 + 4 + 4) * (24 + 1) * 8 * 2**3 * 4
    assert plan.training_samples(config) == 2 * 16 * 4 * (24 - 2)
    assert plan.checkpoint_bytes(config, 1) == 12 * plan.count_parameters(config, 1).total


def test_the_table_shows_layout_tokens_and_epochs():
    text = plan.plan(_config(64, 96, 1, 3, 4, 8, steps=20, batch_size=4, accumulation=2), 2)
    tokens = "64 per sample, 256 per micro-batch, 1,024 per step"
    for words in ("2: EP 2, EDP 1, ZeRO 0, float32", tokens, "20 with 16 samples each"):
        assert words in text


def test_the_table_shows_slabs():
    config = _config(64, 96, 1, 3, 4, 8, batch_size=4, accumulation=2)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"context_size": 2})})
    text = plan.plan(config, 8)
    tokens = "64 per sample, 128 per micro-batch, 2,048 per step"
    for words in ("8: EP 4, EDP 1, CP 2, ZeRO 0", tokens, "with 32 samples each"):
        assert words in text


LAYOUTS = {
    "ZeRO 0": "parallel.zero_stage=0",
    "ZeRO 0, EP 1": "parallel.ep_size=1",
    "ZeRO 1": "parallel.zero_stage=1 training.precision=bfloat16 training.accumulation=2",
    "ZeRO 2": "parallel.zero_stage=2 training.activation_checkpointing=true",
    "low-rank additions": "finetune.train=lora",
    "samples": "model.moe.scope=path model.moe.router.kind=oracle",
}


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> Path:
    """A folder with config.yaml and the counts of `LAYOUTS`, from two ranks, two experts and few tokens."""
    folder = tmp_path_factory.mktemp("plan")
    config = _config(256, 512, 1, 2, 2, 8).model_dump()
    config["model"]["moe"]["num_experts"] = 2
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    done = launch(2, WORKER, str(folder / "config.yaml"), *LAYOUTS.values())
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_planned_states_match_what_an_engine_allocates(counted, layout):
    config = load_config(counted / "config.yaml", LAYOUTS[layout].split())
    count = json.loads((counted / "counts.json").read_text())[list(LAYOUTS).index(layout)]
    sizes = plan.memory(config, 2)
    assert count["between"] == pytest.approx(sizes["weights"] + sizes["optimizer"], rel=0.03)
    assert 0.75 * sizes["sum"] < count["peak"] <= 1.02 * sizes["sum"]
