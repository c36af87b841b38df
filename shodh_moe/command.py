"""How every command ends: the exit code, and one line for the user or a traceback for us."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from shodh_moe.errors import EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, UserError
from shodh_moe.files import disk_trouble

EXIT_INTERRUPTED = 130


def exit_code(work: Callable[[], object], debug: bool = False) -> int:
    """Run ``work`` and translate what it raises: 0 done, 2 wrong input, 130 Ctrl-C, 1 everything else."""
    try:
        work()
    except UserError as error:
        if debug:
            traceback.print_exc()
        rank = int(os.environ.get("RANK", 0))
        print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except OSError as error:
        if debug or not (reason := disk_trouble(error)):
            traceback.print_exc()
            return EXIT_FAILED
        print(f"error: {error.filename or ''}: {reason}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except Exception:
        traceback.print_exc()
        return EXIT_FAILED
    return EXIT_DONE
