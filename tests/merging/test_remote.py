"""Merges of models on an object server."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.merging import merge
from tests.merging.models import config, merged, network, same_bits, save, save_checkpoint
from tests.merging.test_inputs import sharded
from tests.object_server import ObjectServer, fresh_bucket


@pytest.fixture
def bucket(store: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectServer:
    monkeypatch.chdir(tmp_path)
    fresh_bucket(store, tmp_path, monkeypatch)
    return store


def put(path: str | Path) -> None:
    fsspec.filesystem("s3", skip_instance_cache=True).put(str(path), f"bucket/{path}", recursive=Path(path).is_dir())


def test_every_kind_of_remote_input_merges_like_a_local_one(bucket: ObjectServer) -> None:
    base = network()
    low, high = network(1, near=base), network(2, near=base)
    save(low, Path("low.safetensors"))
    sharded(Path("high"), high, "pytorch_model.bin.index.json", ".bin")
    local = merged(Path(), "ccm", ["low.safetensors", "high"], parameters={"alpha": 0.3}, output="local")
    Path("high/large.npz").write_bytes(bytes(1000))  # not needed, so not transferred
    torch.save(low, "low.ckpt")
    for name in ("low.safetensors", "low.ckpt", "high"):
        put(name)
    bucket.reset()
    pairs = [
        ["s3://bucket/low.safetensors", "s3://bucket/high"],
        ["s3://bucket/low.ckpt", "s3://bucket/high/pytorch_model.bin.index.json"],
        ["s3://bucket/low.ckpt", "high"],
    ]
    for number, pair in enumerate(pairs):
        made = merged(Path(), "ccm", pair, parameters={"alpha": 0.3}, output=f"out{number}")
        assert same_bits(made, local)
        manifest = json.loads(Path(f"out{number}/merge.json").read_text())
        assert set(manifest["inputs"]) == set(pair)
    assert not any("large.npz" in request for request in bucket.requests)
    assert bucket.sent["/bucket/low.safetensors"] == Path("low.safetensors").stat().st_size
    # A merge that is made already is recognised by the cached copies.
    merge(config(Path(), "ccm", pairs[0], parameters={"alpha": 0.3}), Path("out0"))


def test_remote_checkpoints(bucket: ObjectServer) -> None:
    base = {"w": torch.randn(50)}
    paths = [save_checkpoint(network(i, near=base), Path(f"run{i}"), 2) for i in (0, 1)]
    local = merged(Path(), "ccm", paths, parameters={"alpha": 0.3}, output="local", format="safetensors")
    for path in paths:
        put(path)
    remote = [f"s3://bucket/{path}" for path in paths]
    assert same_bits(
        merged(Path(), "ccm", remote, parameters={"alpha": 0.3}, output="out", format="safetensors"), local
    )
    file = Path(paths[1], "rank_00001.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    put(file)
    with pytest.raises(UserError, match=r"checkpoint s3://bucket/run1/7 is refused: rank_00001.safetensors does not"):
        merged(Path(), "ccm", remote, parameters={"alpha": 0.3}, output="out2", format="safetensors")


def test_remote_models_that_are_not_there_and_remote_outputs(bucket: ObjectServer) -> None:
    save(network(), Path("low.safetensors"))
    with pytest.raises(UserError, match=r"s3://bucket/absent does not exist"):
        merged(Path(), "linear", ["s3://bucket/absent"], parameters={"weight": 1})
    Path("low.safetensors").rename("whole.safetensors")
    Path("low.safetensors").write_bytes(Path("whole.safetensors").read_bytes()[:-10])
    Path("folder").mkdir()
    Path("folder/model.safetensors").write_bytes(Path("low.safetensors").read_bytes())
    put("low.safetensors")
    put("folder")
    for path in ("low.safetensors", "folder"):
        with pytest.raises(UserError, match=r"^s3://bucket/\S*\.safetensors is truncated"):
            merged(Path(), "linear", [f"s3://bucket/{path}"], parameters={"weight": 1})
    Path("whole.safetensors").replace("low.safetensors")
    Path("empty").mkdir()
    Path("empty/notes.txt").touch()
    put("empty")
    with pytest.raises(UserError, match=r"s3://bucket/empty holds no model"):
        merged(Path(), "linear", ["s3://bucket/empty"], parameters={"weight": 1})
    path = config(Path(), "linear", ["low.safetensors"], parameters={"weight": 1}, output="s3://bucket/out")
    with pytest.raises(UserError, match=r"the output s3:/bucket/out is a URL"):
        merge(path)
    assert not Path("s3:").exists()
