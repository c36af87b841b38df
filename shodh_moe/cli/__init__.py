"""The ``shodh`` command; a file for each group of commands. What they do is imported when one of them runs."""

from shodh_moe.cli.main import main

__all__ = ["main"]
