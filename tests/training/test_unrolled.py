"""Unrolled training, strides, noise and scaled histories do not depend on how samples are distributed over ranks.

Two gloo processes, and one with the same global batch, in float64: every expert-parallel size, exchange and ZeRO stage
gives the same losses, gradient norms and weights.
"""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shodh_moe.base.network import free_port
from tests.forked import spawn
from tests.training.synthetic import write_case

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

STEPS, RATE = 3, 1e-2
SETTINGS = (
    "training.precision=float64",
    "training.loss=domain",
    "training.unroll=2",
    "training.history_noise=0.1",
    "model.strides=[1,2]",  # with history and unroll 2, the larger one just fits into the seven snapshots
    "model.scale_history=true",
    "model.moe.dropless=true",
    "model.moe.router.balance=global",  # the other kind of balance depends on the micro-batch
)
PATH = ("model.moe.scope=path", "model.moe.attention=own", "model.moe.num_experts=4")
CASES = {
    "push-forward": (*PATH, "training.unroll_gradient=last"),
    "through time": (*PATH, "training.unroll_gradient=through"),
    "paths of tokens": (*PATH, "training.unroll_gradient=through", "model.moe.router.context=token"),
    "router in each layer": ("training.unroll_gradient=through", "model.moe.num_experts=4"),
}
LAYOUTS = [(zero, ep, "token") for zero, ep in itertools.product((0, 1, 2), (1, 2))]
SAMPLES = [(zero, 2, "sample") for zero in (0, 1, 2)]


def layouts(case: str) -> list[tuple[int, int, str]]:
    """ZeRO stage, expert-parallel size and exchange. Only one path per sample lets samples travel."""
    return LAYOUTS + (SAMPLES if case in ("push-forward", "through time") else [])


def _train(folder: Path, rank: int, world: int, *settings: str) -> dict[str, torch.Tensor]:
    from shodh_moe.config.load import load_config
    from shodh_moe.data.sampler import DomainSampler
    from shodh_moe.tokenizer.latents import load_latents, samples_of
    from shodh_moe.training.draws import draw_noise, draw_strides
    from shodh_moe.training.forward import forward
    from shodh_moe.training.pretrain import latent_engine

    config = load_config(folder / "config.yaml", [*SETTINGS, *settings, f"training.batch_size={8 // world}"])
    t = config.training
    samples = samples_of(config, load_latents(folder / "latents", "train"), "train")
    sampler = DomainSampler(samples.sizes, t.batch_size, 0, world)
    engine = latent_engine(config, 6, samples)
    losses, norms, strides = [], [], []
    for step in range(STEPS):
        picks = sampler.batch(step, rank)
        batch = samples.batch(picks, draw_strides(samples, picks, config.seed, step))
        noise = draw_noise(samples, picks, config.seed, step)
        strides += batch.stride_B.tolist()
        found, _, exchange = forward(
            engine, batch.to("cpu", engine.dtype), config, samples.change_scale(), noise.to(engine.dtype)
        )
        assert (exchange is not None) == (config.parallel.exchange == "sample")
        result = engine.step(found.loss, RATE)
        assert result is not None
        assert result.applied
        mean = found.loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean / world)
        norms.append(torch.tensor([result.norm, result.shared_norm, *result.expert_norms_LE.flatten()]))
    shapes = {name: shape for name, shape in engine.shapes().items() if name.startswith("model/")}
    weights = {name: torch.zeros(math.prod(shape), dtype=engine.dtype) for name, shape in shapes.items()}
    for fragment in engine.fragments():
        if fragment.name in weights:
            weights[fragment.name][fragment.start :][: len(fragment.values)] = fragment.values
    for values in weights.values():
        dist.all_reduce(values)
    return {"losses": torch.stack(losses), "norms": torch.stack(norms), "strides": torch.tensor(strides), **weights}


def _worker(rank: int, folder: Path, port: int, world: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), DS_ACCELERATOR="cpu", DEEPSPEED_LOG_LEVEL="error")
    torch.set_num_threads(1)
    from shodh_moe.training.process_group import init_distributed

    init_distributed()
    results = {}
    for case, settings in CASES.items():
        for zero, ep, exchange in layouts(case) if world > 1 else [(0, 1, "token")]:
            layout = (f"parallel.zero_stage={zero}", f"parallel.ep_size={ep}", f"parallel.exchange={exchange}")
            results[case, zero, ep, exchange] = _train(folder, rank, world, *settings, *layout)
    if rank == 0:
        torch.save(results, folder / f"world{world}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    folder = write_case(tmp_path_factory.mktemp("unrolled"))
    for world in (1, 2):
        spawn(_worker, (folder, free_port(), world), world)
    return {world: torch.load(folder / f"world{world}.pt", weights_only=True) for world in (1, 2)}


@pytest.mark.parametrize(("case", "layout"), [(case, layout) for case in CASES for layout in layouts(case)])
def test_every_layout_trains_like_one_rank(results: dict[int, dict], case: str, layout: tuple[int, int, str]) -> None:
    one, other = results[1][case, 0, 1, "token"], results[2][(case, *layout)]
    for name in one.keys() - {"strides"}:
        torch.testing.assert_close(other[name], one[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_the_cases_are_what_they_claim(results: dict[int, dict]) -> None:
    """Both strides occur, the embedding of each learns, and the two gradients are not the same."""
    one = results[1]["push-forward", 0, 1, "token"]
    assert set(one["strides"].tolist()) == {1, 2}
    assert (one["model/stride.weight_SD"].view(2, -1).abs().amax(1) > 1e-3).all()
    through = results[1]["through time", 0, 1, "token"]
    assert torch.equal(one["losses"][0], through["losses"][0])
    assert not torch.isclose(one["norms"][0, 0], through["norms"][0, 0], rtol=1e-3)
