"""Find the newest usable checkpoint and read any part of it (DESIGN 8).

The files are JSON and safetensors, so reading one never runs code from it.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from shodh_moe.base.cores import available_cores
from shodh_moe.base.errors import UserError
from shodh_moe.base.files import sha256
from shodh_moe.base.text import printable
from shodh_moe.checkpoint.fragments import Fragment, model_fragments
from shodh_moe.checkpoint.rank_file import DTYPES
from shodh_moe.checkpoint.state import RANK_STATE, Damaged, load_state, not_covered, piece_key, rank_file
from shodh_moe.parallel import ExpertParallel

HASHED_AT_ONCE = 8  # files
TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def list_checkpoints(folder: Path) -> list[int]:
    """List the steps of the checkpoints in a folder, ascending."""
    return sorted(int(path.name) for path in folder.glob("*") if re.fullmatch(r"\d+", path.name, re.ASCII))


def find_checkpoint(folder: Path, shapes: dict[str, list[int]] | None = None) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint that is intact and fits, with its ``state.json``; None if there are no checkpoints.

    Prints every checkpoint that it refuses, and why. Reads all files to hash them, so only one rank should call it.

    Args:
        folder: the run's ``checkpoints``.
        shapes: required shapes of the logical tensors; None: check for damage only.

    Raises:
        UserError: there are checkpoints, but none can be used.
    """
    steps = list_checkpoints(folder)
    newest_reason = ""
    for step in reversed(steps):
        path = folder / str(step)
        # Compare shapes first: that is cheap.
        reason = (mismatch(path, shapes) if shapes is not None else None) or damage(path)
        if reason is None:
            return path, load_state(path)
        newest_reason = newest_reason or f"{step}: {reason}"
        more = "; trying the one before it" if step > steps[0] else ""
        print(printable(f"checkpoint {path} is refused: {reason}{more}"), flush=True)
    if steps:
        raise UserError(
            f"no checkpoint in {folder} can be used ({newest_reason}): "
            "use the config they were made with, or remove them to start again from step 0"
        )
    return None


def last_checkpoint(folder: Path, steps: int) -> Path | None:
    """Return the newest intact checkpoint in a run's ``checkpoints`` if training has reached ``steps``, else None.

    Raises:
        UserError: as `find_checkpoint`.
    """
    found = find_checkpoint(folder)
    return found[0] if found and found[1]["step"] >= steps else None


def damage(path: Path) -> str | None:
    """Describe the damage to a checkpoint folder in one line; None if every byte is as it was written."""
    found = damages(path)
    return f"{found[0]} (and {len(found) - 1} more)" if len(found) > 1 else found[0] if found else None


def damages(path: Path) -> list[str]:
    """List all damage to a checkpoint folder; [] if it is intact."""
    try:
        state = load_state(path)
    except Damaged as error:
        return [str(error)]
    found = [_tensor_damage(name, record) for name, record in state["tensors"].items()]
    with ThreadPoolExecutor(min(HASHED_AT_ONCE, available_cores())) as pool:
        found += pool.map(lambda rank: _file_damage(path, state, rank), range(state["world_size"]))
    return [reason for reason in found if reason]


def _tensor_damage(name: str, record: dict[str, Any]) -> str | None:
    if record["dtype"] not in TYPES:
        return f"tensor {name} has type {record['dtype']}, which checkpoints do not support"
    return not_covered(name, record)


def _file_damage(path: Path, state: dict[str, Any], rank: int) -> str | None:
    name = rank_file(rank)
    record = state["files"][name]
    try:
        size = (path / name).stat().st_size
        if size != record["bytes"]:
            return f"{name} has {size} bytes instead of {record['bytes']}: it is {_longer_or_truncated(size, record)}"
        if sha256(path / name) != record["sha256"]:
            return f"{name} does not match its hash"
        with safe_open(path / name, "pt") as file:
            keys = set(file.keys())
            for tensor, entry in state["tensors"].items():
                for owner, start, count in entry["pieces"]:
                    if owner == rank and not _holds(file, keys, piece_key(tensor, start), count, entry["dtype"]):
                        return f"{name} does not hold elements {start} to {start + count - 1} of {tensor}"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    except SafetensorError:
        return f"{name} is not a safetensors file"
    return None


def _holds(file: Any, keys: set[str], key: str, count: int, dtype: str) -> bool:
    """Whether an open safetensors file has a piece of this key, length and dtype."""
    if key not in keys or dtype not in TYPES:
        return False
    piece = file.get_slice(key)
    return piece.get_shape() == [count] and piece.get_dtype() == DTYPES[TYPES[dtype]]


def _longer_or_truncated(size: int, record: dict[str, Any]) -> str:
    return "truncated" if size < record["bytes"] else "not the file that was written"


def mismatch(path_or_state: Path | dict[str, Any], shapes: dict[str, list[int]]) -> str | None:
    """Describe in one line how the tensors of a checkpoint differ from ``shapes``; None if they fit.

    Names the first few tensors that are missing, extra, or of another shape.
    """
    if isinstance(path_or_state, Path):
        try:
            path_or_state = load_state(path_or_state)
        except Damaged as error:
            return str(error)
    saved = {name: record["shape"] for name, record in path_or_state["tensors"].items()}
    return _difference(saved, shapes)


def _difference(saved: dict[str, list[int]], shapes: dict[str, list[int]]) -> str | None:
    parts = []
    if other := [name for name in shapes if name in saved and saved[name] != list(shapes[name])]:
        texts = [f"{name} is {saved[name]} as saved and {list(shapes[name])} in the model" for name in other]
        parts.append("of another shape: " + _few(texts))
    if missing := [name for name in shapes if name not in saved]:
        parts.append("not saved: " + _few(missing))
    if extra := [name for name in saved if name not in shapes]:
        parts.append("unknown to the model: " + _few(extra))
    return "it belongs to another model or optimizer; tensors " + "; ".join(parts) if parts else None


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class CheckpointReader:
    """Reads parts of a checkpoint; only the requested elements are read from disk.

    Attributes:
        path: the checkpoint's folder.
        state: the content of ``state.json``.

    Raises:
        UserError: the checkpoint cannot be used. Only `find_checkpoint` checks the hashes of the other files.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.state = load_state(path)
            for name, record in self.state["tensors"].items():
                if reason := _tensor_damage(name, record):
                    raise Damaged(reason)
        except Damaged as error:
            raise UserError(f"checkpoint {path} is refused: {error}") from error
        self._pieces = {
            name: sorted(record["pieces"], key=lambda piece: piece[1]) for name, record in self.state["tensors"].items()
        }
        self._files: dict[int, Any] = {}

    def names(self) -> list[str]:
        """List the names of all logical tensors."""
        return list(self.state["tensors"])

    def shape(self, name: str) -> list[int]:
        """Return the shape of a logical tensor. Raises `UserError` if it does not exist."""
        return self._record(name)["shape"]

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Read elements ``start`` to ``start + count - 1`` of the flattened logical tensor: [count], in its dtype.

        Raises:
            UserError: the tensor does not exist or is shorter, or its file cannot be read.
        """
        record = self._record(name)
        if start < 0 or start + count > math.prod(record["shape"]):
            raise UserError(
                f"checkpoint {self.path}: {name} has shape {record['shape']} and no element {start + count - 1}"
            )
        out = torch.empty(count, dtype=TYPES[record["dtype"]])
        pieces = self._pieces[name]
        first = bisect_right(pieces, start, key=lambda piece: piece[1]) - 1
        for rank, begins, size in pieces[max(first, 0) :]:
            low, high = max(start, begins), min(start + count, begins + size)
            if low < high:
                piece = self._slice(rank, piece_key(name, begins), low - begins, high - begins)
                out[low - start : high - start] = piece
            elif begins >= start + count:
                break
        return out

    def tensor(self, name: str) -> Tensor:
        """Read a whole logical tensor in its shape."""
        shape = self.shape(name)
        return self.read(name, 0, math.prod(shape)).view(shape)

    def rank_state(self, rank: int) -> dict[str, Tensor]:
        """Read a rank's own state by name (see `state.RANK_STATE`); {} if fewer ranks wrote the checkpoint.

        Raises:
            UserError: the rank's file cannot be read.
        """
        if rank >= self.state["world_size"]:
            return {}
        try:
            file = self._file(rank)
            return {k: file.get_tensor(k) for k in file.keys() if k.startswith(RANK_STATE)}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise self._unreadable(rank, error) from error

    @torch.no_grad()
    def fill(self, fragments: list[Fragment]) -> None:
        """Copy from the checkpoint into the memory of ``fragments``, converting dtype and device.

        Raises:
            UserError: as in `read`.
        """
        for name, start, values in fragments:
            values.copy_(self.read(name, start, values.numel()))

    def _record(self, name: str) -> dict[str, Any]:
        if name not in self.state["tensors"]:
            raise UserError(f"checkpoint {self.path} has no tensor {name}: it belongs to another model or optimizer")
        return self.state["tensors"][name]

    def _slice(self, rank: int, key: str, first: int, end: int) -> Tensor:
        try:
            return self._file(rank).get_slice(key)[first:end]
        except (OSError, SafetensorError) as error:
            raise self._unreadable(rank, error) from error

    def _file(self, rank: int) -> Any:
        if rank not in self._files:
            self._files[rank] = safe_open(self.path / rank_file(rank), "pt")
        return self._files[rank]

    def _unreadable(self, rank: int, error: Exception) -> UserError:
        return UserError(f"checkpoint {self.path} is damaged: {rank_file(rank)} cannot be read: {error}")


def load_weights(path: Path, model: nn.Module, ep: ExpertParallel) -> None:
    """Load the weights of a checkpoint into a model that holds this rank's experts.

    Raises:
        UserError: the checkpoint cannot be used, or its tensors differ from those of the model.
    """
    reader = CheckpointReader(path)
    fragments, shapes = model_fragments(model, ep)
    saved = {name: reader.shape(name) for name in reader.names() if name.startswith("model/")}
    if reason := _difference(saved, shapes):
        raise UserError(f"checkpoint {path} is refused: {reason}; use the config it was made with")
    reader.fill(fragments)
