"""Where a trace begins: the span of a command, whose context goes along with its calls."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

from smc.config import TRACE_ENDPOINTS


@contextmanager
def span(name: str) -> Iterator[dict[str, str]]:
    """Run the block in a span, exported if the standard variables say where to; yields metadata for calls."""
    if not any(os.environ.get(endpoint) for endpoint in TRACE_ENDPOINTS):
        yield {}
        return
    from opentelemetry import propagate

    from smc import telemetry

    # Whoever sets up exporters imports the SDK: by name, so that nobody else does.
    exporting = importlib.import_module("smc.exporting").exporting
    with exporting("smc"), telemetry.tracer(__name__).start_as_current_span(name):
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        yield carrier
