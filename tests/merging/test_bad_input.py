"""Invalid input: one line names the error, nothing is written and no input is changed."""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.merging import merge
from shodh_moe.runs.merge_rank import main
from tests.merging.models import State, config, network, save, save_checkpoint
from tests.tiny import tree

PAIR = ["low.safetensors", "high.safetensors"]


@pytest.fixture(autouse=True)
def experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> State:
    monkeypatch.chdir(tmp_path)
    base = network()
    save(base, Path("base.safetensors"))
    save(network(1, near=base), Path("low.safetensors"))
    save(network(2, near=base), Path("high.safetensors"))
    return base


def refused(*messages: str, path: Path | None = None, method: str = "ccm", models: Any = PAIR, **words: Any) -> str:
    """Check that the merge is refused in one line that contains each of ``messages``, and changes nothing."""
    limits = {key: words.pop(key) for key in ("memory_limit", "out_shard_size") if key in words}
    words = {"parameters": {"alpha": 0.5}, "output": "out", **words}
    path = path or config(Path(), method, models, **words)
    before = tree(Path())
    with pytest.raises(UserError) as caught:
        merge(path, **limits)
    assert tree(Path()) == before
    for text in messages:
        assert text in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        ({"method": "cmm"}, ("cmm", "ccm")),
        ({"merge_methd": 1}, ("merge_methd", "merge_method")),
        ({"slices": []}, ("slices", "language models")),
        ({"output": None}, ("--output",)),
        ({"parameters": {"alhpa": 1}}, ("alhpa", "alpha")),
        ({"parameters": {}}, ("one of alpha and coordinate",)),
        ({"parameters": {"alpha": 1, "coordinate": 1}}, ("exactly one of alpha and coordinate",)),
        ({"parameters": {"alpha": [0, 1]}}, ("gradient", "sweep")),
        ({"parameters": {"alpha": "much"}}, ("much",)),
        ({"parameters": {"alpha": float("nan")}}, ("finite",)),
        ({"parameters": {"alpha": [{"filter": "lft", "value": 1}, {"value": 0}]}}, ("lft", "none of the 10")),
        ({"parameters": {"alpha": [{"filter": "lift", "value": 1}]}}, ("no value for tensor",)),
        ({"parameters": {"alpha": [{"regex": "(", "value": 1}]}}, ("regular expression",)),
        ({"parameters": {"alpha": [{"fliter": "lift", "value": 1}]}}, ("fliter", "filter")),
        ({"models": ["low.safetensors"]}, ("2 models",)),
        ({"models": ["low.safetensors"] * 2}, ("twice",)),
        ({"models": [*PAIR, "base.safetensors"]}, ("2 models",)),
        ({"models": ["low.safetensors", "absent.safetensors"]}, ("absent.safetensors",)),
        ({"method": "ties", "parameters": {"weight": 1}}, ("base_model",)),
        ({"method": "linear", "parameters": {}}, ("weight", "no value")),
        (
            {"method": "ties", "base_model": "base.safetensors", "parameters": {"weight": 1, "density": 0}},
            ("density", "(0, 1]"),
        ),
        *(
            (
                {"method": "dare_ties", "base_model": "base.safetensors", "parameters": {"weight": 1, "seed": seed}},
                ("seed is a whole number from 0 to 2^53 - 1",),
            )
            for seed in (2**53, 2**64, 1.5, -1)
        ),
        *(
            (
                {"method": method, "base_model": "base.safetensors", "parameters": parameters},
                messages,
            )
            for method, parameters, messages in [
                (
                    "della",
                    {"weight": 1, "density": 0.9},
                    ("out: della: density 0.9 and epsilon 0.15 of tensor", "smaller"),
                ),
                ("della", {"weight": 1, "density": 0.3, "epsilon": 0.5}, ("epsilon is a share in [0, 0.5), not 0.5",)),
                ("della", {"weight": 1, "gamma": 0.1}, ("della takes no parameter 'gamma'",)),
                ("breadcrumbs", {"weight": 1, "gamma": 1}, ("gamma is a share in [0, 1), not 1",)),
                ("breadcrumbs", {"weight": 1, "gamma": {"viscosity": 0.1}}, ("gamma takes no values by axis",)),
                ("breadcrumbs", {"weight": [{"filter": "lft", "value": 1}, {"value": 0}]}, ("lft", "none of the 10")),
                ("breadcrumbs", {"weight": [{"filter": "lift", "value": 1}]}, ("weight has no value for tensor",)),
                ("karcher", {"weight": 1}, ("karcher takes no parameter 'weight'", "max_iter")),
                ("karcher", {"max_iter": 1.5}, ("max_iter is a whole number from 0 to 10000, not 1.5",)),
                ("karcher", {"tol": 0}, ("tol is between 0 and 1, not 0",)),
                ("karcher", {"tol": [{"value": 0.1}]}, ("tol is one number for all tensors",)),
            ]
        ),
        ({"method": "model_stock", "parameters": {}}, ("model_stock needs base_model",)),
        (
            {
                "method": "model_stock",
                "base_model": "base.safetensors",
                "models": ["base.safetensors", "low.safetensors"],
                "parameters": {},
            },
            ("at least 2 models besides base_model, but models has 1",),
        ),
        ({"dtype": "int8"}, ("dtype",)),
        ({"format": "checkpoint"}, ("checkpoint among the inputs",)),
        ({"output": "low.safetensors"}, ("another output",)),
        ({"sweep": {"alpha": 1}}, ("sweep",)),
        ({"sweep": [{"name": "../x", "parameters": {"alpha": 1}}]}, ("name",)),
        ({"sweep": [{"name": "a"}, {"name": "a"}]}, ("two outputs",)),
        ({"memory_limit": "100MiB"}, ("MiB too small", "--memory-limit")),
        ({"memory_limit": "much"}, ("much",)),
    ],
)
def test_invalid_settings_are_named(settings: dict[str, Any], messages: tuple[str, ...]) -> None:
    refused(*messages, **settings)


def test_a_row_that_does_not_fit_into_the_memory_limit() -> None:
    paths = [save({"w": torch.zeros(6_000_000)}, Path(f"{i}.safetensors")) for i in range(2)]
    words = {"method": "della", "base_model": paths[0], "parameters": {"weight": 1, "density": 0.5}}
    refused("MiB too small for 2 inputs", models=paths[1:], memory_limit="450MiB", **words)


def test_a_missing_config_and_invalid_yaml() -> None:
    refused("absent.yaml", path=Path("absent.yaml"))
    Path("bad.yaml").write_text("models: [")
    refused("bad.yaml", "YAML", path=Path("bad.yaml"))


def test_equal_and_missing_coordinates_are_refused_and_far_targets_warn(capsys: pytest.CaptureFixture[str]) -> None:
    ends = [("low.safetensors", {"coordinate": 1}), ("high.safetensors", {"coordinate": 1})]
    refused("and high.safetensors have the same coordinate 1", models=ends, parameters={"coordinate": 2})
    refused("needs the models' coordinates", parameters={"coordinate": 2})
    refused("low.safetensors has a coordinate and high.safetensors has none", models=[ends[0], "high.safetensors"])
    ends[1] = ("high.safetensors", {"coordinate": 3})
    merge(config(Path(), "ccm", ends, parameters={"coordinate": 9}), Path("far"))
    assert "alpha 7 is clipped to 1.5" in capsys.readouterr().err
    merge(config(Path(), "ccm", PAIR, parameters={"alpha": -2}), Path("far too"))
    assert "outside +-1.5" in capsys.readouterr().err


def test_models_with_different_tensors(experts: State) -> None:
    def other(state: State) -> None:
        save(state, Path("high.safetensors"))

    other({k: v for k, v in experts.items() if not k.startswith("lift")})
    refused("high.safetensors misses tensor lift.", "(and 1 more)", "low.safetensors")
    other({**experts, "more": torch.ones(2)})
    refused("high.safetensors has tensor more", "low.safetensors misses")
    other({**experts, "lift.bias": torch.ones(41)})
    refused("lift.bias", "(41,) in high.safetensors", "(40,) in low.safetensors")
    other({**experts, "lift.bias": experts["lift.bias"].double()})
    refused("lift.bias", "float64 in high.safetensors", "float32 in low.safetensors")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(bad: float, experts: State) -> None:
    weight = experts["lift.weight"].clone()
    weight[3, 5] = bad
    save({**experts, "lift.weight": weight}, Path("high.safetensors"))
    refused("high.safetensors: tensor lift.weight", "[3, 5]")
    spectral = experts["spectral.weight"].clone()
    spectral[1, 2, 3] = complex(0, bad)
    save({**experts, "spectral.weight": spectral}, Path("high.pt"))
    refused("high.pt: tensor spectral.weight", "[1, 2, 3]", models=["low.safetensors", "high.pt"])


def test_a_value_too_large_for_the_output_type(experts: State) -> None:
    save({**experts, "lift.bias": torch.full((40,), 1e6)}, Path("high.safetensors"))
    refused("lift.bias", "too large for float16", dtype="float16")


def test_an_expert_trained_from_another_anchor() -> None:
    save(network(77), Path("stranger.safetensors"))
    message = refused(
        "it was not trained from it", models=["low.safetensors", "stranger.safetensors"], base_model="base.safetensors"
    )
    assert message.startswith("stranger.safetensors differs from base.safetensors by 1.")
    parameters = {"alpha": 0.5, "distance_limit": 3}
    merge(
        config(
            Path(),
            "ccm",
            ["low.safetensors", "stranger.safetensors"],
            base_model="base.safetensors",
            parameters=parameters,
        ),
        Path("forced"),
    )


@pytest.mark.parametrize("method", ["linear", "karcher", "model_stock", "breadcrumbs", "della"])
def test_a_third_expert_from_another_anchor(method: str) -> None:
    save(network(77), Path("stranger.safetensors"))
    refused(
        "stranger.safetensors differs from base.safetensors by 1.",
        "it was not trained from it",
        method=method,
        models=[*PAIR, "stranger.safetensors"],
        base_model="base.safetensors",
        parameters={} if method in ("karcher", "model_stock") else {"weight": 0.3},
    )


def test_the_middle_of_a_curve_from_another_anchor() -> None:
    save(network(77), Path("stranger.safetensors"))
    models = [PAIR[0], "stranger.safetensors", PAIR[1]]
    refused(
        "stranger.safetensors differs from base.safetensors by 1.",
        "it was not trained from it",
        models=[(model, {"coordinate": place}) for model, place in zip(models, (1.0, 2.0, 4.0), strict=True)],
        base_model="base.safetensors",
        parameters={"alpha": 0.3},
    )


def test_damaged_files() -> None:
    whole = Path("high.safetensors").read_bytes()
    for content, messages in [
        (whole[:-10], "truncated"),
        (whole[:100], "truncated"),
        (whole + b"x", "longer"),
        (b"", "truncated"),
        (whole[:8] + b"x" + whole[9:], "header cannot be read"),
        (whole.replace(b'"F32"', b'"F99"'), "F99"),
    ]:
        Path("high.safetensors").write_bytes(content)
        refused("high.safetensors", messages)


def test_a_missing_shard() -> None:
    merge(config(Path(), "linear", ["high.safetensors"], parameters={"weight": 1}), Path("high"), out_shard_size="1KB")
    shard = sorted(Path("high").glob("model-*"))[1]
    moved = shard.rename("elsewhere")
    refused(str(shard), "but missing", models=["low.safetensors", "high"])
    moved.rename(shard)
    shutil.copy(shard, "high/model-00001-of-00002.safetensors")
    (Path("high") / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../low.safetensors"}}')
    refused("outside its folder", models=["low.safetensors", "high"])


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "content",
    [
        {"w": torch.ones(2), "evil": Evil()},
        {"w": torch.ones(2), "step": 1},
        [torch.ones(2)],
        {},
        {"w": torch.ones(2), "more": {"w": torch.ones(2)}, "most": {"w": torch.ones(2)}},
    ],
)
def test_pickles_that_are_not_plain_state_dicts(content: Any) -> None:
    torch.save(content, "x.pt")
    refused("x.pt", "save ", models=["low.safetensors", "x.pt"])
    assert not Path("executed").exists()


def test_old_and_foreign_pickles() -> None:
    torch.save({"w": torch.ones(2)}, "x.pt", _use_new_zipfile_serialization=False)
    refused("x.pt", "convert it with torch.save", models=["low.safetensors", "x.pt"])
    Path("x.pt").write_bytes(pickle.dumps(Evil()))
    refused("x.pt", "as safetensors", models=["low.safetensors", "x.pt"])
    assert not Path("executed").exists()


def test_damaged_and_different_checkpoints() -> None:
    base = {"w": torch.randn(50)}
    paths = [save_checkpoint(network(i, near=base), Path(f"run{i}"), 2) for i in (0, 1)]
    file = Path(paths[1], "rank_00001.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    refused("run1", "rank_00001.safetensors does not match its hash", models=paths)
    file.unlink()
    refused("run1", "rank_00001.safetensors is missing", models=paths)
    other = save_checkpoint(network(3, near=base), Path("run3"), 2, tokenizer_sha256="another")
    refused("different tokenizers", models=[paths[0], other])
    other = save_checkpoint(network(3, near=base), Path("run4"), 2, config={"model": {"top_k": 3}})
    refused("different models: model.top_k", models=[paths[0], other])
    Path("run0/checkpoints").mkdir()
    refused("name one of its checkpoints", models=["run0", other])


def test_an_output_that_exists() -> None:
    Path("out").mkdir()
    refused("out exists")
    Path("out/x").touch()
    refused("out exists")


def test_a_disk_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 0, 1000))
    refused("the outputs need")


def test_a_disk_that_fills_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*arguments: Any) -> int:
        raise OSError(28, os.strerror(28))

    path = config(Path(), "ccm", PAIR, parameters={"alpha": 0.5}, output="out")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert main([str(path)]) == 2
    assert "no space left" in capsys.readouterr().err
    assert not Path("out").exists()
    assert main([str(path)]) == 0
    assert Path("out").exists()
    assert not Path(".merging-out").exists()


def test_an_output_that_another_process_is_writing() -> None:
    work = Path(".merging-out")
    work.mkdir()
    with open(work / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused("another process is writing")
