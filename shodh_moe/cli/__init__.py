"""The ``shodh`` command, one file per group of commands. A command imports its implementation when it runs."""

from shodh_moe.cli.main import main

__all__ = ["main"]
