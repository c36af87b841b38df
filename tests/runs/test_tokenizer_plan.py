"""Compare the tokenizer's plan with the tensors that autograd and the solver keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.config import Config
from shodh_moe.runs import tokenizer_plan
from shodh_moe.runs.live_bytes import LiveBytes
from shodh_moe.tokenizer import walls
from shodh_moe.tokenizer.reconstruction import Reconstruction
from shodh_moe.tokenizer.tokenizer import Tokenizer

DECODERS = {
    "spectral": {"operator": "spectral", "walls": "none"},
    "ramp": {"operator": "central2", "walls": "ramp"},
    "exact": {"operator": "staggered", "walls": "exact"},
    "seamless": {"operator": "staggered", "patches": "overlapping", "refine": 8, "scales": "sample"},
    "direct": {"operator": "staggered", "decoder": "direct", "walls": "none"},
}


def _config(grid: list[int], **tokenizer: Any) -> Config:
    small = {"widths": [8, 12, 16], "latent_channels": 16, "batch_size": 2}
    return Config.model_validate({"data": {"grid": grid}, "tokenizer": {**small, **tokenizer}})


def _fields(config: Config) -> torch.Tensor:
    fields = torch.randn(config.tokenizer.batch_size, 5, *config.data.grid)
    fields[:, 4] = 0
    fields[:, 4, 4:12, 6:10] = 1
    return fields


@pytest.mark.parametrize(
    ("decoder", "precision", "checkpointing"),
    [
        ("spectral", "float32", False),
        ("ramp", "bfloat16", False),
        ("direct", "bfloat16", True),
        ("exact", "float32", True),
        ("seamless", "float32", False),
        ("seamless", "bfloat16", True),
    ],
)
def test_a_step_uses_the_planned_memory(decoder: str, precision: str, checkpointing: bool) -> None:
    config = _config([24, 16, 40], precision=precision, **DECODERS[decoder])
    plan = tokenizer_plan.activation_bytes(config, 2, checkpointing)
    tokenizer = Tokenizer(config.tokenizer, config.data.grid)
    tokenizer.encoder.checkpointing = tokenizer.decoder.checkpointing = checkpointing
    with LiveBytes([*tokenizer.parameters(), *tokenizer.buffers()]) as live:
        fields = _fields(config)
        before = live.peak
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = Reconstruction(tokenizer)(fields).mean()
        kept = live.now
        loss.backward()
    assert before < kept
    assert plan["activations"] == pytest.approx(kept, rel=0.03)
    assert plan["activations"] + plan["passes"] == pytest.approx(live.peak, rel=0.03)


def test_planned_activations_match_what_autograd_saves() -> None:
    """Count the storages that autograd packs, and the batch."""
    config = _config([24, 16, 40], **DECODERS["exact"])
    tokenizer = Tokenizer(config.tokenizer, config.data.grid)
    own = {p.untyped_storage().data_ptr() for p in (*tokenizer.parameters(), *tokenizer.buffers())}
    fields = _fields(config)
    saved = {fields.untyped_storage().data_ptr(): fields.untyped_storage()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        Reconstruction(tokenizer)(fields)
    plan = tokenizer_plan.activation_bytes(config, 2, False)
    assert plan["activations"] == pytest.approx(sum(storage.nbytes() for storage in saved.values()), rel=0.03)


def test_checkpointing_lowers_memory() -> None:
    config = _config([24, 16, 40], operator="staggered", walls="exact")
    plain, recomputed = (tokenizer_plan.memory(config, 1, on) for on in (False, True))
    assert recomputed["activations"] < 0.5 * plain["activations"]
    assert recomputed["sum"] < plain["sum"]
    assert {key: plain[key] for key in ("weights", "batch")} == {key: recomputed[key] for key in ("weights", "batch")}


@pytest.mark.parametrize("operator", ["staggered", "central2"])
def test_the_solver_keeps_no_more_fields_than_planned(operator: str) -> None:
    solid = torch.zeros(1, 1, 16, 16, 16)
    solid[..., 4:8, 4:9, 3:7] = 1
    w, mask = torch.randn(1, 3, 16, 16, 16), walls.may_flow(solid, operator)
    with LiveBytes([w, mask]) as live:
        walls._projected._init_fn(w, mask, operator)
    fields = live.peak / w[:, 0].nbytes
    assert 0.6 * tokenizer_plan.SOLVER_FIELDS < fields <= tokenizer_plan.SOLVER_FIELDS


def test_zero_divides_the_states_among_ranks() -> None:
    config = _config([16, 16, 16], batch_size=4)
    count = sum(parameter.numel() for parameter in Tokenizer(config.tokenizer, config.data.grid).parameters())
    whole = tokenizer_plan.memory(config, 4, False)
    states = {part: whole[part] for part in ("weights", "gradients", "optimizer", "reduction")}
    assert states == {"weights": 4 * count, "gradients": 4 * count, "optimizer": 8 * count, "reduction": 4 * count}
    zero = config.model_copy(update={"parallel": config.parallel.model_copy(update={"zero_stage": 2})})
    assert tokenizer_plan.memory(zero, 4, False)["optimizer"] == 12 * -(-count // 4)


def test_the_table_shows_ranks_latents_and_memory() -> None:
    text = tokenizer_plan.tokenizer_plan(_config([24, 16, 40], batch_size=6, activation_checkpointing=True), 2)
    for words in (
        "2, 3 samples each; ZeRO 0, float32",
        "3 x 2 x 5, 16 channels: 128 times",
        "the config has it on",
        "activations ",
    ):
        assert words in text


def test_ranks_that_cannot_share_the_batch_are_refused() -> None:
    with pytest.raises(UserError, match="batch_size 2 cannot be divided among 3 ranks"):
        tokenizer_plan.tokenizer_plan(_config([16, 16, 16]), 3)
