"""The format of the doctor's table."""

from __future__ import annotations

import json

from shodh_moe.doctor.table import Line, as_json, as_text

LINES = [
    Line("ok", "python", "3.12.3"),
    Line("warning", "apex", "what is installed is unrelated " * 4, "pip uninstall apex " * 10),
    Line("error", "hdf5", "fails", "pip install h5py"),
]


def test_columns_are_aligned_and_remedies_stay_in_one_piece() -> None:
    rows = as_text(LINES, width=80).splitlines()
    assert rows[0] == "ok       python  3.12.3"
    assert rows[1].startswith("warning  apex    what is")
    assert rows[2].startswith(" " * 17 + "what is installed")
    assert all(len(row) <= 80 for row in rows if "->" not in row)
    assert " " * 17 + "-> " + "pip uninstall apex " * 10 in rows
    assert rows[-1] == "1 error, 1 warning"


def test_colours_do_not_change_the_text() -> None:
    coloured = as_text(LINES, colours=True)
    assert "\033[31merror" in coloured
    for code in ("\033[31m", "\033[32m", "\033[33m", "\033[0m"):
        coloured = coloured.replace(code, "")
    assert coloured == as_text(LINES)


def test_json_counts_and_keeps_every_line() -> None:
    report = json.loads(as_json(LINES))
    assert (report["errors"], report["warnings"]) == (1, 1)
    assert report["lines"][2] == {"status": "error", "what": "hdf5", "value": "fails", "remedy": "pip install h5py"}


def test_the_summary_without_problems() -> None:
    assert as_text(LINES[:1]).splitlines()[-1] == "all is well"
