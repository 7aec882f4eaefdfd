"""Errors on the wire: the one place where they become gRPC statuses, and become errors again at the caller."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc.status_pb2 import Status

from smc import errors
from smc.v1 import smc_pb2 as pb

KIND = "smc-error"
"""Trailing metadata: the class of the error."""
DETAILS = "grpc-status-details-bin"
"""Trailing metadata, by gRPC's convention: a google.rpc.Status."""

AUTHORITY = "smc-authority"
"""Trailing metadata of an answer: the replica's `Credential.authority`. By it a caller sees when to renew its own."""

MOST_DETAILS = 3072
"""Bytes: a client refuses more than 8 KiB of metadata, and base64 makes four of three."""
MOST_TEXT = 1024
"""Bytes of the plain status text, which counts as well."""

CODES: dict[str, grpc.StatusCode] = {
    "Invalid": grpc.StatusCode.INVALID_ARGUMENT,
    "Denied": grpc.StatusCode.PERMISSION_DENIED,
    "Unauthenticated": grpc.StatusCode.UNAUTHENTICATED,
    "NotFound": grpc.StatusCode.NOT_FOUND,
    "Conflict": grpc.StatusCode.ABORTED,
    "Exhausted": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "Unavailable": grpc.StatusCode.UNAVAILABLE,
    "Expired": grpc.StatusCode.UNAUTHENTICATED,
    "Ambiguous": grpc.StatusCode.UNKNOWN,
    "Internal": grpc.StatusCode.INTERNAL,
}
_KINDS: dict[str, type[errors.SmcError]] = {
    kind.__name__: kind
    for kind in (
        errors.Invalid,
        errors.Denied,
        errors.Unauthenticated,
        errors.NotFound,
        errors.Conflict,
        errors.Exhausted,
        errors.Unavailable,
        errors.Expired,
    )
}


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that failed, as it is told."""

    kind: str
    """A key of CODES."""
    message: str
    hint: str = ""
    findings: tuple[pb.Finding, ...] = ()
    id: str = ""

    @property
    def code(self) -> grpc.StatusCode:
        return CODES[self.kind]

    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """The trailing metadata, bounded: what does not fit is counted in `more`."""
        error = pb.Error(kind=self.kind, message=_cut(self.message), hint=_cut(self.hint), id=self.id)
        size = error.ByteSize()
        for finding in self.findings:
            size += finding.ByteSize() + 4
            if size > MOST_DETAILS:
                break
            error.findings.append(finding)
        error.more = len(self.findings) - len(error.findings)
        detail = AnyMessage()
        detail.Pack(error)
        status = Status(code=self.code.value[0], message=self.text(), details=[detail])
        return ((KIND, self.kind), (DETAILS, status.SerializeToString()))

    def text(self) -> str:
        return _cut(f"{self.message} ({self.hint})" if self.hint else self.message)


class Remote(errors.SmcError):
    """A replica failed in a way that is none of our errors: INTERNAL, or a lost answer."""


def kind_of(error: errors.SmcError) -> str:
    """The name of the class of errors.py that it is."""
    return next((base.__name__ for base in type(error).__mro__ if base.__name__ in _KINDS), "Invalid")


def from_rpc(error: Any, server: str) -> tuple[errors.SmcError, Sequence[pb.Finding], int]:
    """What a grpc.RpcError means: the error, the findings, and how many more there are. `server` is host:port.

    A replica that cannot be reached is Unavailable.
    """
    code = error.code()
    text = error.details() or ""
    told = _told(error.trailing_metadata() or ())
    if told is not None:
        message = f"{told.message} [{told.id}]" if told.id else told.message
        return _KINDS.get(told.kind, Remote)(message, hint=told.hint), tuple(told.findings), told.more
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return _unreachable(server, code, text), (), 0
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text:
        return errors.Invalid(f"{server} takes no message of that size", hint="a manifest has at most 1 MiB"), (), 0
    kind = next((k for k, c in CODES.items() if c == code), "")
    return _KINDS.get(kind, Remote)(f"{server} answers {code.name}: {text[:500]}"), (), 0


def _unreachable(server: str, code: grpc.StatusCode, text: str) -> errors.Unavailable:
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.Unavailable(f"{server} did not answer in time", hint="try again, or another server")
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return errors.Unavailable(
            f"{server} is no replica of the mesh that the credential is of, or its certificate has expired",
            hint="check the address, the clock and the credential",
        )
    return errors.Unavailable(
        f"{server} cannot be reached: {text.removeprefix('failed to connect to all addresses; last error: ')[:300]}",
        hint="is it running, and is the address right?",
    )


def _told(metadata: Iterable[Any]) -> pb.Error | None:
    for key, value in metadata:
        if key == DETAILS and isinstance(value, bytes):
            try:
                status = Status.FromString(value)
                error = pb.Error()
                if any(detail.Unpack(error) for detail in status.details):
                    return error
            except DecodeError:
                return None
    return None


def _cut(text: str) -> str:
    data = text.encode()
    return text if len(data) <= MOST_TEXT else data[: MOST_TEXT - 3].decode(errors="ignore") + "…"
