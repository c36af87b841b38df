"""Ranks that differ at the start all end soon with the same message; ranks that agree form a process group."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shodh_moe.base.errors import UserError
from shodh_moe.base.network import free_port
from shodh_moe.parallel.rendezvous import agree, join, versions
from tests.forked import context

FACTS = {"training.batch_size": 16, "model.dim": 128, "data.grid": [32, 32, 32]}


def _agree_on_ranks(
    worlds: list[int], ranks: list[int] | None = None, facts: dict[int, Any] | None = None
) -> list[str]:
    """Return the error of `agree` on each of several ranks that share a store, "" without an error."""
    store = dist.HashStore()

    def one(number: int) -> str:
        rank = ranks[number] if ranks else number
        try:
            agree(store, rank, worlds[number], FACTS | (facts or {}).get(number, {}), timeout_seconds=1.0)
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(worlds)) as pool:
        return list(pool.map(one, range(len(worlds))))


def test_equal_facts_pass():
    assert _agree_on_ranks([3, 3, 3]) == ["", "", ""]


def test_a_difference_names_key_ranks_and_values_on_every_rank():
    messages = _agree_on_ranks([4] * 4, facts={3: {"training.batch_size": 8, "model.dim": 64}})
    expected = "ranks disagree on training.batch_size: 16 on ranks 0-2, 8 on rank 3 (and on model.dim): "
    assert messages == [expected + "start every rank with the same config"] * 4


def test_a_key_that_one_rank_lacks_is_a_difference():
    messages = _agree_on_ranks([2, 2], facts={1: {"telemetry.every": 10}})
    assert all(
        text.startswith("ranks disagree on telemetry.every: nothing on rank 0, 10 on rank 1") for text in messages
    )
    assert len(messages) == 2


def test_a_list_and_a_tuple_are_the_same_fact():
    assert _agree_on_ranks([2, 2], facts={1: {"data.grid": (32, 32, 32)}}) == ["", ""]


@pytest.mark.parametrize(
    ("worlds", "values"),
    [
        ([2, 2, 3], "2 on ranks 0-1, 3 on rank 2"),
        ([2, 3], "2 on rank 0, 3 on rank 1"),
        ([3, 2], "3 on rank 0, 2 on rank 1"),
    ],
)
def test_differing_world_sizes(worlds, values):
    """The last rank is always told, even if the others have started without waiting for it."""
    messages = _agree_on_ranks(worlds)
    assert all(f"ranks disagree on WORLD_SIZE: {values}" in text for text in messages if text)
    assert messages[-1]


def test_a_rank_that_arrives_after_a_smaller_world_has_started_is_refused():
    store = dist.HashStore()
    agree(store, 0, 1, FACTS, 1.0)
    with pytest.raises(UserError, match="ranks disagree on WORLD_SIZE: 1 on rank 0, 2 on rank 1"):
        agree(store, 1, 2, FACTS, 1.0)


def test_missing_ranks_are_named():
    messages = _agree_on_ranks([4, 4], ranks=[0, 2])
    assert len(messages) == 2
    assert all(text.startswith("ranks 1, 3 of 4 did not arrive within 1 s") for text in messages)


def test_a_rank_that_was_started_twice_is_named():
    messages = _agree_on_ranks([3, 3, 3, 3], ranks=[0, 1, 1, 2])
    assert any("rank 1 was started more than once" in text for text in messages)


def test_a_rank_beyond_the_world_size_is_named():
    messages = _agree_on_ranks([2, 2], ranks=[0, 2])
    assert all("rank 2 cannot be part of a WORLD_SIZE of 2" in text for text in messages)


@pytest.mark.parametrize(("variable", "value"), [("RANK", "first"), ("WORLD_SIZE", "")])
def test_variables_that_are_not_numbers(monkeypatch, variable, value):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"variable {variable} is '{value}'"):
        join("gloo", FACTS, 1.0)


# Real processes.


def _process(rank: int, world: int, port: int, facts: dict[str, Any], timeout: float, result: str) -> None:
    variables = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in variables.items()})
    outcome: dict[str, Any] = {}
    try:
        join("gloo", FACTS | facts, timeout)
        join("gloo", FACTS | facts, timeout)  # a second call changes nothing
        total = torch.tensor([float(rank)])
        dist.all_reduce(total)
        outcome["sum"] = float(total)
        dist.destroy_process_group()
    except UserError as error:
        outcome["error"] = str(error)
    Path(result).write_text(json.dumps(outcome), encoding="utf-8")


def _processes(
    folder: Path, worlds: list[int], facts: dict[int, Any] | None = None, timeout: float = 30.0, absent: int = -1
) -> list[dict[str, Any]]:
    """Return the outcome of each rank; all must end well before the timeout unless one is absent."""
    port, present = free_port(), [rank for rank in range(len(worlds)) if rank != absent]
    files = {rank: folder / f"{rank}.json" for rank in present}
    processes = [
        context().Process(
            target=_process, args=(rank, worlds[rank], port, (facts or {}).get(rank, {}), timeout, str(files[rank]))
        )
        for rank in present
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + 40
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging
    return [json.loads(file.read_text(encoding="utf-8")) for file in files.values()]


@pytest.mark.distributed
def test_processes_that_agree_form_a_group(tmp_path):
    assert _processes(tmp_path, [3, 3, 3]) == [{"sum": 3.0}] * 3


@pytest.mark.distributed
def test_processes_with_different_configs_all_end_with_the_same_message(tmp_path):
    began = time.monotonic()
    outcomes = _processes(tmp_path, [3, 3, 3], {0: {"training.batch_size": 8}})
    message = (
        "ranks disagree on training.batch_size: 8 on rank 0, 16 on ranks 1-2: start every rank with the same config"
    )
    assert outcomes == [{"error": message}] * 3
    assert time.monotonic() - began < 25  # less than the time they would wait for a rank


@pytest.mark.distributed
def test_processes_with_different_library_versions(tmp_path):
    outcomes = _processes(tmp_path, [2, 2], {1: {"version of torch": "2.8.0"}})
    own = versions()["torch"]
    for outcome in outcomes:
        assert f'ranks disagree on version of torch: "{own}" on rank 0, "2.8.0" on rank 1' in outcome["error"]
        assert "install" in outcome["error"]


@pytest.mark.distributed
def test_processes_with_different_world_sizes(tmp_path):
    outcomes = _processes(tmp_path, [3, 2])
    assert [o["error"].partition(": start")[0] for o in outcomes] == [
        "ranks disagree on WORLD_SIZE: 3 on rank 0, 2 on rank 1"
    ] * 2


@pytest.mark.distributed
@pytest.mark.parametrize("absent", [0, 2])
def test_a_process_that_does_not_arrive_is_named(tmp_path, absent):
    outcomes = _processes(tmp_path, [3, 3, 3], timeout=2.0, absent=absent)
    assert len(outcomes) == 2
    for outcome in outcomes:
        assert outcome["error"].startswith(f"rank {absent} of 3 did not arrive")
        assert "within 2 s" in outcome["error"]
