"""Fine-tuning to a new domain with few trajectories, beside training from scratch.

    python benchmarks/studies/finetune.py [--config FILE] [--json FILE] [key=value ...]

Runs the commands `shodh data generate`, `finetune`, `pretrain` and `evaluate`. Finished work is skipped, so repeating
the command resumes. The ways are those of `shodh finetune --train`, and two controls that begin with random weights:
`scratch` trains a tokenizer and a transformer on the same trajectories, `same_tokenizer` only a transformer.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, for `support` and `studies`

from shodh_moe.base.command import exit_code
from shodh_moe.base.errors import UserError
from shodh_moe.base.files import require_writable, whole_folder, write_text
from shodh_moe.cli import main as shodh
from shodh_moe.config.load import load_config, read_yaml
from shodh_moe.config.paths import resolve_paths
from shodh_moe.data import compute_stats, list_trajectories, read_trajectory, write_stats
from shodh_moe.inference.loading import find_source, read_weights
from studies.finetune_config import StudyConfig, base_model, command, only_domain, read_arguments
from support.common import machine

MEASURES = ("velocity_nrmse", "velocity_vrmse", "pressure_vrmse", "rollout_nrmse", "rollout_nrmse_persistence")


@dataclass
class Study:
    """Paths of the whole study."""

    config: StudyConfig
    folder: Path
    base: Path

    def dataset(self) -> Path:
        """Generate the new domain's trajectories, and return their dataset."""
        config = self.config
        tree = read_yaml(Path(config.base))
        tree |= {"name": "new_domain", "runs": str(self.folder / "runs")}
        counts = config.trajectories.model_dump()
        tree["data"] |= {
            "path": None,
            "name": "new_domain",
            "root": str(self.folder / "data"),
            "seed": config.seed + 1,
            "snapshots": config.snapshots,
            "domains": only_domain(config.domain, config.settings, counts),
        }
        path = self.folder / "new_domain.yaml"
        write_text(path, yaml.safe_dump(tree, sort_keys=False))
        command("data", "generate", "--config", str(path))
        return resolve_paths(load_config(path)).dataset

    def first(self, dataset: Path, count: int) -> Path:
        """A dataset with the first ``count`` training trajectories, and all others. Files are shared where possible."""
        target = self.folder / "data" / f"first_{count}"
        if not target.exists():
            with whole_folder(target) as folder:
                for split in ("train", "valid", "test"):
                    (folder / "data" / split).mkdir(parents=True)
                    files = sorted((dataset / "data" / split).glob("*.hdf5"))
                    for file in files[: count if split == "train" else None]:
                        _share(file, folder / "data" / split / file.name)
                records = list_trajectories(folder, "train")
                write_stats(folder, compute_stats(read_trajectory(record) for record in records))
        return target

    def timed_train(self, way: str, count: int, data: Path) -> tuple[Path | None, float | None]:
        """`train`, and the seconds that it took when it was not interrupted."""
        path = self.folder / "seconds.json"
        times = json.loads(path.read_text()) if path.exists() else {}
        began, whole = time.perf_counter(), not (self.folder / "runs" / f"{way}_{count}").exists()
        model = self.train(way, count, data)
        if model and whole:
            times[model.name] = time.perf_counter() - began
            write_text(path, json.dumps(times, indent=1) + "\n")
        return model, times.get(f"{way}_{count}")

    def train(self, way: str, count: int, data: Path) -> Path | None:
        """Train one model and return it, exported; None if it was refused."""
        name = f"{way}_{count}"
        model = self.folder / "models" / name
        if model.exists():
            return model
        model.parent.mkdir(exist_ok=True)
        runs = [f"runs={self.folder / 'runs'}", f"tokenizer.root={self.folder / 'tokenizers'}"]
        if way in ("all", "expert", "lora"):
            steps = [f"training.steps={self.config.steps}"]
            steps.append(f"training.learning_rate={self.config.learning_rates[way]}")
            words = ["finetune", "--model", str(self.base), "--data", str(data), "--output", str(model), "--train", way]
            return model if shodh([*words, *runs, *steps]) == 0 else None
        words = ["--config", self.config.base, "--name", name, *runs, f"data.name={name}", f"data.path={data}"]
        if way == "same_tokenizer":
            words.append(f"tokenizer.path={self.base / 'tokenizer'}")
        else:
            command("tokenizer", "train", *words)
        command("tokenizer", "encode", *words)
        command("pretrain", *words)
        command("checkpoint", "export", str(self.folder / "runs" / name), "--output", str(model))
        return model

    def measure(self, model: Path, what: str, config: Path, settings: list[str]) -> dict[str, dict[str, Any]]:
        """Evaluate a model on the test split of a config, and return the measures of each domain."""
        output = self.folder / "measured" / what / model.name
        if not (output / "metrics.json").exists():
            words = ["--config", str(config), "--checkpoint", str(model), "--output", str(output)]
            command("evaluate", *words, f"tokenizer.root={self.folder / 'tokenizers'}", *settings)
        domains = json.loads((output / "metrics.json").read_text())["domains"]
        return {domain: {key: values[key] for key in MEASURES} for domain, values in domains.items()}


def _share(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def _model_section(model: Path) -> list[str]:
    """The settings of a model that `shodh evaluate` needs beside another config."""
    section = find_source(model).config.model.model_dump()
    return [f"model={json.dumps(section)}"]


def work(config: StudyConfig, output: Path) -> None:
    require_writable(output.absolute().parent)
    study = Study(config, Path(config.folder), base_model(config))
    dataset = study.dataset()
    rows: list[dict[str, Any]] = []
    new = study.measure(study.base, "new", study.base / "config.yaml", [f"data.path={study.first(dataset, 1)}"])
    old = study.measure(study.base, "old", study.base / "config.yaml", [])
    rows.append({"way": "base", "count": 0, "new": new, "old": old})
    for count in config.counts:
        data = study.first(dataset, count)
        for way in config.ways:
            model, seconds = study.timed_train(way, count, data)
            row: dict[str, Any] = {"way": way, "count": count, "seconds": seconds}
            if model is None:
                rows.append(row | {"refused": True})
                continue
            row["new"] = study.measure(model, "new", model / "config.yaml", [])
            if way not in ("same_tokenizer", "scratch"):
                row["old"] = study.measure(model, "old", study.base / "config.yaml", _model_section(model))
            if way == "expert":
                row["old_weights_equal"] = _old_weights_equal(study.base, model)
            rows.append(row)
            write_text(output, json.dumps(_content(config, rows), indent=1) + "\n")
    write_text(output, json.dumps(_content(config, rows), indent=1) + "\n")
    print(table(rows))
    print(f"results: {output}")


def _content(config: StudyConfig, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "benchmark": "finetune",
        "machine": machine(torch.device("cpu")),
        "config": config.model_dump(),
        "rows": rows,
    }


def _old_weights_equal(base: Path, model: Path) -> bool:
    """Whether every weight of the base model is in the grown one, bit for bit."""
    before, after = (read_weights(find_source(path)) for path in (base, model))
    grown = {name.replace("path.router.base.", "path.router."): tensor for name, tensor in after.items()}
    return all(torch.equal(grown[name][: len(tensor)], tensor) for name, tensor in before.items())


def table(rows: list[dict[str, Any]]) -> str:
    """The velocity's nRMSE after the first, the middle and the last step of a rollout, in Markdown."""
    lines = [
        "| way | trajectories | new domain: first, middle, last step | old domains, first step |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if row.get("refused"):
            lines.append(f"| {row['way']} | {row['count']} | refused | |")
            continue
        (new,) = row["new"].values()
        last = len(new["rollout_nrmse"]) - 1
        errors = ", ".join(f"{new['rollout_nrmse'][step]:.4f}" for step in (0, last // 2, last))
        old = ", ".join(f"{name} {one['rollout_nrmse'][0]:.4f}" for name, one in row.get("old", {}).items())
        lines.append(f"| {row['way']} | {row['count']} | {errors} | {old} |")
    (new,) = rows[0]["new"].values()
    last = len(new["rollout_nrmse"]) - 1
    still = ", ".join(f"{new['rollout_nrmse_persistence'][step]:.4f}" for step in (0, last // 2, last))
    return "\n".join([*lines, f"| persistence | | {still} | |"])


def main(arguments: list[str] | None = None) -> int:
    def run() -> None:
        config, output = read_arguments(str(__doc__).partition("\n")[0], "finetune.json", arguments, StudyConfig)
        for way in {"all", "expert", "lora"}.intersection(config.ways) - set(config.learning_rates):
            raise UserError(f"learning_rates has no entry {way}: add one")
        work(config, output)

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
