"""Complete merges: every kind of input and output, limits, kills, sweeps."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from shodh_moe.checkpoint import CheckpointReader, damage
from shodh_moe.checkpoint.inspect import inspect
from shodh_moe.inference.loading import find_source, read_weights
from shodh_moe.merging import merge
from shodh_moe.merging import stream as stream_module
from shodh_moe.merging.methods import METHODS
from shodh_moe.merging.recipe import BLOCK
from tests.merging.models import State, bits, config, files_of, load, merged, network, same_bits, save, save_checkpoint
from tests.tiny import config as tiny_config

ROOT = Path(__file__).resolve().parents[2]
HALF = {"alpha": 0.5}
TWO_WEIGHTS = {"weight": 0.4, "density": 0.5}


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[State, State, State]:
    """An anchor and two experts in the current folder: base.safetensors, low.safetensors, high.safetensors."""
    monkeypatch.chdir(tmp_path)
    base = network()
    states = base, network(1, near=base), network(2, near=base)
    for name, state in zip(("base", "low", "high"), states, strict=True):
        save(state, Path(f"{name}.safetensors"))
    return states


def words(method: str) -> dict[str, object]:
    """Return config settings of this method for the files of `three`, without the models."""
    if method == "ccm":
        return {"parameters": HALF, "base_model": "base.safetensors"}
    if method == "slerp":
        return {"parameters": {"t": 0.3}, "base_model": "low.safetensors"}
    parameters: dict[str, float] = {} if method in ("karcher", "model_stock") else TWO_WEIGHTS
    parameters = {"weight": 0.4} if method in ("linear", "task_arithmetic") else parameters
    return {"parameters": parameters, "base_model": "base.safetensors"}


def models(method: str) -> list[str]:
    return ["high.safetensors"] if method == "slerp" else ["low.safetensors", "high.safetensors"]


def test_ccm_of_every_data_type(three: tuple[State, State, State]) -> None:
    _, low, high = three
    made = merged(Path(), "ccm", ["low.safetensors", "high.safetensors"], parameters=HALF)
    assert made.keys() == low.keys()
    for name, tensor in low.items():
        assert (made[name].dtype, made[name].shape) == (tensor.dtype, tensor.shape)
        if tensor.is_floating_point() or tensor.is_complex():
            wide = torch.complex128 if tensor.is_complex() else torch.float64
            parts = 0.25 * tensor.to(wide), 0.75 * high[name].to(wide)
            # There are three roundings: of the two terms, at least to float32, and of their sum.
            bound = torch.finfo(tensor.dtype).eps * (parts[0].abs() + parts[1].abs())
            assert torch.all((made[name].to(wide) - sum(parts)).abs() <= bound), name
        else:
            assert torch.equal(made[name], tensor)


def test_half_precision_is_accumulated_in_float32(tmp_path: Path) -> None:
    """In bfloat16, 256 + 1 rounds to 256."""
    parts = [
        save({"w": torch.tensor([x], dtype=torch.bfloat16)}, tmp_path / f"{i}.safetensors")
        for i, x in enumerate([256.0, 1.0, 1.0])
    ]
    made = merged(tmp_path, "linear", parts, parameters={"weight": 1, "normalize": False})
    assert made["w"].item() == 258.0


def test_filters_choose_tensors(three: tuple[State, State, State]) -> None:
    _, low, high = three
    alpha = [{"filter": "lift", "value": 1}, {"regex": r"^spectral\.", "value": -1}, {"value": 1}]
    made = merged(Path(), "ccm", models("ccm"), parameters={"alpha": alpha})
    assert bits(made["lift.weight"]) == bits(high["lift.weight"])
    assert bits(made["spectral.weight"]) == bits(low["spectral.weight"])
    assert bits(made["brain"]) == bits(high["brain"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("limits", [{"memory_limit": "100GB", "out_shard_size": "1KB"}, {"memory_limit": "64GB"}])
def test_slicing_and_sharding_do_not_change_a_bit(
    method: str, limits: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base: State = {
        "a": torch.randn(2 * BLOCK + 5),
        "z": torch.randn(7, BLOCK, dtype=torch.complex64),
        "n": torch.ones(3),
    }
    for i, name in enumerate(("base", "low", "high")):
        save(network(i, near=base), Path(f"{name}.safetensors"))
    whole = merged(Path(), method, models(method), **words(method))
    monkeypatch.setattr(stream_module, "LARGEST_SLICE", BLOCK)
    sliced = merged(Path(), method, models(method), output="sliced", **words(method), **limits)
    assert same_bits(whole, sliced)


@settings(max_examples=15, deadline=None)
@given(
    st.permutations([0, 1, 2, 3]),
    st.sampled_from(["linear", "task_arithmetic", "ties", "dare", "della", "model_stock"]),
)
def test_the_order_of_models_does_not_change_a_bit(order: list[int], method: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        base = {"w": torch.randn(50, generator=torch.Generator().manual_seed(9))}
        anchor = save(base, here / "base.safetensors")
        entries = [
            (save(network(i, near=base), here / f"{i}.safetensors"), {"weight": 0.1 * (i + 1)}) for i in range(4)
        ]
        if method == "model_stock":
            entries = [(path, {}) for path, _ in entries]
        shared = {"density": 0.6} if method in ("ties", "dare", "della") else {}
        first = merged(here, method, entries, base_model=anchor, parameters=shared)
        other = merged(here, method, [entries[i] for i in order], base_model=anchor, parameters=shared, output="other")
        assert same_bits(first, other)


@pytest.mark.parametrize("method", ["ccm", "ties"])
def test_the_format_of_the_inputs_does_not_change_a_bit(method: str, three: tuple[State, State, State]) -> None:
    plain = merged(Path(), method, models(method), **words(method))
    for name, state in zip(("low", "high"), three[1:], strict=True):
        save(state, Path(f"{name}.pt"))
        # A merge of one model copies it into several files.
        merge(
            config(Path(), "linear", [f"{name}.safetensors"], parameters={"weight": 1}),
            Path(name),
            out_shard_size="1KB",
        )
        assert len(list(Path(name).glob("*.safetensors"))) > 2
    for form in (["low.pt", "high.pt"], ["low", "high"], ["low.pt", "high"]):
        again = merged(Path(), method, form, output="-".join(form).replace(".", ""), **words(method))
        assert same_bits(plain, again)


def test_a_merged_checkpoint_can_be_evaluated(tmp_path: Path) -> None:
    base = {"w": torch.randn(50)}
    described = tiny_config().model_dump()
    paths = [save_checkpoint(network(i, near=base), tmp_path / str(i), 2, config=described) for i in (1, 2)]
    made = merged(tmp_path, "linear", paths, parameters={"weight": 0.5})
    source = find_source(tmp_path / "out")
    assert bits(read_weights(source)["w"]) == bits(made["model/w@0"])
    assert "50" in inspect(tmp_path / "out")


def test_ep_size_of_checkpoints_does_not_change_a_bit(tmp_path: Path) -> None:
    base = {k: v for k, v in network().items() if not v.is_complex() and v.numel()}
    states = network(1, near=base), network(2, near=base)
    made = []
    for ranks in (1, 2, 3):
        paths = [save_checkpoint(state, tmp_path / f"{ranks}-{i}", ranks) for i, state in enumerate(states)]
        output = tmp_path / f"out{ranks}"
        merge(config(tmp_path, "ccm", paths, parameters=HALF), output, out_shard_size="2KB")
        assert damage(output) is None
        made.append({path.name: path.read_bytes() for path in output.glob("*.safetensors")})
    assert len(made[0]) > 1
    assert made[0] == made[1] == made[2]
    reader = CheckpointReader(tmp_path / "out2")
    assert reader.state["step"] == 7
    expected = 0.25 * states[0]["lift.weight"] + 0.75 * states[1]["lift.weight"]
    torch.testing.assert_close(reader.tensor("model/lift.weight"), expected)
    assert all(name.startswith("model/") for name in reader.names())
    # Such an output can be an input again.
    words = {"parameters": {"weight": 1}, "format": "safetensors"}
    again = merged(tmp_path, "linear", [str(tmp_path / "out2")], output="again", **words)
    assert bits(again["lift.weight"]) == bits(reader.tensor("model/lift.weight"))


@pytest.mark.parametrize("mapped", [True, False])
def test_a_merged_state_dict_loads_with_torch(mapped: bool, three: tuple[State, State, State]) -> None:
    plain = merged(Path(), "ccm", models("ccm"), parameters=HALF)
    merge(config(Path(), "ccm", models("ccm"), parameters=HALF, format="pt"), Path("pt"))
    assert same_bits(plain, torch.load("pt/model.pt", weights_only=True, mmap=mapped))


def test_output_dtypes_including_complex128(tmp_path: Path) -> None:
    state = {"z": torch.randn(5, 4, dtype=torch.complex64), "x": torch.randn(9), "i": torch.arange(4)}
    path = save(state, tmp_path / "a.safetensors")
    wide = merged(tmp_path, "linear", [path], parameters={"weight": 1}, dtype="float64")
    assert (wide["x"].dtype, wide["i"].dtype) == (torch.float64, torch.int64)
    # safetensors has no complex128: the real and imaginary parts are a last axis, and the file's metadata says so.
    assert torch.equal(torch.view_as_complex(wide["z"]), state["z"].to(torch.complex128))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["complex128"]) == ["z"]
    back = merged(tmp_path, "linear", [str(tmp_path / "out")], parameters={"weight": 1}, dtype="float32", output="back")
    assert same_bits(back, state)
    narrow = merged(tmp_path, "linear", [path], parameters={"weight": 1}, out_dtype="bfloat16", output="narrow")
    assert (narrow["x"].dtype, narrow["z"].dtype) == (torch.bfloat16, torch.complex64)


def test_the_manifest_has_correct_hashes_and_describes_the_merge(three: tuple[State, State, State]) -> None:
    other = {**three[2], "steps": torch.tensor(9)}
    save(other, Path("high.safetensors"))
    entries = [("low.safetensors", {"coordinate": 1.0}), ("high.safetensors", {"coordinate": 3.0})]
    parameters = {"coordinate": 2.5}
    merge(
        config(Path(), "ccm", entries, base_model="base.safetensors", parameters=parameters),
        Path("out"),
        out_shard_size="2KB",
    )
    manifest = json.loads(Path("out/merge.json").read_text())
    assert manifest["alpha"] == {
        "found": "coordinate",
        "value": 0.5,
        "unclipped": 0.5,
        "coordinate": 2.5,
        "low": 1.0,
        "high": 3.0,
        "clip": 1.5,
    }
    assert {path: one["role"] for path, one in manifest["inputs"].items()} == {
        "base.safetensors": "base",
        "low.safetensors": "low",
        "high.safetensors": "high",
    }
    for path, one in manifest["inputs"].items():
        assert one["files"][path]["sha256"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    for name, one in manifest["outputs"].items():
        assert one["sha256"] == hashlib.sha256((Path("out") / name).read_bytes()).hexdigest()
    assert any("steps" in note and "high.safetensors" in note for note in manifest["notes"])
    assert load(Path("out"))["steps"].item() == 3
    distances = manifest["relative_distance_from_base"].values()
    assert all(0.08 < distance < 0.12 for distance in distances)
    assert abs(manifest["cosine_of_task_vectors"]) < 0.2


def test_a_killed_merge_resumes_and_gives_the_same_files(three: tuple[State, State, State]) -> None:
    path = config(Path(), "ccm", models("ccm"), base_model="base.safetensors", parameters=HALF)
    merge(path, Path("unbroken"), out_shard_size="2KB")
    count = len(list(Path("unbroken").glob("*.safetensors")))
    assert count > 3
    for files in (1, 3):  # the second process resumes the first
        script = str(ROOT / "tests" / "merging" / "killed.py")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        ended = subprocess.run([sys.executable, script, str(path), "again", str(files)], env=environment, timeout=100)
        assert ended.returncode == 9
        assert not Path("again").exists()
        complete = list(Path(".merging-again/records").iterdir())
        assert len(complete) == files
    first = {record.name.removesuffix(".json") for record in complete}
    before = {name: Path(".merging-again/content", name).stat().st_mtime_ns for name in first}
    merge(path, Path("again"), out_shard_size="2KB")
    assert {name: Path("again", name).stat().st_mtime_ns for name in first} == before  # not written again
    assert files_of(Path("again")) == files_of(Path("unbroken"))
    assert not Path(".merging-again").exists()


def test_leftovers_of_a_merge_of_other_inputs_are_not_used(
    three: tuple[State, State, State], capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(Path(), "ccm", models("ccm"), parameters=HALF)
    script = str(ROOT / "tests" / "merging" / "killed.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, script, str(path), "out", "2"], env=environment, timeout=100)
    save(network(5, near=three[0]), Path("low.safetensors"))
    merge(path, Path("out"), out_shard_size="2KB")
    assert "starting over" in capsys.readouterr().out
    assert same_bits(load(Path("out")), merged(Path(), "ccm", models("ccm"), parameters=HALF, output="fresh"))


def test_a_sweep_writes_several_outputs(three: tuple[State, State, State], capsys: pytest.CaptureFixture[str]) -> None:
    path = config(Path(), "ccm", models("ccm"), parameters={}, sweep={"alpha": [-1, 0.5, 1.0]}, output="grid")
    assert [one.name for one in merge(path)] == ["alpha=-1", "alpha=0.5", "alpha=1.0"]
    assert bits(load(Path("grid/alpha=-1"))["double"]) == bits(three[1]["double"])
    alone = merged(Path(), "ccm", models("ccm"), parameters=HALF, output="alone", name="alone.yaml")
    assert same_bits(load(Path("grid/alpha=0.5")), alone)
    # A second merge keeps existing outputs.
    before = Path("grid/alpha=-1/merge.json").stat().st_mtime_ns
    shutil.rmtree("grid/alpha=1.0")
    merge(path)
    assert Path("grid/alpha=-1/merge.json").stat().st_mtime_ns == before
    assert bits(load(Path("grid/alpha=1.0"))["double"]) == bits(three[2]["double"])
    entries = [
        {"name": "soup", "merge_method": "linear", "parameters": {"weight": 0.5}},
        {"name": "narrow", "parameters": HALF, "dtype": "bfloat16"},
    ]
    merge(config(Path(), "ccm", models("ccm"), sweep=entries, output="list"))
    expected = (three[1]["double"] + three[2]["double"]) / 2
    torch.testing.assert_close(load(Path("list/soup"))["double"], expected)
    assert load(Path("list/narrow"))["double"].dtype == torch.bfloat16


def test_processes_share_a_sweep(three: tuple[State, State, State]) -> None:
    path = config(Path(), "ccm", models("ccm"), sweep={"alpha": [-1, 0, 1]}, output="serial")
    merge(path)
    for rank in (1, 0):
        made = merge(path, Path("shared"), rank=rank, size=2)
        assert len(made) == 2 - rank
    assert files_of(Path("shared")) == files_of(Path("serial"))


@pytest.mark.slow
def test_memory_stays_below_the_limit(tmp_path: Path) -> None:
    """Merge 600 MB of inputs, with a tensor of 160 MB, by ties in three passes; in one piece it would need 900 MB."""
    base = {"large": torch.randn(40_000_000), "small": torch.randn(10_000_000)}
    paths = [save(network(i, near=base, distance=0.1 * i), tmp_path / f"{i}.safetensors") for i in range(3)]
    assert peak(config(tmp_path, "ties", paths[1:], base_model=paths[0], parameters=TWO_WEIGHTS), "420MiB") < 420 << 20


@pytest.mark.slow
def test_memory_stays_below_the_limit_where_rows_are_ranked(tmp_path: Path) -> None:
    """DELLA of 240 MB of inputs; with the whole tensor in memory, its two task vectors alone would need 160 MB more."""
    base = {"large": torch.randn(4000, 5000), "bias": torch.randn(100_000)}
    paths = [save(network(i, near=base, distance=0.1 * i), tmp_path / f"{i}.safetensors") for i in range(3)]
    assert peak(config(tmp_path, "della", paths[1:], base_model=paths[0], parameters=TWO_WEIGHTS), "400MiB") < 400 << 20


def peak(config: Path, limit: str) -> int:
    """Merge in a process of its own, and return its largest resident memory in bytes."""
    script = str(ROOT / "tests" / "merging" / "peak.py")
    command = [sys.executable, script, str(config), "--output", str(config.with_name("out")), "--memory-limit", limit]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout.split()[-1])
