"""Environment variables that must be numbers, checked where they are read."""

from __future__ import annotations

import os

from shodh_moe.base.errors import UserError

_LAST_PORT = 65535


def number_in(*names: str, least: int = 0, most: int = 10**9) -> int | None:
    """Return the whole number in the first of these environment variables that is set and not empty; None without one.

    Raises:
        UserError: the variable is not a whole number from ``least`` to ``most``.
    """
    name = next((name for name in names if os.environ.get(name)), None)
    if name is None:
        return None
    text = os.environ[name].strip()
    # The length is limited because Python refuses to convert thousands of digits.
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else -1
    if not least <= number <= most:
        raise UserError(
            f"the variable {name} is {os.environ[name][:80]!r}, not a whole number{_limits(least, most)}: "
            f"set it to one, or unset it and start with a launcher that sets it{_cause(name, text)}"
        )
    return number


def number(*names: str, least: int = 0, most: int = 10**9) -> int:
    """Like `number_in`, but one of the variables must be set; raises `UserError` otherwise."""
    found = number_in(*names, least=least, most=most)
    if found is None:
        raise UserError(
            f"the variable {names[0]} is {os.environ.get(names[0], '')!r}, not a whole number: "
            "start with a launcher that sets it"
        )
    return found


def master_port() -> int | None:
    """Return the number in MASTER_PORT; None if it is not set. Raises `UserError` if it is not a port number."""
    return number_in("MASTER_PORT", least=1, most=_LAST_PORT)


def require_master_port() -> int:
    """Like `master_port`, but it must be set; raises `UserError` otherwise."""
    return number("MASTER_PORT", least=1, most=_LAST_PORT)


def _limits(least: int, most: int) -> str:
    return f" from {least} to {most}" if most < 10**9 else f" of at least {least}" if least else ""


def _cause(name: str, text: str) -> str:
    # Kubernetes describes a service named "master" to every container in a variable MASTER_PORT.
    service = name.removesuffix("_PORT").lower()
    return f" (Kubernetes sets it so for a service named {service!r})" if text.startswith("tcp://") else ""
