"""An exchange of samples trains exactly like one of tokens: four gloo processes, float64.

tests/training/test_layouts.py compares 20 steps at every layout; here are the settings in which samples are harder to
move: uneven shares, ranks without samples, dropped tokens, losses that depend on the whole micro-batch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shodh_moe.base.network import free_port
from tests.forked import spawn
from tests.training.synthetic import write_case

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

WORLD, STEPS = 4, 2
SETTINGS = (
    "training.precision=float64",
    "model.moe.scope=path",
    "model.moe.num_experts=8",
    "model.moe.router.balance_weight=0.5",
    "model.moe.router.z_weight=0.1",
)
DROPLESS, ROOM = "model.moe.dropless=true", "parallel.exchange_capacity=4.0"
DROPPING = ("model.moe.capacity_factor=0.7", "model.moe.min_capacity=1")
# Both domains' experts are on the first rank of a group of four.
ORACLE = ("model.moe.router.kind=oracle", DROPLESS)
CASES: dict[str, tuple[str, ...]] = {
    "room for all": (DROPLESS, ROOM, "training.loss=sample", "training.accumulation=2"),
    "no room": (DROPLESS, "parallel.exchange_capacity=1.0", "parallel.zero_stage=1"),
    "pairs of ranks": (
        DROPLESS,
        "parallel.exchange_capacity=1.0",
        "parallel.ep_size=2",
        "parallel.zero_stage=2",
        "model.moe.attention=own",
        "training.loss=domain",
    ),
    "one rank computes all": (*ORACLE, ROOM, "parallel.zero_stage=2", "training.loss=relative"),
    "one rank holds all": (*ORACLE, "parallel.exchange_capacity=1.0", "training.activation_checkpointing=true"),
    "dropped tokens": (*DROPPING, ROOM, "model.moe.attention=own"),
    "dropped tokens, no room": (
        *DROPPING,
        "model.moe.drop_order=probability",
        "parallel.exchange_capacity=1.0",
        "parallel.zero_stage=1",
    ),
    "unrolled through time": (
        DROPLESS,
        ROOM,
        "training.unroll=2",
        "training.unroll_gradient=through",
        "training.loss=sample",
        "model.strides=[1,2]",
        "model.scale_history=true",
    ),
    "unrolled, dropped tokens, no room": (
        *DROPPING,
        "parallel.exchange_capacity=1.0",
        "parallel.zero_stage=2",
        "training.unroll=3",
        "training.loss=relative",
    ),
    "linear router": (DROPLESS, "model.moe.router.kind=linear", "training.batch_size=2"),
}


def _train(folder: Path, rank: int, *settings: str) -> dict[str, Any]:
    from shodh_moe.config.load import load_config
    from shodh_moe.data.sampler import DomainSampler
    from shodh_moe.tokenizer.latents import load_latents, samples_of
    from shodh_moe.training.draws import draw_strides
    from shodh_moe.training.forward import forward
    from shodh_moe.training.pretrain import latent_engine

    config = load_config(folder / "config.yaml", [*SETTINGS, *settings])
    t = config.training
    samples = samples_of(config, load_latents(folder / "latents", "train"), "train")
    sampler = DomainSampler(samples.sizes, t.batch_size, 0, WORLD)
    engine = latent_engine(config, 6, [2, 2, 2], samples)
    scale_D = samples.change_scale()
    found: dict[str, Any] = {
        key: [] for key in ("losses", "error_B", "norms", "experts", "kept", "computed", "strangers")
    }
    for micro in range(STEPS * t.accumulation):
        picks = sampler.batch(micro, rank)
        batch = samples.batch(picks, draw_strides(samples, picks, 0, micro)).to("cpu", engine.dtype)
        engine.ep.exchanges = []
        losses, routing, exchange = forward(engine, batch, config, scale_D)
        found["losses"].append(torch.stack(losses[:5]).detach())
        found["error_B"].append(losses.error_B)
        found["experts"].append(torch.stack([layer.expert_N for layer in routing]))
        found["kept"].append(routing[0].kept_N)
        if exchange is not None:
            found["computed"].append(exchange.computed_G)
            found["strangers"].append(exchange.strangers)
        step = engine.step(losses.loss, 1e-2)
        found["exchanges"] = [(e.direction, e.sent_bytes) for e in engine.ep.exchanges]
        if step is not None:
            assert step.applied
            found["norms"].append(torch.tensor([step.norm, step.shared_norm, *step.expert_norms_LE.flatten()]))
    weights = {f"{f.name} {f.start}": f.values.clone() for f in engine.fragments() if f.name.startswith("model/")}
    stacked = {key: torch.stack(found[key]) for key in ("losses", "error_B", "norms", "experts")}
    return found | stacked | {"weights": weights}


def _worker(rank: int, folder: Path, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), DS_ACCELERATOR="cpu", DEEPSPEED_LOG_LEVEL="error")
    torch.set_num_threads(1)
    from shodh_moe.training.process_group import init_distributed

    init_distributed()
    results = {
        (case, kind): _train(folder, rank, *settings, f"parallel.exchange={kind}")
        for case, settings in CASES.items()
        for kind in ("token", "sample")
    }
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = write_case(tmp_path_factory.mktemp("sample_exchange"))
    spawn(_worker, (folder, free_port()), WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_it_trains_like_an_exchange_of_tokens(ranks, case):
    for rank in ranks:
        token, sample = rank[case, "token"], rank[case, "sample"]
        assert torch.equal(sample["experts"], token["experts"])
        assert all(map(torch.equal, sample["kept"], token["kept"]))
        for key in ("losses", "error_B", "norms"):
            torch.testing.assert_close(sample[key], token[key], rtol=1e-9, atol=1e-14, msg=lambda m, k=key: f"{k}: {m}")
        assert sample["weights"].keys() == token["weights"].keys()
        for name, value in token["weights"].items():
            torch.testing.assert_close(
                sample["weights"][name], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_the_cases_are_what_they_claim(ranks):
    found = {case: [rank[case, "sample"] for rank in ranks] for case in CASES}

    def strangers(case: str) -> set[int]:
        return {count for rank in found[case] for count in rank["strangers"]}

    assert strangers("room for all") == strangers("one rank computes all") == strangers("dropped tokens") == {0}
    for case in ("no room", "pairs of ranks", "dropped tokens, no room"):
        assert max(strangers(case)) > 0
    assert not all(kept.all() for rank in ranks for kept in rank["dropped tokens", "token"]["kept"])
    assert strangers("one rank holds all") == {12}
    assert found["one rank computes all"][3]["computed"] == [[16, 0, 0, 0]] * STEPS
    assert found["one rank holds all"][3]["computed"] == [[4, 4, 4, 4]] * STEPS
    assert len({expert for rank in found["room for all"] for expert in rank["experts"].flatten().tolist()}) > 4


def test_only_inputs_travel_if_there_is_room(ranks):
    """History, geometry and target of 8 cells and 6 channels in float64; expert, domain, stride, norm and weight."""
    row = 8 * (4 * 6 * 8 + 5)
    for rank in ranks:
        kinds, sent = zip(*rank["room for all", "sample"]["exchanges"], strict=True)
        assert kinds == ("samples",) * 3  # counts, samples, errors
        assert sent[0] == 3 * 4 * 8
        assert sent[1] % row == 0
        assert sent[1] <= 4 * row
        directions = [kind for kind, _ in rank["no room", "sample"]["exchanges"]]
        assert {"samples", "dispatch", "combine"} == set(directions)
