"""How a run's experts have shared their tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shodh_moe.base.errors import UserError
from shodh_moe.base.records import read_run


def load_of_run(run: Path) -> list[float]:
    """Return each expert's share of the tokens in a run's last routing record, as a mean over its layers.

    Raises:
        UserError: the folder has no such record.
    """
    for record in reversed(read_run(run, "train")):
        if loads := [layer["load_all"] for layer in record.get("routing", []) if "load_all" in layer]:
            return [float(share) for share in np.mean(loads, axis=0)]
    raise UserError(f"--load {run}: its metrics.jsonl has no routing record; name the folder of a run with experts")
