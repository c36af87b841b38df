"""Checkpoint folders: whole or absent, refused when damaged, cut along the expert axis."""

from __future__ import annotations

import json

import pytest
import torch

from shodh_moe.errors import UserError
from shodh_moe.parallel import ExpertParallel
from shodh_moe.training import checkpoint
from shodh_moe.training.checkpoint import find_checkpoint, list_checkpoints, shard_experts, write_checkpoint


def _write(folder, step: int) -> None:
    write_checkpoint(folder, step, {"model.safetensors": {"w": torch.full((3,), float(step))}}, {"config": {}})


def test_newest_intact_checkpoint_is_found(tmp_path):
    assert find_checkpoint(tmp_path / "none") is None
    for step in (9, 10):
        _write(tmp_path, step)
    path, state = find_checkpoint(tmp_path)
    assert path.name == "10"
    assert state["step"] == 10
    assert (tmp_path / "latest").read_text() == "10\n"


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "state"])
def test_damage_is_named_and_the_one_before_used(tmp_path, capsys, damage):
    for step in (1, 2):
        _write(tmp_path, step)
    weights, state = tmp_path / "2" / "model.safetensors", tmp_path / "2" / "state.json"
    if damage == "flip":
        data = bytearray(weights.read_bytes())
        data[-2] ^= 4
        weights.write_bytes(data)
    elif damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-4])
    elif damage == "remove":
        weights.unlink()
    else:
        state.write_text("{")
    assert find_checkpoint(tmp_path)[0].name == "1"
    assert f"checkpoint {tmp_path / '2'} is refused" in capsys.readouterr().out


def test_only_damaged_checkpoints_is_an_error_not_a_silent_restart(tmp_path):
    _write(tmp_path, 1)
    (tmp_path / "1" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        find_checkpoint(tmp_path)


def test_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    _write(tmp_path, 1)

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"cannot write .*2.*no space left"):
        _write(tmp_path, 2)
    assert list_checkpoints(tmp_path) == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "latest"]
    assert json.loads((tmp_path / "1" / "state.json").read_text())["step"] == 1


def test_shards_are_consecutive_blocks_of_the_expert_axis():
    tensors = {"a.experts.w": torch.arange(8).view(4, 2), "a.experts.w/step": torch.tensor(3.0), "b": torch.ones(5)}
    shard = shard_experts(tensors, ExpertParallel(size=2, rank=1))
    assert shard["a.experts.w"].tolist() == [[4, 5], [6, 7]]
    assert shard["b"].shape == (5,)
    assert shard["a.experts.w/step"].item() == 3.0
