"""A lock that allows one training at a time in a run folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import disk_trouble


def lock_run(run: Path) -> IO[str]:
    """Keep other trainings out of a run folder until the returned file is closed or this process ends.

    The system releases the lock of a killed process. On network disks it holds between hosts if they support flock, as
    NFS 4 and Lustre (mounted with flock) do.

    Raises:
        UserError: another process holds the lock (the message says which, and since when), or the file cannot be
            written.
    """
    run.mkdir(parents=True, exist_ok=True)
    file = open(run / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - the lock lives as long as the file is open
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        text = file.read().strip()
        file.close()
        raise UserError(
            f"run folder {run} is being trained by another process ({text or 'unknown'}): wait for it, end it, or "
            "choose another name (NAME=... or --name)"
        ) from None
    except OSError as error:  # a disk without locks
        print(
            f"warning: {run} cannot be locked ({error.strerror}): make sure that no second training uses it", flush=True
        )
        return file
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    try:
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": now}))
        file.flush()
    except OSError as error:
        file.close()
        raise UserError(f"cannot write {run / '.lock'}: {disk_trouble(error) or error.strerror}") from error
    return file
