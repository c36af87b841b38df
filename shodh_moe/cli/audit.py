"""``shodh audit``."""

from __future__ import annotations

import argparse
from typing import Any

from shodh_moe.base.command import add_config_arguments, path_option
from shodh_moe.cli.common import add_command
from shodh_moe.config.load import load_config_of


def add_audit(commands: Any) -> None:
    text = "measure whether joint training harms a domain and whether a mixture of experts prevents it; writes a report"
    audit = add_command(commands, "audit", text, "example: shodh audit --config configs/audit/cpu.yaml", _audit)
    add_config_arguments(audit)
    audit.add_argument("--output", type=path_option, metavar="FOLDER", help="folder for a copy of the report")


def _audit(options: argparse.Namespace) -> None:
    from shodh_moe.audit.config import AuditConfig
    from shodh_moe.audit.run import run

    audit = load_config_of(AuditConfig, options.config, options.overrides, options.name)
    run(audit, options.output)
    print((audit.folder / "report" / "summary.md").read_text())
    print(f"report: {audit.folder / 'report' / 'index.html'}")
