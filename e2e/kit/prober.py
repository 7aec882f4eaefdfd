"""A prober that hides nothing: it sends at a steady rate whatever happens, each request once, and keeps all answers."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from smc.demo.apps import XFCC, document, identities
from smc.demo.traffic import Answer, Caller, open_loop

Connections = Literal["new", "kept"]


@dataclass(frozen=True, slots=True)
class Probe:
    """One request and what became of it."""

    sent: float
    """Seconds on the loop's clock."""
    latency: float
    status: int
    """0: no answer."""
    version: str
    source: str
    """SPIFFE ID of the caller, as the server's proxy saw it."""
    destination: str
    """SPIFFE ID that the server's proxy presented."""
    error: str


def probe(answer: Answer) -> Probe:
    said = document(answer)
    source, destination = identities(str(said.get(XFCC, "")))
    return Probe(
        answer.sent, answer.latency, answer.status, str(said.get("version", "")), source, destination, answer.error
    )


class Steady(ABC):
    """Sends through a sidecar while it is open, `rate` times a second, whatever becomes of it.

    On leaving it waits until every request that was sent has an answer or has failed. `proxy` is host:port of the
    sidecar's outbound listener; a request without an answer after `timeout` seconds has failed.
    """

    def __init__(self, proxy: str | None, rate: float, connections: Connections, timeout: float) -> None:
        self._rate = rate
        self._caller = Caller(proxy, keep_alive=connections == "kept", timeout=timeout)
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @abstractmethod
    async def _send(self) -> None:
        """Send the next one, if any, and note what became of it."""

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(open_loop(self._rate, self._send, self._stop), name=type(self).__name__)
        return self

    async def __aexit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self._stop.set()
        try:
            if self._task is not None:
                await self._task
        finally:
            await self._caller.close()


class Prober(Steady):
    """Counts each request that went wrong, of at least 50 a second.

    `expect` is the status that is
    right. With `identities` an answer has to tell both SPIFFE IDs too: only 200s of the bookstore can.
    """

    def __init__(
        self,
        proxy: str | None,
        url: str,
        *,
        rate: float = 100.0,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        connections: Connections = "kept",
        expect: int = 200,
        identities: bool = True,
        timeout: float = 10.0,
    ) -> None:
        if rate < 50:
            raise ValueError("fewer than 50 requests a second do not see short faults")
        super().__init__(proxy, rate, connections, timeout)
        self._url, self._method, self._headers = url, method, dict(headers or {})
        self._expect, self._identities = expect, identities and expect == 200
        self._news = asyncio.Condition()
        self.sent = 0
        self.probes: list[Probe] = []
        """In the order of their answers."""

    async def _send(self) -> None:
        self.sent += 1
        answer = await self._caller.request(self._url, self._method, self._headers)
        self.probes.append(probe(answer))
        async with self._news:
            self._news.notify_all()

    async def until(self, answers: int, timeout: float = 120.0) -> None:
        """Go on until there are so many answers in all, failures included.

        Raises:
            TimeoutError: not within `timeout` seconds.
        """
        async with asyncio.timeout(timeout), self._news:
            await self._news.wait_for(lambda: len(self.probes) >= answers)

    async def more(self, answers: int, timeout: float = 120.0) -> None:
        """As `until`, counted from now."""
        await self.until(len(self.probes) + answers, timeout)

    async def fresh(self, answers: int, timeout: float = 120.0) -> list[Probe]:
        """Go on until so many of the requests that are sent from now on have an answer, and return these.

        `more` also counts answers to what is under way now.

        Raises:
            TimeoutError: not within `timeout` seconds.
        """
        moment, first = asyncio.get_running_loop().time(), len(self.probes)

        def found() -> list[Probe]:
            return [one for one in self.probes[first:] if one.sent >= moment]

        async with asyncio.timeout(timeout), self._news:
            await self._news.wait_for(lambda: len(found()) >= answers)
        return found()

    def wrong(self, found: Probe) -> bool:
        if found.status != self._expect:
            return True
        return self._identities and not (found.source and found.destination)

    @property
    def failures(self) -> list[Probe]:
        return [found for found in self.probes if self.wrong(found)]

    def assert_clean(self, minimum: int = 3000) -> None:
        """At least `minimum` requests, every one of them answered, and every answer right."""
        assert self.sent == len(self.probes), f"{self.sent} sent, {len(self.probes)} answered"
        assert len(self.probes) >= minimum, f"only {len(self.probes)} probes, {minimum} are needed to say anything"
        failures = self.failures
        assert not failures, f"{len(failures)} of {self.sent} failed:\n{self.summary()}"

    def summary(self) -> str:
        """Every kind of failure with its number, and when it began and ended, in seconds after the first request."""
        start = min((found.sent for found in self.probes), default=0.0)
        kinds: dict[tuple[int, str], list[float]] = {}
        for found in self.failures:
            why = found.error or ("without identities" if found.status == self._expect else "")
            kinds.setdefault((found.status, why), []).append(found.sent - start)
        return "\n".join(
            f"  {len(times)} x status {status} {error}, from {min(times):.3f} s to {max(times):.3f} s"
            for (status, error), times in sorted(kinds.items())
        )

    def versions(self) -> Counter[str]:
        return Counter(found.version for found in self.probes)


async def send(
    number: int,
    proxy: str | None,
    url: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    connections: Connections = "kept",
    concurrency: int = 16,
    timeout: float = 10.0,
) -> list[Probe]:
    """Send `number` requests as fast as `concurrency` at a time go, each once, and return what became of each."""
    caller = Caller(proxy, keep_alive=connections == "kept", timeout=timeout)
    probes: list[Probe] = []
    left = number

    async def one_by_one() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            probes.append(probe(await caller.request(url, method, headers or {})))

    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(concurrency, number)):
                tasks.create_task(one_by_one())
    finally:
        await caller.close()
    return probes


def statuses(probes: Sequence[Probe]) -> Counter[int]:
    return Counter(found.status for found in probes)
