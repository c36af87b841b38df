"""Run one process of the benchmark: ``python -m shodh_moe.ccm.bench CONFIG data|measure FAMILY SEED``.

``data`` generates the family's data and ignores the seed; ``measure`` measures the experts of one seed.
"""

from __future__ import annotations

import sys

import torch

from shodh_moe.base.command import exit_code
from shodh_moe.base.memory import keep_freed_memory
from shodh_moe.ccm import data
from shodh_moe.ccm.bench.config import BenchConfig
from shodh_moe.ccm.bench.measure import measure
from shodh_moe.config.load import load_config_of


def main() -> int:
    path, step, key, seed = sys.argv[1:]

    def work() -> None:
        keep_freed_memory()
        config = load_config_of(BenchConfig, path)
        if step == "data":
            one = config.families[key].family
            device = "cuda" if torch.cuda.is_available() else "cpu"
            data.generate(one.family(), one.folder(), device=device, run=config.name)
        else:
            measure(config, key, int(seed))

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
