"""W&B offline, as its files in the run folder say, and a server that cannot be reached."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from shodh_moe.config import TelemetryConfig
from shodh_moe.runs.track import send_report, wait_for_trackers
from shodh_moe.trackers.wandb import _mode
from shodh_moe.training.log import Log
from tests.tiny import refused
from tests.trackers.runs import add_results, make_run, record

pytest.importorskip("wandb", reason="wandb is not installed, so its tracker is not tested")
OFFLINE = TelemetryConfig(trackers=["wandb"], wandb_mode="offline")


def blocks_of(content: bytes) -> Iterator[bytes]:
    """Yield the records of a .wandb file: LevelDB's log format, blocks of 32 KiB behind a header of 7 bytes."""
    whole, place = b"", 7
    while place + 7 <= len(content):
        room = 32768 - place % 32768
        if room < 7:  # too little for the header of a part
            place += room
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def read(path: Path) -> tuple[str, dict[str, str], list[tuple[int, float]]]:
    """Return the id, the config and the losses by step that a .wandb file holds."""
    from wandb.proto.wandb_internal_pb2 import Record

    run_id, config, losses = "", {}, []
    for data in blocks_of(path.read_bytes()):
        found = Record()
        found.ParseFromString(data)
        if found.HasField("run"):
            run_id = found.run.run_id
            config |= {item.key: item.value_json for item in found.run.config.update}
        items = {item.key or "/".join(item.nested_key): item.value_json for item in found.history.item}
        if "train/loss" in items:
            losses.append((int(items["_step"]), float(items["train/loss"])))
    return run_id, config, losses


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_starts_of_a_run_are_one_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "small")
    with Log(run, 0, OFFLINE) as log:
        for step in (1, 2):
            log.write(record(step))
    wait_for_trackers(OFFLINE, run)
    with Log(run, 2, OFFLINE) as log:
        log.write(record(4))
    wait_for_trackers(OFFLINE, run)
    add_results(run)
    send_report(OFFLINE, run)
    log_text = (run / "trackers/wandb.log").read_text()
    found = [read(path) for path in sorted(run.glob("trackers/wandb/wandb/offline-run-*/*.wandb"))]
    assert len(found) == 3, log_text
    assert {run_id for run_id, _, _ in found} == {json.loads((run / "trackers/wandb.json").read_text())["id"]}
    assert [losses for _, _, losses in found] == [[(1, 1.0), (2, 0.5)], [(4, 0.25)], []]
    assert found[0][1]["training.steps"] == "7"
    assert found[0][1]["git_commit"] == '"0123abc"'
    for name in ("config.yaml", "report/index.html"):
        assert list(run.glob(f"trackers/wandb/wandb/offline-run-*/files/{name}"))


def test_the_mode_follows_key_and_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert _mode("auto") == "offline"  # no key
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    assert _mode("auto") == "offline"  # no network
    assert _mode("online") == "online"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert _mode("auto") == "online"


@pytest.mark.slow
def test_a_server_that_cannot_be_reached_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr("shodh_moe.trackers.wandb.START_S", 3.0)
    run = make_run(tmp_path / "small")
    (run / "config.yaml").write_text("telemetry: {wandb_mode: online}\n")
    (run / "metrics.jsonl").write_text(json.dumps(record(1)) + "\n")
    refused(capfd, "track", str(run), "--to", "wandb", says=("wandb does not take", "telemetry.wandb_mode"))
