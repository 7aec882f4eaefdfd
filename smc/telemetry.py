"""The names under which SMC tells what it does, and the trace that follows a change from its writer to the last ACK.

A record stores its writer's trace context. A replica that builds a Mesh from it starts a root span of its own that
links there: one change reaches every replica and every proxy, so a single tree would never end.
"""

from __future__ import annotations

from collections.abc import Iterable

from opentelemetry import propagate, trace
from opentelemetry.trace import Link, SpanContext, TraceFlags, Tracer

# Attribute and log field names.
PROXY = "smc.proxy"
REPLICA = "smc.replica"
REVISION = "smc.revision"
MANIFEST = "smc.manifest"
SOURCE = "smc.source"
TYPE = "smc.type"
RESOURCES = "smc.resources"
AFFECTED = "smc.affected"
IDENTITY = "smc.identity"

MOST_LINKS = 32
"""Links of one build span: a re-list touches everything, and every trace would be linked."""


def tracer(module: str) -> Tracer:
    return trace.get_tracer(module)


def current_traceparent() -> str:
    """The W3C `traceparent` of the span that is open here; "" if none is."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get("traceparent", "")


def links(traceparents: Iterable[str]) -> list[Link]:
    """Links to the writers of records, without repetition and at most MOST_LINKS; what cannot be read is left out."""
    found: list[Link] = []
    for text in dict.fromkeys(traceparents):
        context = _parse(text)
        if context is not None:
            found.append(Link(context))
            if len(found) == MOST_LINKS:
                break
    return found


def _parse(traceparent: str) -> SpanContext | None:
    """Read `00-<trace>-<span>-<flags>` (W3C Trace Context, section 3.2)."""
    parts = traceparent.split("-")
    if len(parts) != 4 or parts[0] != "00" or [len(p) for p in parts[1:]] != [32, 16, 2]:
        return None
    try:
        trace_id, span_id, flags = (int(part, 16) for part in parts[1:])
    except ValueError:
        return None
    context = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags))
    return context if context.is_valid else None
