"""Home folders and environment variables in the paths that a user writes: configs, overrides and options."""

from __future__ import annotations

import os
import re

_VARIABLE = re.compile(r"\$(?:\{(?P<braced>[^}]*)\}|(?P<plain>\w+))", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def expand(path: str) -> str:
    """Replace ``~`` and ``~user`` at the start of a path, and ``$NAME`` and ``${NAME}`` anywhere in it.

    Only the path itself is expanded, not what it is replaced by. Unlike in a shell, nothing is replaced by an empty
    text: a path that starts at the root by accident would be worse than an error.

    Raises:
        ValueError: a variable is not set or empty, or a home folder is not known; the message names it.
    """
    start, slash, rest = path.partition("/")
    if start.startswith("~"):
        home = os.path.expanduser(start)
        if home == start:
            raise ValueError(f"{path!r}: the home folder {start} is not known; write the whole path, or ./{start}")
        return home + slash + _VARIABLE.sub(lambda found: _value(path, found), rest)
    return _VARIABLE.sub(lambda found: _value(path, found), path)


def _value(path: str, found: re.Match[str]) -> str:
    name = found["plain"] if found["braced"] is None else found["braced"]
    if not _NAME.fullmatch(name):
        raise ValueError(f"{path!r}: {found[0]} is not the name of a variable; write $NAME or ${{NAME}}")
    if not os.environ.get(name):
        state = "is empty" if name in os.environ else "is not set"
        raise ValueError(f"{path!r}: the environment variable {name} {state}; set it, or write the whole path")
    return os.environ[name]
