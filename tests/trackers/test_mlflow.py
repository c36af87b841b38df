"""MLflow on a real server, which also dies and hangs, and as a database in the run folder."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shodh_moe.cli import main
from shodh_moe.config import TelemetryConfig
from shodh_moe.runs.track import send_report, wait_for_trackers
from shodh_moe.training.log import Log
from tests.tiny import refused
from tests.trackers.runs import add_results, make_run, record
from tests.trackers.servers import Server
from tests.training.launch import launch
from tests.training.synthetic import write_case

mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed, so its tracker is not tested")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
Capture = pytest.CaptureFixture[str]
WORKER = Path(__file__).parents[1] / "training" / "worker_pretrain.py"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.kill()


def telemetry(uri: str | None) -> TelemetryConfig:
    return TelemetryConfig(trackers=["mlflow"], mlflow_uri=uri)


def client(uri: str) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(tracking_uri=uri)


def runs_of(uri: str) -> list[mlflow.entities.Run]:
    experiment = client(uri).get_experiment_by_name("shodh_moe")
    return list(client(uri).search_runs([experiment.experiment_id])) if experiment else []


def steps_of(uri: str, run_id: str, name: str) -> list[int]:
    return sorted(metric.step for metric in client(uri).get_metric_history(run_id, name))


def test_a_resumed_run_is_the_same_tracked_run(server: Server, tmp_path: Path) -> None:
    run = make_run(tmp_path / "small")
    before = {found.info.run_id for found in runs_of(server.uri)}
    with Log(run, 0, telemetry(server.uri)) as log:
        for step in (3, 6, 9):
            log.write(record(step))
        log.write(record(9, "valid"))
    wait_for_trackers(telemetry(server.uri), run)
    (found,) = [one for one in runs_of(server.uri) if one.info.run_id not in before]
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "small"
    assert found.data.params["training.steps"] == "7"
    assert found.data.tags["mlflow.source.git.commit"] == "0123abc"
    with Log(run, 6, telemetry(server.uri)) as log:  # from the checkpoint of step 6
        for step in (9, 12):
            log.write(record(step))
    wait_for_trackers(telemetry(server.uri), run)
    (again,) = [one for one in runs_of(server.uri) if one.info.run_id not in before]
    assert again.info.run_id == found.info.run_id
    assert steps_of(server.uri, found.info.run_id, "train/loss") == [3, 6, 9, 12]
    assert steps_of(server.uri, found.info.run_id, "valid/latent_mse/calm") == [9]
    assert again.data.metrics["routing_load/layer_0/calm/expert_1"] == 0.75
    add_results(run)
    send_report(telemetry(server.uri), run)
    (last,) = [one for one in runs_of(server.uri) if one.info.run_id not in before]
    assert last.data.metrics["evaluation/calm/latent_mse"] == 0.125
    folder = Path(client(server.uri).download_artifacts(found.info.run_id, "", str(tmp_path)))
    for name in ("config.yaml", "environment.json", "metrics.json", "report/index.html", "report/losses.png"):
        assert (folder / name).read_bytes() == (run / name).read_bytes()
    assert (folder / "routing_load_map/layer_0/calm.png").is_file()


def test_a_server_that_is_killed_stops_no_training(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Ranks train; the server is killed on the way; a later start of it gets what is missing."""
    folder, run = write_case(tmp_path / "case"), tmp_path / "small"
    settings = ("training.steps=400", "training.log_every=1", "training.checkpoint_every=400")
    settings += ("training.validate_every=400", "telemetry.trackers=[mlflow]", f"telemetry.mlflow_uri={server.uri}")
    path = run / "trackers/mlflow.json"

    def kill_when_sent() -> None:
        while not path.exists() or not json.loads(path.read_text())["sent"]:
            time.sleep(0.01)
        server.kill()

    killer = threading.Thread(target=kill_when_sent, daemon=True)
    killer.start()
    try:
        done = launch(2, WORKER, str(folder), str(run), "auto", *settings, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
        killer.join(1)
        assert not killer.is_alive()
        warnings = [line for line in done.stdout.splitlines() if line.startswith("warning: mlflow: ")]
        assert len(warnings) == 1, done.stdout + done.stderr
        assert f"`shodh track {run.resolve()}`" in warnings[0]
        wait_for_trackers(telemetry(server.uri), run)
        state = json.loads(path.read_text())
        assert 0 < state["sent"]["train"] < 400
        (run / "config.yaml").write_text(json.dumps({"telemetry": telemetry(server.uri).model_dump()}))
        refused(capfd, "track", str(run), says=("mlflow does not take", "telemetry.mlflow_uri"))
    finally:
        server.start()
    assert main(["track", str(run)]) == 0
    assert steps_of(server.uri, state["id"], "train/loss") == list(range(1, 401))


def test_a_server_that_hangs_delays_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    run = make_run(tmp_path / "small")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        log = Log(run, 0, telemetry(f"http://127.0.0.1:{silent.getsockname()[1]}"))
        longest = 0.0
        for step in range(1, 50):
            began = time.perf_counter()
            log.write(record(step))
            longest = max(longest, time.perf_counter() - began)
            time.sleep(0.02)
        log.close()
    assert longest < 0.5
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 49


def test_without_a_server_the_run_folder_has_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = make_run(tmp_path / "small")
    (run / "metrics.jsonl").write_text("".join(json.dumps(record(step)) + "\n" for step in (1, 2)))
    assert main(["track", str(run), "--to", "mlflow"]) == 0
    uri = f"sqlite:///{run.resolve()}/trackers/mlflow/mlflow.db"
    (found,) = runs_of(uri)
    assert steps_of(uri, found.info.run_id, "train/loss") == [1, 2]
    assert list(run.glob("trackers/mlflow/artifacts/**/config.yaml"))
