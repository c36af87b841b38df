"""A training leaves nothing behind however it ends, so that another can start in the same process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shodh_moe.base.network import free_port
from tests.training.launch import launch
from tests.training.synthetic import write_case

# The outcomes on rank 0 and on rank 1.
ENDINGS = {
    "a step raises": ("RuntimeError: of a step",) * 2,
    "a step exits": ("SystemExit: 7",) * 2,
    "rank 0 refuses": ("UserError: checkpoint {folder}/nowhere is refused: it does not exist", "SystemExit: 2"),
    "a signal": ("SystemExit: 75",) * 2,
    "to the end": ("done",) * 2,
}


@pytest.mark.distributed
def test_lock_log_watchdog_and_process_group_are_closed_on_every_exit_path(tmp_path: Path) -> None:
    folder = write_case(tmp_path / "case")
    ports = [str(free_port()) for _ in ENDINGS]
    done = launch(2, Path(__file__).with_name("worker_endings.py"), str(folder), *ports)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in (0, 1):
        found = json.loads((folder / f"endings_{rank}.json").read_text())
        assert found.keys() == ENDINGS.keys()
        for name, ending in found.items():
            assert ending["outcome"] == ENDINGS[name][rank].format(folder=folder), name
            assert not ending["in a group"], name
            assert ending["open logs"] == 0, name
            assert ending["sentinels"] == 0, name
            assert ending["handlers restored"], name
            assert not ending.get("locked", False), name
        assert found["to the end"]["logs"] == (4 if rank == 0 else 0), "the refused start opens none"
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 7))
