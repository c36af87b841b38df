"""Assign the tensors of an output to files, before the first byte is written."""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from shodh_moe.base.errors import UserError
from shodh_moe.checkpoint.rank_file import DTYPES as CHECKPOINT_DTYPES
from shodh_moe.checkpoint.state import piece_key, rank_file
from shodh_moe.merging.inputs import INDEX, MODEL
from shodh_moe.merging.safetensors_file import make_header
from shodh_moe.merging.torch_file import zip_data_offset

Described = dict[str, tuple[torch.dtype, tuple[int, ...]]]
REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}  # dtype of a complex tensor's parts
WIDER = {torch.float32: torch.complex64, torch.float64: torch.complex128}


@dataclass(frozen=True)
class OutputFile:
    """One output file, written sequentially."""

    name: str
    format: str
    tensors: Described

    @property
    def payload(self) -> int:
        """Size of its tensors in bytes."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.tensors.values())

    def begin(self, path: Path) -> dict[str, int]:
        """Create the file without the tensors' data, and return the byte offset of each tensor."""
        if self.format == "pt":
            return _begin_pt(path, self.tensors)
        stored = self.tensors
        if self.format == "checkpoint":
            # Checkpoints store flat pieces of tensors, whose keys give the first element.
            stored = {piece_key(MODEL + k, 0): (dtype, (math.prod(shape),)) for k, (dtype, shape) in stored.items()}
        beginning, places, _ = make_header(stored, {"format": "pt"})
        path.write_bytes(beginning)
        return dict(zip(self.tensors, places.values(), strict=True))


def plan_files(tensors: Described, format: str, shard_bytes: int) -> list[OutputFile]:
    """Distribute ``tensors`` in order over files of at most ``shard_bytes``; a larger tensor gets its own file.

    Raises:
        UserError: the format does not support one of the dtypes.
    """
    if format == "checkpoint":
        for name, (dtype, _) in tensors.items():
            if dtype not in CHECKPOINT_DTYPES:
                raise UserError(
                    f"a checkpoint cannot store tensor {name} of dtype {dtype}: write `format: safetensors`"
                )
    if format == "pt":  # torch.load needs a single file
        return [OutputFile("model.pt", format, tensors)]
    groups: list[Described] = [{}]
    size = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if size and size + nbytes > shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = (dtype, shape)
        size += nbytes
    return [OutputFile(_name(format, i, len(groups)), format, group) for i, group in enumerate(groups)]


def _name(format: str, number: int, count: int) -> str:
    if format == "checkpoint":
        return rank_file(number)
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def index_of(files: list[OutputFile]) -> dict[str, str]:
    """Return the index file as {name: content}, which maps each tensor to its file; {} if there is only one file."""
    if len(files) == 1 or files[0].format != "safetensors":
        return {}
    where = {name: file.name for file in files for name in file.tensors}
    index = {"metadata": {"total_size": sum(file.payload for file in files)}, "weight_map": where}
    return {INDEX: json.dumps(index, indent=2) + "\n"}


def output_dtype(stored: torch.dtype, wanted_name: str | None) -> torch.dtype:
    """Return the output dtype of a tensor with dtype ``stored``.

    Complex tensors keep theirs if half precision is wanted, integers and booleans always.
    """
    if wanted_name is None or not (stored.is_floating_point or stored.is_complex):
        return stored
    wanted: torch.dtype = getattr(torch, wanted_name)
    return WIDER.get(wanted, stored) if stored.is_complex else wanted


def _begin_pt(path: Path, tensors: Described) -> dict[str, int]:
    """Write a state dict like `torch.save`, but with holes in place of the tensors' data; return their offsets."""
    # This memory is reserved, but never touched.
    empty = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in tensors.items()}
    with torch.serialization.skip_data():
        torch.save(empty, path)
    places = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as raw:
        for number, name in enumerate(tensors):  # each tensor has its own storage, in this order
            places[name] = zip_data_offset(raw, archive.getinfo(f"model/data/{number}"))
    return places
