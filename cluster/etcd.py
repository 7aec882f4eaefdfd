"""The store over etcd, version 3: the only module that knows its messages.

One channel for each endpoint, so that each member is verified by its own name and a stuck one is left without waiting
for the others; calls stay with the endpoint that answers. A call is sent on a connection that stands, and on no other:
so it is known that a transaction was never sent, and one that was sent and not answered is `Ambiguous`. The options of
the channels were measured, not guessed; README.md says what each failure costs.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import Any, NoReturn

import grpc
import structlog
from aetcd import rpc
from opentelemetry import trace

from cluster.backoff import Backoff
from cluster.kv import (
    Ambiguous,
    Batch,
    ClusterChanged,
    Committed,
    Compacted,
    Delete,
    Guard,
    KeyValue,
    LeaseLost,
    Listing,
    Operation,
    Outcome,
    Put,
    Refused,
    Rejected,
    RevisionRegressed,
    Status,
    Survey,
    Unavailable,
    check_transaction,
)

PATIENCE = 1.0
"""Seconds that one endpoint has for a connection, or for the answer to a read, while another one may be asked."""
COOL_DOWN = 5.0
"""Seconds for which an endpoint that failed is asked last, shortened at random by up to a half."""
QUIET = 2.0
"""Seconds without a word on a watch after which etcd is asked to say something."""
ANSWER = 3.0
"""Seconds that it has for that; then the connection counts as dead. (gRPC's own keepalive takes 13.)"""
CALM = 10.0
"""Seconds of watching after which earlier failures are forgotten."""
PAGE = 500
"""Keys of the first answer to a listing."""
MOST_KEYS = 10_000
"""Keys of any answer: etcd reads them all before it finds that they are too large for a message."""
SMALL = 1024 * 1024
"""Bytes of values below which the next answer has twice the keys: for each one etcd walks over all that is left, so a
long listing in short answers takes it the square of the keys."""

_METADATA = (("hasleader", "true"),)
"""A member that is cut off from the others says so after an election timeout; else it would serve stale for ever."""
_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),  # etcd closes connections that ping more often than every 5 s
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),  # without it a dead peer is noticed after 60 s, whatever the line above says
    ("grpc.keepalive_permit_without_calls", 0),  # etcd closes idle connections that ping
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 16 * 1024 * 1024),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),  # gRPC would send a transaction again that it believes unseen
)

_COMPACTED = "required revision has been compacted"
_FUTURE = "required revision is a future revision"
_LEASE_NOT_FOUND = "requested lease not found"
_NO_SPACE = "database space exceeded"
_LARGER_THAN_MAX = "larger than max"
_UNHANDLED = ("etcdserver: no leader", "etcdserver: too many requests", "not supported for learner")
"""What a member says that did not even propose the request: another one may."""
_FINAL = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.DATA_LOSS,
    }
)
_ADVICE = (
    (_NO_SPACE, "compact and defragment it or raise its --quota-backend-bytes, then run `etcdctl alarm disarm`"),
    ("request is too large", "split it, or raise etcd's --max-request-bytes"),
    ("permission denied", "grant the role of this client's user read and write access to the key"),
    ("user name is empty", "give the client a certificate whose common name is an etcd user"),
    ("corrupt cluster", "etcd's members differ: find the bad one with `etcdctl endpoint hashkv` and replace it"),
    ("404", "is this etcd's client port?"),
)

log = structlog.get_logger(__name__)
tracer = trace.get_tracer(__name__)


@dataclass(frozen=True, slots=True)
class EtcdTLS:
    """PEM texts: whom to trust as etcd, and who this client is."""

    ca: bytes
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)


class EtcdKV:
    """A client of an etcd cluster: `kv.KV`. Belongs to the event loop on which it is first used."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        tls: EtcdTLS | None = None,
        timeout: float = 5.0,
        probe: str = "\0",
    ) -> None:
        """Connects on first use.

        Args:
            endpoints: `host:port` of members of one cluster, the preferred ones first.
            tls: None for connections that are not encrypted.
            timeout: seconds that each call has, attempts on several endpoints together.
            probe: the key that `status` reads, there or not. Where etcd's access control is on, one that may be read.
        """
        if not endpoints:
            raise ValueError("a client of etcd needs at least one endpoint")
        self._endpoints = [_Endpoint(address, tls) for address in dict.fromkeys(endpoints)]
        self._current = self._endpoints[0]
        self._timeout = timeout
        self._probe = probe
        self._closed = False

    # -------------------------------------------------------------------------------------------------------- reading

    async def status(self) -> Status:
        request = rpc.RangeRequest(key=_encode(self._probe), count_only=True)
        answer = await self._ask("a read of where the store is", _range_of(request))
        return Status(answer.header.cluster_id, answer.header.revision)

    async def get(self, key: str) -> KeyValue | None:
        answer = await self._ask(f"a read of {key}", _range_of(rpc.RangeRequest(key=_encode(key))))
        return _key_value(answer.kvs[0]) if answer.kvs else None

    async def list(self, prefix: str, *, revision: int = 0) -> Listing:
        items: list[KeyValue] = []
        start, end = _below(prefix)
        cluster_id, at, limit = 0, revision, PAGE
        while True:
            request = rpc.RangeRequest(key=start, range_end=end, limit=limit, revision=at)
            try:
                page = await self._ask(f"a listing of {prefix}", _range_of(request))
            except _Refusal as e:
                if _LARGER_THAN_MAX in e.details and limit > 1:
                    limit = max(1, limit // 10)
                    continue
                await self._no_listing(e, revision, at)
            if not cluster_id:
                cluster_id, at = page.header.cluster_id, revision or page.header.revision
            elif page.header.cluster_id != cluster_id:
                raise ClusterChanged(cluster_id, page.header.cluster_id)
            items.extend(_key_value(item) for item in page.kvs)
            if sum(len(item.value) for item in page.kvs) < SMALL:
                limit = min(2 * limit, MOST_KEYS)
            if not page.more:
                return Listing(cluster_id, at, tuple(items))
            start = page.kvs[-1].key + b"\0"

    async def _no_listing(self, refusal: _Refusal, asked: int, at: int) -> NoReturn:
        if _COMPACTED in refusal.details:
            if asked:
                raise Compacted(asked) from refusal
            raise Unavailable(f"revision {at} was compacted while it was being listed") from refusal
        if _FUTURE in refusal.details:
            raise RevisionRegressed(at, (await self.status()).revision) from refusal
        raise refusal

    async def survey(self, prefix: str) -> Survey:
        key, end = _below(prefix)
        request = rpc.RangeRequest(
            key=key,
            range_end=end,
            limit=1,
            keys_only=True,
            sort_order=rpc.RangeRequest.DESCEND,
            sort_target=rpc.RangeRequest.MOD,
        )
        answer = await self._ask(f"a survey of {prefix}", _range_of(request))
        newest = answer.kvs[0].mod_revision if answer.kvs else 0
        return Survey(answer.header.cluster_id, answer.header.revision, answer.count, newest)

    async def version(self) -> str:
        """The version of the member that answers, as in `3.5.16`.

        Raises:
            Unavailable, Refused: as from any call.
        """
        answer = await self._ask(
            "a question for its version",
            lambda endpoint, timeout: endpoint.maintenance.Status(
                rpc.StatusRequest(), timeout=timeout, metadata=_METADATA
            ),
        )
        return str(answer.version)

    # -------------------------------------------------------------------------------------------------------- writing

    async def transact(self, operations: Sequence[Operation], guards: Sequence[Guard] = ()) -> Outcome:
        check_transaction(operations, guards)
        keys = tuple(dict.fromkeys(guard.key for guard in guards))
        request = rpc.TxnRequest(
            compare=[condition for guard in guards for condition in _conditions(guard)],
            # Without an operation etcd would answer from what this member has, which may be old.
            success=[_operation(operation) for operation in operations] or [_read(self._probe, count_only=True)],
            failure=[_read(key) for key in keys],
        )
        with tracer.start_as_current_span(
            "etcd.txn",
            kind=trace.SpanKind.CLIENT,
            attributes={
                "db.system.name": "etcd",
                "db.operation.name": "txn",
                "etcd.txn.operations": len(operations),
                "etcd.txn.guards": len(guards),
            },
        ) as span:
            try:
                answer = await self._ask(
                    "a transaction",
                    lambda endpoint, timeout: endpoint.kv.Txn(request, timeout=timeout, metadata=_METADATA),
                    writes=bool(operations),
                )
            except _Refusal as e:
                if _LEASE_NOT_FOUND in e.details:
                    leases = ", ".join(sorted({f"{o.lease:x}" for o in operations if isinstance(o, Put) and o.lease}))
                    raise LeaseLost(f"nothing was written: the lease {leases} does not exist") from e
                raise
            span.set_attribute("etcd.revision", answer.header.revision)
            span.set_attribute("etcd.txn.succeeded", answer.succeeded)
        if answer.succeeded:
            return Committed(answer.header.revision)
        found: dict[str, KeyValue | None] = {}
        for key, response in zip(keys, answer.responses, strict=True):
            kvs = response.response_range.kvs
            found[key] = _key_value(kvs[0]) if kvs else None
        return Rejected(answer.header.revision, found)

    async def compact(self, revision: int) -> None:
        request = rpc.CompactionRequest(revision=revision)
        try:
            await self._ask(
                f"compacting to revision {revision}",
                lambda endpoint, timeout: endpoint.kv.Compact(request, timeout=timeout, metadata=_METADATA),
            )
        except _Refusal as e:
            if _COMPACTED not in e.details:
                raise

    # --------------------------------------------------------------------------------------------------------- leases

    async def grant(self, ttl: float) -> int:
        # A lease whose number was lost on the way expires by itself: asking again is safe.
        request = rpc.LeaseGrantRequest(TTL=math.ceil(ttl))
        answer = await self._ask(
            "granting a lease",
            lambda endpoint, timeout: endpoint.lease.LeaseGrant(request, timeout=timeout, metadata=_METADATA),
        )
        return int(answer.ID)

    async def renew(self, lease: int) -> float:
        async def keep_alive(endpoint: _Endpoint, timeout: float) -> Any:
            call = endpoint.lease.LeaseKeepAlive(timeout=timeout, metadata=_METADATA)
            try:
                await _send(call, rpc.LeaseKeepAliveRequest(ID=lease))
                answer = await call.read()
                if answer is grpc.aio.EOF:
                    raise _Unanswered("the stream ended without an answer")
                return answer
            finally:
                call.cancel()

        answer = await self._ask("renewing a lease", keep_alive)
        if answer.TTL <= 0:
            raise LeaseLost(f"the lease {lease:x} does not exist")
        return float(answer.TTL)

    async def revoke(self, lease: int) -> None:
        request = rpc.LeaseRevokeRequest(ID=lease)
        try:
            await self._ask(
                "revoking a lease",
                lambda endpoint, timeout: endpoint.lease.LeaseRevoke(request, timeout=timeout, metadata=_METADATA),
            )
        except _Refusal as e:
            if _LEASE_NOT_FOUND not in e.details:
                raise

    # ------------------------------------------------------------------------------------------------------- watching

    async def watch(self, prefix: str, after: Status) -> AsyncGenerator[Batch, None]:
        loop = asyncio.get_running_loop()
        seen = after.revision
        retry = Backoff()
        while True:
            self._check_open()
            endpoint, began = self._order()[0], loop.time()
            try:
                async with aclosing(self._stream(endpoint, prefix, Status(after.cluster_id, seen))) as batches:
                    async for batch in batches:
                        # Where to resume: what was delivered, never what a header says that the store is at.
                        seen = batch.revision
                        retry.reset()
                        yield batch
            except _Unanswered as e:
                self._blame(endpoint, str(e))
                if retry.fresh:
                    log.info("a watch broke and is resumed", prefix=prefix, revision=seen, reason=str(e))
            if loop.time() - began > CALM:
                retry.reset()
            await retry.wait()

    async def _stream(self, endpoint: _Endpoint, prefix: str, after: Status) -> AsyncGenerator[Batch, None]:
        """Watch on one stream until it breaks.

        Raises:
            _Unanswered: it broke.
            Compacted, RevisionRegressed, ClusterChanged, Refused: as from `watch`.
        """
        await endpoint.connect(PATIENCE)
        call = endpoint.watch.Watch(metadata=_METADATA)
        revisions = Revisions(after.revision)
        key, end = _below(prefix)
        # Beginning with what is known already costs one revision that is dropped. It tells a history that is whole
        # from one whose compaction took what came next: etcd compares with where the watch begins.
        create = rpc.WatchCreateRequest(key=key, range_end=end, start_revision=max(1, after.revision), fragment=True)
        try:
            await _send(call, rpc.WatchRequest(create_request=create))
            while True:
                response = await _receive(call)
                if response.compact_revision:
                    raise Compacted(response.compact_revision)
                if response.canceled:
                    # etcd keeps the stream open, and silent.
                    if "permission denied" in response.cancel_reason:
                        raise _Refusal(endpoint.address, f"a watch of {prefix}", response.cancel_reason)
                    raise _Unanswered(f"etcd cancelled the watch: {response.cancel_reason or 'no reason given'}")
                if response.created:
                    await self._check_history(response.header, after)
                for batch in revisions.feed(response.events, more=response.fragment):
                    yield batch
        except grpc.aio.AioRpcError as e:
            if refusal := _refusal(endpoint, f"a watch of {prefix}", e):
                raise refusal from e
            raise _Unanswered(_reason(e)) from e
        except asyncio.CancelledError:
            if not self._closed or _cancelled():
                raise
            # Closing the channel looks as if this task had been cancelled.
            raise _Unanswered("the client was closed") from None
        finally:
            call.cancel()

    async def _check_history(self, header: Any, after: Status) -> None:
        if header.cluster_id != after.cluster_id:
            raise ClusterChanged(after.cluster_id, header.cluster_id)
        if header.revision < after.revision:
            # A member that lags says the same as a store that went back. A linearizable read tells them apart.
            try:
                now = await self.status()
            except Unavailable as e:
                raise _Unanswered(str(e)) from e
            if now.revision < after.revision:
                raise RevisionRegressed(after.revision, now.revision)

    # --------------------------------------------------------------------------------------------------------- asking

    async def _ask(self, what: str, call: Callable[[_Endpoint, float], Awaitable[Any]], *, writes: bool = False) -> Any:
        """Ask one endpoint after another until one answers or the time is over.

        What `writes` is sent once at most. Where that cannot be told it counts as sent.

        Raises:
            Unavailable: none answered; if it writes, it was not sent.
            Refused: one answered that it will not; always a `_Refusal`.
            Ambiguous: it writes, and was sent.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        reasons: dict[str, str] = {}
        retry = Backoff(first=0.05, most=0.5)
        untried = deque(self._order())
        while (left := deadline - loop.time()) > 0:
            self._check_open()
            if not untried:
                try:
                    async with asyncio.timeout(left):
                        await retry.wait()
                except TimeoutError:
                    break
                untried.extend(self._order())
                continue
            endpoint = untried.popleft()
            began = loop.time()
            share = self._share(left, last=not untried)
            sent = False
            # Whoever waits, waits; what comes after it is sent elsewhere.
            overdue = loop.call_later(PATIENCE, self._blame, endpoint, f"no answer within {PATIENCE:g} s")
            try:
                await endpoint.connect(share)
                sent = True
                spent = loop.time() - began
                answer = await call(endpoint, (left if writes else share) - spent)
            except _Unanswered as e:
                reasons[endpoint.address] = str(e)
            except grpc.aio.AioRpcError as e:
                if refusal := _refusal(endpoint, what, e):
                    raise refusal from e
                reasons[endpoint.address] = _reason(e)
                sent = not any(text in (e.details() or "") for text in _UNHANDLED)
            except asyncio.CancelledError:
                if not self._closed or _cancelled():
                    raise
                # Closing the channel looks as if this task had been cancelled.
                reasons[endpoint.address] = "the client was closed"
            else:
                if loop.time() - began < PATIENCE:
                    endpoint.resting_until = 0.0
                    self._current = endpoint
                return answer
            finally:
                overdue.cancel()
            self._blame(endpoint, reasons[endpoint.address])
            if writes and sent:
                raise Ambiguous(
                    f"{what} was sent to etcd at {endpoint.address} and not answered "
                    f"({reasons[endpoint.address]}): read back whether it was applied"
                )
        self._check_open()
        raise Unavailable(
            f"etcd did not answer {what} within {self._timeout:g} s: "
            + "; ".join(f"{address}: {reason}" for address, reason in reasons.items())
        )

    def _share(self, left: float, *, last: bool) -> float:
        """Seconds that one endpoint has for a connection, or for the answer to a read, of those that a call has left.

        The last of a round has more than PATIENCE, for all may be slow, but PATIENCE less than what is left, unless it
        is the only one: of the others one may have come back meanwhile, or have a leader again.
        """
        if len(self._endpoints) == 1:
            return left
        return min(left, max(PATIENCE, left - PATIENCE) if last else PATIENCE)

    def _order(self) -> Sequence[_Endpoint]:
        """Endpoints in the order in which to ask: the one that answered last, the others, those that rest."""
        now = asyncio.get_running_loop().time()
        return sorted(
            self._endpoints,
            key=lambda e: (e.resting_until if e.resting_until > now else 0.0, e is not self._current),
        )

    def _blame(self, endpoint: _Endpoint, reason: str) -> None:
        now = asyncio.get_running_loop().time()
        if endpoint.resting_until <= now and not self._closed:
            log.warning("an endpoint of etcd does not answer", endpoint=endpoint.address, reason=reason)
        endpoint.resting_until = now + COOL_DOWN * (1 - random.random() / 2)  # noqa: S311

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("this client of etcd was closed")

    async def close(self) -> None:
        self._closed = True
        for endpoint in self._endpoints:
            await endpoint.close()


class _Unanswered(Exception):
    """An endpoint did not answer; says why."""


class _Refusal(Refused):
    """With etcd's own words, to tell what they mean for what was asked."""

    def __init__(self, address: str, what: str, details: str) -> None:
        advice = "".join(f"; {advice}" for text, advice in _ADVICE if text in details)
        super().__init__(f"etcd at {address} refused {what}: {details}{advice}")
        self.details = details


class _Endpoint:
    """One member, and the connection to it, which is made when it is first needed."""

    def __init__(self, address: str, tls: EtcdTLS | None) -> None:
        self.address = address
        self.resting_until = 0.0
        """On the loop's clock; it failed, and others are asked before it."""
        self._tls = tls
        self._channel: grpc.aio.Channel | None = None
        self.kv: Any = None
        self.lease: Any = None
        self.watch: Any = None
        self.maintenance: Any = None

    def _open(self) -> grpc.aio.Channel:
        if self._channel is None:
            if self._tls is None:
                self._channel = grpc.aio.insecure_channel(self.address, options=_OPTIONS)
            else:
                credentials = grpc.ssl_channel_credentials(self._tls.ca, self._tls.key, self._tls.certificate)
                self._channel = grpc.aio.secure_channel(self.address, credentials, options=_OPTIONS)
            self.kv = rpc.KVStub(self._channel)
            self.lease = rpc.LeaseStub(self._channel)
            self.watch = rpc.WatchStub(self._channel)
            self.maintenance = rpc.MaintenanceStub(self._channel)
        return self._channel

    async def connect(self, within: float) -> None:
        """Return once the connection stands.

        Raises:
            _Unanswered: it does not, after `within` seconds or as soon as an attempt failed.
        """
        channel = self._open()
        try:
            async with asyncio.timeout(within):
                while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
                    if state is grpc.ChannelConnectivity.SHUTDOWN:
                        raise _Unanswered("the client was closed")
                    if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                        # Only a call is told why; this one changes nothing if it does get through.
                        await self.maintenance.Status(rpc.StatusRequest(), timeout=within, metadata=_METADATA)
                    else:
                        await channel.wait_for_state_change(state)
        except grpc.aio.AioRpcError as e:
            raise _Unanswered(_reason(e)) from e
        except grpc.aio.UsageError as e:
            raise _Unanswered("the client was closed") from e
        except TimeoutError:
            raise _Unanswered("no connection") from None

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()


class Revisions:
    """Makes whole revisions of a watch's events: in order, none twice, none in parts."""

    def __init__(self, seen: int) -> None:
        """`seen`: the last revision that is known already."""
        self._seen = seen
        self._events: list[Any] = []

    def feed(self, events: Iterable[Any], *, more: bool) -> list[Batch]:
        """What is complete now. `more`: the response was a fragment, so its last revision may go on in the next."""
        self._events.extend(events)
        batches = []
        rest: list[Any] = []
        for revision, group in groupby(self._events, key=attrgetter("kv.mod_revision")):
            rest = list(group)
            if more and revision == self._events[-1].kv.mod_revision:
                break
            if revision > self._seen:
                self._seen = revision
                batches.append(_batch(revision, rest))
            rest = []
        self._events = rest
        return batches


def _batch(revision: int, events: Sequence[Any]) -> Batch:
    return Batch(
        revision,
        tuple(_key_value(event.kv) for event in events if event.type == rpc.Event.PUT),
        tuple(_decode(event.kv.key) for event in events if event.type == rpc.Event.DELETE),
    )


async def _send(call: Any, request: Any) -> None:
    try:
        # On a stream that has ended: the next read says why.
        with suppress(asyncio.InvalidStateError):
            async with asyncio.timeout(ANSWER):
                await call.write(request)
    except TimeoutError:
        raise _Unanswered(f"nothing could be sent for {ANSWER:g} s") from None


async def _receive(call: Any) -> Any:
    """The next response of a watch; asks for a sign of life when there is none for QUIET seconds.

    Raises:
        _Unanswered: there is none.
    """
    # A read that is cancelled ends the stream, so it is waited for and not given a timeout.
    reading = asyncio.ensure_future(call.read())
    try:
        await asyncio.wait({reading}, timeout=QUIET)
        if not reading.done():
            await _send(call, rpc.WatchRequest(progress_request=rpc.WatchProgressRequest()))
            await asyncio.wait({reading}, timeout=ANSWER)
        if not reading.done():
            raise _Unanswered(f"silent for {QUIET + ANSWER:g} s")
        if reading.cancelled():
            raise _Unanswered("the client was closed")
        response = reading.result()
    finally:
        reading.cancel()
        await asyncio.wait({reading})
    if response is grpc.aio.EOF:
        raise _Unanswered("the stream ended")
    return response


def _cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _reason(error: grpc.aio.AioRpcError) -> str:
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "no answer"
    details = error.details() or ""
    for prefix in ("failed to connect to all addresses; last error: ", "UNKNOWN: "):
        details = details.removeprefix(prefix)
    return details or error.code().name


def _refusal(endpoint: _Endpoint, what: str, error: grpc.aio.AioRpcError) -> _Refusal | None:
    """What etcd says for good; None if another member, or a later time, may say otherwise."""
    details = error.details() or error.code().name
    if any(text in details for text in _UNHANDLED):
        return None
    # An answer to a transaction is only large when it was rejected, so one that is too large has changed nothing.
    too_much = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and (
        _NO_SPACE in details or _LARGER_THAN_MAX in details
    )
    return _Refusal(endpoint.address, what, details) if too_much or error.code() in _FINAL else None


def _range_of(request: Any) -> Callable[[_Endpoint, float], Awaitable[Any]]:
    return lambda endpoint, timeout: endpoint.kv.Range(request, timeout=timeout, metadata=_METADATA)


def _below(prefix: str) -> tuple[bytes, bytes]:
    """The first key that begins with `prefix`, and the first after those."""
    first = _encode(prefix)
    # No byte of UTF-8 is 0xFF, so the last one can be raised.
    return (first, first[:-1] + bytes([first[-1] + 1])) if first else (b"\0", b"\0")


def _conditions(guard: Guard) -> list[Any]:
    key, found = _encode(guard.key), []
    if guard.create_revision is not None:
        found.append(rpc.Compare(key=key, target=rpc.Compare.CREATE, create_revision=guard.create_revision))
    if guard.mod_revision is not None:
        found.append(rpc.Compare(key=key, target=rpc.Compare.MOD, mod_revision=guard.mod_revision))
    if guard.value is not None:
        found.append(rpc.Compare(key=key, target=rpc.Compare.VALUE, value=guard.value))
    return found


def _operation(operation: Operation) -> Any:
    key = _encode(operation.key)
    if isinstance(operation, Delete):
        return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=key))
    return rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=operation.value, lease=operation.lease))


def _read(key: str, *, count_only: bool = False) -> Any:
    return rpc.RequestOp(request_range=rpc.RangeRequest(key=_encode(key), count_only=count_only))


def _key_value(item: Any) -> KeyValue:
    return KeyValue(_decode(item.key), item.value, item.create_revision, item.mod_revision, item.lease)


def _encode(key: str) -> bytes:
    return key.encode(errors="surrogateescape")


def _decode(key: bytes) -> str:
    """Others may write keys that are no UTF-8. They are carried along, and come back the same."""
    return key.decode(errors="surrogateescape")
