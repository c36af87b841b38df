"""Every shipped config loads and fits its number of ranks, and its comments are correct."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shodh_moe.config import Config
from shodh_moe.config.load import load_config
from shodh_moe.runs import plan
from shodh_moe.runs.checks import _check_generated
from shodh_moe.training.deepspeed_config import deepspeed_config, layout_of

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
HOST_GPUS = 8


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


def _comments(path: Path) -> str:
    return "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))


def _world(path: Path) -> int:
    """Return the number of ranks that the comments state; the quickstart states none and uses two on a laptop."""
    stated = re.search(r"^#   ranks +(\d+):", _comments(path), re.MULTILINE)
    return int(stated[1]) if stated else 2


def test_the_config_fits_its_ranks(path):
    config, world = load_config(path), _world(path)
    ep = layout_of(config, world).ep
    deepspeed_config(config, world)
    _check_generated(config)
    assert config.name == path.stem
    assert config.parallel.processes in ("auto", min(world, HOST_GPUS))
    assert HOST_GPUS % ep == 0, "experts stay within a host"
    count = plan.count_parameters(config, world)  # builds the model: grid, latents, patch and heads fit
    assert count.rank_expert * ep == count.expert


def test_the_schedule_is_sensible(path):
    config = load_config(path)
    t = config.training
    assert t.warmup_steps <= t.steps / 10
    assert t.steps >= 2 * t.checkpoint_every
    assert t.keep_every % t.checkpoint_every == 0
    assert config.telemetry.every % t.log_every == 0
    assert config.tokenizer.steps >= config.tokenizer.checkpoint_every
    assert t.stall_seconds >= 600, "the first step may compile kernels"


def test_comments_agree_with_the_plan(path):
    comments, world = _comments(path), _world(path)
    if path.stem == "quickstart":
        return
    table = "".join(f"#   {line}\n" for line in plan.plan(load_config(path), world).splitlines())
    command = f"`shodh plan --config configs/{path.name} --world {world}`"
    assert f"# {command} says:\n#\n{table}" in comments, "update the comment"
    smaller = re.findall(r"^#   ((?:[a-z_.]+=\S+ ?)+): ([\d.]+) GiB$", comments, re.MULTILINE)
    assert smaller
    whole = plan.step_samples(load_config(path), world)
    for overrides, stated in smaller:
        other = load_config(path, overrides.split())
        assert f"{plan.memory(other, world)['sum'] / 2**30:.1f}" == stated
        assert plan.step_samples(other, world) == whole


def test_commands_in_the_comments_name_this_config(path):
    named = re.findall(r"configs/[a-z0-9_]+\.yaml", _comments(path))
    assert set(named) <= {f"configs/{path.name}"}


def test_the_cluster_config_is_the_long_run():
    config = load_config(Path(CONFIGS[0]).with_name("cluster_8x8.yaml"))
    assert config.training.steps == 20_000
    assert config.data.grid == [128] * 3
    assert plan.snapshots(config) == 61_000
    assert plan.latent_grid(config) == [16] * 3
    assert plan.sample_tokens(config) == 4096


def test_the_readme_lists_every_config_with_correct_numbers():
    text = (CONFIGS[0].parent / "README.md").read_text()
    for path in CONFIGS:
        row = next(line for line in text.splitlines() if line.startswith(f"| [{path.name}]({path.name})"))
        config, world = load_config(path), _world(path)
        tokens = plan.step_samples(config, world) * plan.sample_tokens(config)
        memory = plan.memory(config, world)["sum"] / 2**30
        assert f"| {tokens:,} | {config.training.steps:,} | {memory:.1f} GiB |" in row
        assert _model(config, world) in row


def _model(config: Config, world: int) -> str:
    count = plan.count_parameters(config, world)
    return f"{count.total / 1e6:,.1f} M, {count.active / 1e6:,.1f} M active"
