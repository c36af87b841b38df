"""Describe how an output was made: ``merge.json``, and ``state.json`` of a checkpoint."""

from __future__ import annotations

import json
import math
import platform
from importlib.metadata import version
from typing import Any

from shodh_moe.checkpoint.state import FORMAT, STATE, seal
from shodh_moe.merging.config import Target
from shodh_moe.merging.drift import summary
from shodh_moe.merging.inputs import MODEL, InputModel
from shodh_moe.merging.layout import OutputFile, index_of

MANIFEST = "merge.json"
MANIFEST_FORMAT = 1


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a merge's result may depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("shodh_moe", "torch", "numpy")}}


def drift_of(target: Target, written: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the `summary` of distances between base and experts, from the records of all files; {} without a base."""
    sums = [fact["drift"] for record in written.values() for fact in record["facts"].values() if "drift" in fact]
    return summary(sums, target.models) if sums else {}


def texts(
    target: Target,
    plan: str,
    files: list[OutputFile],
    written: dict[str, dict[str, Any]],
    inputs: dict[str, dict[str, Any]],
    reference: InputModel | None,
    input_notes: list[str],
) -> dict[str, str]:
    """Return the text files of an output, by name: the manifest, and if needed the index or ``state.json``.

    Args:
        written: size, hash and facts of every file with tensors.
        inputs: size and hash of each input's files, by the input's path.
        reference: the checkpoint whose config a merged checkpoint inherits.
        input_notes: how inputs were read.
    """
    notes = [
        f"{name} (not floating point) is taken from {fact['taken_from']}; it differs in {', '.join(fact['differs_in'])}"
        for record in written.values()
        for name, fact in record["facts"].items()
        if "taken_from" in fact
    ]
    notes += [
        f"{name} has {fact['not_finite']} NaN or infinite values, equal in all models and copied"
        for record in written.values()
        for name, fact in record["facts"].items()
        if "not_finite" in fact
    ]
    hashes = {name: {"bytes": one["bytes"], "sha256": one["sha256"]} for name, one in written.items()}
    manifest = {
        "format": MANIFEST_FORMAT,
        "plan": plan,
        "merge": target.config.model_dump(exclude_none=True, exclude_defaults=True),
        **({"alpha": target.alpha} if target.alpha else {}),
        "inputs": {path: {"role": _role(target, path), "files": inputs[path]} for path in target.paths},
        **drift_of(target, written),
        "outputs": hashes,
        "notes": target.warnings + input_notes + notes,
        "versions": versions(),
    }
    result = {**index_of(files), MANIFEST: json.dumps(manifest, indent=2) + "\n"}
    if files[0].format == "checkpoint" and reference:
        result[STATE] = state_text(target.method, files, hashes, reference.state)
    return result


def _role(target: Target, path: str) -> str:
    if path == target.base:
        return "base"
    return target.composition.layout.role(path) if target.composition else "model"


def state_text(method: str, files: list[OutputFile], hashes: dict[str, Any], reference: dict[str, Any]) -> str:
    """Return ``state.json`` of a checkpoint that has weights only, with step and config of the state ``reference``."""
    tensors = {}
    for rank, file in enumerate(files):
        for name, (dtype, shape) in file.tensors.items():
            count = math.prod(shape)
            pieces = [[rank, 0, count]] if count else []
            described = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "pieces": pieces}
            tensors[MODEL + name] = described
    kept = ("step", "written", "config", "zero_stage", "tokenizer_sha256", "versions", "expert")
    facts = {key: reference[key] for key in kept if key in reference}
    own = {"format": FORMAT, "world_size": len(files), "ep_size": 1, "attempt": f"merge-{method}"}
    return seal({**facts, **own, "tensors": tensors, "files": hashes})
