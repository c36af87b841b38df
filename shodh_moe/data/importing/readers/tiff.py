"""TIFF stacks, by tifffile: each series of pages is an array, named image, or image_0, image_1, ..."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import tifffile

from shodh_moe.data.importing.array_files import Array, ArrayFile, require_numbers

# Without a handler it would print what it also raises.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


def read(path: Path, stack: ExitStack) -> ArrayFile:
    """List the series; each is loaded as a whole when it is first read. The usual order of axes is z, y, x."""
    file = stack.enter_context(tifffile.TiffFile(path))
    many = len(file.series) > 1

    def array(name: str, index: int) -> Array:
        series = file.series[index]
        require_numbers(path, name, series.dtype)
        values = series.asarray()
        return Array(path, name, tuple(values.shape), lambda part: values[part])

    names = {f"image_{index}" if many else "image": index for index in range(len(file.series))}
    return ArrayFile(path, {name: partial(array, name, index) for name, index in names.items()}, in_memory=True)
