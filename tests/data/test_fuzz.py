"""A few of the mutated files that benchmarks/studies/fuzz_reader.py and fuzz_importer.py read by the thousand."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shodh_moe.data import list_trajectories, opening, read_snapshots

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FILES, IMPORTS = 150, 48


@pytest.fixture(autouse=True, scope="module")
def importable() -> Iterator[None]:
    """Put the benchmarks folder on the path, as running a script in it does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


@pytest.fixture(scope="module")
def bases(importable: None, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    from support.mutations import make_bases

    return make_bases(tmp_path_factory.mktemp("bases"))


def test_mutated_files_are_read_or_refused(tmp_path: Path, bases: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from studies.fuzz_reader import FAULTS, read_as_training_does, write_case

    monkeypatch.setattr(opening, "CPU_SECONDS", 1)
    opening._stop()  # the next one starts with this limit
    outcomes: Counter[str] = Counter()
    for number in range(FILES):
        base, mutation = write_case(tmp_path, bases, 7, number)
        outcome, message = read_as_training_does(tmp_path, base)
        assert outcome not in FAULTS, f"file {number}, {mutation}: {message}"
        outcomes[outcome] += 1
    opening._stop()
    assert outcomes["refused"] > FILES / 4
    assert outcomes["accepted, values equal"] > FILES / 10


def test_every_base_is_sound(tmp_path: Path, bases: list[Any]) -> None:
    """Otherwise its mutations would all be refused for the same reason."""
    from support.mutations import lookup3

    for base in bases:
        path = tmp_path / base.name / "data/train/a.hdf5"
        path.parent.mkdir(parents=True)
        path.write_bytes(base.content)
        (record,) = list_trajectories(tmp_path / base.name, "train")
        for got, expected in zip(read_snapshots(record), base.values, strict=True):
            np.testing.assert_array_equal(got, expected)
        assert len(base.sealed) > 10 or "new_format" not in base.name
    assert lookup3(b"Four score and seven years ago") == 0x17770551  # from the reference implementation


def test_a_fault_is_reported_with_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from support import supervise

    child = "import json, os; print(json.dumps({'number': 3}), flush=True); os.abort()"
    popen = supervise.subprocess.Popen
    starts = iter([child, "pass"])
    monkeypatch.setattr(
        supervise.subprocess, "Popen", lambda arguments, **pipes: popen([sys.executable, "-c", next(starts)], **pipes)
    )
    outcomes, faults, _, _ = supervise.watch("script.py", seed=0, files=4, folder=tmp_path, faulty=())
    assert outcomes == {"crash": 1}
    assert faults[0]["number"] == 3


def test_mutated_files_of_others_are_imported_with_the_values_of_their_library_or_refused(
    tmp_path: Path, importable: None
) -> None:
    from studies.fuzz_importer import FAULTS, run_cases

    outcomes: Counter[str] = Counter()
    formats = set()
    for line in run_cases(3, range(IMPORTS), tmp_path):
        if "outcome" in line:
            assert line["outcome"] not in FAULTS, line
            outcomes[line["outcome"].partition(",")[0]] += 1
            formats.add(line["case"].partition(",")[0])
    assert {"npz", "npy", "hdf5", "netcdf3_classic", "netcdf4", "tiff", "matlab"} <= formats
    assert outcomes["refused"] > IMPORTS / 4
    assert outcomes["accepted"] > IMPORTS / 10


def test_values_that_the_library_does_not_read_are_a_fault(tmp_path: Path, importable: None) -> None:
    from studies.fuzz_importer import UNREAD, WRONG, import_and_compare
    from support.foreign_files import flow, make_sets

    class Owner:
        """Stands for the process of the library."""

        values: Any = None

        def run_apart(self, *call: Any) -> Any:
            if self.values is None:
                raise ValueError("damaged")
            return self.values

    (tmp_path / "sets").mkdir()
    one = next(one for one in make_sets(tmp_path / "sets") if one.name == "npz")
    folder, owner, original = tmp_path / "sets" / "npz", Owner(), flow()
    assert import_and_compare(folder, one, original, owner)[0] == "accepted, values unchanged, its library refuses"
    assert import_and_compare(folder, one, {**original, "u": original["u"] + 1}, owner)[0] == UNREAD
    owner.values = original
    assert import_and_compare(folder, one, original, owner)[0] == "accepted, values equal"
    for other in ({"u": original["u"] * (1 + 1e-5)}, {"time": original["time"] * 2}, {"p": original["p"][::-1]}):
        owner.values = {**original, **other}
        assert import_and_compare(folder, one, original, owner)[0] == WRONG
