"""Send a run to trackers outside its training: its report after the evaluation, or all of it on request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shodh_moe.base.errors import UserError
from shodh_moe.base.records import METRICS, read_run
from shodh_moe.config import TelemetryConfig
from shodh_moe.config.load import load_config
from shodh_moe.config.trackers import LOCAL, with_process
from shodh_moe.trackers.follower import Follower, lock_tracker, reason_of
from shodh_moe.trackers.follower_process import FollowerProcess
from shodh_moe.trackers.sender import Sender
from shodh_moe.trackers.tracker import TrackedRun, make_tracker, require_library

SETTINGS = {"mlflow": "mlflow_uri", "wandb": "wandb_mode"}  # the key that says where a tracker's server is


def send_report(telemetry: TelemetryConfig, run: Path) -> None:
    """Send the report, the evaluation and the records that a tracker lacks. What fails is a warning."""
    tracked = TrackedRun(run, telemetry)
    processes = [FollowerProcess(name, tracked, report=True) for name in with_process(telemetry.trackers)]
    for process in processes:
        process.end(finished=True)
    for process in processes:
        process.wait()


def wait_for_trackers(telemetry: TelemetryConfig, run: Path) -> None:
    """Wait until the processes that send the records of an ended training have ended, which they do by themselves."""
    for name in with_process(telemetry.trackers):
        try:
            lock_tracker(TrackedRun(run, telemetry), name).close()
        except UserError as error:
            print(f"warning: {error}", flush=True)


def track(run: Path, names: Sequence[str] = ()) -> None:
    """Send what trackers lack of a run, which may be in training: records, report, evaluation.

    Args:
        names: trackers; () takes those of the run's config.

    Raises:
        UserError: there is no such run or nothing to send, a library is missing, a server does not take the run, or
            another process sends it.
    """
    if not (run / METRICS).is_file():
        raise UserError(f"{run} has no {METRICS}: give the folder of a run whose training has started")
    telemetry = load_config(run / "config.yaml").telemetry if (run / "config.yaml").is_file() else TelemetryConfig()
    names = list(dict.fromkeys(names or telemetry.trackers))
    for name in names:
        require_library(name)
    tracked = TrackedRun(run, telemetry)
    for name in names:
        if name in LOCAL:
            _write_anew(name, tracked)
    for name in with_process(names):
        _send(name, tracked)


def _write_anew(name: str, run: TrackedRun) -> None:
    """Write the files of a local tracker from all records. TensorBoard then shows only those."""
    records = read_run(run.folder)
    if name == "csv":
        make_tracker(name, replace(run, kept=records))
        return
    for path in (run.folder / "tensorboard").glob("events*"):
        path.unlink()
    sender = Sender(make_tracker(name, run))
    sender.send(records)
    sender.draw_last()


def _send(name: str, run: TrackedRun) -> None:
    try:
        count = Follower(name, run).end(finished=True, report=True)
    except UserError:
        raise
    except Exception as error:  # a tracker's library may raise anything
        raise UserError(
            f"{name} does not take {run.folder} ({reason_of(error)}): check that its server answers, and "
            f"telemetry.{SETTINGS[name]}; what was sent is not sent again"
        ) from error
    print(f"[track] {name}: {count} new records of {run.folder}", flush=True)
