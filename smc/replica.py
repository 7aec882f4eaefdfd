"""One replica: every part made, and joined to the others. It decides nothing itself."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import replace
from importlib.metadata import version

import structlog

from cluster.election import Election
from cluster.kv import KV
from cluster.members import Members, NameTaken
from cluster.mirror import Mirror
from smc import codec, health, plugins
from smc.api import server as api
from smc.api import waiting
from smc.api.backends import Backends, ProxyStatus, ReplicaStatus
from smc.certificates.authority import Trust, follow_trust
from smc.certificates.credential import Credential
from smc.certificates.issuing import Issuer
from smc.certificates.requests import replica_credential
from smc.certificates.sealing import Keyring
from smc.certificates.signers import Signer
from smc.codec import UnreadableRecord
from smc.config import API_PORT, HEALTH_PORT, JOIN_PORT, XDS_PORT, Settings
from smc.envoy.snapshot import Generator
from smc.errors import Conflict, SmcError, Unavailable
from smc.keys import Keys
from smc.leading import Duties
from smc.metrics import Metrics
from smc.model import Name
from smc.pipeline import Pipeline
from smc.readiness import Readiness
from smc.records import MemberRecord, MeshRecord
from smc.registry import Registry
from smc.xds import server as xds
from smc.xds.session import Session

DRAIN, DRAIN_EACH = 5.0, 0.02
"""Seconds over which a replica that stops sends its streams away: so many for each, but no more in all."""
RENEW_RETRY = 2.0
"""Seconds until a replica asks again for a credential."""
RENEW_AGAIN = 0.2
"""Seconds until a replica asks for one that the new intermediate signs."""
VERSION = version("smc")

log = structlog.get_logger(__name__)


class Replica:
    """All parts of one replica, joined. `run` is its lifetime."""

    def __init__(
        self,
        settings: Settings,
        kv: KV,
        keys: Keys,
        signer: Signer,
        mesh: MeshRecord,
        epoch: int,
        keyring: Keyring,
    ) -> None:
        self._settings = settings
        self._kv = kv
        self._keys = keys
        self._keyring = keyring
        self._trust_domain = mesh.trust_domain
        self._metrics = metrics = Metrics()
        self._ttl = settings.lease_ttl.total_seconds()
        self._mirror = Mirror(kv, keys.root, keys.feeds_mesh)
        informers = plugins.informers(settings)
        generator = Generator(lambda record: keyring.open(keys.certificate(record.identity), record.sealed_key))
        self._pipeline = Pipeline(
            self._mirror,
            plugins.policies(),
            generator.snapshot,
            sources=frozenset(informer.name for informer in informers),
            max_staleness=settings.max_staleness.total_seconds(),
            metrics=metrics,
        )
        self._registry = Registry(kv, keys)
        self._readiness = Readiness(kv, keys, self._is_known_ready, self._all_listening)
        self._streams = xds.Streams(
            self._pipeline,
            metrics,
            replica=settings.name,
            identifier=f"{settings.name}/{mesh.cluster_id}/{epoch}",
            trust_domain=mesh.trust_domain,
            max_streams=settings.max_streams,
            listening=self._readiness.listening,
        )
        self._election = Election(
            kv,
            keys.leader,
            settings.name,
            ttl=self._ttl,
            pinned=(keys.epoch,),
            on_fenced=metrics.fenced_writes.inc,
        )
        self._duties = Duties(
            kv=kv,
            keys=keys,
            registry=self._registry,
            informers=informers,
            issuer=Issuer(
                kv,
                keys,
                keyring,
                signer,
                time.time,
                lambda revision: waiting.survey(self._backends(), revision),
                lambda kind: metrics.certificates_issued.labels(kind).inc(),
            ),
            meshes=self._pipeline.meshes,
            compacts=not settings.etcd_shared,
        )
        self._members = Members(kv, keys.members)
        self._alive: Mapping[str, MemberRecord] = {}
        self._credential: Credential | None = None
        self._certified = asyncio.Event()
        self._trust: Trust | None = None
        self._trust_changed = asyncio.Event()
        self._serving = False
        metrics.leader.set_function(lambda: float(self._election.leading))
        metrics.ready.set_function(lambda: float(not self._unready()))
        metrics.store_unreachable.set_function(self._unreachable_for)

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set; then resign, send the streams away and return."""
        settings = self._settings
        async with asyncio.TaskGroup() as tasks, AsyncExitStack() as servers:
            background = [
                tasks.create_task(self._pipeline.run(), name="pipeline"),
                tasks.create_task(self._readiness.run(), name="readiness"),
                tasks.create_task(self._follow_trust(), name="trust"),
                tasks.create_task(self._keep_credential(), name="credential"),
                tasks.create_task(self._follow_members(), name="members"),
                tasks.create_task(health.watch_lag(self._metrics), name="loop lag"),
                tasks.create_task(self._announce(Members(self._kv, self._keys.acks), self._acks), name="acks"),
                tasks.create_task(self._announce(self._members, self._member), name="member"),
            ]
            election = tasks.create_task(self._election.run(self._duties.run), name="election")
            background.append(election)
            try:
                await servers.enter_async_context(
                    health.serving(settings.address, HEALTH_PORT, self._metrics, self._unready)
                )
                if await self._before(stop, self._certified.wait()):
                    await servers.enter_async_context(self._servers())
                    background.append(tasks.create_task(self._streams.balance(self._others), name="balance"))
                    self._serving = True
                    # The mesh is here to stay: no collection needs to look through it again.
                    gc.freeze()
                    log.info("serving", address=settings.address, version=VERSION)
                    await stop.wait()
                log.info("stopping")
                self._serving = False
                election.cancel()
                await asyncio.wait((election,))
                await self._streams.drain(min(DRAIN, DRAIN_EACH * len(self._streams.sessions)))
                await servers.aclose()
            finally:
                # Once, and to the end: a second cancellation takes from an election the time to give its lease back.
                for task in background:
                    if not task.cancelling():
                        task.cancel()
                await asyncio.wait(background)

    @staticmethod
    async def _before(stop: asyncio.Event, wanted: Awaitable[object]) -> bool:
        """Wait for `wanted`; False if `stop` came first."""
        tasks = (asyncio.ensure_future(wanted), asyncio.ensure_future(stop.wait()))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return not stop.is_set()
        finally:
            for task in tasks:
                task.cancel()

    @asynccontextmanager
    async def _servers(self) -> AsyncIterator[None]:
        address = self._settings.address
        async with (
            xds.serving(
                self._streams,
                api.presented(self._own, lambda credential: credential.chain),
                address=_host(address, XDS_PORT),
                max_connection_age=self._settings.max_connection_age.total_seconds(),
            ),
            api.serving(self._backends(), self._metrics, api=_host(address, API_PORT), join=_host(address, JOIN_PORT)),
        ):
            yield

    # ---------------------------------------------------------------------------------------------- who this replica is

    def _own(self) -> Credential:
        if self._credential is None:
            raise Unavailable("this replica has no credential yet")
        return self._credential

    async def _keep_credential(self) -> None:
        """Get this replica's credential, and the next one at half of its life or once another intermediate signs.

        Whatever is in the way, a store that is full for one, ends nothing that is served with the one it has.
        """
        while True:
            self._trust_changed.clear()
            try:
                self._credential = await replica_credential(
                    self._kv, self._keys, self._keyring, self._settings.name, now=time.time()
                )
            except SmcError as e:
                log.warning("this replica's credential cannot be made yet; trying on", error=str(e))
                await asyncio.sleep(RENEW_RETRY)
                continue
            log.info("credential", uri=self._credential.uri, not_after=self._credential.not_after)
            self._certified.set()
            await self._renewal_due(self._credential.renew_at)

    async def _renewal_due(self, moment: float) -> None:
        """Trust whom everybody trusts, until `moment`, in seconds since 1970, or until another intermediate signs."""
        while (left := moment - time.time()) > 0:
            credential, trust = self._own(), self._trust
            if trust is not None and credential.issuer != trust.signer:
                # The leader may have heard of it later than this replica.
                await asyncio.sleep(RENEW_AGAIN)
                return
            if trust is not None and credential.roots != trust.roots:
                self._credential = replace(credential, roots=trust.roots)
                log.info("other roots are trusted", pins=self._credential.pins)
            with suppress(TimeoutError):
                async with asyncio.timeout(min(60.0, left)):  # the wall clock may be set
                    await self._trust_changed.wait()
            self._trust_changed.clear()

    async def _follow_trust(self) -> None:
        async with aclosing(follow_trust(self._kv, self._keys)) as changes:
            async for self._trust in changes:
                self._trust_changed.set()

    def _unready(self) -> str:
        if self._credential is None:
            return "the replica waits for a credential, which the leader signs once there is one"
        if not self._serving:
            return "the replica is starting, or stopping"
        return self._pipeline.unready_reason

    def _unreachable_for(self) -> float:
        since = self._mirror.unreachable_since
        return 0.0 if since is None else asyncio.get_running_loop().time() - since

    # --------------------------------------------------------------------------------------------- what others are told

    async def _announce(self, members: Members, value: Callable[[], bytes]) -> None:
        """Raises Conflict if another live replica has this one's name."""
        try:
            await members.announce(self._settings.name, value, ttl=self._ttl)
        except NameTaken as e:
            raise Conflict(str(e)) from None

    def _acks(self) -> bytes:
        return codec.encode(self._streams.report())

    def _member(self) -> bytes:
        address = self._settings.address
        return codec.encode(
            MemberRecord(
                self._settings.name,
                _host(address, XDS_PORT),
                _host(address, API_PORT),
                _host(address, JOIN_PORT),
                codec.READABLE,
                not self._unready(),
                len(self._streams.sessions),
                VERSION,
                self._credential.pins if self._credential is not None else (),
                self._credential.issuer if self._credential is not None else "",
            )
        )

    def _all_listening(self) -> Iterable[Name]:
        mesh = self._pipeline.mesh
        there = mesh.proxies if mesh is not None else {}
        return [s.proxy for s in self._streams.sessions if s.stream.listening and s.proxy in there]

    def _is_known_ready(self, proxy: Name) -> bool:
        view = self._mirror.view
        return view is not None and self._keys.ready(proxy) in view.items

    # ------------------------------------------------------------------------------------------------------- the others

    async def _follow_members(self) -> None:
        async with aclosing(self._members.watch()) as changes:
            async for alive in changes:
                self._alive = _members(alive)

    def _others(self) -> Sequence[int]:
        return [member.streams for name, member in self._alive.items() if member.ready and name != self._settings.name]

    async def _known_members(self) -> Sequence[MemberRecord]:
        found = _members(await self._members.alive())
        return [found[name] for name in sorted(found)]

    # ----------------------------------------------------------------------------------------------- what the API shows

    def _backends(self) -> Backends:
        return Backends(
            kv=self._kv,
            keys=self._keys,
            keyring=self._keyring,
            registry=self._registry,
            kinds=plugins.kinds(),
            trust_domain=self._trust_domain,
            mesh=lambda: self._pipeline.mesh,
            imagine=self._pipeline.imagine,
            replica=self._status,
            reached=self._reached,
            proxies=lambda: [self._proxy_status(session) for session in self._streams.sessions],
            members=self._known_members,
            credential=self._own,
            unreachable_for=self._unreachable_for,
        )

    def _status(self) -> ReplicaStatus:
        return ReplicaStatus(
            self._settings.name,
            self._election.leading,
            not self._unready(),
            self._pipeline.mesh.revision if self._pipeline.mesh is not None else 0,
            len(self._streams.sessions),
            VERSION,
        )

    def _reached(self) -> int:
        mesh, view = self._pipeline.mesh, self._mirror.view
        if mesh is None or view is None:
            return 0
        return self._mirror.revision if mesh.revision >= view.revision else mesh.revision

    def _proxy_status(self, session: Session) -> ProxyStatus:
        mesh = self._pipeline.mesh
        newest = mesh.revision if mesh is not None else 0
        proxy = mesh.proxies.get(session.proxy) if mesh is not None else None
        return ProxyStatus(
            session.proxy,
            proxy.workload.identity.uri(self._trust_domain) if proxy is not None else "",
            session.connected,
            newest,
            session.revision(newest),
            session.state,
            session.versions,
            session.nacks,
        )


def _members(found: Mapping[str, bytes]) -> Mapping[str, MemberRecord]:
    """What can be read of what the members say: a newer one may write what this version does not know."""
    members: dict[str, MemberRecord] = {}
    for name, value in found.items():
        try:
            members[name] = codec.decode(MemberRecord, value, key=name)
        except UnreadableRecord as e:
            log.warning("what a replica says of itself cannot be read", replica=name, error=str(e))
    return members


def _host(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
