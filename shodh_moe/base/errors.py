"""The exception for wrong input, and the exit codes of all commands."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_UNREAD = 141  # the reader of the output has ended, as in `... | head`: what shells report for other programs
EXIT_REQUEUE = 75  # stopped by a signal after writing a checkpoint: start again (EX_TEMPFAIL of sysexits.h)


class UserError(Exception):
    """The user's input is wrong: a config, a file, a folder, a disk.

    The message is one line that says what is wrong, where, and what to do. Commands print it without a traceback
    (unless ``--debug``) and exit with code 2. Every other exception is a bug in this package, with code 1.
    """


class ReportedByRank0(UserError):
    """A `UserError` of another rank that rank 0 reports as well, with all ranks that have it.

    A rank that ends with it first waits for the launcher, which stops the other ranks once rank 0 has ended. So the
    user sees one message.
    """
