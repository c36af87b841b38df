"""Read requests {"path": P} from stdin, one per line, and answer each with a line of JSON until stdin ends."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import h5py

from shodh_moe.base.errors import UserError
from shodh_moe.base.remote_file import RemoteFile, openable
from shodh_moe.inspection.flow import describe
from shodh_moe.inspection.structure import check_structure, one_line

MEMORY_BYTES = 2 * 2**30


def inspect(path: str) -> dict[str, Any]:
    """Inspect one HDF5 file.

    Returns:
        {"flow": result of `describe`}, {"no_flow": reason} for a sound file of another kind, or {"refused": reason}.
        A reason completes a sentence that begins with the file's path.
    """
    source: Path | RemoteFile = Path(path)
    try:
        source = openable(Path(path))
        with h5py.File(source, "r") as file:
            check_structure(file)
            try:
                return {"flow": describe(file, Path(path).parent.name)}
            except UserError as error:
                return {"no_flow": str(error)}
    except UserError as error:
        return {"refused": str(error)}
    except BlockingIOError:
        return {"refused": "is locked: another process is writing it; wait until it has finished"}
    except Exception as error:
        if isinstance(source, RemoteFile) and source.error:
            return {"refused": str(source.error)}
        if "truncated" in str(error):
            return {"refused": "is truncated"}
        return {"refused": f"is damaged or unreadable ({one_line(error)})"}


def main() -> None:
    """Answer requests; ``sys.argv[1]`` is the limit of CPU seconds for each file."""
    # Lower the soft limits; skip any that this system does not support.
    cpu_seconds = int(sys.argv[1])
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for line in sys.stdin:
        with contextlib.suppress(ValueError, OSError):
            used = resource.getrusage(resource.RUSAGE_SELF)
            limit = int(used.ru_utime + used.ru_stime) + 1 + cpu_seconds
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        print(json.dumps(inspect(json.loads(line)["path"])), flush=True)


if __name__ == "__main__":
    main()
