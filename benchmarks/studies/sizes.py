"""Errors of a model on grids that it was not trained on, beside its own grid, persistence, and models trained there.

    python benchmarks/studies/sizes.py [--config FILE] [--json FILE] [key=value ...]

Runs the commands `shodh data generate`, `tokenizer train`, `tokenizer encode`, `pretrain`, `checkpoint export` and
`evaluate`. Finished work is skipped, so repeating the command resumes. A flow on a larger grid is a larger box of the
same domain, with cells of the same size: no field is interpolated.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, for `support` and `studies`

from shodh_moe.base.command import exit_code
from shodh_moe.base.errors import UserError
from shodh_moe.base.files import require_writable, write_text
from shodh_moe.base.section import Positive, Section
from shodh_moe.config import Config
from shodh_moe.config.load import load_config
from shodh_moe.config.sizes import require_size
from studies.finetune_config import ROOT, Counts, command, read_arguments
from support.common import machine

CONFIG = ROOT / "configs" / "sizes" / "study.yaml"
MEASURES = ("velocity_nrmse", "velocity_vrmse", "pressure_vrmse", "rollout_nrmse", "rollout_nrmse_persistence")
Grid = list[int]


class SizesConfig(Section, changes="nothing"):
    """See configs/sizes/study.yaml."""

    base: str
    folder: str
    grids: list[list[Positive]]
    own: list[list[Positive]]
    trajectories: Counts
    variants: dict[str, list[str]]


def name_of(grid: Grid) -> str:
    return "x".join(map(str, grid))


class Study:
    """One run of the study: where its parts are, and the settings of each."""

    def __init__(self, config: SizesConfig):
        self.config, self.folder = config, Path(config.folder)
        self.base: Config = load_config(config.base)

    def settings(self, grid: Grid) -> list[str]:
        """The settings of the data on a grid."""
        folders = [f"{key}.root={self.folder / key}" for key in ("data", "tokenizer")]
        found = [f"runs={self.folder / 'runs'}", *folders, f"data.grid={json.dumps(grid)}"]
        if grid != self.base.data.grid and grid not in self.config.own:
            counts = json.dumps(self.config.trajectories.model_dump())
            found += [f"data.domains.{name}.trajectories={counts}" for name, _ in self.base.data.domains.items()]
        return found

    def train(self, name: str, grid: Grid, more: list[str]) -> Path:
        """Train a model on a grid, and return its export."""
        model = self.folder / "models" / name
        if not model.exists():
            model.parent.mkdir(parents=True, exist_ok=True)
            words = ["--config", self.config.base, "--name", name, *self.settings(grid), *more]
            for step in (("data", "generate"), ("tokenizer", "train"), ("tokenizer", "encode"), ("pretrain",)):
                command(*step, *words)
            command("checkpoint", "export", str(self.folder / "runs" / name), "--output", str(model))
        return model

    def measure(self, model: Path, grid: Grid) -> dict[str, dict[str, Any]]:
        """Evaluate a model on the test split of a grid, and return the measures of each domain."""
        output = self.folder / "measured" / name_of(grid) / model.name
        if not (output / "metrics.json").exists():
            settings = self.settings(grid)
            command("data", "generate", "--config", self.config.base, "--name", f"data_{name_of(grid)}", *settings)
            words = ["--config", str(model / "config.yaml"), "--checkpoint", str(model), "--output", str(output)]
            command("evaluate", *words, *settings)
        domains = json.loads((output / "metrics.json").read_text())["domains"]
        return {domain: {key: values[key] for key in MEASURES} for domain, values in domains.items()}


def work(config: SizesConfig, output: Path) -> None:
    require_writable(output.absolute().parent)
    study = Study(config)
    trained_on = study.base.data.grid
    for grid in config.grids:
        require_size(grid, study.base.model, "grids has")
    if foreign := [grid for grid in config.own if grid not in config.grids]:
        raise UserError(f"own has {foreign[0]}, which is not among grids {config.grids}: add it there")
    rows: list[dict[str, Any]] = []

    def add(model: Path, trained: Grid, grid: Grid) -> None:
        row = {"model": model.name, "trained_on": trained, "grid": grid, "domains": study.measure(model, grid)}
        rows.append(row)
        content = {"benchmark": "sizes", "machine": machine(torch.device("cpu")), "config": config.model_dump()}
        write_text(output, json.dumps({**content, "rows": rows}, indent=1) + "\n")

    for variant, settings in config.variants.items():
        model = study.train(variant, trained_on, settings)
        for grid in (trained_on, *config.grids):
            add(model, trained_on, grid)
    for grid in config.own:
        add(study.train(f"own_{name_of(grid)}", grid, []), grid, grid)
    print(table(rows))
    print(f"results: {output}")


def table(rows: list[dict[str, Any]]) -> str:
    """The velocity's nRMSE after the first, the middle and the last step of a rollout, in Markdown."""
    lines = ["| grid | domain | model | trained on | first, middle, last step |", "|---|---|---|---|---|"]
    for grid, domain in dict.fromkeys((name_of(row["grid"]), domain) for row in rows for domain in row["domains"]):
        own = [row for row in rows if name_of(row["grid"]) == grid]
        for row in own:
            errors = _three(row["domains"][domain]["rollout_nrmse"])
            lines.append(f"| {grid} | {domain} | {row['model']} | {name_of(row['trained_on'])} | {errors} |")
        still = _three(own[0]["domains"][domain]["rollout_nrmse_persistence"])
        lines.append(f"| {grid} | {domain} | persistence | | {still} |")
    return "\n".join(lines)


def _three(errors: list[float]) -> str:
    last = len(errors) - 1
    return ", ".join(f"{errors[step]:.4f}" for step in (0, last // 2, last))


def main(arguments: list[str] | None = None) -> int:
    def run() -> None:
        description = str(__doc__).partition("\n")[0]
        work(*read_arguments(description, "sizes.json", arguments, SizesConfig, CONFIG))

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
