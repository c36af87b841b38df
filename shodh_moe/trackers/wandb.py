"""W&B: its server, or files in the run folder that `wandb sync` sends later."""

from __future__ import annotations

import netrc
import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from shodh_moe.trackers.facts import commit_of, settings_of, start_files
from shodh_moe.trackers.state import load_state
from shodh_moe.trackers.tracker import Point, TrackedRun

SERVER = "https://api.wandb.ai"
CONNECT_S, START_S = 3.0, 30.0


class WandB:
    """A run of a W&B project. Offline it is kept in ``trackers/wandb/`` of the run folder, a folder for each start."""

    def __init__(self, run: TrackedRun):
        os.environ.setdefault("WANDB_SILENT", "true")  # its messages would hide ours
        import wandb

        folder = run.own_folder / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        mode, project = _mode(run.telemetry.wandb_mode), run.telemetry.wandb_project
        state = load_state(run, "wandb")
        if state.where != project or not state.id:
            state.begin(project, uuid.uuid4().hex[:12])
        commit = commit_of(run.folder)
        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, x_disable_stats=True, init_timeout=START_S,
            **({"git_commit": commit} if commit else {}),
        )  # fmt: skip
        self._wandb = wandb
        self._run = wandb.init(
            project=project,
            id=state.id,
            name=run.name,
            dir=str(folder),
            mode=mode,
            resume="allow" if mode == "online" else None,  # offline, `wandb sync` joins the starts by their id
            config={**settings_of(run.folder), "git_commit": commit},
            settings=settings,
        )
        for path in start_files(run.folder):
            self._run.save(str(path), base_path=str(run.folder), policy="now")
        self._folder = run.folder

    def add(self, points: Sequence[Point]) -> None:
        for step, scalars in points:
            self._run.log(dict(scalars), step=step)

    def add_images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        self._run.log({name: self._wandb.Image(image) for name, image in images.items()}, step=step)

    def add_report(self, results: Point, files: list[Path]) -> None:
        self._run.summary.update(dict(results[1]))
        pictures = [path for path in files if path.suffix == ".png"]
        self._run.log({f"report/{path.stem}": self._wandb.Image(str(path)) for path in pictures})
        for path in files:
            self._run.save(str(path), base_path=str(self._folder), policy="now")

    def close(self, finished: bool = True) -> None:
        self._run.finish(exit_code=0 if finished else 1)


def _mode(wanted: str) -> str:
    """Return online or offline. WANDB_MODE decides over auto, as everywhere in W&B."""
    if wanted != "auto":
        return wanted
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"]
    server = urlsplit(os.environ.get("WANDB_BASE_URL", SERVER))
    return "online" if _has_key(server.hostname or "") and _answers(server.hostname, server.port) else "offline"


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False


def _answers(host: str | None, port: int | None) -> bool:
    try:
        socket.create_connection((host or "", port or 443), timeout=CONNECT_S).close()
    except OSError:
        return False
    return True
