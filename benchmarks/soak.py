"""Train for hours on two hosts while something breaks every two minutes; check that only steps are lost.

    sudo .venv/bin/python benchmarks/soak.py --json benchmarks/results/soak_cpu.json

Needs root and Linux, because the two hosts are namespaces of this machine, the run folder is on a disk of its own, and
one fault sets the machine's clock. Data, tokenizer and latents are made first. Then ``shodh pretrain --elastic`` trains
over both hosts. Every two minutes one of the faults of `support.faults` happens, chosen at random. If the
command ends, it is started again, as a user would, up to three times without progress.

Reported for each fault: whether training went on untouched, by itself or after a new start of the command, how long no
step was made, and how many steps were repeated. At the end, and after every fault, the records of the run must have no
gap and every checkpoint must be intact. Weights and losses at an early step must equal those of a run without faults.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import psutil
import yaml

from shodh_moe.base.environment import describe_environment
from shodh_moe.checkpoint import CheckpointReader, damage, list_checkpoints
from shodh_moe.config.load import load_config
from support.faults import FAULTS, Site, loop_disk
from support.hosts import BIN, boot_hosts, missing

ROOT = Path(__file__).parents[1]
LOG_EVERY = 5
STEPS = 1_000_000  # more than fit into the time
MOST_STARTS = 3
TAIL = 200_000  # bytes that hold the last records


class Training:
    """The training command on the first host, started again whenever it ends.

    Attributes:
        starts: number of times that the command was started.
        by_itself: number of times that ``--elastic`` started ranks again.
        best: greatest step ever logged.
        kept: copy of the checkpoint of step ``keep``.
    """

    def __init__(self, site: Site, config: Path, work: Path, name: str, keep: int):
        self.run, self.starts, self.best = site.disk / "runs" / name, 0, 0
        self.kept, self._keep = work / f"{name}_{keep}", keep
        self._site, self._log = site, work / f"{name}.log"
        self._command = [str(BIN / "shodh"), "pretrain", "--config", str(config), "--name", name, "--elastic"]
        self._command += ["--hostfile", str(site.hosts.hostfile), f"runs={site.disk / 'runs'}"]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def by_itself(self) -> int:
        return self._log.read_text(errors="replace").count("[elastic]") if self._log.exists() else 0

    def keep_running(self) -> None:
        """Start the command if it does not run."""
        if self._process is None or self._process.poll() is not None:
            with self._log.open("a") as log:
                self._process = subprocess.Popen(
                    self._site.hosts.first.command(*self._command, folder=ROOT, OMP_NUM_THREADS="1"),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            self.starts += 1

    def printed(self) -> str:
        """Return the end of what the command has printed."""
        return self._log.read_text(errors="replace")[-4000:]

    def step(self) -> int:
        """Return the last step in the records."""
        records = _records(self.run, TAIL)
        last = records[-1]["step"] if records else 0
        if not self.kept.exists() and (checkpoint := self.run / "checkpoints" / str(self._keep)).exists():
            shutil.copytree(checkpoint, self.kept)
        self.best = max(self.best, last)
        return last

    def stop(self) -> int:
        """Ask the command to write a checkpoint and end; return its exit code."""
        assert self._process
        for process in self._site.hosts.first.processes("pretrain"):
            with suppress(psutil.Error, IndexError):
                if process.cmdline()[1] == self._command[0]:
                    process.send_signal(signal.SIGTERM)
        return self._process.wait(120)


def _records(run: Path, tail: int | None = None) -> list[dict[str, Any]]:
    """Read the complete lines of the run's records, or those of its last ``tail`` bytes."""
    try:
        with open(run / "metrics.jsonl", "rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = file.seek(max(size - tail, 0) if tail else 0)
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    return [record for line in lines[1 if start else 0 :] if (record := json.loads(line))["kind"] == "train"]


def check_run(run: Path) -> None:
    """Check that records have no gap and every checkpoint is intact."""
    steps = [record["step"] for record in _records(run)]
    assert steps == list(range(LOG_EVERY, LOG_EVERY * len(steps) + 1, LOG_EVERY)), f"gaps in {steps[-20:]}"
    for step in list_checkpoints(run / "checkpoints"):
        assert not damage(run / "checkpoints" / str(step)), (step, damage(run / "checkpoints" / str(step)))


def wait_for_progress(training: Training, beyond: int, seconds: float) -> None:
    """Return once a step beyond the given one is in the records, starting the command whenever it has ended.

    Raises:
        RuntimeError: no progress within ``seconds``, or after `MOST_STARTS` starts.
    """
    deadline, starts = time.monotonic() + seconds, training.starts
    while training.step() <= beyond:
        training.keep_running()
        if training.starts > starts + MOST_STARTS:
            raise RuntimeError(f"no progress beyond step {beyond} after {MOST_STARTS} starts:\n{training.printed()}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"no progress beyond step {beyond} within {seconds:.0f} s")
        time.sleep(0.2)


def one_fault(training: Training, site: Site, kind: str, watch_s: float) -> dict[str, Any]:
    """Let a fault of one kind happen, and watch for ``watch_s`` and until there is a checkpoint of a later step."""
    before = lowest = training.step()
    starts, restarts, began = training.starts, training.by_itself, time.monotonic()
    pause, last_new, best, over = 0.0, began, training.best, None
    with ThreadPoolExecutor(1) as pool:
        fault = pool.submit(FAULTS[kind], site)
        while over is None or max(list_checkpoints(training.run / "checkpoints"), default=0) <= over:
            now, step = time.monotonic(), training.step()
            if over is None and fault.done() and now - began > watch_s:
                over = training.best
            lowest = min(lowest, step)
            if step > best:
                pause, last_new, best = max(pause, now - last_new), now, step
            if now - began > 600:
                raise RuntimeError(f"no new checkpoint within 600 s after {kind}:\n{training.printed()}")
            training.keep_running()
            time.sleep(0.2)
    started, itself = training.starts - starts, training.by_itself - restarts
    return {
        "fault": kind,
        "what": fault.result(),
        "step": before,
        "outcome": "new start" if started else "by itself" if itself else "untouched",
        "seconds": round(pause, 1),
        "steps_repeated": before - lowest,
    }


def summary(faults: list[dict[str, Any]]) -> str:
    """Return a Markdown table with a row for each kind of fault."""
    heads = ["fault", "times", "untouched", "by itself", "new start"]
    heads += ["seconds without a new step, median (most)", "steps repeated, median (most)"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for kind in FAULTS:
        rows = [row for row in faults if row["fault"] == kind]
        if rows:
            counts = Counter(row["outcome"] for row in rows)
            cells = [kind, len(rows), counts["untouched"], counts["by itself"], counts["new start"]]
            for key in ("seconds", "steps_repeated"):
                values = [row[key] for row in rows]
                cells.append(f"{statistics.median(values):.0f} ({max(values):.0f})")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def write_config(source: Path, folder: Path, checkpoint_every: int) -> Path:
    settings = load_config(source).model_dump()
    for key in ("data", "tokenizer"):
        settings[key]["root"] = str(Path(settings[key]["root"]).absolute())
    settings["parallel"]["processes"] = "auto"  # a hostfile replaces it
    training = settings["training"]
    training |= {"steps": STEPS, "checkpoint_every": checkpoint_every, "log_every": LOG_EVERY, "validate_every": 1000}
    training |= {"stall_seconds": 20, "keep_last": 3, "keep_every": 0}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def check_equal(training: Training, other: Training, step: int) -> None:
    """Check that the kept weights and all losses up to a step are equal bit for bit."""
    a, b = (CheckpointReader(one.kept) for one in (training, other))
    assert all(a.tensor(name).equal(b.tensor(name)) for name in b.names()), f"weights differ at step {step}"
    losses = [[r["loss"] for r in _records(one.run) if r["step"] <= step] for one in (training, other)]
    assert losses[0] == losses[1], "losses differ"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/quickstart.yaml")
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--every", type=float, default=120, help="seconds from one fault to the next")
    parser.add_argument("--checkpoint-every", type=int, default=50, help="steps")
    parser.add_argument("--compare-at", type=int, default=1000, help="step of a checkpoint")
    parser.add_argument("--without", choices=sorted(FAULTS), action="append", default=[], help="leave out a fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if reason := missing():
        sys.exit(f"error: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the disk is unmounted
    work = Path(tempfile.mkdtemp(prefix="soak-"))
    config = write_config(options.config, work, options.checkpoint_every)
    for stage in (["data", "generate"], ["tokenizer", "train"], ["tokenizer", "encode"]):
        subprocess.run([str(BIN / "shodh"), *stage, "--config", str(config)], check=True)
    random = Random(options.seed)
    kinds = [kind for kind in FAULTS if kind not in options.without]
    faults: list[dict[str, Any]] = []
    with loop_disk(work / "disk", work / "mounted"), boot_hosts(work / "hosts") as hosts:
        site = Site(hosts, work / "mounted", random)
        training = Training(site, config, work, "soak", options.compare_at)
        wait_for_progress(training, 0, 300)
        end = time.monotonic() + 60 * options.minutes
        # Every kind in turn, in a new order each round, so that all occur equally often.
        order: list[str] = []
        while (began := time.monotonic()) < end:
            order = order or random.sample(kinds, len(kinds))
            faults.append({"minute": round((began - end) / 60 + options.minutes, 1)})
            faults[-1] |= one_fault(training, site, order.pop(), options.every / 2)
            check_run(training.run)
            print(json.dumps(faults[-1]), flush=True)
            while time.monotonic() < min(began + options.every, end):
                training.keep_running()
                training.step()
                time.sleep(0.2)
        while not training.kept.exists():
            wait_for_progress(training, training.step(), 300)
        code = training.stop()
        check_run(training.run)
        left = [process.cmdline() for host in hosts.all for process in host.processes()]
        assert not left, left
        reference = Training(site, config, work, "reference", options.compare_at)
        while not reference.kept.exists():
            wait_for_progress(reference, reference.step(), 300)
        reference.stop()
        check_equal(training, reference, options.compare_at)
        result = {
            "seed": options.seed,
            "minutes": options.minutes,
            "every_seconds": options.every,
            "checkpoint_every": options.checkpoint_every,
            "steps": training.best,
            "starts": training.starts,
            "by_itself": training.by_itself,
            "exit_code": code,
            "equal_to_a_run_without_faults_at_step": options.compare_at,
            "faults": faults,
            "environment": describe_environment(),
        }
    print(summary(faults))
    print(f"{len(faults)} faults, {training.best} steps, {training.starts} starts of the command; logs in {work}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
