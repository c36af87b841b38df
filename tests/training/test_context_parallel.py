"""Ranks that share samples train like ranks with whole samples, and resume from each other's checkpoints: float64.

The same global batches are trained by two ranks with whole samples, and by four that divide each sample into two slabs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shodh_moe.base.network import free_port
from shodh_moe.base.records import read_run
from shodh_moe.checkpoint import CheckpointReader
from tests.forked import spawn
from tests.training.launch import launch
from tests.training.synthetic import CONFIG, write_case, write_latents

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

STEPS, SAVED_AT = 6, 3
GRID = 4
SETTINGS = (
    "training.precision=float64",
    "training.grad_clip=0.05",
    "training.steps=20",
    "model.moe.num_experts=4",
    "model.moe.dropless=true",
    "model.moe.router.balance_weight=0.5",
    "model.moe.router.z_weight=0.1",
    "deepspeed.zero_optimization={reduce_bucket_size: 100000}",  # the default takes gigabytes
)
PATH = ("model.moe.scope=path", "model.moe.attention=own")
ROLLOUT = (
    *("training.unroll=2", "training.history_noise=0.1", "model.strides=[1,2]", "model.scale_history=true"),
    *("model.boundaries=true", "model.positions=periodic_aware"),  # the first axis has walls in one domain
)
CASES: dict[str, tuple[str, ...]] = {
    "path": (*PATH, "training.loss=domain"),
    # Every expert has room for all tokens, because a capacity drops tokens of each rank.
    "layer": (
        "model.moe.scope=layer",
        "model.moe.dropless=false",
        "model.moe.capacity_factor=4.0",
        "training.loss=relative",
        "training.accumulation=2",
    ),
    "windows": (*PATH, "model.moe.router.context=window", "model.norms=sandwich", "training.loss=sample"),
    "sample and token": (
        *PATH,
        "model.moe.router.context=both",
        "model.moe.top_k=2",
        "model.moe.router.balance=global",
        "training.activation_checkpointing=true",
    ),
    "bias": (*PATH, "model.moe.router.balance=bias", "model.patch=2"),
    "film": ("model.film=true", "model.moe.scope=layer", "model.moe.num_experts=0"),
    "through time": (*PATH, *ROLLOUT, "training.unroll_gradient=through", "training.loss=relative"),
    "push-forward": (
        *(*PATH, *ROLLOUT, "training.unroll_gradient=last", "training.loss=sample"),
        "training.activation_checkpointing=true",
        "model.moe.router.balance=global",
    ),
    "both, through time": (*PATH, *ROLLOUT, "training.unroll_gradient=through", "model.moe.router.context=both"),
    "film, through time": (
        *("model.film=true", "model.moe.scope=layer", "model.moe.num_experts=0"),
        *(*ROLLOUT, "training.unroll_gradient=through"),
    ),
}
# Layouts of four ranks: settings beside those of the case.
SHARED = {
    "EP 1": (),
    "EP 2": ("parallel.ep_size=2", "parallel.exchange=token"),
    "EP 2, ZeRO 1": ("parallel.ep_size=2", "parallel.exchange=token", "parallel.zero_stage=1"),
    "EP 2, samples": ("parallel.ep_size=2", "parallel.exchange=sample", "parallel.exchange_capacity=1.0"),
    "EP 2, ZeRO 2, samples": ("parallel.ep_size=2", "parallel.exchange=sample", "parallel.zero_stage=2"),
}
RUNS = [("path", layout) for layout in SHARED]
RUNS += [
    ("layer", "EP 2"),
    ("windows", "EP 2"),
    ("sample and token", "EP 2, ZeRO 1"),
    ("bias", "EP 1"),
    ("film", "EP 1"),
    ("through time", "EP 2, ZeRO 1"),
    ("through time", "EP 2, ZeRO 2, samples"),
    ("push-forward", "EP 2, samples"),
    ("both, through time", "EP 1"),
    ("film, through time", "EP 1"),
]
WHOLE = ("parallel.ep_size=1",)


class _Run:
    """One engine on this rank, trained on samples or on slabs of them."""

    def __init__(self, folder: Path, name: str, *settings: str):
        from shodh_moe.config.load import load_config
        from shodh_moe.data.sampler import DomainSampler
        from shodh_moe.tokenizer.latents import load_latents, samples_of
        from shodh_moe.training.pretrain import latent_engine

        self.config = load_config(folder / "config.yaml", [*SETTINGS, *settings])
        self.folder, self.step = folder / name, 0
        self.samples = samples_of(self.config, load_latents(folder / "latents", "train"), "train")
        self.engine = latent_engine(self.config, 4, self.samples)
        layout = self.engine.layout
        self.sampler = DomainSampler(self.samples.sizes, self.config.training.batch_size, 0, layout.batches)

    def train(self, steps: int) -> dict[str, torch.Tensor]:
        """Return the losses of each micro-batch, as means over ranks, and the norms of each step."""
        from shodh_moe.training.balance import update_biases
        from shodh_moe.training.draws import draw_noise, draw_strides
        from shodh_moe.training.forward import forward

        engine, rank, found = self.engine, dist.get_rank(), {"losses": [], "norms": []}
        accumulation, scale_D = self.config.training.accumulation, self.samples.change_scale()
        seed, slab = self.config.seed, engine.cp.slab(GRID)
        for micro in range(self.step * accumulation, (self.step + steps) * accumulation):
            picks = self.sampler.batch(micro, engine.layout.batch_rank(rank))
            number = micro // accumulation
            strides = draw_strides(self.samples, picks, seed, number)
            batch = self.samples.batch(picks, strides, slab).to("cpu", engine.dtype)
            noise = None
            if self.config.training.history_noise:
                noise = draw_noise(self.samples, picks, seed, number, slab).to(engine.dtype)
            losses, routing, _ = forward(engine, batch, self.config, scale_D, noise)
            step = engine.step(losses.loss, 1e-2)
            mean = torch.stack(losses[:5]).detach()
            dist.all_reduce(mean)
            found["losses"].append(mean / dist.get_world_size())
            if self.config.model.moe.router.balance == "bias":
                update_biases(engine.model.routers, [routing], 0.01)
            if step is not None:
                assert step.applied
                found["norms"].append(torch.tensor([step.norm, step.shared_norm, *step.expert_norms_LE.flatten()]))
        self.step += steps
        return {key: torch.stack(values) for key, values in found.items()}

    def save(self) -> None:
        from shodh_moe.checkpoint import CheckpointWriter
        from shodh_moe.training.resume import random_state

        writer = CheckpointWriter(self.folder, dist.get_rank(), dist.get_world_size(), 9, 0, str(self.step))
        facts = {"updates": self.engine.updates, "config": self.config.model_dump()}
        writer.save(self.step, self.engine.fragments(), self.engine.shapes(), random_state(), facts)
        writer.finish()
        dist.barrier()

    def load(self, folder: Path) -> None:
        reader = CheckpointReader(folder / str(SAVED_AT))
        self.engine.load(reader)
        self.step = reader.state["step"]


def _join(rank: int, port: int, world: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), DS_ACCELERATOR="cpu", DEEPSPEED_LOG_LEVEL="error")
    torch.set_num_threads(1)
    from shodh_moe.training.process_group import init_distributed

    init_distributed()


def _train(run: _Run) -> dict[str, Any]:
    first = run.train(SAVED_AT)
    run.save()
    second = run.train(STEPS - SAVED_AT)
    run.save()
    return {key: torch.cat([first[key], second[key]]) for key in first}


def _slabs(rank: int, folder: Path, port: int) -> None:
    """Four ranks: two slabs each of two micro-batches."""
    _join(rank, port, 4)
    results = {
        run: _train(_Run(folder, " ".join(run), *CASES[run[0]], *SHARED[run[1]], "parallel.context_size=2"))
        for run in RUNS
    }
    continued = _Run(folder, "continued in slabs", *CASES["path"], *SHARED["EP 2, ZeRO 1"], "parallel.context_size=2")
    continued.load(folder / "path EP 1")
    results["continued in slabs"] = continued.train(STEPS - SAVED_AT)
    continued.save()
    if rank == 0:
        torch.save(results, folder / "slabs.pt")
    dist.barrier()
    dist.destroy_process_group()


def _whole(rank: int, folder: Path, port: int) -> None:
    """Two ranks with the same micro-batches of whole samples."""
    _join(rank, port, 2)
    results: dict[str, Any] = {case: _train(_Run(folder, case, *CASES[case], *WHOLE)) for case in CASES}
    continued = _Run(folder, "continued", *CASES["path"], "parallel.ep_size=2", "parallel.zero_stage=2")
    continued.load(folder / "path EP 2, ZeRO 1")
    results["continued"] = continued.train(STEPS - SAVED_AT)
    continued.save()
    if rank == 0:
        torch.save(results, folder / "whole.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("context_parallel")
    (folder / "config.yaml").write_text(CONFIG)
    write_latents(folder / "latents", channels=4, grid=GRID, wall_axis=0)
    spawn(_slabs, (folder, free_port()), 4)
    spawn(_whole, (folder, free_port()), 2)
    return folder


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for key, values in other.items():
        torch.testing.assert_close(one[key], values, rtol=1e-9, atol=1e-14, msg=lambda m, k=key: f"{k}: {m}")


def _same_checkpoints(one: Path, other: Path) -> None:
    a, b = (CheckpointReader(path / str(STEPS)) for path in (one, other))
    assert sorted(a.names()) == sorted(b.names())
    for name in b.names():
        found, expected = a.tensor(name), b.tensor(name)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("case", "layout"), RUNS)
def test_slabs_train_like_whole_samples(folder, case, layout):
    """Compare all losses, all gradient norms, and every weight and moment at the end."""
    slabs, whole = (torch.load(folder / f"{name}.pt", weights_only=True) for name in ("slabs", "whole"))
    _same(slabs[case, layout], whole[case])
    _same_checkpoints(folder / f"{case} {layout}", folder / case)


@pytest.mark.parametrize(("results", "name"), [("whole", "continued"), ("slabs", "continued in slabs")])
def test_a_checkpoint_fits_every_number_of_slabs(folder, results, name):
    found = torch.load(folder / f"{results}.pt", weights_only=True)[name]
    unbroken = torch.load(folder / "whole.pt", weights_only=True)["path"]
    _same(found, {key: values[SAVED_AT:] for key, values in unbroken.items()})
    _same_checkpoints(folder / name, folder / "path")


def test_the_cases_learn_clip_and_route(folder):
    for case, run in torch.load(folder / "whole.pt", weights_only=True).items():
        assert run["losses"][-1, 0] < run["losses"][0, 0], case
        assert (run["norms"][:, 0] > 0.05).any(), case


def test_a_run_in_slabs_writes_the_same_records_and_is_continued_without(tmp_path):
    """Training, validation and telemetry of two ranks with slabs and of one with whole samples."""
    folder, worker = write_case(tmp_path / "case"), Path(__file__).with_name("worker_pretrain.py")

    def pretrain(ranks: int, name: str, *settings: str, resume: str = "auto") -> str:
        common = ("training.precision=float64", "model.moe.scope=path", "model.moe.dropless=true", *ROLLOUT)
        done = launch(ranks, worker, str(folder), str(tmp_path / name), resume, *common, *settings)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    pretrain(1, "whole")
    assert "ZeRO 0, float64, CP 2" in pretrain(2, "slabs", "parallel.context_size=2")
    checkpoint = str(tmp_path / "slabs" / "checkpoints" / "3")
    assert "made by 2 ranks at CP 2, now 1\n" in pretrain(1, "continued", resume=checkpoint)
    whole, slabs, continued = (read_run(tmp_path / name) for name in ("whole", "slabs", "continued"))
    assert [record["kind"] for record in slabs] == ["train", "valid", "train", "valid"]
    for one, other in [*zip(whole, slabs, strict=True), *zip(whole[2:], continued, strict=True)]:
        for key in ("loss", "prediction_loss", "commitment_loss", "grad_norm", "latent_mse", "latent_mse_persistence"):
            if key in one:
                torch.testing.assert_close(other[key], one[key], rtol=1e-9, atol=1e-12, msg=key)
    for one, other in zip(whole[::2], slabs[::2], strict=True):
        for key in ("load", "entropy", "mean_gate", "largest_logit", "load_all"):
            for layer, same in zip(one["routing"], other["routing"], strict=True):
                torch.testing.assert_close(same[key], layer[key], rtol=1e-9, atol=1e-12, msg=key)
