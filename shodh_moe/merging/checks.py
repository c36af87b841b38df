"""Check inputs and outputs before the first byte is written."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import require_writable
from shodh_moe.base.remote import is_url
from shodh_moe.config.compare import differing_model_keys
from shodh_moe.merging.inputs import InputModel
from shodh_moe.merging.layout import OutputFile
from shodh_moe.merging.output import unfinished
from shodh_moe.merging.settings import Conditional


def require_same_tensors(reference: InputModel, other: InputModel) -> None:
    """Check that two models have the same tensors.

    Raises:
        UserError: tensors are missing, extra, or differ in shape or dtype; the message names the first and its file.
    """
    ours, theirs = reference.tensors, other.tensors
    if missing := [name for name in ours if name not in theirs]:
        raise UserError(
            f"{other.path} misses tensor {missing[0]}{_more(missing)}, which is in {reference.file_of(missing[0])}"
            f"{_near(missing[0], theirs)}: merge models of one architecture"
        )
    if extra := [name for name in theirs if name not in ours]:
        raise UserError(
            f"{other.file_of(extra[0])} has tensor {extra[0]}{_more(extra)}, which {reference.path} misses: "
            "merge models of one architecture"
        )
    for what, remedy in (("shape", "merge models of one architecture"), ("dtype", "convert one with a linear merge")):
        differing = [name for name in ours if getattr(ours[name], what) != getattr(theirs[name], what)]
        if differing:
            name = differing[0]
            texts = [str(getattr(one.tensors[name], what)).removeprefix("torch.") for one in (other, reference)]
            raise UserError(
                f"tensor {name}{_more(differing)} has {what} {texts[0]} in {other.file_of(name)} and {texts[1]} in "
                f"{reference.file_of(name)}: {remedy}"
            )


def _near(name: str, others: Iterable[str]) -> str:
    """Name a tensor that differs from ``name`` only by a prefix."""
    near = (one for one in others if one.endswith(f".{name}") or name.endswith(f".{one}"))
    found = next(near, None)
    return f" (it has {found} instead, with other tensors beside)" if found else ""


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def require_same_architecture(models: list[InputModel]) -> None:
    """Check that checkpoints of this project have the same model settings, which equal shapes do not prove.

    Raises:
        UserError: model settings or tokenizers differ.
    """
    checkpoints = [model for model in models if model.state]
    for other in checkpoints[1:]:
        first = checkpoints[0]
        a, b = (one.state.get("config", {}).get("model", {}) for one in (first, other))
        if differing := differing_model_keys(a, b):
            raise UserError(
                f"{first.path} and {other.path} are different models: model.{differing[0]}{_more(differing)}"
            )
        if first.state.get("tokenizer_sha256") != other.state.get("tokenizer_sha256"):
            raise UserError(f"{first.path} and {other.path} were trained on latents of different tokenizers")


def require_matches(conditions: list[Conditional], names: list[str]) -> None:
    """Check that every filter matches a tensor. Raises: UserError: one matches none, so it is probably misspelt."""
    for condition in conditions:
        if condition.written and not any(condition.fits(name) for name in names):
            raise UserError(f"{condition.written} matches none of the {len(names)} tensors, such as {names[0]}")


def require_apart(output: Path, inputs: list[str]) -> None:
    """Check that the output is local and apart from all inputs. Raises: UserError: it is not."""
    if is_url(str(output).replace(":/", "://", 1)):  # a path has lost one of the slashes
        raise UserError(f"the output {output} is a URL: give a local folder, and copy it there afterwards")
    place = output.resolve()
    for path in inputs:
        if is_url(path):
            continue
        given = Path(path).resolve()
        if place == given or place in given.parents or given in place.parents:
            raise UserError(f"the output {output} and the input {path} contain each other: choose another output")


def require_space(outputs: dict[Path, list[OutputFile]]) -> None:
    """Check that all outputs fit on their disks. Raises: UserError: one is too small, or a folder is not writable."""
    needed: dict[int, int] = {}
    places: dict[int, Path] = {}
    for folder, files in outputs.items():
        require_writable(folder.parent)
        there = next(path for path in folder.absolute().parents if path.exists())
        device = there.stat().st_dev
        written = sum(file.stat().st_blocks * 512 for file in unfinished(folder).glob("content/*"))
        needed[device] = needed.get(device, 0) + max(0, sum(file.payload for file in files) - written)
        places[device] = there
    for device, size in needed.items():
        free = shutil.disk_usage(places[device]).free
        if size > free:
            raise UserError(
                f"the outputs need {size / 1e9:.2f} GB but {places[device]} has {free / 1e9:.2f} GB free: "
                "free some, or choose another disk"
            )
