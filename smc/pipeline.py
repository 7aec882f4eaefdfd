"""One replica's loop: View -> Mesh -> Snapshots -> the streams that they concern.

Builds start at once when idle and coalesce under load: one in flight, newest wins, no fixed delay. They run in a
thread; whatever a thread makes is frozen before the event loop sees it. A lost store changes nothing: the last Mesh
stays.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from itertools import islice

import structlog
from opentelemetry.context import Context
from opentelemetry.trace import SpanContext

from cluster.kv import KeyValue, Unavailable, View
from cluster.mirror import Mirror
from cluster.overlay import Overlay
from smc import errors, telemetry
from smc.codec import UnreadableRecord, traceparent
from smc.errors import NotFound
from smc.manifests import PolicyApi
from smc.mesh import Mesh, build, with_revocations
from smc.metrics import Metrics
from smc.model import Name, Sidecar
from smc.xds.slot import NotAdmitted, Offer, Slot
from smc.xds.snapshot import Snapshot

log = structlog.get_logger(__name__)
tracer = telemetry.tracer(__name__)

COLD_REFUSAL = 15.0
"""Seconds without the store in which a cold proxy is refused, so that it finds a replica that is better off."""

BUILD_DEADLINE = 30.0
"""Seconds that a new stream waits for the Mesh that it must not be older than."""

TOGETHER = 32
"""Streams that are offered something before the first of them is written to: what runs again and again stays in the
processor's caches."""

Generate = Callable[[Mesh, Name], Snapshot]


class Pipeline:
    """What this replica knows and whom it tells. Runs on one event loop; `run` is its lifetime."""

    def __init__(
        self,
        mirror: Mirror,
        policies: Sequence[PolicyApi],
        generate: Generate,
        *,
        sources: frozenset[str],
        max_staleness: float,
        metrics: Metrics,
    ) -> None:
        self.mesh: Mesh | None = None
        self._mirror = mirror
        self._policies = policies
        self._generate = generate
        self._sources = sources
        self._max_staleness = max_staleness
        self._metrics = metrics
        metrics.problems.set_function(self._count_problems)
        self._pending: View | None = None
        self._arrived = asyncio.Event()
        self._built: asyncio.Condition = asyncio.Condition()
        self._view: View | None = None
        """That `mesh` was built from."""
        self._generation = 0
        self._reached = (0, 0)
        """The generation and revision of the View that was built last."""
        self._failed = (0, 0), ""
        """The same of the View that could not be built last, and why."""
        self._slots: dict[Name, dict[Slot, None]] = {}
        """Of every proxy that has an open stream, those of its streams."""
        self._stale: set[Name] = set()
        """The proxies whose slots are."""
        self._only: dict[tuple[Name, str], Slot] = {}
        """Of each proxy that has one stream for a service."""
        self._build_context: SpanContext | None = None
        """Of `mesh`; None: nobody records it."""
        self._publishing = asyncio.Lock()
        self._generating = threading.Lock()
        """A thread goes on when who waits for it is cancelled, and a generator serves one thread at a time."""

    # ------------------------------------------------------------------------------------------------------- the loop

    async def run(self) -> None:
        """Follow the store until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow())
            tasks.create_task(self._build())

    async def _follow(self) -> None:
        async with aclosing(self._mirror.follow()) as views:
            async for view in views:
                self._pending = view if self._pending is None else _merge(self._pending, view)
                self._arrived.set()

    async def _build(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            view, self._pending = self._pending, None
            if view is not None:
                with _uncollected():
                    await self._step(view)

    async def _step(self, view: View) -> None:
        loop = asyncio.get_running_loop()
        previous = self.mesh if view.generation == self._generation else None
        links = telemetry.links(_traceparents(view))
        with tracer.start_as_current_span("smc.build", context=Context(), links=links) as span:
            started = loop.time()
            try:
                mesh = await asyncio.to_thread(build, previous, view, self._policies)
            except Exception as e:
                # A fault of ours must not take a replica down, let alone all of them one after the other: the last
                # good Mesh stays, and the next View is built from nothing.
                log.exception("building the mesh failed; the last one stays", **{telemetry.REVISION: view.revision})
                self._metrics.build_failures.inc()
                self._generation = -1
                # Before a new stream hears of it. Whoever cannot even do this must not go on serving.
                await self._obey(view)
                async with self._built:
                    self._failed = (view.generation, view.revision), str(e) or type(e).__name__
                    self._built.notify_all()
                return
            self._metrics.build_time.observe(loop.time() - started)
            self._metrics.affected.observe(len(mesh.affected))
            span.set_attribute(telemetry.REVISION, mesh.revision)
            span.set_attribute(telemetry.AFFECTED, len(mesh.affected))
            await self._publish(mesh, view, everyone=previous is None, context=span.get_span_context())

    async def _obey(self, view: View) -> None:
        """Refuse whom the View revokes, although there is no Mesh of it."""
        async with self._publishing:
            if self.mesh is not None:
                self.mesh = await asyncio.to_thread(with_revocations, self.mesh, view)
                for name, slots in self._slots.items():
                    for slot in slots:
                        if why := self.mesh.refuses(name, slot.serial):
                            slot.end(why)

    async def _publish(self, mesh: Mesh, view: View, *, everyone: bool, context: SpanContext) -> None:
        loop = asyncio.get_running_loop()
        async with self._publishing:
            started = loop.time()
            there = self._slots.keys()
            names = set(there) if everyone else there & mesh.affected
            if self._stale:
                names |= there & self._stale
            snapshots = await asyncio.to_thread(self._snapshots, mesh, names)
            self._metrics.snapshot_time.observe(loop.time() - started)
            looked_at = tuple(there) if self.mesh is None or _revokes_others(self.mesh, mesh) else names
            self.mesh, self._view = mesh, view
            self._build_context = context if context.trace_flags.sampled else None
            offer = self._offer(mesh)
            self._generation = view.generation
            self._stale = set()
            offered: list[Slot] = []
            for name in looked_at:
                snapshot = snapshots.get(name)
                for slot in self._slots.get(name, ()):
                    if why := mesh.refuses(name, slot.serial):
                        # Before it is given anything of this Mesh: a key that took the place of its own, for one.
                        slot.end(why)
                    elif snapshot is None and name not in names:
                        continue
                    elif snapshot is None and name not in mesh.proxies:
                        slot.end(f"workload {name} was removed from the mesh")
                    else:
                        self._fill(slot, name, snapshot, offer)
                        if snapshot is not None:
                            offered.append(slot)
                if len(offered) >= TOGETHER:
                    _write(offered)
            _write(offered)
        self._metrics.revision.set(mesh.revision)
        async with self._built:
            self._reached = (view.generation, view.revision)
            self._built.notify_all()

    def _snapshots(self, mesh: Mesh, names: Iterable[Name]) -> Mapping[Name, Snapshot]:
        """Runs in a thread. A proxy whose Snapshot cannot be made keeps the one that it has; the others go on."""
        made: dict[Name, Snapshot] = {}
        with self._generating:
            for name in names:
                if name in mesh.proxies:
                    try:
                        made[name] = self._generate(mesh, name)
                    except Exception:
                        log.exception(
                            "generating a snapshot failed; the proxy keeps the last one", **{telemetry.PROXY: str(name)}
                        )
        return made

    async def imagine(self, changes: Mapping[str, bytes | None]) -> tuple[Mesh, Mesh]:
        """The Mesh as it is, and as it would be if these keys had these values; None: if they were deleted.

        Nothing of it reaches a stream, and the next build does not hear of it.

        Raises:
            errors.Unavailable: there is none yet.
        """
        mesh, view = self.mesh, self._view
        if mesh is None or view is None:
            raise errors.Unavailable(self.unready_reason)
        revision = view.revision + 1
        late: dict[str, KeyValue | None] = dict.fromkeys(changes)
        for key, value in changes.items():
            there = view.items.get(key)
            if value is not None:
                late[key] = KeyValue(key, value, there.create_revision if there else revision, revision)
        imagined = replace(view, revision=revision, items=Overlay(view.items, late), changed=frozenset(changes))
        return mesh, await asyncio.to_thread(build, mesh, imagined, self._policies)

    def _count_problems(self) -> float:
        return float(sum(map(len, self.mesh.problems.values()))) if self.mesh is not None else 0.0

    # ---------------------------------------------------------------------------------------------------- the streams

    @property
    def ready(self) -> bool:
        """The first View is built and every configured source was observed whole."""
        return self.mesh is not None and self._sources <= self.mesh.synced

    @property
    def unready_reason(self) -> str:
        if self.mesh is None:
            return "the mesh has not been read from etcd yet"
        missing = ", ".join(sorted(self._sources - self.mesh.synced))
        return f"these sources have not been observed yet: {missing}" if missing else ""

    async def meshes(self) -> AsyncGenerator[Mesh, None]:
        """Yield the newest Mesh once this replica is ready, then each newer one; who is slow is spared some."""
        last: Mesh | None = None

        def newer() -> Mesh | None:
            return self.mesh if self.ready and self.mesh is not last else None

        while True:
            async with self._built:
                last = await self._built.wait_for(newer)
            if last is not None:
                yield last

    async def admit(self, *, resumed: bool) -> None:
        """Return once a stream that opened now may be answered: with nothing older than what was committed before.

        While the store cannot be reached, a resumed stream waits (it is sent nothing, and loses nothing); a cold one
        is refused for COLD_REFUSAL seconds, and then gets the last Mesh for at most `max_staleness`.

        Raises:
            NotAdmitted: with the reason; the proxy should try another replica.
        """
        while True:
            if not self.ready:
                raise NotAdmitted(self.unready_reason)
            try:
                await self._mirror.caught_up()
                await self._has_built(self._mirror.view)
                return
            except Unavailable as e:
                if not resumed:
                    self._admit_stale(e)
                    return
                await asyncio.sleep(1)

    async def _has_built(self, view: View | None) -> None:
        wanted = (view.generation, view.revision) if view is not None else (0, 0)
        try:
            async with asyncio.timeout(BUILD_DEADLINE), self._built:
                await self._built.wait_for(lambda: max(self._reached, self._failed[0]) >= wanted)
        except TimeoutError:
            raise NotAdmitted(f"the mesh at revision {wanted[1]} was not built within {BUILD_DEADLINE:.0f} s") from None
        if self._reached < wanted:
            raise NotAdmitted(f"the mesh at revision {wanted[1]} cannot be built: {self._failed[1]}")

    def _admit_stale(self, cause: Unavailable) -> None:
        since = self._mirror.unreachable_since
        lasted = asyncio.get_running_loop().time() - since if since is not None else 0.0
        if lasted < COLD_REFUSAL:
            raise NotAdmitted(f"etcd cannot be reached since {lasted:.0f} s: {cause}")
        if lasted > self._max_staleness:
            raise NotAdmitted(f"etcd cannot be reached since {lasted:.0f} s, longer than the mesh may be stale")

    async def subscribe(self, proxy: Name, service: str = "", serial: str = "") -> Slot:
        """A slot that holds the proxy's Snapshot now and gets every later one, until the credential is revoked.

        A proxy has one for each `service`; a newer one of the same takes its place. Only a gRPC program has as many as
        it calls others and is called. `serial` is the credential's, in hexadecimal.

        Raises:
            NotFound: no workload of that name.
            Denied: the credential is revoked.
        """
        async with self._publishing:
            mesh = self.mesh
            if mesh is None or proxy not in mesh.proxies:
                raise NotFound(
                    f"no workload {proxy} in the mesh",
                    hint="apply its Workload, or correct the name that it joined with",
                )
            if why := mesh.refuses(proxy, serial):
                raise errors.Denied(why)
            snapshots = await asyncio.to_thread(self._snapshots, mesh, [proxy])
            slot = Slot(serial)
            self._fill(slot, proxy, snapshots.get(proxy), self._offer(mesh))
            if not self.is_program(proxy):
                if older := self._only.get((proxy, service)):
                    older.end(f"a newer stream of {proxy} took its place")
                    self._forget(proxy, older)
                self._only[proxy, service] = slot
            self._slots.setdefault(proxy, {})[slot] = None
            return slot

    def _offer(self, mesh: Mesh) -> Offer:
        return Offer(mesh.revision, asyncio.get_running_loop().time(), self._build_context)

    def _fill(self, slot: Slot, proxy: Name, snapshot: Snapshot | None, offer: Offer) -> None:
        """`snapshot` is None where it could not be made."""
        if snapshot is not None:
            slot.put(snapshot, offer)
        else:
            slot.stale = True
            self._stale.add(proxy)

    def is_program(self, proxy: Name) -> bool:
        """Whether it is a gRPC program, which has several streams."""
        found = self.mesh.proxies.get(proxy) if self.mesh is not None else None
        return found is not None and found.workload.sidecar is Sidecar.GRPC

    def unsubscribe(self, proxy: Name, slot: Slot, service: str = "") -> None:
        """Forget a slot; one that a newer subscription replaced is no error."""
        self._forget(proxy, slot)
        if self._only.get((proxy, service)) is slot:
            del self._only[proxy, service]

    def _forget(self, proxy: Name, slot: Slot) -> None:
        slots = self._slots.get(proxy, {})
        slots.pop(slot, None)
        if not slots:
            self._slots.pop(proxy, None)


def _write(offered: list[Slot]) -> None:
    for slot in offered:
        slot.write()
    offered.clear()


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector, which would look again and again through what a build makes, though nearly all of it
    stays: a tenth of the time of a build from nothing, and of that until the last proxy has been told of a change. It
    takes its turn when that is done.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _merge(earlier: View, later: View) -> View:
    if earlier.generation != later.generation:
        return later
    return replace(later, changed=earlier.changed | later.changed)


def _revokes_others(before: Mesh, now: Mesh) -> bool:
    """Whether somebody may be refused who was not, though nothing that he is told has changed."""
    return now.admitted is not before.admitted or now.revoked_identities is not before.revoked_identities


def _traceparents(view: View) -> Iterable[str]:
    """Of what has changed; of a part of it, if that is much."""
    for key in islice(view.changed, 4 * telemetry.MOST_LINKS):
        item = view.items.get(key)
        if item is not None:
            try:
                yield traceparent(item.value, key=key)
            except UnreadableRecord:
                continue
