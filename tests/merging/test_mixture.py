"""Domain experts merged into one path mixture: what each path computes, its router, and refused input."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.cli import main as shodh
from shodh_moe.config import Config, ModelConfig
from shodh_moe.config.paths import resolve_paths
from shodh_moe.inference.loading import find_source, read_weights
from shodh_moe.merging.mixture import merge_mixture
from shodh_moe.merging.mixture_config import load_mixture
from shodh_moe.model import Context, LatentTransformer
from shodh_moe.parallel import ExpertParallel
from shodh_moe.tokenizer.latents import LatentSamples, load_latents
from tests.merging.models import State, bits, files_of, save_checkpoint
from tests.tiny import tree
from tests.training.synthetic import write_latents

DOMAINS = ("open_channel", "porous_media")
CHANNELS, GRID = 6, [2, 2, 2]
DENSE = {
    "dim": 24,
    "depth": 2,
    "heads": 2,
    "norms": "pre",
    "moe": {"num_experts": 0, "shared_experts": 2, "expert_hidden": 8, "attention": "shared"},
}
SINGLE = {
    **DENSE,
    "moe": {
        "num_experts": 1,
        "scope": "path",
        "shared_experts": 1,
        "attention": "low_rank",
        "attention_rank": 4,
        "expert_hidden": 8,
    },
}


def network(model: dict[str, Any], seed: int = 0) -> LatentTransformer:
    return LatentTransformer(ModelConfig.model_validate(model), CHANNELS, seed, ExpertParallel()).eval()


def experts(model: dict[str, Any], move: str = "") -> list[State]:
    """An anchor, and two experts near it that differ in the tensors whose names contain ``move``."""
    anchor = {name: tensor.clone() for name, tensor in network(model).state_dict().items()}
    random = torch.Generator().manual_seed(1)
    # The head starts at zero.
    anchor = {name: t + 0.1 * torch.randn(t.shape, generator=random) for name, t in anchor.items()}
    near = [
        {n: t + 0.1 * torch.randn(t.shape, generator=random) if move in n else t.clone() for n, t in anchor.items()}
        for _ in DOMAINS
    ]
    return [anchor, *near]


def write(model: dict[str, Any], states: list[State], **words: Any) -> Path:
    """Write anchor, experts and a config of their mixture to the current folder, and return the config."""
    facts = {"config": {"model": model, "data": {"weights": {"porous_media": 0.0}}}, "tokenizer_sha256": "t"}
    paths = [save_checkpoint(state, Path(f"run{i}"), 1 + i % 2, **facts) for i, state in enumerate(states)]
    models = [{"model": path, "domain": domain} for path, domain in zip(paths[1:], DOMAINS, strict=False)]
    tree = {"base_model": paths[0], "models": models, "output": "mixed", **words}
    Path("mixture.yaml").write_text(yaml.safe_dump(tree))
    return Path("mixture.yaml")


def loaded(output: Path) -> tuple[LatentTransformer, State]:
    """Load a merged checkpoint, as `shodh evaluate` does."""
    source = find_source(output)
    assert source.config.data.weights is None
    state = read_weights(source)
    made = network(source.config.model.model_dump())
    made.load_state_dict(state)
    return made, state


def batch(domain: int) -> tuple[Tensor, Tensor, Context]:
    samples = LatentSamples(load_latents(Path("latents"), "valid"), 2)
    return samples.batch([(domain, 0), (domain, 2)]).inputs


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_latents(Path("latents"))


# Everything that a path of a dense network's mixture has of its own: matrices, but neither biases nor norms.
OWN = ".weight"


@pytest.mark.parametrize("attention", ["own", "shared"])
@torch.no_grad()
def test_each_path_of_dense_experts_predicts_what_its_expert_does(attention: str) -> None:
    states = experts(DENSE, move=OWN)
    shared = [n for n in states[0] if "norm" in n or (attention == "shared" and "attention" in n)]
    for state in states:
        state.update({name: states[0][name] for name in shared})
    merge_mixture(write(DENSE, states, router={"kind": "oracle"}, attention=attention))
    made, _ = loaded(Path("mixed"))
    assert (made.config.moe.num_experts, made.config.moe.shared_experts, made.config.moe.expert_hidden) == (2, 0, 16)
    for domain in (0, 1):
        history, geometry, context = batch(domain)
        alone = network(DENSE)
        alone.load_state_dict(states[1 + domain])
        expected = alone(history, geometry).latent_BCxyz
        found = made(history, geometry, context).latent_BCxyz
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        # The other expert predicts something else.
        alone.load_state_dict(states[2 - domain])
        assert float((found - alone(history, geometry).latent_BCxyz).abs().max()) > 1e-2


@torch.no_grad()
def test_single_experts_are_stacked_and_shared_parts_stay() -> None:
    """Only the path's own parts were trained, so that each path of the mixture is its expert bit for bit."""
    states = experts(SINGLE)
    own = ("routed_EIO", "narrow_EIQ", "widen_EQO", "gate_up_LDF", "down_LFD")
    for state in states[1:]:
        state.update({name: states[0][name] for name in state if not name.endswith(own)})
    merge_mixture(write(SINGLE, states, router={"kind": "oracle"}))
    made, merged = loaded(Path("mixed"))
    for name, tensor in merged.items():
        if name.endswith(own):
            assert bits(tensor) == bits(torch.cat([states[1][name], states[2][name]])), name
        else:
            assert bits(tensor) == bits(states[0][name]), name
    for domain in (0, 1):
        history, geometry, context = batch(domain)
        alone = network(SINGLE)
        alone.load_state_dict(states[1 + domain])
        found = made(history, geometry, context).latent_BCxyz
        torch.testing.assert_close(found, alone(history, geometry).latent_BCxyz, rtol=0, atol=1e-6)


def test_shared_parts_that_differ_are_averaged() -> None:
    states = experts(SINGLE)
    merge_mixture(write(SINGLE, states, router={"kind": "oracle"}))
    _, merged = loaded(Path("mixed"))
    for name in ("embed.weight", "head.bias", "blocks.1.attention.qkv.weight", "blocks.0.moe.shared.0.down.weight"):
        torch.testing.assert_close(merged[name], (states[1][name] + states[2][name]) / 2, rtol=0, atol=1e-7)
    manifest = json.loads(Path("mixed/merge.json").read_text())
    assert manifest["router"] == {"kind": "oracle", "experts": list(DOMAINS)}
    assert all(0.1 < one < 0.5 for one in manifest["relative_distance_from_base"].values())
    assert {one["role"] for one in manifest["inputs"].values()} == {"base", *DOMAINS}


@pytest.mark.parametrize("model", [DENSE, SINGLE], ids=["dense", "single"])
@torch.no_grad()
def test_a_cosine_router_sends_each_domain_to_its_expert(model: dict[str, Any]) -> None:
    # The domains' latents lie around different means.
    move_domains(Path("latents"), {"open_channel": 2.0, "porous_media": -2.0})
    merge_mixture(write(model, experts(model), latents="latents", router={"dim": 8}))
    made, merged = loaded(Path("mixed"))
    assert merged["path.router.prototypes_ER"].shape == (2, 8)
    for domain in (0, 1):
        history, geometry, _ = batch(domain)
        routing = made(history, geometry).routing
        assert len(routing) == 2
        assert routing[0].expert_N.unique().tolist() == [domain]
    router = json.loads(Path("mixed/merge.json").read_text())["router"]
    assert router["kind"] == "cosine"
    for domain in DOMAINS:
        assert router["domains"][domain]["purity"] == 1
        assert router["domains"][domain]["gate"] > 0.999
    # The same files again, and a kept output.
    first = files_of(Path("mixed"))
    merge_mixture(Path("mixture.yaml"))
    merge_mixture(Path("mixture.yaml"), Path("again"))
    assert files_of(Path("mixed")) == first
    assert {k: v for k, v in files_of(Path("again")).items() if "rank" in k} == {
        k: v for k, v in first.items() if "rank" in k
    }


def test_the_example_loads() -> None:
    example = Path(__file__).resolve().parents[2] / "configs" / "merge" / "mixture.yaml"
    assert [expert.domain for expert in load_mixture(example).experts] == list(DOMAINS)


def test_the_router_looks_at_each_experts_own_latents_by_default() -> None:
    config = {"model": DENSE, "data": {"weights": {"porous_media": 0.0}}}
    own = resolve_paths(Config.model_validate(config)).latents
    own.parent.mkdir(parents=True)
    Path("latents").rename(own)
    merge_mixture(write(DENSE, experts(DENSE)))
    router = json.loads(Path("mixed/merge.json").read_text())["router"]
    assert router["latents"] == [str(own)]
    assert router["rows_per_domain"] == 3 * (7 - 2)


def test_domains_that_look_alike_give_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    move_domains(Path("latents"), {"open_channel": 0.0, "porous_media": 0.0}, copy=True)
    merge_mixture(write(DENSE, experts(DENSE), latents="latents"))
    assert "training samples to its own path: choose another router.context" in capsys.readouterr().err


def test_a_mixture_that_a_full_disk_stopped_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(DENSE, experts(DENSE), latents="latents")
    merge_mixture(path, Path("whole"), out_shard_size="10KB")
    real, written = os.pwrite, 0

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 50_000:
            raise OSError(28, os.strerror(28))
        return real(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(UserError, match=r"no space left .* complete files are kept"):
            merge_mixture(path, out_shard_size="10KB")
    assert not Path("mixed").exists()
    kept = {file: file.stat().st_mtime_ns for file in Path(".merging-mixed/content").glob("*.safetensors")}
    done = [file for file in kept if Path(".merging-mixed/records", f"{file.name}.json").exists()]
    assert 1 < len(done) < len(list(Path("whole").glob("*.safetensors")))
    merge_mixture(path, out_shard_size="10KB")
    assert all(Path("mixed", file.name).stat().st_mtime_ns == kept[file] for file in done)
    assert {name: data for name, data in files_of(Path("mixed")).items() if "rank" in name} == {
        name: data for name, data in files_of(Path("whole")).items() if "rank" in name
    }


def move_domains(folder: Path, means: dict[str, float], copy: bool = False) -> None:
    """Add a number to each domain's latents; ``copy``: give all trajectories the first one's latents."""
    import h5py

    for file in folder.glob("*.hdf5"):
        with h5py.File(file, "r+") as opened:
            first = next(iter(opened.values()))
            z, geometry = first["z"][()], first["geometry"][()]
            for group in opened.values():
                if copy:
                    group["z"][...], group["geometry"][...] = z, geometry
                group["z"][...] += means[group.attrs["domain"]]


def refused(path: Path, capsys: pytest.CaptureFixture[str], *messages: str, arguments: tuple[str, ...] = ()) -> None:
    before = tree(Path())
    assert shodh(["merge", "mixture", str(path), *arguments]) == 2
    assert tree(Path()) == before
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for text in messages:
        assert text in error


def test_an_expert_from_another_anchor_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    states = experts(DENSE)
    random = torch.Generator().manual_seed(5)
    stranger = {name: torch.randn(tensor.shape, generator=random) for name, tensor in states[0].items()}
    path = write(DENSE, [*states[:2], stranger], router={"kind": "oracle"})
    refused(path, capsys, "run2/7 differs from run0/7 by", "it was not trained from it")


def test_experts_that_cannot_form_paths_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    states = experts(DENSE)
    oracle = {"kind": "oracle"}
    layer = {**DENSE, "moe": {**DENSE["moe"], "num_experts": 2}}
    refused(write(layer, states, router=oracle), capsys, "run1/7 has 2 experts and scope layer", "num_experts 0")
    refused(write({**DENSE, "film": True}, states, router=oracle), capsys, "run1/7 has film")
    infinite = {**states[2], "head.bias": torch.full_like(states[2]["head.bias"], torch.inf)}
    refused(write(DENSE, [*states[:2], infinite], router=oracle), capsys, "tensor head.bias has NaN or infinity")
    other = {name: tensor for name, tensor in states[2].items() if name != "head.bias"}
    refused(write(DENSE, [*states[:2], other], router=oracle), capsys, "run2/7 misses tensor head.bias")


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        ({"router": {"kind": "linear"}}, ("cosine or oracle, not linear",)),
        ({"router": {"dimm": 3}}, ("moe.router.dimm",)),
        ({"routr": {}}, ("routr", "the nearest valid one is 'router'")),
        ({"output": None}, ("--output",)),
        ({"latents": "absent"}, ("absent/train.hdf5",)),
        ({"attention": "low_rank"}, ("attention",)),
        ({"base_model": "absent"}, ("absent does not exist",)),
        ({"models": [{"model": "run1/7", "domain": "open_channel"}]}, ("models",)),
        ({"models": [{"model": "run1/7", "domain": d} for d in DOMAINS]}, ("the model run1/7 twice",)),
        ({"models": [{"model": f"run{i}/7", "domain": "bed"} for i in (1, 2)]}, ("the domain bed twice",)),
        (
            {"models": [{"model": "run1/7", "domain": "bed"}, {"model": "run2/7", "domain": "porous_media"}]},
            ("latents have no domain bed, only open_channel, porous_media",),
        ),
        ({"output": "run1/7"}, ("contain each other",)),
    ],
)
def test_wrong_configs_are_refused(
    words: dict[str, Any], messages: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    refused(write(DENSE, experts(DENSE), **{"latents": "latents", **words}), capsys, *messages)


def test_a_memory_limit_that_is_too_small(capsys: pytest.CaptureFixture[str]) -> None:
    path = write(DENSE, experts(DENSE), router={"kind": "oracle"})
    refused(path, capsys, "MiB too small", arguments=("--memory-limit", "100MiB"))
