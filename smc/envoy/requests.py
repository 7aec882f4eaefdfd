"""What becomes of a request on its way: as the rules of the caller's proxy see it, and then those of the server's.

The other side of what `http.py` and `listeners.py` tell Envoy to do, and nothing else: a rule is judged with these
words, not with those that the application sent. Each is observed at a real Envoy.

`called` and `routed` are the same at a caller that speaks gRPC without a proxy, `answered` at a server: gRPC normalises
nothing, and has words of its own for what a rule sees. Each is observed at grpcio 1.85.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from smc.errors import Invalid
from smc.manifests.expressions import matches_whole
from smc.model import HttpMatch

MADE_UP_ID = "00000000-0000-4000-8000-000000000000"
"""Stands for the request id that a proxy gives to a request without one."""

GRPC_AGENT = "grpc"
"""Stands for the `user-agent` that gRPC's own client sends."""
GRPC_METHOD, GRPC_TYPE = "POST", "application/grpc"
"""The only ones that gRPC knows."""
GRPC_STATUSES = {
    400: "INTERNAL",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "UNIMPLEMENTED",
    429: "UNAVAILABLE",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "UNAVAILABLE",
}
"""What a status of HTTP is to a gRPC program; every other error is UNKNOWN."""

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_TARGET = re.compile(rb"/[\x21-\x7e]*")
_ESCAPED_SLASH = re.compile(rb"%(?:2f|5c)", re.IGNORECASE)
_PARAMETERS = re.compile(rb"(?<=/)(\.{1,2});[^/]*(?=/|\Z)")
"""Of a dot segment, such as `..;x`, which some applications take for `..`."""
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")
_DOT = re.compile(rb"(\.|%2e)(\.|%2e)?", re.IGNORECASE)
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_UNFIT = re.compile(rb'["<>^`{|}]')

_INTERNAL = frozenset(
    f"x-envoy-{name}"
    for name in (
        "decorator-operation",
        "downstream-service-cluster",
        "downstream-service-node",
        "hedge-on-per-try-timeout",
        "internal",
        "ip-tags",
        "max-retries",
        "original-path",
        "original-url",
        "retriable-header-names",
        "retriable-status-codes",
        "retry-grpc-on",
        "retry-on",
        "upstream-alt-stat-name",
        "upstream-rq-per-try-timeout-ms",
        "upstream-rq-timeout-alt-response",
        "upstream-rq-timeout-ms",
    )
)
"""What Envoy takes from nobody who is external, and everybody is."""


class BadRequest(Invalid):
    """A proxy answers 400, before any rule is asked."""


@dataclass(frozen=True, slots=True)
class Request:
    """Text stands for bytes in UTF-8; what is not UTF-8 is written as surrogates."""

    method: str = "GET"
    path: str = "/"
    """With the query, if there is one."""
    headers: tuple[tuple[str, str], ...] = ()
    """(name, value) in the order in which they are sent; `host` is one of them."""
    grpc: bool = False
    """Whether gRPC judges it, to which a header's values are one, and the query is a part of the path."""

    def values(self, name: str) -> tuple[bytes, ...]:
        """Of a header, in order: a rule that one of them meets is met. Empty: there is no such header."""
        wanted = "host" if name == ":authority" else name
        found = tuple(encoded(value) for known, value in self.headers if known == wanted)
        return (b",".join(found),) if self.grpc and found else found

    @property
    def judged_path(self) -> str:
        """What a rule's expression has to match."""
        return self.path if self.grpc else self.path.partition("?")[0]


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def outgoing(request: Request) -> Request:
    """As the outbound listener hands it to its routes: nothing is normalised on the way to the world.

    Raises:
        BadRequest: no application's request may look like this.
    """
    if not _TOKEN.fullmatch(request.method):
        raise BadRequest(f"{request.method[:80]!r} is no method")
    if not _TARGET.fullmatch(encoded(request.path)) or "#" in request.path:
        raise BadRequest(f"the path {request.path[:200]!r} is not / and then visible ASCII without #", hint="escape it")
    headers = []
    for given, value in request.headers:
        if not _TOKEN.fullmatch(given) or any(c in value for c in "\r\n\0"):
            raise BadRequest(f"{given[:80]!r} is no header, or has a value that none may have")
        headers.append((given.lower(), value.strip(" \t")))
    sent = _with(headers, {"x-forwarded-proto": "http"}, without=_INTERNAL | {"x-forwarded-client-cert"})
    if all(name != "x-request-id" for name, _ in sent):
        sent = (*sent, ("x-request-id", MADE_UP_ID))
    return Request(request.method, request.path, sent)


def incoming(sent: Request, source: str, destination: str) -> Request:
    """As the inbound listener of a server hands what `outgoing` gave to policy; `source` and `destination` are URIs.

    Raises:
        BadRequest: its path has an escaped slash or zero.
    """
    certificate = f"By={destination};Hash={'0' * 64};URI={source}"
    headers = [(name, value) for name, value in sent.headers if "_" not in name]
    own = {"x-forwarded-proto": "https", "x-forwarded-client-cert": certificate}
    seen = _with(headers, own, without=_INTERNAL)
    if all(name != "x-request-id" for name, _ in seen):
        seen = (*seen, ("x-request-id", MADE_UP_ID))
    return Request(sent.method, normalised(sent.path), seen)


def called(request: Request) -> Request:
    """As gRPC's own client sends it.

    Raises:
        BadRequest: gRPC sends nothing that looks like this.
    """
    if request.method != GRPC_METHOD:
        raise BadRequest(f"gRPC has no method {request.method[:80]!r}", hint=f"it calls by {GRPC_METHOD}")
    if not _TARGET.fullmatch(encoded(request.path)):
        raise BadRequest(f"the path {request.path[:200]!r} is not / and then visible ASCII", hint="escape it")
    headers = [(name.lower(), value) for name, value in request.headers]
    if not all(_TOKEN.fullmatch(name) for name, _ in headers):
        raise BadRequest("a header has a name that none may have")
    own = {"content-type": GRPC_TYPE, "te": "trailers", "user-agent": GRPC_AGENT}
    return Request(request.method, request.path, _with(headers, own, without=frozenset()), grpc=True)


def routed(sent: Request) -> Request:
    """What the conditions of a split see, at its caller, of what `called` gave: not what gRPC adds after them."""
    unseen = {"host", "te", "user-agent"}
    seen = tuple((name, value) for name, value in sent.headers if name not in unseen and not name.endswith("-bin"))
    return replace(sent, headers=seen)


def answered(sent: Request) -> Request:
    """As a gRPC server that is no proxy judges what `outgoing` or `called` gave.

    Raises:
        BadRequest: gRPC refuses it.
    """
    if sent.method != GRPC_METHOD:
        raise BadRequest(f"gRPC has no method {sent.method[:80]!r}", hint=f"it is called by {GRPC_METHOD}")
    return replace(sent, headers=tuple(header for header in sent.headers if header[0] != "te"), grpc=True)


def normalised(path: str) -> str:
    """The path as policy judges it and the application gets it: no dot segments, no slashes in a row, few escapes.

    Raises:
        BadRequest: it has an escaped slash, backslash or zero.
    """
    raw, mark, query = encoded(path).partition(b"?")
    if _ESCAPED_SLASH.search(raw):
        raise BadRequest(f"the path {path[:200]!r} has an escaped slash", hint="write / itself")
    segments = _PARAMETERS.sub(rb"\1", raw).replace(b"\\", b"/").split(b"/")[1:]
    kept: list[bytes] = []
    for segment in segments:
        if dots := _DOT.fullmatch(segment):
            if dots[2] and kept:
                kept.pop()
        else:
            kept.append(_unescaped(segment, path))
    last = b"" if _DOT.fullmatch(segments[-1]) else kept.pop()
    whole = b"/" + b"".join(segment + b"/" for segment in kept) + last
    if b"//" in whole:
        # Of nothing but slashes Envoy leaves two: one for the beginning, and one for the end.
        named = b"/".join(segment for segment in whole.split(b"/") if segment)
        whole = b"/" + named + (b"/" if whole.endswith(b"/") else b"")
    return (whole + mark + query).decode("utf-8", "surrogateescape")


def _unescaped(segment: bytes, path: str) -> bytes:
    """With every escape that is not needed written as what it stands for, and the others as they are."""

    def plain(escape: re.Match[bytes]) -> bytes:
        value = int(escape[1], 16)
        if value == 0:
            raise BadRequest(f"the path {path[:200]!r} has an escaped zero")
        return bytes([value]) if value in _UNRESERVED else escape[0]

    return _UNFIT.sub(lambda c: b"%%%02X" % c[0][0], _ESCAPE.sub(plain, segment))


def _with(
    headers: Iterable[tuple[str, str]], own: dict[str, str], *, without: frozenset[str]
) -> tuple[tuple[str, str], ...]:
    """The headers, with those that the proxy writes itself instead of whatever was there."""
    dropped = without | own.keys()
    return (*((name, value) for name, value in headers if name not in dropped), *own.items())


# --------------------------------------------------------------------------------------------------------------- rules


def unmet(match: HttpMatch, request: Request) -> Mapping[str, str]:
    """The parts of a match that the request does not meet (`path`, `method`, `header <name>`), each with why.

    Empty: it matches. The request is that of `outgoing` for a route, that of `incoming` for policy.
    """
    found = {}
    if match.path is not None:
        path = request.judged_path
        if not matches_whole(match.path, encoded(path)):
            found["path"] = f"the path {path} does not match {match.path}"
    if match.methods and request.method not in match.methods:
        found["method"] = f"the method {request.method} is not {' or '.join(match.methods)}"
    for name, expression in match.headers:
        values = request.values(name)
        if not values:
            found[f"header {name}"] = f"there is no header {name}, which has to match {expression}"
        elif not any(matches_whole(expression, value) for value in values):
            shown = " and ".join(value.decode(errors="replace")[:200] for value in values[:10])
            found[f"header {name}"] = f"the header {name} is {shown}, which does not match {expression}"
    return found
