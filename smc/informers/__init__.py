"""Informers: what a provider of services and workloads says, as Observations; the leader writes them to the registry.

A provider is one file here, one line in `smc/plugins.py`, and a test that inherits `InformerContract`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

import structlog

from cluster.backoff import Backoff
from cluster.election import Deposed, Leadership
from cluster.kv import HistoryChanged, StoreError
from smc import telemetry
from smc.errors import SmcError, Unavailable
from smc.model import Observation
from smc.registry import Registry

FIRST_RETRY, LAST_RETRY = 1.0, 30.0
"""Seconds between attempts, doubled each time; see `Backoff`."""

log = structlog.get_logger(__name__)
tracer = telemetry.tracer(__name__)


class Informer(Protocol):
    """Knows what one source has. Making one does no I/O."""

    @property
    def name(self) -> str:
        """The source: what its records are kept under, `registry/<name>/`. A label, unique in a mesh."""
        ...

    def observe(self) -> AsyncGenerator[Observation, None]:
        """Yield the whole truth of the source, for ever: at once, and again after each change.

        Changes may be put together, so what is yielded is the newest when it is asked for. It is sorted: equal truth
        gives equal observations. One object that cannot be read is a Problem in the observation, which has what it
        said before, or says that this is `unknown`; a source that cannot be read is an exception, never an observation
        without what it had. Close it with `contextlib.aclosing`. Cancelling is safe, and it may be called again at any
        time: another replica may have led meanwhile.

        Raises:
            Unavailable: the source cannot be read now, so what it has is unknown.
        """
        ...


async def run(leadership: Leadership, registry: Registry, informer: Informer) -> None:
    """Write to the registry what an informer observes, for as long as the leadership lasts.

    Whatever fails on the way is logged and tried again after a growing pause; the last good state stays meanwhile.

    Raises:
        Deposed: another replica leads.
        HistoryChanged: the store is another one than before.
    """
    backoff = Backoff(FIRST_RETRY, LAST_RETRY)
    while True:
        try:
            async with aclosing(informer.observe()) as observations:
                async for observation in observations:
                    await _write(leadership, registry, informer.name, observation)
                    backoff.reset()
            raise Unavailable(f"the informer {informer.name} ended")  # noqa: TRY301
        except (Deposed, HistoryChanged):
            raise
        except Exception as e:
            foreseen = isinstance(e, SmcError | StoreError | OSError)
            log.warning(
                "a source cannot be observed; what is known of it stays",
                **{telemetry.SOURCE: informer.name},
                error=str(e) or type(e).__name__,
                exc_info=not foreseen,
            )
        await backoff.wait()


async def _write(leadership: Leadership, registry: Registry, source: str, observation: Observation) -> None:
    with tracer.start_as_current_span("smc.observe", attributes={telemetry.SOURCE: source}):
        replaced = await registry.replace(leadership, source, observation, traceparent=telemetry.current_traceparent())
    if replaced.written or replaced.deleted:
        log.info(
            "observation written",
            **{telemetry.SOURCE: source},
            written=replaced.written,
            deleted=replaced.deleted,
            problems=len(observation.problems),
        )
