"""Text that comes from files of others: as lines on a terminal, and as parts of file names."""

from __future__ import annotations

import re
from typing import Any

LONGEST_NAME = 100  # bytes in UTF-8: leaves room in a file name, of which most systems allow 255
NAME_RULE = f"at most {LONGEST_NAME} letters, digits, spaces and _ . + = - that start with a letter, digit or _"
_NAME = re.compile(r"\w[\w .+=-]*")


def printable(text: str) -> str:
    r"""Return ``text`` on one line, with every character that a terminal would not show as an escape, such as ``\x1b``.

    Such characters can move the cursor, change colours or reverse the order of letters, and a lone surrogate (a byte
    that is not UTF-8) cannot be printed at all.
    """
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def printable_tree(tree: Any) -> Any:
    """Apply `printable` to every text in nested dictionaries, their keys, and lists."""
    if isinstance(tree, dict):
        return {printable_tree(key): printable_tree(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [printable_tree(value) for value in tree]
    return printable(tree) if isinstance(tree, str) else tree


def is_name(text: str) -> bool:
    """Whether ``text`` follows `NAME_RULE`, so that it can be a part of a file name, of a table and of a page."""
    return _NAME.fullmatch(text) is not None and len(text.encode(errors="replace")) <= LONGEST_NAME
