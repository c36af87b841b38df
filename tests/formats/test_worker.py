"""The process that reads files of others: what a library does on a damaged one ends no import."""

from __future__ import annotations

from pathlib import Path

import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.formats import worker
from tests.formats import faulty_calls


def test_a_library_that_crashes_or_hangs_does_not_end_the_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "u.vti"
    path.write_bytes(b"12345")
    monkeypatch.setattr(worker, "SECONDS", 60.0)
    for function, words in ((faulty_calls.crash, "its library crashes on it"), (faulty_calls.hang, "does not finish")):
        assert worker.run_apart(path, faulty_calls.size, 2) == 10
        if function is faulty_calls.hang:
            monkeypatch.setattr(worker, "SECONDS", 1.0)
        with pytest.raises(UserError, match=rf"u\.vti is damaged \(its library .*{words.split()[-1]}"):
            worker.run_apart(path, function)
    monkeypatch.setattr(worker, "SECONDS", 60.0)
    with pytest.raises(ValueError, match=r"no table in u\.vti"):
        worker.run_apart(path, faulty_calls.fail)
    worker.stop()
