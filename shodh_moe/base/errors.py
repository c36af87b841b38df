"""The one exception a user may cause, and the exit codes every command shares."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_REQUEUE = 75  # stopped by a signal, with a checkpoint: start it again (EX_TEMPFAIL of sysexits.h)


class UserError(Exception):
    """The user's input is wrong: a config, a file, a folder, a disk.

    The message is one line that says what is wrong, where, and what to do. Commands print it without a
    traceback (unless ``--debug``) and exit with code 2; every other exception is a fault of ours, code 1.
    """
