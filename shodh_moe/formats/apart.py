"""Open a file in the worker process, and pass its arrays on part by part.

The libraries that read these formats crash, hang or take all memory on some damaged files. In the worker this ends no
import, and the message names the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shodh_moe.formats.arrays import Array, ArrayFile, Part
from shodh_moe.formats.known import open_here, require_package
from shodh_moe.formats.worker import is_running, run_apart

_open: dict[Path, tuple[ArrayFile, ExitStack]] = {}  # in the worker


@contextmanager
def open_file(path: Path) -> Iterator[ArrayFile]:
    """Open a file, or the folder of a format that is a folder; it is read in the worker process.

    Raises:
        UserError: it is missing or damaged, its format cannot be read (the message says how to convert it), or the
            package that reads it is not installed.
    """
    require_package(path)
    try:
        names, attributes, unusable, in_memory = run_apart(path, _describe)
        arrays: dict[str, Callable[[], Array]] = {name: partial(_array, path, name) for name in names}
        yield ArrayFile(path, arrays, attributes, unusable, in_memory)
    finally:
        with suppress(Exception):
            if is_running():  # otherwise it has crashed, which closes all
                run_apart(path, _close)


def _array(path: Path, name: str) -> Array:
    def raw(part: Part) -> Any:
        return run_apart(path, _part, name, part)

    return replace(run_apart(path, _header, name), path=path, raw=raw)


def _opened(path: Path) -> ArrayFile:
    """Open a file in the worker, or return it if it is open."""
    if path not in _open:
        stack = ExitStack()
        _open[path] = stack.enter_context(open_here(path)), stack
    return _open[path][0]


def _describe(path: Path) -> tuple[list[str], dict[str, Any], dict[str, str], bool]:
    file = _opened(path)
    return file.names, file.attributes, file.unusable, file.in_memory


def _header(path: Path, name: str) -> Array:
    return replace(_opened(path).array(name), raw=_not_here)


def _part(path: Path, name: str, part: Part) -> Any:
    return np.ascontiguousarray(_opened(path).array(name).raw(part))


def _not_here(part: Part) -> Any:
    raise NotImplementedError("the values are in the worker process")


def _close(path: Path) -> None:
    if path in _open:
        _open.pop(path)[1].close()
