"""The input files of one trajectory: open them when needed, and find datasets in them by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import translate
from pathlib import Path

from shodh_moe.base.errors import UserError
from shodh_moe.data.importing.order import number_key
from shodh_moe.formats import Array, ArrayFile, open_file

_MOST_OPEN = 8
_MOST_IN_MEMORY = 4  # four files for u, v, w and p are read once for each snapshot


@dataclass
class ArrayFiles:
    """The files of a trajectory, of which the most recent few are kept open.

    Attributes:
        entries: for each entry of the mapping's list, which is a file or a pattern, the files that it names.
        view: cuts the trajectory out of each array; None if arrays hold one trajectory.
    """

    entries: list[list[Path]]
    view: Callable[[Array], Array] | None = None
    _names: dict[Path, list[str]] = field(default_factory=dict)
    _open: dict[Path, tuple[ArrayFile, ExitStack]] = field(default_factory=dict)

    @property
    def paths(self) -> list[Path]:
        return [path for entry in self.entries for path in entry]

    def at(self, path: Path) -> ArrayFile:
        """Open a file, or return it if it is already open."""
        if path not in self._open:
            in_memory = any(file.in_memory for file, _ in self._open.values())
            while len(self._open) >= (_MOST_IN_MEMORY if in_memory else _MOST_OPEN):
                self._open.pop(next(iter(self._open)))[1].close()
            stack = ExitStack()
            opened = stack.enter_context(open_file(path))
            self._open[path] = opened.seen_through(self.view) if self.view else opened, stack
        return self._open[path][0]

    def array(self, path: Path, name: str) -> Array:
        """Return an array of a file."""
        return self.at(path).array(name)

    def names(self, path: Path, pattern: str) -> list[str]:
        """List the datasets of a file that match a pattern (or have it as their name), in the order of their numbers.

        Several groups of names, such as u_1, u_2, v_1, v_2, follow each other in alphabetical order.

        Raises:
            UserError: what matches is a link, or cannot be read for another reason.
        """
        if path not in self._names:
            self._names[path] = self.at(path).names
        names = self._names[path]
        fits = re.compile(translate(pattern))
        for name, what in self.at(path).unusable.items():
            if fits.fullmatch(name) or pattern.startswith(f"{name}/"):
                raise UserError(f"{path}: {name} is {what}")
        return [pattern] if pattern in names else sorted(filter(fits.fullmatch, names), key=number_key)

    def find(self, pattern: str) -> list[tuple[Path, str]]:
        """List (file, dataset name) of every dataset that matches a pattern, file by file.

        Raises:
            UserError: no dataset matches, or one that cannot be read.
        """
        found = [(path, name) for path in self.paths for name in self.names(path, pattern)]
        if not found:
            names = sorted({name for path in self.paths[:2] for name in self.at(path).names})
            shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            raise UserError(f"{self} has no dataset {pattern!r}; it has {shown or 'none'}")
        return found

    def __str__(self) -> str:
        more = len(self.paths) - 1
        return str(self.paths[0]) + (f" (and {more} more files)" if more else "")

    def close(self) -> None:
        """Close all open files."""
        while self._open:
            self._open.popitem()[1][1].close()


@contextmanager
def open_array_files(entries: list[list[Path]], view: Callable[[Array], Array] | None = None) -> Iterator[ArrayFiles]:
    """Open the files of a trajectory; they are closed at the end of the block."""
    files = ArrayFiles(entries, view)
    try:
        yield files
    finally:
        files.close()
