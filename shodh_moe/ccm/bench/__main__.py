"""Run one process of the benchmark.

python -m shodh_moe.ccm.bench data EXPERT              make the data of an expert's config
python -m shodh_moe.ccm.bench measure CONFIG KEY SEED  measure the experts of one family and seed
python -m shodh_moe.ccm.bench vary CONFIG KEY SEED     measure its variants
"""

from __future__ import annotations

import sys

from shodh_moe.base.command import exit_code
from shodh_moe.base.memory import keep_freed_memory
from shodh_moe.ccm.bench.config import BenchConfig
from shodh_moe.ccm.bench.measure import measure
from shodh_moe.ccm.bench.vary import vary
from shodh_moe.ccm.config import ExpertConfig
from shodh_moe.ccm.stages import make_data
from shodh_moe.config.load import load_config_of


def main() -> int:
    step, path, *which = sys.argv[1:]

    def work() -> None:
        keep_freed_memory()
        if step == "data":
            make_data(load_config_of(ExpertConfig, path))
        else:
            key, seed = which
            (measure if step == "measure" else vary)(load_config_of(BenchConfig, path), key, int(seed))

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
