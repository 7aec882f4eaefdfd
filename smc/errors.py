"""Every way in which SMC says no, as one tree.

SmcError
├── Invalid           what was given is wrong, and stays wrong however often it is tried
├── Denied            the caller is known, and may not do this
├── Unauthenticated   the caller could not prove who it is
├── NotFound          what was named does not exist
├── Conflict          it exists already, or changed since it was read
├── Exhausted         a limit was reached
├── Unavailable       it cannot be done now; trying again later may work
└── Expired           a token or credential is past its time

The message says what, where and why, lower case, without a full stop; `hint` says what to do. Never a key, token or
other secret in either: errors reach logs and strangers.
"""

from __future__ import annotations


class SmcError(Exception):
    """The base of all that SMC raises on purpose."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message} ({self.hint})" if self.hint else message

    @property
    def message(self) -> str:
        """What, where and why, without the hint."""
        return str(self.args[0])


class Invalid(SmcError):
    pass


class Denied(SmcError):
    pass


class Unauthenticated(SmcError):
    pass


class NotFound(SmcError):
    pass


class Conflict(SmcError):
    pass


class Exhausted(SmcError):
    pass


class Unavailable(SmcError):
    pass


class Expired(SmcError):
    pass
