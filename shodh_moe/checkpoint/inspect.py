"""Print what a checkpoint holds, and verify that it is intact."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from shodh_moe.base.errors import UserError
from shodh_moe.base.text import printable_tree
from shodh_moe.checkpoint.find import checkpoints_at
from shodh_moe.checkpoint.read import damages
from shodh_moe.checkpoint.state import Damaged, load_state

# `state.json` has no marks, so this file alone recognises experts by their name.
EXPERTS = ".experts."
NOT_RECORDED = "not recorded"


def inspect(path: Path) -> str:
    """Describe one checkpoint as a table; for a run or its ``checkpoints`` folder, the newest one.

    Raises:
        UserError: there is no checkpoint, or its ``state.json`` cannot be read.
    """
    path = _checkpoints(path)[-1]
    try:
        state = printable_tree(load_state(path))
    except Damaged as error:
        raise UserError(f"checkpoint {path} is refused: {error}") from error
    shapes = {name: record["shape"] for name, record in state["tensors"].items()}
    model = {name.removeprefix("model/"): math.prod(s) for name, s in shapes.items() if name.startswith("model/")}
    config = state.get("config")
    rows: list[tuple[str, Any]] = [
        ("checkpoint", path),
        ("step", state["step"]),
        ("written", state["written"]),
        ("config", config.get("name", NOT_RECORDED) if isinstance(config, dict) else NOT_RECORDED),
        ("ranks", state["world_size"]),
        ("expert-parallel size", state.get("ep_size", NOT_RECORDED)),
        ("ZeRO stage", state.get("zero_stage", NOT_RECORDED)),
        ("tensors", _counts(shapes)),
        ("parameters", f"{sum(model.values()):,}"),
    ]
    rows += [(f"  {module}", f"{count:,}") for module, count in _by_module(model).items()]
    experts = sum(count for name, count in model.items() if EXPERTS in name)
    rows += [("  of these in routed experts", f"{experts:,}"), ("experts by layer", _experts(shapes))]
    rows.append(("bytes", f"{sum(file['bytes'] for file in state['files'].values()):,}"))
    rows += [(f"  {name}", f"{file['bytes']:,}") for name, file in state["files"].items()]
    versions = state.get("versions")
    if isinstance(versions, dict):
        rows += [("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def verify(path: Path) -> list[str]:
    """List all damage to a checkpoint, or to all checkpoints of a run or its ``checkpoints`` folder; [] if intact.

    Raises:
        UserError: there is no checkpoint.
    """
    return [f"checkpoint {folder}: {reason}" for folder in _checkpoints(path) for reason in damages(folder)]


def _checkpoints(path: Path) -> list[Path]:
    if found := checkpoints_at(path):
        return found
    raise UserError(
        f"{path} is not a checkpoint and contains none: give a run folder, its checkpoints folder, or one checkpoint"
    )


def _counts(shapes: dict[str, list[int]]) -> str:
    """Count the tensors of each kind, such as ``40 model, 40 exp_avg``."""
    kinds: dict[str, int] = {}
    for name in shapes:
        kind = name.partition("/")[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def _by_module(model: dict[str, int]) -> dict[str, int]:
    """Add up the parameter counts of each top-level module."""
    modules: dict[str, int] = {}
    for name, count in model.items():
        module = name.partition(".")[0]
        modules[module] = modules.get(module, 0) + count
    return modules


def _experts(shapes: dict[str, list[int]]) -> str:
    """List the number of routed experts in each MoE layer, in layer order."""
    layers: dict[str, int] = {}
    for name, shape in shapes.items():
        if name.startswith("model/") and EXPERTS in name and shape:
            layers.setdefault(name.partition(EXPERTS)[0], shape[0])
    return ", ".join(map(str, layers.values())) or "none"
