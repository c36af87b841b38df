"""Script of test_merge: a merge that is killed once a given number of its output files are complete."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from shodh_moe.merging import merge
from shodh_moe.merging.output import Output

KILLED = 9
config, output, files = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
keep = Output._keep


def die_after(self: Output, *arguments: Any) -> None:
    keep(self, *arguments)
    if len(self.done) == files:
        os._exit(KILLED)


Output._keep = die_after  # type: ignore[method-assign]
merge(config, output, out_shard_size="2KB")
