"""The estimate of data generation: the solver's time steps, the size of the files, and the duration in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.config import DataConfig
from shodh_moe.config.load import load_config
from shodh_moe.config.paths import resolve_paths
from shodh_moe.data import generate
from shodh_moe.data.estimate import cell_updates, format_estimate, time_steps, update_rate, worth_measuring
from shodh_moe.data.generation import flow_devices, on_free_device
from shodh_moe.data.planned import planned_trajectories
from shodh_moe.data.storage import needed_bytes
from shodh_moe.solvers import LatticeBoltzmann, simulate, trajectory_seed
from shodh_moe.solvers.domains import DOMAINS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ONE = {"train": 1, "valid": 1, "test": 1}


@pytest.mark.parametrize("name", DOMAINS)
def test_estimated_time_steps_match_the_solver(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = (16, 8, 24)
    settings: dict[str, Any] = {"spinup_steps": 7, "steps_per_snapshot": 5}
    if name == "porous_media":
        settings["grain"] = 3.0
    domain = DOMAINS[name].model_validate(settings)
    made = 0
    advance = LatticeBoltzmann._advance

    def counted(self: Any, force_T3: Any, *arguments: Any) -> None:
        nonlocal made
        made += len(np.asarray(force_T3).reshape(-1, 3))
        advance(self, force_T3, *arguments)

    monkeypatch.setattr(LatticeBoltzmann, "_advance", counted)
    simulate(name, domain, grid, 0, 0, 3)
    setup = domain.setup(grid, np.random.default_rng(trajectory_seed(0, name, 0)))
    assert time_steps(domain, setup, grid, 3) == made


def test_estimated_disk_space_covers_the_files(tmp_path: Path) -> None:
    flow = {"trajectories": ONE, "spinup_steps": 2, "steps_per_snapshot": 2}
    domains = {"open_channel": flow, "porous_media": None}
    config = DataConfig.model_validate({"grid": [16, 16, 16], "snapshots": 5, "domains": domains})
    generate(config, tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size <= needed_bytes(3, config) <= 1.5 * size + 2**20


def test_the_full_config_generates_the_dataset_of_the_cluster_config() -> None:
    full, cluster = (load_config(CONFIGS / f"{name}.yaml") for name in ("data/full", "cluster_8x8"))
    assert resolve_paths(full).dataset == resolve_paths(cluster).dataset
    assert full.data == cluster.data


def test_estimate_line_of_the_full_dataset(tmp_path: Path) -> None:
    config = load_config(CONFIGS / "data" / "full.yaml").data
    jobs = planned_trajectories(config, tmp_path)
    assert worth_measuring(jobs, config, ["cpu"])
    assert not worth_measuring(jobs, config, ["cuda:0"])
    line = format_estimate(jobs, len(jobs), config, tmp_path, 1, 1e7, "on these 2 cores")
    hours = cell_updates(jobs, config) / 1e7 / 3600
    assert (
        f"1,220 trajectories, 61,000 snapshots of 128^3: about {hours / 24:.1f} days on these 2 cores, 2.06 TB ("
        in line
    )
    # 10 trajectories, three at a time, take four rounds; two cores are idle in the last one.
    share = cell_updates(jobs[:10], config) / 1e9 / 60 * 12 / 10
    line = format_estimate(jobs[:10], len(jobs), config, tmp_path, 3, 1e9, "on these 3 cores")
    assert line.startswith(
        f"10 of 1,220 trajectories, 500 snapshots of 128^3: about {share:.1f} minutes on these 3 cores"
    )
    assert "on this GPU: the progress will show how long, " in format_estimate(
        jobs, 1220, config, tmp_path, 1, None, "on this GPU"
    )


@pytest.mark.parametrize("flows", [1, 2])
def test_the_update_rate_is_measured(flows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shodh_moe.data.estimate._SECONDS", 0.02)
    config = DataConfig.model_validate({"grid": [16, 16, 16], "snapshots": 5})
    assert 1e4 < update_rate(config, flows, 1) < 1e11


# Devices.


class DeviceConfig:
    """Stands for a config with the key `device` set."""

    def __init__(self, device: str):
        self.device, self.grid = device, [16, 16, 16]


@pytest.mark.parametrize(
    ("device", "gpus", "rank", "expected"),
    [
        ("cpu", 4, None, ["cpu"] * 3),
        ("auto", 0, 5, ["cpu"] * 3),
        ("auto", 2, None, ["cuda:0", "cuda:1"]),
        ("cuda", 2, 0, ["cuda:0"]),
        ("cuda", 2, 3, ["cuda:1"]),
    ],
)
def test_each_gpu_simulates_one_flow_at_a_time(
    monkeypatch: pytest.MonkeyPatch, device: str, gpus: int, rank: int | None, expected: list[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    config: Any = DeviceConfig(device)
    assert flow_devices(config, 3, rank) == expected


def test_a_missing_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    config: Any = DeviceConfig("cuda")
    with pytest.raises(UserError, match=r"data\.device is cuda, but"):
        flow_devices(config, 3)


def test_no_two_jobs_share_a_device() -> None:
    taken: list[str] = []
    work = on_free_device(lambda job, device: taken.append(device) or Path(job), ["cuda:0", "cuda:1"])
    assert [str(work(job)) for job in "abc"] == ["a", "b", "c"]
    assert taken == ["cuda:0", "cuda:1", "cuda:0"]
