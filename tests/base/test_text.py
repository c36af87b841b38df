"""Text from files of others: what a terminal shows, and what may be a part of a file name."""

from __future__ import annotations

import pytest

from shodh_moe.base.text import is_name, printable, printable_tree


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a plain text: µ, é, 流", "a plain text: µ, é, 流"),
        ("two\n  lines\tand a tab", "two lines and a tab"),
        ("red \x1b[31m", r"red \x1b[31m"),
        ("a C1 control \x9b2J", r"a C1 control \x9b2J"),
        ("reversed \u202e", r"reversed \u202e"),
        (b"not UTF-8 \xff".decode(errors="surrogateescape"), r"not UTF-8 \udcff"),
    ],
)
def test_what_a_terminal_would_not_show_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable_tree({text: [text, 1, None]}) == {shown: [shown, 1, None]}
    printable(text).encode()


@pytest.mark.parametrize("name", ["open_channel", "MHD_64", "isotropic turbulence", "Re=100", "3D", "_x", "Strömung"])
def test_usual_names_are_accepted(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".x", "a/b", "/a", "a\\b", "a\n", "a\0", "\x1b[2J", "a|b", "<b>", "$x$", "-rf", "\udcff"]
)
def test_other_names_are_not(name: str) -> None:
    assert not is_name(name)


def test_a_name_fits_into_a_file_name() -> None:
    assert is_name("é" * 50)
    assert not is_name("é" * 51)
