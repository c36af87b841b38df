"""The inputs of a merge: find the byte ranges of every tensor, in any supported file format.

This module opens, checks and describes files without reading tensor data. Loading never runs code from a file.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from shodh_moe.base.errors import UserError
from shodh_moe.checkpoint import CheckpointReader, checkpoints_at, damage
from shodh_moe.checkpoint.state import STATE, piece_key, rank_file
from shodh_moe.merging.safetensors_file import CODES, Damaged, read_header

INDEX = "model.safetensors.index.json"
MODEL = "model/"  # prefix of the names of weights in a checkpoint


class Extent(NamedTuple):
    """A run of consecutive elements of a tensor in a file."""

    start: int  # first element, in the flattened tensor
    length: int
    file: int  # index into the model's files
    offset: int  # bytes from the start of the file


@dataclass(frozen=True)
class Stored:
    """A tensor and its location in the files."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass
class InputModel:
    """One input.

    Attributes:
        path: the path given in the config.
        kind: "safetensors", "pt" or "checkpoint".
        files: the files that contain tensors.
        tensors: by name, in the order of the files; for a checkpoint only ``model/*`` without this prefix, sorted.
        sha256: hash of each file if already known and checked (from a checkpoint's ``state.json``).
        state: a checkpoint's ``state.json``.
    """

    path: str
    kind: str
    files: list[Path]
    tensors: dict[str, Stored]
    sha256: dict[str, str] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    def file_of(self, name: str) -> Path:
        """The file that contains the first element of a tensor."""
        extents = self.tensors[name].extents
        return self.files[extents[0].file] if extents else Path(self.path)


def open_input(path: str) -> InputModel:
    """Describe a safetensors file, a folder with one (or several and an index), a torch state dict, an exported model,
    or a checkpoint of this project.

    Raises:
        UserError: the input does not exist, a file is missing or damaged (names it), or a pickle has other content.
    """
    where = Path(path)
    try:
        if where.is_file():
            return _pt(path, where) if where.suffix in (".pt", ".pth", ".bin") else _safetensors(path, [where])
        if (where / STATE).is_file():
            return _checkpoint(path, where)
        if where.name.endswith(".index.json") or (where / INDEX).is_file():
            return _indexed(path, where)
        if where.is_dir():
            return _only_file(path, where)
    except Damaged as error:
        raise UserError(f"{error}: copy it or create it again") from None
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror}") from None
    raise UserError(
        f"{path} does not exist: give a safetensors file, a folder with one, a .pt state dict or a checkpoint"
    )


def verify_checkpoint(model: InputModel) -> None:
    """Verify the hashes of a checkpoint's files. Raises: UserError: a file has changed."""
    if model.kind == "checkpoint" and (reason := damage(Path(model.path))):
        raise UserError(f"checkpoint {model.path} is refused: {reason}; use another one of its run")


def _safetensors(path: str, files: list[Path]) -> InputModel:
    tensors: dict[str, Stored] = {}
    for number, file in enumerate(files):
        header = read_header(file)
        for name, (dtype, shape, offset) in header.items():
            if name in tensors:
                raise UserError(
                    f"{file}: tensor {name} is also in another file of {path}: remove the file that is left over"
                )
            count = math.prod(shape)
            tensors[name] = Stored(dtype, shape, (Extent(0, count, number, offset),) if count else ())
    return InputModel(path, "safetensors", files, tensors)


def _indexed(path: str, folder: Path) -> InputModel:
    try:
        where = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(where.values()))
        outside = next((name for name in names if Path(name).name != name), None)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{folder / INDEX} is damaged") from None
    if outside:
        raise UserError(f"{folder / INDEX} is refused: it names {outside}, outside its folder")
    if missing := next((name for name in names if not (folder / name).is_file()), None):
        raise UserError(f"{folder / missing} is named in {INDEX} but missing: copy the model again")
    model = _safetensors(path, [folder / name for name in names])
    if differing := sorted(model.tensors.keys() ^ where.keys()):
        verb = "misses" if differing[0] in model.tensors else "names"
        raise UserError(f"{folder / INDEX} {verb} tensor {differing[0]}, unlike its files: create it again")
    return model


def _only_file(path: str, folder: Path) -> InputModel:
    usual = folder / "model.safetensors"
    found = [usual] if usual.is_file() else sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        raise UserError(f"{path} has {len(found)} safetensors files and no {INDEX}: name one of them")
    if found:
        return _safetensors(path, found)
    pickles = sorted(file for ending in ("pt", "pth", "bin") for file in folder.glob(f"*.{ending}"))
    if len(pickles) == 1:
        return _pt(path, pickles[0])
    if checkpoints_at(folder) not in (None, [folder]):
        raise UserError(f"{path} is a run: name one of its checkpoints, such as {path}/checkpoints/STEP")
    raise UserError(f"{path} holds no model: name a safetensors file, a .pt state dict or a checkpoint")


def _pt(path: str, file: Path) -> InputModel:
    """Describe a plain state dict. Its tensors are memory-mapped to find their offsets, but not read."""
    remedy = "save it again as torch.save(model.state_dict(), FILE), or as safetensors"
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise UserError(f"{file} contains objects other than tensors, which are not loaded: {remedy}") from None
    except (RuntimeError, EOFError, ValueError) as error:
        text = " ".join(str(error).split())[:120]
        raise UserError(f"{file} is damaged, or in an old torch format ({text}): {remedy}") from None
    if not isinstance(tensors, dict) or not tensors:
        raise UserError(f"{file} contains a {type(tensors).__name__} without tensors, not a state dict: {remedy}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.is_sparse:
            what = type(tensor).__name__
            raise UserError(f"{file} is not a plain state dict: {name!r} is a {what}, not a dense tensor: {remedy}")
        if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
            raise UserError(f"{file}: tensor {name} is not contiguous: {remedy}")
        if tensor.dtype not in CODES and tensor.dtype != torch.complex128:
            raise UserError(f"{file}: tensor {name} has dtype {tensor.dtype}, which cannot be merged")
    start = _mapped_at(file, tensors)
    stored = {}
    for name, tensor in tensors.items():
        extent = Extent(0, tensor.numel(), 0, tensor.data_ptr() - start)
        stored[name] = Stored(tensor.dtype, tuple(tensor.shape), (extent,) if tensor.numel() else ())
    return InputModel(path, "pt", [file], stored)


def zip_data_offset(raw: BinaryIO, record: zipfile.ZipInfo) -> int:
    """Return the byte offset of an uncompressed record's data in the zip file that is open as ``raw``."""
    # The data follow the local header, whose lengths may differ from those in the directory.
    raw.seek(record.header_offset + 26)
    lengths = raw.read(4)
    name, extra = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
    return record.header_offset + 30 + name + extra


def _mapped_at(file: Path, tensors: dict[str, torch.Tensor]) -> int:
    """Return the address of the mapped file's first byte, from its storages' positions in the file and in memory."""
    records = []
    with zipfile.ZipFile(file) as archive, open(file, "rb") as raw:
        for record in archive.infolist():
            if "/data/" in record.filename and record.file_size:
                records.append((zip_data_offset(raw, record), record.file_size))
    storages = {(one.data_ptr(), one.nbytes()) for one in (t.untyped_storage() for t in tensors.values())}
    addresses = sorted(one for one in storages if one[1])
    records.sort()
    starts = {address - offset for (address, _), (offset, _) in zip(addresses, records, strict=False)}
    sizes_agree = [size for _, size in addresses] == [size for _, size in records]
    if not addresses:
        return 0
    if len(starts) != 1 or not sizes_agree:
        raise UserError(f"{file} does not have the layout of torch.save: save it again as safetensors")
    return starts.pop()


def _checkpoint(path: str, folder: Path) -> InputModel:
    state = CheckpointReader(folder).state
    files = [folder / rank_file(rank) for rank in range(state["world_size"])]
    headers = []
    for file in files:
        if not file.is_file():
            raise UserError(f"checkpoint {path} is refused: {file.name} is missing; use another one of its run")
        headers.append(read_header(file))
    tensors = {}
    for key in sorted(name for name in state["tensors"] if name.startswith(MODEL)):
        record, extents = state["tensors"][key], []
        dtype = getattr(torch, record["dtype"])
        for rank, start, count in sorted(record["pieces"], key=lambda piece: piece[1]):
            found = headers[rank].get(piece_key(key, start))
            if found is None or found[:2] != (dtype, (count,)):
                raise UserError(f"checkpoint {path} is refused: {files[rank].name} does not hold {key} from {start} on")
            extents.append(Extent(start, count, rank, found[2]))
        tensors[key.removeprefix(MODEL)] = Stored(dtype, tuple(record["shape"]), tuple(extents))
    if not tensors:
        raise UserError(f"checkpoint {path} holds no weights of a model")
    hashes = {name: record["sha256"] for name, record in state["files"].items()}
    return InputModel(path, "checkpoint", files, tensors, hashes, state)
