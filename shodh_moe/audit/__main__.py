"""Measure one run of the audit in a separate process: ``python -m shodh_moe.audit CONFIG RUN``."""

from __future__ import annotations

import sys

import torch

from shodh_moe.audit.arms import find_run
from shodh_moe.audit.config import AuditConfig
from shodh_moe.audit.measure import measure
from shodh_moe.base.command import exit_code
from shodh_moe.base.memory import keep_freed_memory
from shodh_moe.config.load import load_config_of


def main() -> int:
    path, name = sys.argv[1:]

    def work() -> None:
        keep_freed_memory()
        torch.manual_seed(0)
        audit = load_config_of(AuditConfig, path)
        measure(audit, find_run(audit, name))

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
