"""Reading the records of a run: repeated steps of a resumed run, half a line of a killed run, a damaged line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.base.records import Tail, read_history, records


def _lines(*found: dict[str, Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in found)


def test_repeated_steps_of_a_resumed_run_replace_the_old_records(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    killed = [{"kind": "train", "step": step, "loss": 9.0} for step in (10, 20, 30)]
    resumed = [{"kind": "valid", "step": 20}, *({"kind": "train", "step": step, "loss": 1.0} for step in (20, 30))]
    path.write_text(_lines(*killed, *resumed))
    train = records(read_history(path), "train")
    assert [(record["step"], record["loss"]) for record in train] == [(10, 9.0), (20, 1.0), (30, 1.0)]
    assert records(read_history(path), "valid") == [{"kind": "valid", "step": 20}]


def test_an_incomplete_last_line_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(_lines({"kind": "train", "step": 1}) + '{"kind": "tra')
    assert read_history(path) == [{"kind": "train", "step": 1}]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("not JSON\n" + _lines({"kind": "train", "step": 1}))
    with pytest.raises(UserError, match=r"metrics\.jsonl line 1 is not JSON .*: repair or remove that line"):
        read_history(path)


def test_a_tail_reads_whole_lines_once_and_a_new_file_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    path.write_text('{"step": 1}\n{"step"')
    assert tail.read() == [{"step": 1}]
    with open(path, "a") as file:
        file.write(": 2}\n")
    assert tail.read() == [{"step": 2}]
    assert tail.read() == []
    (tmp_path / "new").write_text('{"step": 1}\n{"step": 5}\n{"step": 6}\n')
    (tmp_path / "new").replace(path)
    assert tail.read() == [{"step": 1}, {"step": 5}, {"step": 6}]
    with open(path, "a") as file:
        file.write("half a line\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl has a line that is not JSON"):
        tail.read()
