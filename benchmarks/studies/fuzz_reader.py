"""Fuzz the reader with mutated trajectory files and statistics, read as training reads them.

A supervised child process reads one file after another, so that a crash of its interpreter or a hang is counted without
ending the run. A file is determined by --seed and its number; --only N reads file N again and keeps it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/, for `support` and `studies`

from shodh_moe.base.errors import UserError
from shodh_moe.data import FieldStats, list_trajectories, opening, read_provenance, read_snapshots
from shodh_moe.data.loader import Snapshots
from support.mutations import Base, make_bases, mutate, mutated_stats
from support.supervise import fuzz_command, limit_child

FAULTS = ("traceback", "crash", "timeout")
CPU_SECONDS = 2  # replaces the reader's own limit, so that files that never end take less time
STATS_SHARE = 0.03  # share of the cases that mutate statistics instead of a trajectory


def read_as_training_does(folder: Path, base: Base | None) -> tuple[str, str]:
    """Read the dataset in ``folder``. Returns (outcome, message). ``base`` is None if the statistics were mutated."""
    try:
        if base is None:
            FieldStats.load(folder)
            return "accepted, values equal or changed", ""
        (record,) = list_trajectories(folder, "train")[:1]
        fields, solid = read_snapshots(record)
        read_provenance(record.path)
        # Read again as a batch, which bypasses the library where possible.
        snapshots, out_T5XYZ = Snapshots([record]), np.empty((len(fields), 5, *record.grid), dtype=np.float32)
        for index in (0, *range(len(fields))):
            snapshots.read(index, out_T5XYZ[index])
    except UserError as error:
        message = str(error)
        named = str(folder) in message and "\n" not in message
        return ("refused", message) if named else ("traceback", f"names no file, or is not one line: {message!r}")
    except Exception:
        return "traceback", traceback.format_exc()
    same = np.array_equal(fields, base.values[0]) and np.array_equal(solid, base.values[1])
    if not np.array_equal(out_T5XYZ, np.concatenate([fields, np.broadcast_to(solid, (len(fields), *solid.shape))], 1)):
        return "traceback", "a batch differs from its snapshots"
    return f"accepted, values {'equal' if same else 'changed'}", ""


def write_case(folder: Path, bases: list[Base], seed: int, number: int) -> tuple[Base | None, str]:
    """Write file ``number`` of the run into ``folder``; returns (base, mutation)."""
    rng = np.random.default_rng([seed, number])
    if rng.random() < STATS_SHARE:
        name, content = mutated_stats(rng)
        (folder / "stats.yaml").write_bytes(content)
        return None, f"stats.yaml, {name}"
    base, name, content = mutate(bases, rng)
    path = folder / "data/train/mutated.hdf5"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    return base, f"{base.name}, {name}"


def child(seed: int, start: int, stop: int, folder: Path) -> None:
    """Read the files start..stop; before and after each, print its number or outcome as a line of JSON."""
    limit_child()
    opening.CPU_SECONDS = CPU_SECONDS
    with tempfile.TemporaryDirectory() as made:
        bases = make_bases(Path(made))
    for number in range(start, stop):
        print(json.dumps({"number": number}), flush=True)
        base, mutation = write_case(folder, bases, seed, number)
        outcome, message = read_as_training_does(folder, base)
        print(json.dumps({"number": number, "case": mutation, "outcome": outcome, "message": message}), flush=True)


def only(seed: int, number: int, folder: Path) -> None:
    """Read one file."""
    child(seed, number, number + 1, folder)


def main(arguments: list[str] | None = None) -> int:
    return fuzz_command(__file__, __doc__, 10_000, FAULTS, child, only, arguments)


if __name__ == "__main__":
    sys.exit(main())
