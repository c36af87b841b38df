"""Results in JSON files with the key of what they were computed from."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from shodh_moe.base.results import read_result, write_result


def test_a_result_is_read_with_its_own_key_only(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "one.json"
    assert read_result(path, "a") is None
    write_result(path, "a", {"error": 0.5, "diverged": math.inf})
    assert read_result(path, "a") == {"error": 0.5, "diverged": None, "key": "a"}
    assert read_result(path, "b") is None
    write_result(path, "b", {"error": 0.25, "key": "a"})
    assert read_result(path, "a") is None


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3", json.dumps({"error": 1})])
def test_a_damaged_file_is_no_result(tmp_path: Path, text: str) -> None:
    path = tmp_path / "one.json"
    path.write_text(text)
    assert read_result(path, "a") is None
