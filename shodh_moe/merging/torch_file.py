"""Find the tensors of a state dict in a file of `torch.save`, without running code from it or reading their data.

A pickle is a program of a small machine that can do harm only by calling what it imports. `_Unpickler` gives it nothing
to import but stand-ins: functions that note where a tensor's data are, and for all else classes that do nothing. So any
file can be read, while `torch.load` refuses one as soon as it names an object that torch does not know.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from shodh_moe.base.errors import UserError
from shodh_moe.merging.safetensors_file import CODES, Damaged

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Usual keys of the weights in a training checkpoint, which also holds an optimizer's state and more.
WEIGHTS = ("state_dict", "model_state_dict", "model_state", "model", "module", "network", "net", "params", "weights")
OLD_FORMAT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number as a pickle


class TensorPlace(NamedTuple):
    """Where the data of a tensor are in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    strides: tuple[int, ...] | None  # in elements; None if the elements are contiguous


def read_state_dict(file: Path) -> tuple[dict[str, TensorPlace], list[str]]:
    """Return the tensors of a state dict by name, and notes on what else the file contains.

    The state dict is the object in the file, or the weights in the dict of a training checkpoint (see `WEIGHTS`).

    Raises:
        UserError: there is no state dict, or it is unclear which of several is meant, or a tensor cannot be merged.
        Damaged: the file is not one of `torch.save`, or is damaged.
        OSError: the file cannot be read.
    """
    content = _unpickle(file)
    tensors, notes = _weights(file, content)
    places = {name: _place(file, name, tensor) for name, tensor in tensors.items()}
    return places, notes


def zip_data_offset(raw: BinaryIO, record: zipfile.ZipInfo) -> int:
    """Return the byte offset of an uncompressed record's data in the zip file that is open as ``raw``."""
    # The data follow the local header, whose lengths may differ from those in the directory.
    raw.seek(record.header_offset + 26)
    lengths = raw.read(4)
    name, extra = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
    return record.header_offset + 30 + name + extra


class _Storage(NamedTuple):
    dtype: torch.dtype | None  # None if each tensor gives its own
    offset: int
    nbytes: int


class _Tensor(NamedTuple):
    storage: _Storage
    dtype: torch.dtype
    start: int  # first element in the storage
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    view: str  # "conj" or "neg" for a tensor whose stored values are not its own


class _Foreign:
    """Stands for an object of a class or function that is not imported; takes any arguments and state."""

    def __new__(cls, *arguments: Any, **words: Any) -> _Foreign:
        return object.__new__(cls)

    def __init__(self, *arguments: Any, **words: Any) -> None:
        pass

    def _ignore(self, *arguments: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = update = _ignore


class _Unpickler(pickle.Unpickler):
    """Makes dicts, lists and the like as they are, `_Tensor` for tensors, and `_Foreign` for anything else."""

    def __init__(self, data: bytes, storages: dict[str, tuple[int, int]]):
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._storages = storages

    def persistent_load(self, key: Any) -> _Storage:
        _, dtype, name, _, _ = key
        offset, nbytes = self._storages[name]
        return _Storage(dtype if isinstance(dtype, torch.dtype) else None, offset, nbytes)

    def find_class(self, module: str, name: str) -> Any:
        # Every result is new or immutable, so that no pickle can change anything outside of itself.
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) == ("torch", "Size"):
            return lambda sizes=(): tuple(sizes)
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return lambda storage, start, shape, strides, grad=None, hooks=None, flags=None: _tensor(
                storage, storage.dtype, start, shape, strides, flags
            )
        if (module, name) == ("torch._utils", "_rebuild_tensor_v3"):
            return lambda storage, start, shape, strides, grad, hooks, dtype, flags=None: _tensor(
                storage, dtype, start, shape, strides, flags
            )
        if module == "torch._utils" and name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return lambda data, *state: data
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return lambda function, kind, arguments, state: function(*arguments)
        return type(name, (_Foreign,), {"__module__": "builtins" if module == "__builtin__" else module})


def _tensor(storage: Any, dtype: Any, start: Any, shape: Any, strides: Any, flags: Any) -> _Tensor:
    view = next((name for name in ("conj", "neg") if flags and flags.get(name)), "")
    numbers = (start, *shape, *strides)
    if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype) or len(shape) != len(strides):
        raise ValueError("not a tensor")
    if any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError("not the shape of a tensor")
    last = start + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and (last + 1) * dtype.itemsize > storage.nbytes:
        raise ValueError("a tensor is larger than its storage")
    return _Tensor(storage, dtype, start, tuple(shape), tuple(strides), view)


def _unpickle(file: Path) -> Any:
    with open(file, "rb") as raw:
        try:
            records = {record.filename: record for record in zipfile.ZipFile(raw).infolist()}
            main = next((name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")), None)
        except (zipfile.BadZipFile, ValueError, NotImplementedError):
            raise Damaged(f"{file} is damaged: it cannot be read as a zip file") from None
        if main is None:
            raise UserError(f"{file} is a zip file, but not one of torch.save: give the model's file")
        folder = main.removesuffix("data.pkl")
        if f"{folder}constants.pkl" in records:
            raise UserError(
                f"{file} is a TorchScript program: save its weights alone, as "
                "torch.save(torch.jit.load(FILE).state_dict(), NEW)"
            )
        data = folder + "data/"
        stored = {name: record for name, record in records.items() if name == main or name.startswith(data)}
        if any(record.compress_type != zipfile.ZIP_STORED for record in stored.values()):
            raise UserError(f"{file} was compressed again after torch.save: {_load_and_save()}")
        end = file.stat().st_size
        places = {name: (zip_data_offset(raw, record), record.file_size) for name, record in stored.items()}
        if any(offset + size > end for offset, size in places.values()):
            raise Damaged(f"{file} is damaged: it is truncated")
        if f"{folder}byteorder" in records and _read(raw, records[f"{folder}byteorder"]) == b"big":
            raise UserError(f"{file} was written by a machine with big-endian numbers: {_load_and_save()}")
        text = _read(raw, records[main])
    storages = {name.removeprefix(data): place for name, place in places.items() if name != main}
    try:
        return _Unpickler(text, storages).load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise Damaged(f"{file} is damaged: its description of the tensors cannot be read ({reason})") from None


def _read(raw: BinaryIO, record: zipfile.ZipInfo) -> bytes:
    raw.seek(zip_data_offset(raw, record))  # not by ZipFile.read, as torch can save without checksums
    return raw.read(record.file_size)


def _weights(file: Path, content: Any) -> tuple[dict[str, _Tensor], list[str]]:
    """Return the tensors of the state dict in ``content``, and notes on what is left out."""
    if isinstance(content, _Foreign):
        raise UserError(
            f"{file} contains an object of {_kind(content)}, whose code is not in the file: "
            "load it where that code is, and save torch.save(model.state_dict(), FILE)"
        )
    if not isinstance(content, dict):
        raise UserError(f"{file} contains {_kind(content)}, not a state dict: {SAVE_STATE_DICT}")
    inner = [name for name, value in content.items() if isinstance(value, dict) and _tensors(value)]
    usual = [name for name in inner if name in WEIGHTS]
    if len(usual) == 1 or (len(inner) == 1 and not _tensors(content)):
        chosen = (usual or inner)[0]
        tensors, notes = _flat(file, content[chosen], f"{chosen!r}: ")
        unused = [str(name) for name in content if name != chosen]
        more = f"; not used: {', '.join(unused)}" if unused else ""
        return tensors, [f"{file}: the weights are those under {chosen!r}{more}", *notes]
    if inner:
        names = ", ".join(repr(name) for name in inner)
        raise UserError(f"{file} contains tensors under {names}: load it, and save the one you want alone")
    return _flat(file, content, "")


def _flat(file: Path, content: dict[Any, Any], where: str) -> tuple[dict[str, _Tensor], list[str]]:
    tensors = _tensors(content)
    others = {name: value for name, value in content.items() if name not in tensors}
    # torch and neuraloperator keep facts about modules beside the tensors, under these keys.
    facts = [name for name in others if isinstance(name, str) and name.split(".")[-1] in ("_metadata", "_extra_state")]
    if other := next((name for name in others if name not in facts), None):
        raise UserError(
            f"{file} is not a plain state dict: {where}{other!r} is {_kind(others[other])}, not a dense tensor: "
            "load it, and save it again as torch.save({k: v for k, v in loaded.items() if torch.is_tensor(v)}, NEW)"
        )
    if not tensors:
        raise UserError(f"{file} contains a dict without tensors, not a state dict: {SAVE_STATE_DICT}")
    return tensors, [f"{file}: {where}{name!r} is not a tensor, and not used" for name in facts]


def _tensors(content: dict[Any, Any]) -> dict[str, _Tensor]:
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, _Tensor)}


def _place(file: Path, name: str, tensor: _Tensor) -> TensorPlace:
    if tensor.view:
        raise UserError(
            f"{file}: tensor {name} is a view ({tensor.view}): save it again as tensor.resolve_{tensor.view}()"
        )
    if tensor.dtype not in CODES and tensor.dtype != torch.complex128:
        raise UserError(f"{file}: tensor {name} has dtype {tensor.dtype}, which cannot be merged")
    offset = tensor.storage.offset + tensor.start * tensor.dtype.itemsize
    return TensorPlace(tensor.dtype, tensor.shape, offset, None if _contiguous(tensor) else tensor.strides)


def _contiguous(tensor: _Tensor) -> bool:
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1 and stride != expected:
            return math.prod(tensor.shape) == 0
        expected *= size
    return True


def _kind(value: Any) -> str:
    """Name the type of an unpickled object."""
    kind = value if isinstance(value, type) else type(value)
    return kind.__name__ if kind.__module__ in ("builtins", "collections") else f"{kind.__module__}.{kind.__name__}"


SAVE_STATE_DICT = "save it again as torch.save(model.state_dict(), FILE), or as safetensors"


def _load_and_save() -> str:
    return "load it and save it again: torch.save(torch.load(FILE, weights_only=True), NEW)"
