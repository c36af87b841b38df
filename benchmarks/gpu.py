"""Run the GPU tests, all benchmarks and a short training run (`make gpu`); write a summary table and one JSON file.

    python benchmarks/gpu.py [--out FOLDER] [--json FILE] [--minutes 8]
    python benchmarks/gpu.py --rehearse     # the same steps in tiny sizes on a CPU, to test the script

It needs only a Python with a CUDA torch: no network, no root, no installation. Every step is a separate process with a
time limit; if a step fails or takes too long, this is recorded and the others still run. The exit code is 0 if every
step ran or lacked an optional package (which is recorded), 2 without a GPU, and otherwise 1.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from support.gpu_summary import compare_losses, count_tests, merge_benchmarks, print_summary
from support.steps import Outcome, Step, installed, run_step

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "benchmarks"
TREE = ROOT / "build" / "gpu_tree"
# Packages that the quickstart imports beyond torch.
TRAINING_NEEDS = ("deepspeed", "pydantic", "yaml", "h5py", "numba", "scipy", "safetensors", "tqdm", "tensorboard")
SHORT = [
    "data.snapshots=12",
    "data.domains.open_channel.trajectories.train=6",
    "data.domains.open_channel.trajectories.valid=2",
    "data.domains.open_channel.trajectories.test=2",
    "data.domains.porous_media.trajectories.train=6",
    "data.domains.porous_media.trajectories.valid=2",
    "data.domains.porous_media.trajectories.test=2",
    "tokenizer.steps=60",
    "tokenizer.latent_copies=1",
    "training.steps=100",
    "training.batch_size=8",
]
TINY = [
    "data.grid=[16,16,16]",
    "data.snapshots=5",
    "data.domains.porous_media=null",
    "data.domains.open_channel.trajectories.train=1",
    "data.domains.open_channel.trajectories.valid=1",
    "data.domains.open_channel.trajectories.test=1",
    "data.domains.open_channel.spinup_steps=4",
    "data.domains.open_channel.steps_per_snapshot=4",
    "tokenizer.widths=[8,8,8]",
    "tokenizer.latent_channels=16",
    "tokenizer.steps=2",
    "tokenizer.latent_copies=1",
    "tokenizer.batch_size=2",
    "model.dim=24",
    "model.depth=1",
    "model.heads=2",
    "model.moe.expert_hidden=16",
    "training.steps=2",
    "training.batch_size=2",
    "evaluation.rollout_steps=2",
    "parallel.processes=1",
]


def source_tree() -> Path:
    """Link shodh_moe, its kernels and the tests into the layout of an installation. Returns the folder."""
    package = TREE / "shodh_moe"
    package.mkdir(parents=True, exist_ok=True)
    targets = {package / path.name: path for path in (ROOT / "shodh_moe").iterdir() if path.name != "__pycache__"}
    targets |= {package / "kernels": ROOT / "kernels", TREE / "tests": ROOT / "tests"}
    for link in (*package.iterdir(), TREE / "tests"):
        if link.is_symlink():
            link.unlink()
    for link, target in targets.items():
        link.symlink_to(target)
    return TREE


def steps(out: Path, rehearse: bool) -> list[Step]:
    """List the steps, the most important ones first in case time runs out."""
    python, device = sys.executable, "cpu" if rehearse else "cuda"

    def script(name: str, *arguments: str) -> list[str]:
        return [python, str(HERE / name), *arguments]

    def bench(name: str, limit: float, *arguments: str, needs: tuple[str, ...] = (), folder: str = "") -> Step:
        common = ["--device", device, "--json", str(out / f"{name}.json"), "--seconds", str(max(limit - 15, 10))]
        command = script(f"{folder}{name}.py", *common, *(["--quick"] if rehearse else arguments))
        return Step(name, command, limit, needs=needs)

    def losses(kernels: str) -> Step:
        size = ["--grid", "8", "--width", "16", "--steps", "3"] if rehearse else []
        file = out / f"losses_{kernels}.json"
        command = script("support/losses.py", "--device", device, "--json", str(file), *size)
        return Step(f"losses {kernels}", command, 30, {"SHODH_KERNELS": kernels})

    run_folder = out / "quickstart"
    cli = [python, "-m", "shodh_moe.cli"]
    settings = ["--config", str(ROOT / "configs" / "quickstart.yaml"), *(TINY if rehearse else SHORT)]

    def first_losses(kernels: str) -> Step:
        command = [
            *cli,
            "pretrain",
            *settings,
            "--name",
            f"first_{kernels}",
            "training.steps=20",
            "training.log_every=1",
        ]
        return Step(
            f"first losses {kernels}", command, 40, {"SHODH_KERNELS": kernels}, TRAINING_NEEDS, run_folder,
            after="quickstart",
        )  # fmt: skip

    return [
        Step("environment", script("support/gpu_summary.py", device), 30, read=lambda log: json.loads(log.read_text())),
        tests(out, rehearse),
        bench("dispatch", 85, "--experts", "8,64"),
        bench("spectral_curl", 60),
        bench("gating", 45, "--experts", "8,64"),
        bench("lattice_boltzmann", 60, "--grids", "64,128,256", needs=("numba", "scipy")),
        bench("walls", 40, needs=("numba", "scipy", "pydantic", "h5py"), folder="studies/"),
        losses("triton"),
        losses("reference"),
        bench("moe_layer", 30),
        bench("optimizer", 25),
        Step("quickstart", [*cli, "run", *settings, "--name", "short"], 150, {}, TRAINING_NEEDS, run_folder),
        *([] if rehearse else [first_losses("triton"), first_losses("reference")]),
        Step(
            "pictures",
            script("support/plot.py", *(str(out / f"{name}.json") for name in BENCHMARKS), "--present"),
            25,
            needs=("matplotlib",),
        ),
    ]


# Benchmarks whose results `plot.py` can draw.
BENCHMARKS = ("dispatch", "spectral_curl", "gating", "lattice_boltzmann", "moe_layer", "optimizer")


def tests(out: Path, rehearse: bool) -> Step:
    """Run the kernels' tests with their own pytest settings: the project's need plugins that may not be installed."""
    ini = out / "pytest.ini"
    ini.write_text("[pytest]\nmarkers =\n    slow\n    distributed\n    gpu\n    timeout\n")
    command = [sys.executable, "-m", "pytest", "-c", str(ini), "--rootdir", str(TREE), "-q", "-p", "no:cacheprovider"]
    command += ["tests/kernels/test_gating.py", "-k", "tie or capacity"] if rehearse else ["tests/kernels"]
    if installed("xdist") and not rehearse:
        command += ["-n", "8"]  # most of the time is spent on compiling kernels
    if installed("pytest_timeout"):
        command += ["--timeout", "60"]
    return Step("tests", command, 100, needs=("pytest", "hypothesis"), folder=TREE, read=count_tests)


def run_all(out: Path, rehearse: bool, minutes: float, save: Callable[[list[Outcome]], None]) -> list[Outcome]:
    path = os.pathsep.join(filter(None, (str(source_tree()), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    if rehearse:
        # Use one thread: on a shared machine several threads would wait for each other.
        environment |= {"TRITON_INTERPRET": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    deadline = time.monotonic() + 60 * minutes
    done: list[Outcome] = []
    for step in steps(out, rehearse):
        remaining = deadline - time.monotonic()
        absent = [module for module in step.needs if not installed(module)]
        status = {outcome.name: outcome.status for outcome in done}
        if absent:
            outcome = Outcome(step.name, "not run", 0.0, f"{', '.join(absent)} is not installed")
        elif step.after and status[step.after] != "done":
            outcome = Outcome(step.name, "not run", 0.0, f"{step.after} did not succeed")
        elif remaining < 5:
            outcome = Outcome(step.name, "timed out", 0.0, f"the time limit of {minutes:g} minutes was reached")
        else:
            print(f"{step.name} ...", flush=True)
            outcome = run_step(step, out, min(step.limit, remaining), environment)
        print(f"{step.name}: {outcome.status} in {outcome.seconds:.0f} s {outcome.reason}", flush=True)
        done.append(outcome)
        save(done)
    return done


def result_file(out: Path, options: Any, name: str) -> Path:
    """Path of the JSON file. That of a rehearsal is not in benchmarks/results."""
    if options.json:
        return options.json
    if options.rehearse:
        return out / "gpu_rehearsal.json"
    slug = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")
    return HERE / "results" / f"gpu_{slug}_{datetime.now(timezone.utc):%Y-%m-%d}.json"


def main(arguments: list[str] | None = None) -> int:
    sys.path.insert(0, str(source_tree()))
    from shodh_moe.base.command import OneLineParser
    from shodh_moe.base.files import write_text

    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of logs, results and pictures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/gpu_<name>_<date>.json")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit for all steps together")
    parser.add_argument("--rehearse", action="store_true", help="run the same steps on the CPU in tiny sizes")
    options = parser.parse_args(arguments)
    try:
        import torch
    except ImportError:
        parser.error(f"{sys.executable} has no torch")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("this torch finds no CUDA device; --rehearse runs the steps on the CPU")
    name = "rehearsal" if options.rehearse else torch.cuda.get_device_name()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("*.json"), *out.glob("*.png")):
        old.unlink()  # results of an earlier run would be mistaken for this run's
    file, began = result_file(out, options, name), time.monotonic()
    content: dict[str, Any] = {"what": "make gpu", "device": name, "rehearsal": options.rehearse}

    def save(done: list[Outcome]) -> None:
        content["seconds"] = round(time.monotonic() - began, 1)
        content["steps"] = [asdict(outcome) for outcome in done]
        content["benchmarks"] = merge_benchmarks(out, (*BENCHMARKS, "walls"))
        content["losses"] = compare_losses(out)
        write_text(file, json.dumps(content, indent=1) + "\n")

    done = run_all(out, options.rehearse, options.minutes, save)
    print_summary(content)
    print(f"\nresults: {file}\nlogs and pictures: {out}")
    return 0 if all(outcome.status in ("done", "not run") for outcome in done) else 1


if __name__ == "__main__":
    sys.exit(main())
