"""The jobs of an audit or benchmark in its folder: what they run, and where their output and run times are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from shodh_moe.base.files import write_text
from shodh_moe.config.run import RunConfig
from shodh_moe.launching.jobs import ProcessJob, read_cost

COST = "cost"  # folder of the run times


def job_in(folder: Path, name: str, arguments: list[str], **more: Any) -> ProcessJob:
    """A job with its output in ``folder``/logs and its run times in ``folder``/cost; ``more`` as in `ProcessJob`."""
    return ProcessJob(name, arguments, folder / "logs" / f"{name}.log", folder / COST / f"{name}.json", **more)


def cost_of(folder: Path, name: str) -> dict[str, float]:
    """Run times of a job of `job_in`, see `read_cost`."""
    return read_cost(folder / COST / f"{name}.json")


def cpu_seconds(folder: Path) -> float:
    """Processor time of all jobs of `job_in` together."""
    return sum(read_cost(path)["cpu_seconds"] for path in (folder / COST).glob("*.json"))


def training_job(folder: Path, config: RunConfig, **more: Any) -> ProcessJob:
    """A job that pretrains a config, which is written to ``folder``/configs."""
    path = write_config(folder, config)
    return job_in(folder, config.name, ["-m", "shodh_moe.runs.pretrain_rank", "--config", str(path)], **more)


def write_config(folder: Path, config: RunConfig) -> Path:
    """Write a config to ``folder``/configs, and return the file."""
    path = folder / "configs" / f"{config.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(config.model_dump(), sort_keys=False))
    return path
