"""Fuzz `shodh data import` with mutated files of every format, and compare what it accepts with the format's library.

A supervised child process imports one mutated trajectory after another; the library that owns the format reads the same
files in a process of its own. A case is determined by --seed and its number; --only N runs case N again and keeps its
files in --folder.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, for `support` and `studies`

from shodh_moe.base.errors import UserError
from shodh_moe.data import list_trajectories, read_provenance, read_trajectory
from shodh_moe.data.importing import Mapping, import_data
from shodh_moe.formats import worker
from support.foreign_files import Arrays, Set, flow, make_sets, mapping_of, read_by_owner
from support.mutations import Base, mutate
from support.supervise import fuzz_command, limit_child

WRONG = "accepted, other values than its library's"
UNREAD = "accepted, changed values that its library refuses"
FAULTS = ("traceback", WRONG, UNREAD)
SECONDS_A_CALL = 10.0  # replaces the worker's own limit, so that files that never end take less time


def second_worker() -> Any:
    """Another copy of the module that runs functions apart, with a process of its own for the libraries."""
    spec = importlib.util.find_spec("shodh_moe.formats.worker")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_bases(sets: list[Set]) -> dict[tuple[str, str], Base]:
    """The files to mutate, by the name of the set and of the file; bytes that are values are mutated less often."""
    found = {}
    fields = [
        values[number].tobytes() for name, values in flow().items() for number in range(len(values)) if name != "time"
    ]
    for one in sets:
        for name in one.mutable:
            content = one.files[name]
            structure = np.ones(len(content), bool)
            for piece in fields:
                at = content.find(piece)
                if at >= 0:
                    structure[at : at + len(piece)] = False
            positions = np.flatnonzero(structure) if structure.any() else np.arange(len(content))
            found[one.name, name] = Base(f"{one.name}/{name}", content, positions, [], (np.empty(0), np.empty(0)))
    return found


def write_case(
    folder: Path, sets: list[Set], bases: dict[tuple[str, str], Base], seed: int, number: int
) -> tuple[Set, str]:
    """Write the files of case ``number`` into ``folder``; returns (set, mutation)."""
    rng = np.random.default_rng([seed, number])
    one = sets[number % len(sets)]
    name = one.mutable[rng.integers(len(one.mutable))]
    _, mutation, content = mutate([bases[one.name, name]], rng)
    shutil.rmtree(folder, ignore_errors=True)
    for path, original in one.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content if path == name else original)
    return one, f"{one.name}, {name}, {mutation}"


def import_and_compare(folder: Path, one: Set, original: Arrays, owner: Any) -> tuple[str, str]:
    """Import the files in ``folder``. Returns (outcome, message)."""
    out = folder / "out"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import_data(Mapping(**mapping_of(one, folder)), out, progress=_quiet)
        (record,) = list_trajectories(out, "train")
        stored = read_trajectory(record)
        scale: Any = read_provenance(record.path)["scale"]
    except UserError as error:
        message = str(error)
        named = str(folder) in message and "\n" not in message
        return ("refused", message) if named else ("traceback", f"names no file, or is not one line: {message!r}")
    except Exception:
        return "traceback", traceback.format_exc()
    got = np.concatenate([stored.velocity_T3XYZ, stored.pressure_T1XYZ], 1)
    try:
        wanted, step, spacing = as_imported(owner.run_apart(folder, read_by_owner, one.kind), scale)
    except Exception as error:
        if _same(got, as_imported(original, scale)[0]):
            return "accepted, values unchanged, its library refuses", str(error)
        return UNREAD, f"its library: {error}"
    if not _same(got, wanted):
        return WRONG, f"shapes {got.shape} and {wanted.shape}"
    interval: Any = record.interval
    if step is not None and not np.isclose(interval, step * scale["time"], rtol=2e-3):
        return WRONG, f"time step {record.interval} and {step}"
    assert record.spacing is not None
    if spacing is not None and not np.isclose(record.spacing[0], spacing * scale["length"], rtol=2e-3):
        return WRONG, f"spacing {record.spacing} and {spacing}"
    return f"accepted, values {'equal' if _same(got, as_imported(original, scale)[0]) else 'changed'}", ""


def as_imported(arrays: Arrays, scale: dict[str, float]) -> tuple[np.ndarray, float | None, float | None]:
    """Fields [T, 4, X, Y, Z] in the order of time and of the coordinates; the time step and the spacing, if there."""
    fields = np.stack([arrays[name].astype(np.float64) for name in "uvwp"], 1)
    fields[:, :3] *= scale["velocity"]
    fields[:, 3] *= scale["pressure"]
    times = arrays.get("time")
    if times is not None:
        fields = fields[np.argsort(times, kind="stable")]
    for axis, name in enumerate("xyz"):
        if name in arrays and arrays[name][0] > arrays[name][-1]:
            fields = np.flip(fields, 2 + axis)
    step = None if times is None else float(np.abs(np.diff(np.sort(times))).mean())
    return fields, step, float(np.abs(np.diff(arrays["x"])).mean()) if "x" in arrays else None


def _same(got: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether stored float32 values are those of the library, in float64, up to their rounding."""
    with np.errstate(over="ignore", invalid="ignore"):
        return got.shape == wanted.shape and bool(np.allclose(got, wanted.astype(np.float32), rtol=3e-7, atol=1e-30))


def _quiet(iterable: Iterable[Any], desc: str, total: int) -> Any:
    yield from iterable


def run_cases(seed: int, numbers: Iterable[int], folder: Path) -> Iterable[dict[str, Any]]:
    """Yield {"number"} before each case, and the result after it."""
    owner = second_worker()
    previous, worker.SECONDS, owner.SECONDS = worker.SECONDS, SECONDS_A_CALL, SECONDS_A_CALL
    try:
        with tempfile.TemporaryDirectory() as made:
            sets = make_sets(Path(made))
        bases = make_bases(sets)
        originals = {}
        for one in sets:
            place = folder / "original" / one.name
            for path, content in one.files.items():
                (place / path).parent.mkdir(parents=True, exist_ok=True)
                (place / path).write_bytes(content)
            originals[one.name] = owner.run_apart(place, read_by_owner, one.kind)
        shutil.rmtree(folder / "original")
        for number in numbers:
            yield {"number": number}
            case = folder / f"case{number}"
            one, mutation = write_case(case, sets, bases, seed, number)
            outcome, message = import_and_compare(case, one, originals[one.name], owner)
            yield {"number": number, "case": mutation, "outcome": outcome, "message": message}
            shutil.rmtree(case)
    finally:
        worker.SECONDS = previous
        owner.stop()
        worker.stop()  # it may use much memory


def child(seed: int, start: int, stop: int, folder: Path) -> None:
    """Import the cases start..stop; before and after each, print its number or outcome as a line of JSON."""
    limit_child()
    for line in run_cases(seed, range(start, stop), folder):
        print(json.dumps(line), flush=True)


def only(seed: int, number: int, folder: Path) -> None:
    """Import one case, print its result, and keep its files."""
    for line in run_cases(seed, [number], folder):
        if "outcome" in line:
            print(json.dumps(line, indent=1))
            shutil.copytree(folder / f"case{number}", folder / "kept", dirs_exist_ok=True)


def main(arguments: list[str] | None = None) -> int:
    return fuzz_command(__file__, __doc__, 3000, FAULTS, child, only, arguments)


if __name__ == "__main__":
    sys.exit(main())
