"""Measure one domain and seed in a separate process: ``python -m shodh_moe.ccm.bench3d CONFIG DOMAIN SEED``."""

from __future__ import annotations

import sys

from shodh_moe.base.command import exit_code
from shodh_moe.base.memory import keep_freed_memory
from shodh_moe.ccm.bench3d.config import Bench3dConfig
from shodh_moe.ccm.bench3d.measure import measure
from shodh_moe.config.load import load_config_of


def main() -> int:
    path, domain, seed = sys.argv[1:]

    def work() -> None:
        keep_freed_memory()
        measure(load_config_of(Bench3dConfig, path), domain, int(seed))

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
