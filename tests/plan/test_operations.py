"""The counted work of a network against what torch dispatches when it runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from shodh_moe.config import Config
from shodh_moe.model import LatentTransformer
from shodh_moe.parallel import ExpertParallel
from shodh_moe.plan.operations import Cost, Operation, work_of
from shodh_moe.runs.plan import count_parameters
from shodh_moe.tokenizer.latents import Batch
from shodh_moe.training.losses import error_norms, total_loss

VIEWS = ("view", "transpose", "permute", "squeeze", "expand", "detach", "aten.t.", "split", "slice", "select", "alias")
VIEWS += ("unbind", "empty")
SAMPLES, GRID, CHANNELS = 8, 4, 16


class Dispatched(TorchDispatchMode):
    """Counts operations that are not views, and bytes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(view in str(func) for view in VIEWS):
            self.calls += 1
            self.bytes += sum(x.nbytes for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor))
        return result


def config_of(depth: int, moe: dict[str, Any], **training: Any) -> Config:
    return Config.model_validate(
        {
            "data": {"grid": [8 * GRID] * 3},
            "tokenizer": {"latent_channels": CHANNELS},
            "model": {"dim": 128, "depth": depth, "heads": 4, "moe": {"num_experts": 4, "expert_hidden": 256, **moe}},
            "training": {"batch_size": SAMPLES, "loss": "mse", **training},
        }
    )


def no_in_place_flops(*args: Any, **kwargs: Any) -> int:
    """FLOPs of ``addmm_``, which torch's counter does not know: those of its product."""
    _, a, b = args[:3]
    return 2 * a[0] * a[1] * b[1]


def counted(depth: int, moe: dict[str, Any]) -> list[tuple[int, Dispatched]]:
    """FLOPs (without attention's) and operations of the forward and of the backward pass on a CPU."""
    config = config_of(depth, moe)
    model = LatentTransformer(config.model, CHANNELS, 0, ExpertParallel()).train()
    shape = [CHANNELS] + [GRID] * 3
    label_B = torch.arange(SAMPLES) % 2
    latents = torch.randn(SAMPLES, 4, *shape)
    boundary = torch.zeros(SAMPLES, 3, 2).long()
    batch = Batch(latents[:, :2], latents[:, 2], latents[:, 3:], label_B, torch.ones_like(label_B), boundary)
    norms = error_norms("mse", batch, None)
    mapping = {torch.ops.aten.addmm_: no_in_place_flops}
    with Dispatched() as forward, FlopCounterMode(display=False, custom_mapping=mapping) as first:
        loss = total_loss([model(*batch.inputs)], batch, config, norms).loss
    with Dispatched() as backward, FlopCounterMode(display=False, custom_mapping=mapping) as second:
        loss.backward()
    return [(first.get_total_flops(), forward), (second.get_total_flops(), backward)]


MOE = {
    "own attention": {"attention": "own"},
    "low rank": {"attention": "low_rank"},
    "shared expert": {"attention": "shared", "shared_experts": 1},
    "layer": {"scope": "layer"},
    "no shared matrices": {"attention": "own", "shared_linear": False},
    "dense": {"num_experts": 0, "shared_experts": 1},
    "two of four": {"attention": "shared", "top_k": 2},
}


@pytest.mark.parametrize("moe", MOE.values(), ids=MOE)
def test_counts_are_those_of_a_real_pass(moe):
    shallow, deep = counted(1, moe), counted(3, moe)
    work = work_of(config_of(1, moe), 1, 1, fused=False)
    blocks = summed(work.block)
    ends = summed(work.ends)
    attention = [sum(cost.flops for cost in costs) for costs in zip(*both(work.block, "attention"), strict=True)]
    for side, (block, end) in enumerate(zip(blocks, ends, strict=True)):
        (few, small), (many, large) = shallow[side], deep[side]
        # torch's counter does not know fused attention on a CPU, nor the kernel that computes a router's scores.
        assert block.flops - attention[side] == pytest.approx((many - few) / 2, rel=0.02 if "scope" in moe else 1e-3)
        assert end.flops == pytest.approx(few - (many - few) / 2, rel=0.02, abs=1e5)
        assert block.bytes == pytest.approx((large.bytes - small.bytes) / 2, rel=0.2)
        assert block.calls == pytest.approx((large.calls - small.calls) / 2, rel=0.2)
        assert end.calls == pytest.approx(small.calls - (large.calls - small.calls) / 2, rel=0.25)


def both(operations: list[Operation], kind: str) -> list[tuple[Cost, Cost]]:
    return [(one.forward, one.backward) for one in operations if one.kind == kind] or [(Cost(), Cost())]


def summed(operations: list[Operation]) -> list[Cost]:
    totals = [Counter(), Counter()]
    for one in operations:
        for total, cost in zip(totals, (one.forward, one.backward), strict=True):
            total.update(cost._asdict())
    return [Cost(**total) for total in totals]


def test_attention_by_hand():
    """8 samples of 64 tokens, width 128: two products of 64 x 64 x 128 in each; twice that in the backward pass."""
    (cost,) = [one for one in work_of(config_of(1, {}), 1, 1, False).block if one.kind == "attention"]
    assert cost.forward.flops == 2 * 8 * 2 * 64 * 64 * 128
    assert cost.backward.flops == 2 * cost.forward.flops


def test_an_update_by_hand():
    """Without ZeRO 16 numbers per parameter; with ZeRO on two ranks 4, and 14 for each of a half."""
    config = config_of(2, {})
    count = count_parameters(config, 2).total
    for stage, numbers in ((0, 16), (1, 4 + 14 / 2)):
        parallel = config.parallel.model_copy(update={"zero_stage": stage, "ep_size": 1})
        work = work_of(config.model_copy(update={"parallel": parallel}), 1, 2, False)
        assert work.update == pytest.approx(4 * numbers * count, rel=1e-4)


def test_ranks_that_share_experts_hold_fewer_tensors_elements_and_the_same_flops():
    alone, shared = (work_of(config_of(2, {}), ep, 4, True) for ep in (1, 4))
    assert summed(alone.block)[0].flops == summed(shared.block)[0].flops
    assert shared.update < alone.update


def test_bfloat16_needs_fewer_bytes_and_more_operations():
    wide, narrow = (work_of(config_of(2, {}, precision=p), 1, 1, True) for p in ("float32", "bfloat16"))
    assert summed(narrow.block)[0].flops == summed(wide.block)[0].flops
    products = [sum(c.bytes for c, _ in both(work.block, "product")) for work in (wide, narrow)]
    assert products[1] == products[0] / 2
