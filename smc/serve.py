"""`smc serve`: the process around a replica, from its settings to its exit code."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog
import tenacity
import uvloop

from cluster.kv import KV
from smc import codec, plugins
from smc.certificates.authority import load_keyring, load_mesh, store_errors
from smc.certificates.sealing import Keyring
from smc.certificates.signers import Signer
from smc.config import Settings
from smc.errors import Invalid, SmcError, Unavailable
from smc.exporting import exporting, log_to_stderr
from smc.keys import Keys
from smc.records import EpochRecord, MeshRecord
from smc.replica import Replica

LONGEST_WAIT = 5.0
"""Seconds between two attempts to read the store at the start."""
GC_THRESHOLDS = (10_000, 20, 50)
"""By default Python looks through all that a replica holds every few seconds, and stops the loop for 100 ms each time:
a mesh is many small values that live long. What it frees are the cycles of ended tasks, which can wait."""

T = TypeVar("T")
log = structlog.get_logger(__name__)


def main(settings: Settings) -> int:
    """Run a replica until SIGTERM or SIGINT; returns the exit code."""
    log_to_stderr(settings.log_level, replica=settings.name)
    gc.set_threshold(*GC_THRESHOLDS)
    with exporting("smc", instance=settings.name):
        try:
            uvloop.run(_until_stopped(settings))
        except SmcError as e:
            log.error("the replica cannot run", error=e.message, hint=e.hint)  # noqa: TRY400 - foreseen: no traceback
            return 1
    return 0


async def _until_stopped(settings: Settings) -> None:
    """Run until a signal asks to stop.

    Raises:
        SmcError: it cannot; the text says why.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    kv = plugins.store(settings)
    try:
        signer = plugins.signer(settings)
        keys = Keys(settings.mesh)
        starting = asyncio.create_task(_start(kv, keys, signer))
        stopping = asyncio.create_task(stop.wait())
        # A replica may wait for the store for long; a signal ends that at once.
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not starting.done():
            starting.cancel()
            await asyncio.wait((starting,))
            return
        mesh, epoch, keyring = starting.result()
        await Replica(settings, kv, keys, signer, mesh, epoch, keyring).run(stop)
    except* SmcError as group:
        raise _first(group) from None
    finally:
        await kv.close()


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _start(kv: KV, keys: Keys, signer: Signer) -> tuple[MeshRecord, int, Keyring]:
    """What must be read before anything can be served; waits for the store as long as it takes."""
    mesh = await _patiently(lambda: load_mesh(kv, keys))
    keyring = await _patiently(lambda: load_keyring(kv, keys, signer))

    async def pinned() -> int:
        with store_errors("the store cannot be read"):
            found = f"{(await kv.status()).cluster_id:x}"
            epoch = await kv.get(keys.epoch)
        if found != mesh.cluster_id:
            raise Invalid(
                f"the mesh {keys.mesh_name!r} was made in the etcd cluster {mesh.cluster_id}, and this one is {found}",
                hint="name the etcd of the mesh; a copy of it must not be served beside it",
            )
        if epoch is None:
            raise Invalid(f"the mesh {keys.mesh_name!r} has no epoch", hint="restore etcd from a backup")
        return codec.decode(EpochRecord, epoch.value, key=epoch.key).number

    return mesh, await _patiently(pinned), keyring


async def _patiently(read: Callable[[], Awaitable[T]]) -> T:
    """Ask again while the store does not answer; every other error is raised."""
    async for attempt in tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(Unavailable),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=LONGEST_WAIT),
        before_sleep=lambda state: log.warning("waiting for the store", error=str(_failure(state))),
    ):
        with attempt:
            return await read()
    raise AssertionError("without an end there is no way out of the loop")


def _failure(state: tenacity.RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome is not None else None
