"""TIFF stacks, by tifffile: each series of pages is an array, named image, or image_0, image_1, ..."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from shodh_moe.base.tiff import open_tiff
from shodh_moe.formats.arrays import Array, ArrayFile, require_numbers


def read(path: Path, stack: ExitStack) -> ArrayFile:
    """List the series; each is loaded as a whole when it is first read. The usual order of axes is z, y, x."""
    with open_tiff(path) as file:
        count = len(file.series)

    def array(name: str, index: int) -> Array:
        with open_tiff(path) as file:
            require_numbers(path, name, file.series[index].dtype)
            values = file.series[index].asarray()
        return Array(path, name, tuple(values.shape), lambda part: values[part])

    names = {f"image_{index}" if count > 1 else "image": index for index in range(count)}
    return ArrayFile(path, {name: partial(array, name, index) for name, index in names.items()}, in_memory=True)
