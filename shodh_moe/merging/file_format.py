"""Recognise the format of a model's file by its first bytes; its name says little."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from shodh_moe.base.errors import UserError
from shodh_moe.merging.torch_file import OLD_FORMAT

_LOAD_AND_SAVE = "torch.save(torch.load(FILE, weights_only=True), NEW)"
# First bytes of files that are no models, what they are, and what to do.
OTHERS = (
    (OLD_FORMAT, "in the format of torch before 1.6", f"convert it with {_LOAD_AND_SAVE}"),
    (b"\x80", "a pickle, but not one of torch.save", "save the model's tensors as safetensors"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "run `git lfs pull` in its folder"),
    (b"\x1f\x8b", "compressed with gzip", "unpack it with gunzip"),
    (b"\x89HDF", "an HDF5 file", "save the model's tensors as safetensors"),
    (b"<!DOCTYPE", "a web page", "download the file itself"),
    (b"<html", "a web page", "download the file itself"),
)


def file_format(file: Path) -> Literal["safetensors", "pt"]:
    """Return the format of a file: "pt" for the zip files of `torch.save`, else "safetensors", damaged or not.

    Raises:
        UserError: it is recognised as another kind of file.
        OSError: the file cannot be read.
    """
    with open(file, "rb") as raw:
        head = raw.read(512)
    if head[8:9] == b"{" and head[5:8] == b"\0\0\0":  # the length and start of a safetensors header
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return "pt"
    for start, what, remedy in OTHERS:
        if head.startswith(start):
            raise UserError(f"{file} is {what}: {remedy}")
    if head[257:262] == b"ustar":
        raise UserError(f"{file} is a tar archive: unpack it, and give the model in it")
    return "safetensors"
