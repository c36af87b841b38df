"""Read the files of a run folder that its report needs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shodh_moe.base.errors import UserError
from shodh_moe.base.records import Record, read_history
from shodh_moe.base.text import NAME_RULE, is_name

Array = NDArray[Any]

# The files that a report needs, and the command that writes each.
REQUIRED = {
    "config.yaml": "shodh pretrain",
    "environment.json": "shodh pretrain",
    "metrics.jsonl": "shodh pretrain",
    "metrics.json": "shodh evaluate",
    "evaluation.npz": "shodh evaluate",
}


@dataclass(frozen=True)
class RunData:
    """The data of a report. Arrays are named ``{domain}/{name}``, as in evaluation.npz."""

    name: str
    metrics: Record
    history: list[Record]
    tokenizer_history: list[Record]
    arrays: dict[str, Array]
    domains: list[str]
    config: str
    environment: Record

    def get(self, domain: str, *names: str) -> tuple[Array, ...] | None:
        """Return the named arrays of a domain, or None if any is missing or empty."""
        keys = [f"{domain}/{name}" for name in names]
        if any(key not in self.arrays or self.arrays[key].size == 0 for key in keys):
            return None
        return tuple(self.arrays[key] for key in keys)


def load_run(run_folder: Path) -> RunData:
    """Read a run folder.

    Raises:
        UserError: a file is missing or damaged; the message names it and the command that writes it.
    """
    if not run_folder.is_dir():
        raise UserError(f"there is no run folder {run_folder}: make one with `shodh pretrain`")
    for name, command in REQUIRED.items():
        if not (run_folder / name).is_file():
            raise UserError(f"{run_folder / name} is missing: make it with `{command}`, then write the report again")
    arrays = _read_arrays(run_folder / "evaluation.npz")
    metrics = _read_json(run_folder / "metrics.json")
    in_arrays = [str(domain) for domain in arrays.pop("domains", np.array([])).tolist()]
    # A domain may have numbers without example fields, or fields without numbers.
    domains = list(dict.fromkeys([*metrics.get("domains", {}), *in_arrays]))
    # They become parts of the figures' file names.
    if bad := next((domain for domain in domains if not is_name(domain)), None):
        raise UserError(
            f"{run_folder} has results of a domain named {bad!r}, not {NAME_RULE}: "
            "make them again with `shodh evaluate`"
        )
    tokenizer = run_folder / "tokenizer_metrics.jsonl"
    return RunData(
        name=str(metrics.get("run") or run_folder.resolve().name),
        metrics=metrics,
        history=read_history(run_folder / "metrics.jsonl"),
        tokenizer_history=read_history(tokenizer) if tokenizer.is_file() else [],
        arrays=arrays,
        domains=domains,
        config=(run_folder / "config.yaml").read_text(encoding="utf-8"),
        environment=_read_json(run_folder / "environment.json"),
    )


def _read_json(path: Path) -> Record:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): make it again with `{REQUIRED[path.name]}`") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: make it again with `{REQUIRED[path.name]}`")
    return content


def _read_arrays(path: Path) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged archive
        raise UserError(f"{path} cannot be read ({error}): make it again with `{REQUIRED[path.name]}`") from error
