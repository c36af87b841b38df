"""The inputs of a merge: find the byte ranges of every tensor, in any supported file format.

This module opens, checks and describes files without reading tensor data. Loading never runs code from a file.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from shodh_moe.base.errors import UserError
from shodh_moe.base.remote import is_url, list_folder, local_copy
from shodh_moe.checkpoint import CheckpointReader, checkpoints_at, damage
from shodh_moe.checkpoint.state import STATE, piece_key, rank_file
from shodh_moe.config.load import read_yaml
from shodh_moe.merging.file_format import file_format
from shodh_moe.merging.safetensors_file import Damaged, read_header
from shodh_moe.merging.torch_file import TensorPlace, read_state_dict

INDEX = "model.safetensors.index.json"
EXPORT = "export.json"  # description of an exported model
MODEL = "model/"  # prefix of the names of weights in a checkpoint
# Endings of the files that may be a folder's model, and their usual names, in the order of preference.
PREFERRED = (
    (".safetensors.index.json", (INDEX, "diffusion_pytorch_model.safetensors.index.json")),
    (".safetensors", ("model.safetensors", "diffusion_pytorch_model.safetensors")),
    (".bin.index.json", ("pytorch_model.bin.index.json", "diffusion_pytorch_model.bin.index.json")),
    ((".pt", ".pth", ".bin", ".ckpt", ".pth.tar"), ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.pt")),
)


class Extent(NamedTuple):
    """A run of consecutive elements of a tensor in a file."""

    start: int  # first element, in the flattened tensor
    length: int
    file: int  # index into the model's files
    offset: int  # bytes from the start of the file


@dataclass(frozen=True)
class Stored:
    """A tensor and its location in the files.

    Attributes:
        strides: distance of neighbours along each dimension, in elements from the one extent's offset on; None if the
            elements are in order.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]
    strides: tuple[int, ...] | None = None

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
        state: a checkpoint's ``state.json``; for an exported model the entries that a merged checkpoint inherits.
        notes: what the user should know about how it was read.
    """

    path: str
    kind: str
    files: list[Path]
    tensors: dict[str, Stored]
    sha256: dict[str, str] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def file_of(self, name: str) -> Path:
        """The file that contains the first element of a tensor."""
        extents = self.tensors[name].extents
        return self.files[extents[0].file] if extents else Path(self.path)


def open_input(path: str) -> InputModel:
    """Describe a safetensors file, a state dict of torch, an index of several of them, a folder with one of these, an
    exported model, or a checkpoint of this project, by its path or URL.

    Raises:
        UserError: the input does not exist, a file is missing or damaged (names it), or a pickle has no state dict.
    """
    if not is_url(path):
        return _open(path, Path(path))
    where = _fetched(path)
    try:
        return _open(path, where)
    except UserError as error:
        here, there = where.parent, path.rstrip("/")
        if where.name == there.rpartition("/")[2]:  # else the file is in the folder at the URL
            there = there.rpartition("/")[0]
        raise UserError(str(error).replace(str(here), there)) from error


def _open(path: str, where: Path) -> InputModel:
    try:
        if where.is_file():
            return _file(path, where)
        if (where / STATE).is_file():
            return _checkpoint(path, where)
        if (where / EXPORT).is_file():
            return _exported(path, where)
        if where.is_dir():
            return _file(path, where / choose_file(path, [one.name for one in where.iterdir() if one.is_file()]))
    except Damaged as error:
        raise UserError(f"{error}: copy it or create it again") from None
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror}") from None
    raise UserError(
        f"{path} does not exist: give a safetensors file, a folder with one, a .pt state dict or a checkpoint"
    )


def _fetched(url: str) -> Path:
    """Return a local copy of the files of a remote model; in a folder there may be others beside them."""
    names = list_folder(url)
    if names is None:
        file = local_copy(url)
        if file.name.endswith(".index.json"):
            for name in sorted(set(read_index(file).values())):
                local_copy(f"{url.rpartition('/')[0]}/{name}")
        return file
    if STATE in names:
        files = [local_copy(f"{url.rstrip('/')}/{name}") for name in names]
        return files[0].parent
    return _fetched(f"{url.rstrip('/')}/{choose_file(url, names)}")


def choose_file(path: str, names: list[str]) -> str:
    """Choose the file of a folder's model: an index, or a single file of safetensors or torch.

    Args:
        path: the folder, for messages.
        names: its files.

    Raises:
        UserError: there is none, or there are several and none has the usual name.
    """
    for endings, usual in PREFERRED:
        found = sorted(name for name in names if name.endswith(endings))
        if chosen := next((name for name in usual if name in found), None):
            return chosen
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{path} has {len(found)} models, such as {found[0]} and {found[1]}: name one of the files")
    if ".metadata" in names:
        raise UserError(
            f"{path} is a checkpoint of torch.distributed: convert it with "
            f"`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} model.pt`"
        )
    if "zero_to_fp32.py" in names:
        raise UserError(
            f"{path} is a checkpoint of DeepSpeed: convert it with `python {path}/zero_to_fp32.py {path} OUT`"
        )
    if checkpoints_at(Path(path)) not in (None, [Path(path)]):
        raise UserError(f"{path} is a run: name one of its checkpoints, such as {path}/checkpoints/STEP")
    raise UserError(f"{path} holds no model: name a safetensors file, a .pt state dict or a checkpoint")


def verify_checkpoint(model: InputModel) -> None:
    """Verify the hashes of a checkpoint's files. Raises: UserError: a file has changed."""
    if model.kind == "checkpoint" and (reason := damage(model.files[0].parent)):
        raise UserError(f"checkpoint {model.path} is refused: {reason}; use another one of its run")


def _file(path: str, file: Path) -> InputModel:
    if file.name.endswith(".index.json"):
        return _indexed(path, file)
    return _described(path, [file])


def _described(path: str, files: list[Path]) -> InputModel:
    """Describe a model that is the tensors of all ``files``."""
    model = InputModel(path, "safetensors", files, {})
    for number, file in enumerate(files):
        if file_format(file) == "pt":
            model.kind = "pt"
            found, notes = read_state_dict(file)
            model.notes += notes
        else:
            found = {name: TensorPlace(*one, None) for name, one in read_header(file).items()}
        for name, (dtype, shape, offset, strides) in found.items():
            if name in model.tensors:
                raise UserError(
                    f"{file}: tensor {name} is also in another file of {path}: remove the file that is left over"
                )
            count = math.prod(shape)
            extents = (Extent(0, count, number, offset),) if count else ()
            model.tensors[name] = Stored(dtype, shape, extents, strides)
    if not model.tensors:
        raise UserError(f"{path} contains no tensors: give a model's file")
    return model


def read_index(file: Path) -> dict[str, str]:
    """Return the file name of each tensor from an index. Raises: Damaged, UserError: it is not one of a folder."""
    try:
        where = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        outside = next((name for name in where.values() if Path(name).name != name), None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Damaged(f"{file} is damaged: it is not the index of a model") from None
    if outside:
        raise UserError(f"{file} is refused: it names {outside}, outside its folder")
    return dict(where)


def _indexed(path: str, index: Path) -> InputModel:
    where = read_index(index)
    names = sorted(set(where.values()))
    if missing := next((name for name in names if not (index.parent / name).is_file()), None):
        raise UserError(f"{index.parent / missing} is named in {index.name} but missing: copy the model again")
    model = _described(path, [index.parent / name for name in names])
    if differing := sorted(model.tensors.keys() ^ where.keys()):
        verb = "misses" if differing[0] in model.tensors else "names"
        raise UserError(f"{index} {verb} tensor {differing[0]}, unlike its files: create it again")
    return model


def _exported(path: str, folder: Path) -> InputModel:
    model = _file(path, folder / "model.safetensors")
    try:
        described = json.loads((folder / EXPORT).read_text(encoding="utf-8"))
        tokenizer = json.loads((folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
        config = read_yaml(folder / "config.yaml")
        config["tokenizer"]["path"] = str(folder / "tokenizer")
        own = {"config": config, "step": described["step"], "written": "unknown"}  # an export has no date
        model.state = {**own, "tokenizer_sha256": tokenizer["sha256"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{folder} is damaged ({type(error).__name__})") from None
    return model


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
