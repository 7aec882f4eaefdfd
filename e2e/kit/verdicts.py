"""What each request may come to while policy changes: a small model of the rules, and traffic that is held to it.

A change is in doubt from when it is begun until it is known to be in force everywhere: meanwhile the old rule and the
new one may both be met. Outside of that there is one.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from typing import Any

from e2e.kit.prober import Connections, Probe, Steady, probe
from smc.demo.local import TRUST_DOMAIN

DENIED, OUT = "denied", "out"
"""What a request comes to beside a version: 403; or 403 or 503, where the caller is shut out of the mesh."""
TESTER = {"x-tester": "yes"}
PUBLIC = "/books"
"""What a grant opens; nothing opens any other path."""
CALLERS_OWN = frozenset({"weights", "testers"})
"""The rules that the caller's own proxy follows; all others are the server's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What holds for the bookstore, as far as a request can tell."""

    grants: frozenset[tuple[str, str]]
    """(service account, version): who may read where."""
    weights: tuple[int, int] | None = None
    """Of v1 and v2; None: there is no split."""
    testers: bool = False
    """Whether requests that say they are a tester's go to v2."""
    enforced: bool = True
    revoked: frozenset[str] = frozenset()
    """Service accounts that are shut out."""


@dataclass(frozen=True, slots=True)
class Question:
    """Requests of one kind: who asks whom for what, and how often a second."""

    caller: str
    """The workload, `<namespace>/<name>`."""
    account: str
    host: str
    rate: float
    path: str = PUBLIC
    tester: bool = False
    connections: Connections = "kept"

    @property
    def source(self) -> str:
        return f"spiffe://{TRUST_DOMAIN}/ns/{self.caller.partition('/')[0]}/sa/{self.account}"

    def __str__(self) -> str:
        return f"{self.caller} -> {self.host}{self.path}{' as a tester' if self.tester else ''}, {self.connections}"


def outcomes(question: Question, rules: Rules) -> frozenset[str]:
    """All that a request may come to: a version that answers, DENIED or OUT."""
    if question.account in rules.revoked:
        return frozenset({OUT})
    return frozenset(
        version
        if not rules.enforced or (question.path == PUBLIC and (question.account, version) in rules.grants)
        else DENIED
        for version in _targets(question, rules)
    )


def _targets(question: Question, rules: Rules) -> Iterator[str]:
    match question.host:
        case "bookstore" if question.tester and rules.testers:
            yield "v2"
        case "bookstore":
            weights = rules.weights or (1, 1)
            yield from (version for version, weight in zip(("v1", "v2"), weights, strict=True) if weight)
        case host:
            yield host.removeprefix("bookstore-")


def fits(found: Probe, expected: frozenset[str], question: Question) -> bool:
    """Whether what became of a request is one of the outcomes; a version has to have seen the right caller."""
    match found.status:
        case 200:
            return found.version in expected and found.source == question.source
        case 403:
            return DENIED in expected or OUT in expected
        case 503:
            return OUT in expected
    return False


@dataclass(slots=True)
class _Span:
    value: Any
    begin: float
    end: float = math.inf


class History:
    """Which rules held when. Times are those of the loop's clock; each field changes on its own."""

    def __init__(self, rules: Rules) -> None:
        self._spans = {field.name: [_Span(getattr(rules, field.name), -math.inf)] for field in fields(rules)}

    @property
    def newest(self) -> Rules:
        return Rules(**{name: spans[-1].value for name, spans in self._spans.items()})

    def begin(self, now: float, changes: Mapping[str, Any]) -> None:
        """From now on these may hold as well."""
        for name, value in changes.items():
            self._spans[name].append(_Span(value, now))

    def settle(self, now: float, names: Mapping[str, Any]) -> None:
        """From now on only the newest of these holds."""
        for name in names:
            for span in self._spans[name][:-1]:
                span.end = min(span.end, now)

    def possible(self, since: float, until: float, account: str = "") -> list[Rules]:
        """The rules that a request which was under way between two moments may have met.

        Whoever is shut out hears nothing, and finds its way by what it heard before until it is let in for certain. So
        for the one whose service account is given, any route counts that held since it was shut out.
        """
        shut_out = [
            span.begin
            for span in self._spans["revoked"]
            if account in span.value and span.begin <= until and span.end >= since
        ]
        values = []
        for name, spans in self._spans.items():
            begin = min([since, *shut_out]) if name in CALLERS_OWN else since
            values.append(
                list(dict.fromkeys(span.value for span in spans if span.begin <= until and span.end >= begin))
            )
        return [Rules(**dict(zip(self._spans, chosen, strict=True))) for chosen in itertools.product(*values)]


@dataclass(frozen=True, slots=True)
class Wrong:
    """A request that came to something else than any rule says."""

    question: Question
    found: Probe
    expected: frozenset[str]

    def __str__(self) -> str:
        found = self.found
        was = f"{found.status} {found.version} {found.error or found.source}".strip()
        right = " or ".join(sorted(self.expected))
        return f"{found.sent:.3f} s, for {found.latency:.3f} s: {self.question}: {was}, not {right}"


class Lane(Steady):
    """Asks one question, each time once, and judges every answer as it comes."""

    def __init__(self, question: Question, proxy: str, history: History, *, timeout: float) -> None:
        super().__init__(proxy, question.rate, question.connections, timeout)
        self.question = question
        self.answered = self.certain = self.passed = 0
        """All; those that only one rule was possible for; those that were let through."""
        self.last_passed = -math.inf
        """When the last one that was let through had been sent."""
        self.wrong: list[Wrong] = []
        self._history = history
        self._held = 0
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Nothing is asked, and nothing is under way: what is done to its own sidecar is no failure of the mesh.

        If that fails it stays held, as nobody knows what there is to ask.
        """
        self._held += 1
        await self._idle.wait()
        yield
        self._held -= 1

    async def _send(self) -> None:
        if self._held:
            return
        question = self.question
        self._under_way += 1
        self._idle.clear()
        try:
            url = f"http://{question.host}.bookstore{question.path}"
            answer = await self._caller.request(url, headers=TESTER if question.tester else {})
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()
        self._judge(probe(answer))

    def _judge(self, found: Probe) -> None:
        possible = self._history.possible(found.sent, found.sent + found.latency, self.question.account)
        each = {outcomes(self.question, rules) for rules in possible}
        self.answered += 1
        self.certain += len(each) == 1
        if found.status == 200:
            self.passed += 1
            self.last_passed = max(self.last_passed, found.sent)
        expected = frozenset[str]().union(*each)
        if not fits(found, expected, self.question):
            self.wrong.append(Wrong(self.question, found, expected))
