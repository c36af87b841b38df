"""All layouts of experts and optimizer state train alike, and each resumes from the checkpoints of every other.

Four processes train all nine layouts, which are pairs of ZeRO stage and expert-parallel size.
"""

from __future__ import annotations

import itertools
import math
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.forked import spawn
from tests.training.synthetic import write_case

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

WORLD, STEPS, SAVED_AT, AFTER, RATE = 4, 20, 3, 2, 1e-2
LAYOUTS = list(itertools.product((0, 1, 2), (1, 2, 4)))
SETTINGS = ("model.moe.num_experts=8", "model.moe.dropless=true", "training.grad_clip=0.05")
PATH = ("training.precision=float64", "model.moe.scope=path", "model.moe.attention=own")
# A router in each layer, in two precisions; one path per sample with all its parts, and with an exchange of samples.
CASES = {
    "float64": ("training.precision=float64",),
    "float32": ("training.precision=float32",),
    "path": (*PATH, "parallel.exchange=token"),
    "sample": (*PATH, "parallel.exchange=sample"),
}
# An exchange of samples is compared with one of tokens, and resumes from its checkpoints.
SAME_AS = {"sample": "path"}
SHARING = [layout for layout in LAYOUTS if layout[1] > 1]
# Pairs (layout that saves, layout that resumes): all in float64; in the other cases, which run the same code, a layout
# with itself and with the next.
PAIRS = [("float64", *pair) for pair in itertools.product(LAYOUTS, LAYOUTS)]
PAIRS += [
    (case, source, (LAYOUTS * 2)[number + k])
    for case in ("float32", "path")
    for number, source in enumerate(LAYOUTS)
    for k in (0, 1)
]
PAIRS += [("sample", layout, layout) for layout in SHARING]


def _worker(rank: int, folder: Path, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), DS_ACCELERATOR="cpu", DEEPSPEED_LOG_LEVEL="error")
    torch.set_num_threads(1)
    from shodh_moe.training.process_group import init_distributed

    init_distributed()
    results = {}
    for case in CASES:
        runs = {layout: _Run(rank, folder, case, layout) for layout in (SHARING if case in SAME_AS else LAYOUTS)}
        for layout, run in runs.items():
            results["alike", case, layout] = run.train(STEPS) | {"weights": run.logical()}
            if case in SAME_AS:
                continue
            # The layout's own uninterrupted run, after a checkpoint in its middle.
            run.restart()
            run.train(SAVED_AT)
            run.save()
            results["unbroken", case, layout] = run.train(AFTER) | {"weights": run.logical()}
        for source, target in [pair for which, *pair in PAIRS if which == case]:
            run = runs[target]  # still in the state of its last use, which loading must replace completely
            checkpoint = _folder(folder, SAME_AS.get(case, case), source) / str(SAVED_AT)
            run.load(checkpoint)
            before = run.logical()
            run.train(1, rate=0.0)
            unmoved = all(torch.equal(before[name], value) for name, value in run.logical().items())
            run.load(checkpoint)
            loaded = run.logical(moments=True)
            found = {"unmoved": unmoved, "loaded": loaded, **run.train(AFTER), "weights": run.logical()}
            results["continued", case, source, target] = found
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


def _folder(folder: Path, case: str, layout: tuple[int, int]) -> Path:
    """Folder of the checkpoints of one run."""
    zero, ep = layout
    return folder / f"{case}-zero{zero}-ep{ep}"


class _Run:
    """One engine, trained on the same samples as those of all other layouts."""

    def __init__(self, rank: int, folder: Path, case: str, layout: tuple[int, int]):
        from shodh_moe.config.load import load_config
        from shodh_moe.data.sampler import DomainSampler
        from shodh_moe.tokenizer.latents import LatentSamples, load_latents
        from shodh_moe.training.pretrain import latent_engine

        zero, ep = layout
        layout_settings = (f"parallel.zero_stage={zero}", f"parallel.ep_size={ep}")
        self.config = load_config(folder / "config.yaml", [*SETTINGS, *CASES[case], *layout_settings])
        self.rank, self.step = rank, 0
        self.samples = LatentSamples(load_latents(folder / "latents", "train"), self.config.model.history)
        self.sampler = DomainSampler(self.samples.sizes, self.config.training.batch_size, 0, WORLD)
        self.engine = latent_engine(self.config, 6, self.samples)
        self.folder = _folder(folder, case, layout)
        self.start = [f.values.clone() for f in self.engine.fragments()]

    def restart(self) -> None:
        from shodh_moe.training.optimizer import set_updates

        for fragment, values in zip(self.engine.fragments(), self.start, strict=True):
            fragment.values.copy_(values)
        set_updates(self.engine.optimizer, 0)
        self._distribute()
        self.step = 0

    def _distribute(self) -> None:
        """Distribute the fragments from their owners to all ranks through a checkpoint, as training does."""
        self.step = 0
        self.save()
        self.load(self.folder / "0")

    def train(self, steps: int, rate: float = RATE) -> dict[str, torch.Tensor]:
        from shodh_moe.training.forward import forward

        losses, norms, routes = [], [], []
        for _ in range(steps):
            batch = self.samples.batch(self.sampler.batch(self.step, self.rank)).to("cpu", self.engine.dtype)
            named, routing, _ = forward(self.engine, batch, self.config)
            loss = named.loss
            step = self.engine.step(loss, rate)
            assert step is not None
            assert step.applied
            mean = loss.detach().double()
            dist.all_reduce(mean)
            losses.append(mean / WORLD)
            norms.append(torch.tensor([step.norm, step.shared_norm, *step.expert_norms_LE.flatten()]))
            routes.append(torch.stack([layer.expert_N for layer in routing]))
            self.step += 1
        chosen = torch.stack(routes)
        everyone = [torch.empty_like(chosen) for _ in range(WORLD)]
        dist.all_gather(everyone, chosen)
        return {"losses": torch.stack(losses), "norms": torch.stack(norms), "routes": torch.cat(everyone, dim=2)}

    def logical(self, moments: bool = False) -> dict[str, torch.Tensor]:
        """Return every logical tensor in full, on every rank."""
        shapes = {name: s for name, s in self.engine.shapes().items() if moments or name.startswith("model/")}
        sizes = [math.prod(shape) for shape in shapes.values()]
        first = dict(zip(shapes, itertools.accumulate([0, *sizes]), strict=False))
        flat = torch.zeros(sum(sizes), dtype=self.engine.dtype)
        for fragment in self.engine.fragments():
            if fragment.name in shapes:
                flat[first[fragment.name] + fragment.start :][: len(fragment.values)] = fragment.values
        dist.all_reduce(flat)
        return {name: part.view(shapes[name]) for name, part in zip(shapes, flat.split(sizes), strict=True)}

    def save(self) -> None:
        from shodh_moe.checkpoint import CheckpointWriter
        from shodh_moe.training.resume import random_state

        writer = CheckpointWriter(self.folder, self.rank, WORLD, keep_last=9, keep_every=0, attempt=str(self.step))
        facts = {"updates": self.engine.updates, "config": self.config.model_dump()}
        writer.save(self.step, self.engine.fragments(), self.engine.shapes(), random_state(), facts)
        writer.finish()
        dist.barrier()

    def load(self, checkpoint: Path) -> None:
        from shodh_moe.checkpoint import CheckpointReader

        reader = CheckpointReader(checkpoint)
        self.engine.load(reader)
        self.step = reader.state["step"]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    folder = write_case(tmp_path_factory.mktemp("layouts"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_worker, (folder, port), WORLD)
    return torch.load(folder / "results.pt", weights_only=True)


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))


def _worst(a: dict, b: dict) -> float:
    parts = [_difference(a[key], b[key]) for key in ("losses", "norms")]
    return max(parts + [_difference(a["weights"][name], value) for name, value in b["weights"].items()])


@pytest.mark.parametrize(
    ("case", "layout"),
    [*itertools.product(("float64", "path"), LAYOUTS), *itertools.product(("sample",), SHARING)],
)
def test_twenty_steps_agree_in_float64(results, case, layout):
    """Compare losses, every gradient norm (total, shared, each expert's) and every weight."""
    one, other = results["alike", SAME_AS.get(case, case), (0, 1)], results["alike", case, layout]
    assert torch.equal(one["routes"], other["routes"])
    torch.testing.assert_close(other["losses"], one["losses"], rtol=1e-9, atol=0)
    torch.testing.assert_close(other["norms"], one["norms"], rtol=1e-9, atol=1e-15)
    assert _worst(other, one) < 1e-9


@pytest.mark.parametrize("case", ["float64", "path"])
def test_the_setting_learns_and_clips_gradients(results, case):
    run = results["alike", case, (0, 1)]
    assert run["losses"][-1] < run["losses"][0]
    assert (run["norms"][:, 0] > 0.05).any()
    assert len(run["routes"].unique()) > 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_step_agrees_in_float32_and_flips_are_counted(results, layout, record_property):
    """Later, rounding may send a nearly tied token to the other expert; the test report counts these flips."""
    one, other = (results["alike", "float32", key] for key in ((0, 1), layout))
    torch.testing.assert_close(other["losses"][0], one["losses"][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(other["norms"][0], one["norms"][0], rtol=1e-6, atol=1e-9)
    assert torch.equal(one["routes"][0], other["routes"][0])
    flips = int((one["routes"] != other["routes"]).sum())
    record_property("flipped routes", flips)
    print(f"ZeRO {layout[0]}, EP {layout[1]}: {flips} of {one['routes'].numel()} routes flipped in {STEPS} steps")
    if not flips:
        assert _worst(other, one) < 1e-4


@pytest.mark.parametrize(("case", "source", "target"), PAIRS)
def test_a_checkpoint_resumes_at_any_layout(results, case, source, target):
    origin = SAME_AS.get(case, case)
    unbroken, continued = results["unbroken", origin, source], results["continued", case, source, target]
    for name, value in results["continued", origin, source, source]["loaded"].items():
        assert torch.equal(continued["loaded"][name], value), f"{name} is not what was saved"
    assert continued["unmoved"], "a step at learning rate 0 moved a weight"
    if (case, source) == (origin, target):
        for key in ("losses", "norms", "routes"):
            assert torch.equal(continued[key], unbroken[key])
        assert all(torch.equal(continued["weights"][name], value) for name, value in unbroken["weights"].items())
    else:
        assert _worst(continued, unbroken) < (1e-9 if case != "float32" else 1e-5)


def test_experts_differ_so_that_a_swap_would_be_detected(results):
    for name, value in results["unbroken", "float64", (0, 1)]["weights"].items():
        if ".experts." in name:
            for first, second in itertools.combinations(value, 2):
                assert not torch.equal(first, second)
