"""What the messages of both variants of the protocol have in common."""

from __future__ import annotations

from typing import Any

from smc.xds.snapshot import Type
from smc.xds.stream import ProtocolError

_TYPES = {type_.value: type_ for type_ in Type}


def type_of(message: Any) -> Type:
    """Of which type a request is.

    Raises:
        ProtocolError: of one that is not served.
    """
    type_ = _TYPES.get(message.type_url)
    if type_ is None:
        raise ProtocolError(
            f"resource type {message.type_url[:200]!r} is not served here", hint=f"served are {', '.join(_TYPES)}"
        )
    return type_


def error_of(message: Any) -> str | None:
    """Why a request refuses a response; None: it does not."""
    if not message.HasField("error_detail"):
        return None
    return message.error_detail.message or f"no reason given, code {message.error_detail.code}"


def no_locators(*locators: Any) -> None:
    """
    Raises:
        ProtocolError: there is one.
    """
    if any(locators):
        raise ProtocolError("resource locators are not served", hint="ask for resources by name")
