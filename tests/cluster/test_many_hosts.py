"""Sixteen ranks on eight hosts, of which three are lost, one after the other."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from benchmarks.support.hosts import BIN, Host, Hosts, boot_hosts, missing
from shodh_moe.checkpoint import list_checkpoints
from shodh_moe.config.load import load_config
from shodh_moe.config.paths import resolve_paths
from shodh_moe.runs.elastic import HOSTS_LEFT
from tests.cluster.launch import Launch
from tests.training.synthetic import CONFIG, write_latents
from tests.training.weights import check_same_weights

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

STEPS = 120
EVERY = 10
STALL_S = 90  # 16 ranks that start on two cores need half of this for their first step
SHODH = str(BIN / "shodh")


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if reason := missing():
        pytest.skip(f"NO TEST OVER EIGHT HOSTS: {reason}")
    with boot_hosts(tmp_path / "hosts", count=8, slots=2) as hosts:
        yield hosts
        hosts.kill_all()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config with its latents, in a folder that all hosts share."""
    settings = yaml.safe_load(CONFIG)
    settings["model"]["moe"]["num_experts"] = 4
    settings |= {"runs": str(tmp_path / "runs"), "parallel": {"ep_size": 4}}
    settings |= {key: {"root": str(tmp_path / key)} for key in ("data", "tokenizer")}
    settings["training"] |= {"steps": STEPS, "batch_size": 2, "log_every": EVERY, "validate_every": STEPS}
    settings["training"] |= {"checkpoint_every": EVERY, "keep_last": STEPS, "stall_seconds": STALL_S}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    write_latents(resolve_paths(load_config(path, [], None)).latents, snapshots=40)
    return path


def _steps(run: Launch) -> list[int]:
    return list_checkpoints(run.run / "checkpoints")


def _lines(run: Launch, words: str) -> list[str]:
    return [line for line in run.printed().splitlines() if words in line]


def _losses(run: Path) -> list[float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "train"]


def test_a_run_goes_on_without_the_hosts_that_it_loses(hosts: Hosts, config: Path) -> None:
    """The launching host is the last one, so that also the host of rank 0 can be lost."""

    def die(host: Host) -> None:
        os.kill(host.process, signal.SIGKILL)

    def lose_the_network(host: Host) -> None:
        hosts.set_link(host, "down")

    start = (SHODH, "pretrain", "--hostfile", str(hosts.hostfile))
    run = Launch(hosts.all[-1], config, "elastic", *start, "--elastic")
    for count, (lose, host) in enumerate(
        [(die, hosts.all[3]), (lose_the_network, hosts.all[5]), (die, hosts.first)], start=1
    ):
        done = _steps(run)
        run.until(lambda done=done: len(_steps(run)) > len(done), 300)
        lose(host)
        run.until(lambda count=count: len(_lines(run, "[elastic]")) == count, STALL_S + 150)
    assert run.end(400) == 0, run.printed()

    said = _lines(run, "[elastic]")
    for line, name, ranks in zip(said, ("node4", "node6", "node1"), (14, 12, 10), strict=True):
        assert f"{name} cannot be reached: going on with {ranks} ranks on node" in line
    layouts = [re.findall(r"(\d+) ranks, EP (\d)", line)[0] for line in _lines(run, "ranks, EP")]
    assert layouts == [("16", "4"), ("14", "2"), ("12", "4"), ("10", "2")]
    left = [host for host in hosts.all if host.name not in ("node1", "node4", "node6")]
    assert (run.run / HOSTS_LEFT).read_text() == "".join(f"{host.name} slots=2\n" for host in left)

    # By hand: the same checkpoint, resumed on the hosts that are left.
    last = int(re.findall(r"from step (\d+)", run.printed())[-1])
    by_hand = config.parent / "runs/by_hand"
    shutil.copytree(run.run / "checkpoints" / str(last), by_hand / "checkpoints" / str(last))
    command = (SHODH, "pretrain", "--hostfile", str(run.run / HOSTS_LEFT), "parallel.ep_size=2")
    other = Launch(hosts.all[-1], config, "by_hand", *command)
    assert other.end(300) == 0, other.printed()
    check_same_weights(run.run, by_hand, STEPS)
    losses = _losses(by_hand)
    assert len(losses) == (STEPS - last) / EVERY
    assert losses == _losses(run.run)[-len(losses) :]
