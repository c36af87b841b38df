"""The ``shodh`` command, with one file per group of commands. The work is imported only when a command runs."""

from shodh_moe.cli.main import main

__all__ = ["main"]
