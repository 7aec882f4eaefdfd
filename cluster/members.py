"""Which replicas are alive: each keeps one leased key, which dies with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from types import MappingProxyType

import structlog

from cluster.backoff import Backoff
from cluster.kv import (
    KV,
    Ambiguous,
    Committed,
    Compacted,
    Guard,
    HistoryChanged,
    KeyValue,
    LeaseLost,
    Put,
    Refused,
    Status,
    StoreError,
    Unavailable,
)

GRACE = 2.0
"""Seconds that a lease may outlive its TTL: the store looks for expired ones now and then only."""
LEAVE_DEADLINE = 2.0
"""Seconds for giving back a lease; after that it ends by itself."""

log = structlog.get_logger(__name__)


class NameTaken(StoreError):
    """Another live replica has this name."""


class Members:
    """The leased keys `<prefix><name>`; `prefix` ends with a slash."""

    def __init__(self, kv: KV, prefix: str) -> None:
        if not prefix.endswith("/"):
            raise ValueError(f"the prefix {prefix} does not end with a slash")
        self._kv = kv
        self._prefix = prefix

    async def announce(
        self, name: str, value: Callable[[], bytes], *, ttl: float = 10.0, interval: float = 1.0
    ) -> None:
        """Keep this replica's key for ever, rewriting it at most once an `interval` (seconds) when `value` changed.

        What a replica of this name that died has left behind is waited for: it goes within `ttl` seconds, or twice that
        when the store's own leader changes meanwhile. A lost store is waited for as well. Cancelling gives the lease
        back, so that the key goes at once.

        Raises:
            NameTaken: another live replica has the name.
        """
        seat = _Seat(self._kv, self._prefix + name, ttl, interval)
        retry = Backoff(most=min(2.0, ttl / 5))
        try:
            while True:
                try:
                    await seat.take(value)
                    retry.reset()
                    await seat.keep(value)
                except (Unavailable, Refused, Ambiguous) as e:
                    if retry.fresh:
                        log.warning("this replica cannot be announced; trying on", member=name, reason=str(e))
                    await retry.wait()
                except LeaseLost as e:
                    log.info("this replica is announced anew", member=name, reason=str(e))
                    await retry.wait()
        finally:
            await seat.leave()

    async def alive(self) -> Mapping[str, bytes]:
        """What each live member says, by name, read linearizably."""
        listing = await self._kv.list(self._prefix)
        return {item.key.removeprefix(self._prefix): item.value for item in listing.items}

    async def watch(self) -> AsyncGenerator[Mapping[str, bytes], None]:
        """Yield `alive` now and after each change. Close it with `aclosing`.

        While the store cannot be reached nothing is yielded: nobody leaves by that.
        """
        retry = Backoff()
        last: dict[str, bytes] | None = None
        while True:
            try:
                listing = await self._kv.list(self._prefix)
                now = {item.key.removeprefix(self._prefix): item.value for item in listing.items}
                if now != last:
                    last = now
                    yield MappingProxyType(dict(now))
                async with aclosing(
                    self._kv.watch(self._prefix, Status(listing.cluster_id, listing.revision))
                ) as batches:
                    async for batch in batches:
                        retry.reset()
                        now = dict(last)
                        now.update((item.key.removeprefix(self._prefix), item.value) for item in batch.puts)
                        for key in batch.deletes:
                            now.pop(key.removeprefix(self._prefix), None)
                        if now != last:
                            last = now
                            yield MappingProxyType(dict(now))
            except (Unavailable, Refused, Compacted, HistoryChanged) as e:
                log.debug("listing the members again", reason=str(e))
            await retry.wait()


class _Seat:
    """One name among the members, and the lease that holds it."""

    def __init__(self, kv: KV, key: str, ttl: float, interval: float) -> None:
        self._kv = kv
        self._key = key
        self._ttl = ttl
        self._interval = interval
        self._lease = 0
        """0: none."""
        self._created = 0
        self._written = b""

    async def take(self, value: Callable[[], bytes]) -> None:
        """Make the key, once whoever had it is gone; if it is ours already, go on with it.

        Raises:
            NameTaken: its holder lives.
        """
        while True:
            if (found := await self._kv.get(self._key)) is not None:
                if found.lease == self._lease and self._lease:
                    self._created, self._written = found.create_revision, found.value
                    return
                await self._outlive(found)
                continue
            try:
                self._lease = self._lease or await self._kv.grant(self._ttl)
                written = value()
                outcome = await self._kv.transact(
                    [Put(self._key, written, self._lease)], [Guard(self._key, create_revision=0)]
                )
            except LeaseLost:
                self._lease = 0
                continue
            if isinstance(outcome, Committed):
                self._created, self._written = outcome.revision, written
                return

    async def _outlive(self, found: KeyValue) -> None:
        """Wait until the key is gone that another run has left. Only by going does it show that nobody renews it.

        Raises:
            NameTaken: it is kept alive.
        """
        loop = asyncio.get_running_loop()
        # A store that changes its leader gives every lease its whole TTL anew, also that of a holder which is dead.
        patience = 2 * self._ttl + GRACE
        log.info("another run has this name; waiting for its end", key=self._key, seconds=patience)
        deadline = loop.time() + patience
        while (item := await self._kv.get(self._key)) is not None:
            if item.mod_revision != found.mod_revision or loop.time() >= deadline:
                raise NameTaken(f"another live replica holds {self._key}: give this one another name, or stop that one")
            await asyncio.sleep(min(self._interval, self._ttl / 5))

    async def keep(self, value: Callable[[], bytes]) -> None:
        """Renew the lease, and rewrite the key when the value changed, for as long as it is there.

        Raises:
            LeaseLost: it is not.
        """
        loop = asyncio.get_running_loop()
        renewal = loop.time()
        while True:
            if loop.time() >= renewal:
                renewal = loop.time() + self._ttl / 4
                try:
                    await self._kv.renew(self._lease)
                except LeaseLost:
                    self._lease = 0
                    raise
                item = await self._kv.get(self._key)
                if item is None or item.create_revision != self._created:
                    raise await self._lost()
            if (now := value()) != self._written:
                await self._rewrite(now)
            await asyncio.sleep(min(self._interval, self._ttl / 4))

    async def _rewrite(self, value: bytes) -> None:
        try:
            outcome = await self._kv.transact(
                [Put(self._key, value, self._lease)], [Guard(self._key, create_revision=self._created)]
            )
        except Refused as e:
            # A store that is full takes no writes, and still renews leases.
            log.warning("what this replica says of itself cannot be written", key=self._key, reason=str(e))
            return
        if not isinstance(outcome, Committed):
            raise await self._lost()
        self._written = value

    async def _lost(self) -> LeaseLost:
        """The key went although nobody said that the lease did: nothing that is said of it is to be trusted."""
        await self.leave()
        return LeaseLost(f"{self._key} is not there any more as this replica wrote it")

    async def leave(self) -> None:
        lease, self._lease = self._lease, 0
        if not lease:
            return
        try:
            async with asyncio.timeout(LEAVE_DEADLINE):
                await self._kv.revoke(lease)
        except (StoreError, TimeoutError) as e:
            log.info(
                "a member's lease could not be given back and will expire", key=self._key, reason=str(e) or "no answer"
            )
