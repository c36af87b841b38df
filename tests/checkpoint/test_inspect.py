"""The table that describes a checkpoint, and the check of every file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.checkpoint.inspect import inspect, verify
from tests.checkpoint.ranks import Ranks

TENSORS = {
    "model/embed.weight": torch.zeros(5, 3),
    "model/blocks.0.moe.experts.down": torch.zeros(4, 2, 2),
    "model/blocks.1.moe.experts.down": torch.zeros(8, 2, 2),
    "exp_avg/embed.weight": torch.zeros(5, 3),
}
FACTS = {"config": {"name": "tiny"}, "ep_size": 2, "zero_stage": 1, "versions": {"torch": "2.13.0", "numpy": "2.3"}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    Ranks(tmp_path / "checkpoints").saved(100, TENSORS).saved(200, TENSORS, **FACTS)
    return tmp_path


def test_the_table_describes_the_checkpoint(run: Path) -> None:
    table = inspect(run)
    assert inspect(run / "checkpoints") == inspect(run / "checkpoints" / "200") == table
    rows = dict(line.strip().split("  ", 1) for line in table.splitlines())
    rows = {label: value.strip() for label, value in rows.items()}
    expected = {
        "checkpoint": str(run / "checkpoints" / "200"),
        "step": "200",
        "config": "tiny",
        "ranks": "2",
        "expert-parallel size": "2",
        "ZeRO stage": "1",
        "tensors": "3 model, 1 exp_avg",
        "parameters": "63",
        "embed": "15",
        "blocks": "48",
        "of these in routed experts": "48",
        "experts by layer": "4, 8",
        "versions": "torch 2.13.0, numpy 2.3",
    }
    assert {label: rows[label] for label in expected} == expected
    sizes = [(run / "checkpoints" / "200" / f"rank_0000{rank}.safetensors").stat().st_size for rank in range(2)]
    assert [int(rows[f"rank_0000{rank}.safetensors"].replace(",", "")) for rank in range(2)] == sizes
    assert int(rows["bytes"].replace(",", "")) == sum(sizes)
    assert rows["written"][:2] == "20"


def test_missing_facts_are_shown_as_not_recorded(run: Path) -> None:
    assert inspect(run / "checkpoints" / "100").count("not recorded") == 3


def test_verify_names_all_damage_in_every_checkpoint(run: Path) -> None:
    assert verify(run) == verify(run / "checkpoints" / "100") == []
    (run / "checkpoints" / "100" / "state.json").unlink()
    (run / "checkpoints" / "200" / "rank_00001.safetensors").write_bytes(b"")
    first, second = verify(run / "checkpoints")
    assert first == f"checkpoint {run / 'checkpoints' / '100'}: state.json is missing"
    assert second.startswith(f"checkpoint {run / 'checkpoints' / '200'}: rank_00001.safetensors has 0 bytes")
    assert verify(run / "checkpoints" / "100") == [first]
    with pytest.raises(UserError, match=r"100 is refused: state.json is missing"):
        inspect(run / "checkpoints" / "100")


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="is not a checkpoint and contains none"):
            inspect(path)
