"""``state.json``: the contents of a checkpoint, the location of each part, and hashes to verify it.

A checkpoint is a folder with this file and one safetensors file per rank. ``tensors`` has the shape, dtype and pieces
``[rank, first element, count]`` of each logical tensor; the key of a piece in that rank's file is
``<name>@<first element>``. ``files`` has the size and SHA-256 of each file, and ``sha256`` the hash of everything else
in ``state.json``. It also has the step, the number of ranks, and any facts from the caller of `CheckpointWriter.save`.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

FORMAT = 2
STATE = "state.json"
RANK_STATE = ("rng/", "interval/")  # prefixes of keys in a rank's file that hold its own state, not pieces


class Damaged(Exception):
    """A checkpoint cannot be used. The message reads well after "checkpoint <name> is refused:"."""


class _TensorRecord(BaseModel):
    shape: list[int]
    dtype: str
    pieces: list[tuple[int, int, int]]


class _FileRecord(BaseModel):
    bytes: int
    sha256: str


class _State(BaseModel, extra="allow"):
    step: int
    world_size: int = Field(ge=1)
    attempt: str
    written: str
    tensors: dict[str, _TensorRecord]
    files: dict[str, _FileRecord]


# Keys of `state.json` that the caller's facts must not use.
RESERVED = {"format", "sha256", *_State.model_fields}


def rank_file(rank: int) -> str:
    """Name of a rank's file in the checkpoint folder."""
    return f"rank_{rank:05d}.safetensors"


def piece_key(name: str, start: int) -> str:
    """Key in its rank's file of the piece that begins at element ``start`` of logical tensor ``name``."""
    return f"{name}@{start}"


def not_covered(name: str, record: dict[str, Any]) -> str | None:
    """Describe the first elements of a logical tensor in no piece or in several; None if each is in exactly one."""
    total, done = math.prod(record["shape"]), 0
    for _, start, count in sorted(record["pieces"], key=lambda piece: piece[1:]):
        if start < 0 or count <= 0 or start + count > total:
            return f"tensor {name} has elements {start} to {start + count - 1} of only {total}"
        if start != done:
            what = "are missing" if start > done else "occur more than once"
            return f"tensor {name}: elements {min(start, done)} to {max(start, done) - 1} of {total} {what}"
        done = start + count
    if done != total:
        return f"tensor {name}: elements {done} to {total - 1} of {total} are missing"
    return None


def join(shapes: dict[str, list[int]], reports: dict[int, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Build ``tensors`` of ``state.json`` from the ranks' reports.

    Args:
        shapes: shapes of all logical tensors by name.
        reports: for each rank, its ``pieces`` [start, count] and ``dtypes`` by name.

    Raises:
        RuntimeError: an element is missing or saved twice, a tensor has no shape, or ranks disagree on its dtype.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for name, shape in shapes.items():
        tensors[name] = {"shape": [*shape], "dtype": "", "pieces": []}
    for rank, report in sorted(reports.items()):
        for name, pieces in report["pieces"].items():
            if name not in tensors:
                raise RuntimeError(f"rank {rank} saves {name}, which has no shape")
            record, dtype = tensors[name], report["dtypes"][name]
            if record["dtype"] not in ("", dtype):
                raise RuntimeError(f"tensor {name} is {record['dtype']} on one rank and {dtype} on rank {rank}")
            record["dtype"] = dtype
            record["pieces"] += [[rank, start, count] for start, count in pieces]
    for name, record in tensors.items():
        if reason := not_covered(name, record):
            raise RuntimeError(f"the checkpoint would be incomplete: {reason}")
        record["dtype"] = record["dtype"] or "float32"  # a tensor without elements
    return tensors


def seal(state: dict[str, Any]) -> str:
    """Return the text of ``state.json``, with the hash of the other entries added."""
    plain = json.loads(json.dumps(state))  # tuples become lists and keys become strings, as a reader will see them
    return json.dumps({**plain, "sha256": _hash(plain)})


def load_state(path: Path) -> dict[str, Any]:
    """Read and verify the ``state.json`` of a checkpoint folder.

    Raises:
        Damaged: it is missing, unreadable, changed, or of another format.
    """
    if not path.is_dir():
        raise Damaged("it is not a folder" if path.exists() else "it does not exist")
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damaged(f"{STATE} is missing") from None
    except OSError as error:
        raise Damaged(f"{STATE} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError):
        raise Damaged(f"{STATE} is not JSON: it is truncated or overwritten") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format", "an older or foreign one") if isinstance(state, dict) else "a foreign one"
        raise Damaged(f"its format is {str(found)[:40]}, and this version reads format {FORMAT} only")
    if state.get("sha256") != _hash({key: value for key, value in state.items() if key != "sha256"}):
        raise Damaged(f"{STATE} does not match its hash")
    try:
        _State.model_validate(state)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise Damaged(f"{STATE} has no valid entry {where}") from None
    # Accept only these names: a path in a foreign file must not lead out of the folder.
    if set(state["files"]) != {rank_file(rank) for rank in range(state["world_size"])}:
        raise Damaged(f"{STATE} does not list one file for each of {state['world_size']} ranks")
    return state


def _hash(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
