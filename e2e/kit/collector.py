"""Where the spans of all processes arrive: a collector of OTLP/HTTP with JSON, as small as it can be."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from aiohttp import web


@dataclass(frozen=True, slots=True)
class Span:
    """One span as it was exported. Ids are lower-case hex; `parent` is "" at a root."""

    name: str
    trace: str
    id: str
    parent: str
    links: tuple[tuple[str, str], ...]
    """(trace, span) each."""
    start: int
    end: int
    """Nanoseconds since 1970, both."""
    attributes: dict[str, Any]
    instance: str
    """`service.instance.id` of the process: a replica's name; something random of a command."""

    @property
    def context(self) -> tuple[str, str]:
        return self.trace, self.id


class Collector:
    """Takes what OpenTelemetry's exporters send to `endpoint` (host:port) while it is open."""

    def __init__(self, endpoint: str) -> None:
        self._host, _, port = endpoint.rpartition(":")
        self._port = int(port)
        self.url = f"http://{endpoint}"
        """What OTEL_EXPORTER_OTLP_ENDPOINT says."""
        self.spans: list[Span] = []
        """In the order of their arrival."""
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_post("/v1/traces", self._take)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()
        return self

    async def __aexit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        document = await request.json()
        for resource in document.get("resourceSpans", ()):
            instance = str(_attributes(resource.get("resource", {})).get("service.instance.id", ""))
            for scope in resource.get("scopeSpans", ()):
                self.spans.extend(_span(span, instance) for span in scope.get("spans", ()))
        return web.json_response({})

    def called(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]

    def children(self, parent: Span, name: str = "") -> list[Span]:
        """Its direct children, or those of them with a name."""
        return [
            span
            for span in self.spans
            if (span.trace, span.parent) == parent.context and (not name or span.name == name)
        ]


def _span(span: dict[str, Any], instance: str) -> Span:
    return Span(
        name=span["name"],
        trace=span["traceId"],
        id=span["spanId"],
        parent=span.get("parentSpanId") or "",
        links=tuple((link["traceId"], link["spanId"]) for link in span.get("links", ())),
        start=int(span["startTimeUnixNano"]),
        end=int(span["endTimeUnixNano"]),
        attributes=_attributes(span),
        instance=instance,
    )


def _attributes(of: dict[str, Any]) -> dict[str, Any]:
    """Each value is an object whose one key says the type; whole numbers are strings there."""
    found: dict[str, Any] = {}
    for attribute in of.get("attributes", ()):
        ((kind, value),) = attribute["value"].items()
        found[attribute["key"]] = int(value) if kind == "intValue" else value
    return found
