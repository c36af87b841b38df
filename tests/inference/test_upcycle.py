"""A dense model becomes a mixture with the same outputs; branches trained apart become one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shodh_moe.cli import main
from shodh_moe.config.paths import resolve_paths
from shodh_moe.inference import load_model
from shodh_moe.inference.contexts import FILE
from shodh_moe.inference.loading import find_source
from shodh_moe.inference.one_step import predict_windows
from shodh_moe.tokenizer.latents import LatentSamples, load_latents
from tests.tiny import refused, tree, write_dataset
from tests.trained import GRID, HISTORY, SNAPSHOTS, make_run, push

# A dense model has no use for `shared_linear`, but its mixture needs the shared parts whatever the key says.
DENSE = {"moe": {"num_experts": 0, "shared_experts": 2, "expert_hidden": 16, "shared_linear": False}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense run, its latents, and its export ``model``."""
    folder = tmp_path_factory.mktemp("upcycle")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        push(write_dataset(folder / "theirs", GRID, SNAPSHOTS), {"calm": 0.0, "wild": 8.0})
        run = make_run(folder, DENSE)
        assert main(["tokenizer", "encode", "--config", str(run / "config.yaml")]) == 0
        assert main(["checkpoint", "export", str(run), "--output", "model"]) == 0
    return folder


def samples_of(folder: Path) -> LatentSamples:
    latents = folder / resolve_paths(find_source(folder / "model").config).latents
    return LatentSamples(load_latents(latents, "test"), HISTORY)


def predicted(path: Path, samples: LatentSamples) -> tuple[torch.Tensor, list[int]]:
    windows = [(domain, n) for domain, size in enumerate(samples.sizes) for n in range(size)]
    (found,) = predict_windows(load_model(path).transformer, samples, windows, len(windows))
    return found.latent_BCxyz, found.routing[0].expert_N.unique().tolist() if found.routing else []


@pytest.mark.parametrize("attention", ["shared", "low_rank", "own"])
def test_an_upcycled_mixture_starts_with_the_outputs_of_the_dense_model(
    attention: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    words = ["--experts", "2", "--attention", attention, "--output", str(tmp_path / "mixture")]
    assert main(["merge", "upcycle", "model", *words]) == 0
    samples = samples_of(made)
    expected, _ = predicted(made / "model", samples)
    found, paths = predicted(tmp_path / "mixture", samples)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert paths == [0, 1]  # the domains already take different paths
    assert (tmp_path / "mixture" / FILE).read_bytes() == (made / "model" / FILE).read_bytes()


@torch.enable_grad()
def test_all_parts_of_an_upcycled_path_learn(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After one step, no gradient of a path's own parts is zero, although their products start at zero."""
    monkeypatch.chdir(made)
    assert main(["merge", "upcycle", "model", "--experts", "2", "--output", str(tmp_path / "mixture")]) == 0
    transformer, samples = load_model(tmp_path / "mixture").transformer, samples_of(made)
    optimizer = torch.optim.SGD(transformer.parameters(), lr=0.1)
    batch = samples.batch([(0, 0), (1, 0)])
    for _ in range(2):
        optimizer.zero_grad()
        (transformer(*batch.inputs).latent_BCxyz - batch.target_BCxyz).square().mean().backward()
        optimizer.step()
    for name, parameter in transformer.named_parameters():
        if parameter.dim() == 3:
            assert all(part.abs().max() > 0 for part in parameter.grad), name


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["--experts", "1"], ("--experts 1", "at least 2")),
        (["--experts", "1000"], ("--experts 1000", "256")),
        (["--experts", "2", "--output", "model"], ("model exists",)),
    ],
)
def test_wrong_words_are_refused(
    words: list[str], messages: tuple[str, ...], made: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(made)
    before = tree(made)
    refused(capfd, "merge", "upcycle", "model", "--output", "mixture", *words, says=messages)
    assert tree(made) == before


def test_models_that_cannot_be_upcycled_are_refused(made: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(made)
    assert main(["merge", "upcycle", "model", "--experts", "2", "--output", "twice"]) == 0
    refused(capfd, "merge", "upcycle", "twice", "--experts", "2", "--output", "x", says=("has 2 experts already",))
    (made / "runs/trained/../../theirs").rename("away")
    try:
        words = ["runs/trained", "--experts", "2", "--output", "x", "--tokenizer", "tok"]
        refused(capfd, "merge", "upcycle", *words, says=("records no contexts", "export it again"))
    finally:
        (made / "away").rename("theirs")
