"""A config and a dataset so small that every stage takes seconds, and a helper for refused `shodh` commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from shodh_moe.cli import main
from shodh_moe.config import Config
from shodh_moe.data import compute_stats, list_trajectories, read_trajectory, write_stats, write_trajectory
from shodh_moe.solvers import Simulation

GRID = (16, 16, 16)
FLOW = {"trajectories": {"train": 2, "valid": 1, "test": 1}, "spinup_steps": 4, "steps_per_snapshot": 4}
# A router in each layer, a shared expert, and tokens that are dropped: not the defaults, but most things can happen.
LAYER: dict[str, Any] = {"scope": "layer", "shared_experts": 1, "dropless": False}
CONFIG: dict[str, Any] = {
    "name": "tiny",
    "data": {
        "name": "tiny",
        "grid": list(GRID),
        "snapshots": 5,
        "domains": {"open_channel": FLOW, "porous_media": {**FLOW, "grain": 3.0}},
    },
    "tokenizer": {
        "latent_channels": 16,
        "widths": [8, 8, 8],
        "steps": 3,
        "batch_size": 4,
        "checkpoint_every": 2,
        "log_every": 2,
        "latent_copies": 2,
    },
    "model": {"dim": 24, "depth": 2, "heads": 2, "moe": {"expert_hidden": 16}},
    "training": {"steps": 4, "batch_size": 4, "warmup_steps": 1, "checkpoint_every": 2, "log_every": 1},
    "parallel": {"processes": 2},
    "evaluation": {"rollout_steps": 2},
}


def config(**sections: Any) -> Config:
    return Config.model_validate({**CONFIG, **sections})


def write_config(folder: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    return path


def smooth(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random fields made of a few long waves, [*shape]; the last three axes are space."""
    spectrum = np.fft.rfftn(rng.standard_normal(shape), axes=(-3, -2, -1))
    k = np.meshgrid(*[np.fft.fftfreq(n, 1 / n) for n in shape[-3:-1]], np.fft.rfftfreq(shape[-1], 1 / shape[-1]))
    return np.fft.irfftn(spectrum * (np.swapaxes(sum(a**2 for a in k), 0, 1) <= 4), s=shape[-3:], axes=(-3, -2, -1))


def write_dataset(
    folder: Path, grid: tuple[int, int, int] = GRID, snapshots: int = 5, domains: tuple[str, ...] = ("calm", "wild")
) -> Path:
    """Write a dataset as a third party would: one trajectory per split and domain, with statistics."""
    for number, (split, domain) in enumerate((s, d) for s in ("train", "valid", "test") for d in domains):
        rng = np.random.default_rng(number)
        simulation = Simulation(
            velocity_T3XYZ=smooth(rng, snapshots, 3, *grid).astype(np.float32),
            pressure_TXYZ=smooth(rng, snapshots, *grid).astype(np.float32),
            solid_XYZ=smooth(rng, *grid) > 0.1,
            lid=False,
            time_T=np.arange(snapshots, dtype=np.float32),
            parameters={"viscosity": 0.1, "target_speed": 0.1, "reynolds": 1.0, "mach": 0.1},
        )
        path = folder / "data" / split / f"{domain}.hdf5"
        write_trajectory(path, simulation, dataset_name="theirs", domain=domain, provenance={})
    write_stats(folder, compute_stats(read_trajectory(record) for record in list_trajectories(folder, "train")))
    return folder


def tree(folder: Path) -> dict[str, int]:
    """Every file and folder below ``folder`` with its modification time in ns; 0 for folders."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns if p.is_file() else 0 for p in sorted(folder.rglob("*"))}


def refused(capfd: pytest.CaptureFixture[str], *arguments: str, says: tuple[str, ...]) -> str:
    """Run the command, which must exit with code 2 and one line on stderr that contains each of ``says``."""
    capfd.readouterr()
    code = main(list(arguments))
    error = capfd.readouterr().err
    assert code == 2, error
    assert error.startswith("error: "), error
    assert error.count("\n") == 1, error
    assert error.endswith("\n"), error
    for words in says:
        assert words in error
    return error


def shodh(*arguments: str) -> int:
    """Run a `shodh` command with tiny.yaml in the working folder; return its exit code."""
    stage = 2 if arguments[0] in ("data", "tokenizer") else 1
    return main([*arguments[:stage], "--config", "tiny.yaml", *arguments[stage:]])


def quiet(iterable: Any, desc: str, total: int) -> Any:
    """A progress callback that prints nothing."""
    yield from iterable
