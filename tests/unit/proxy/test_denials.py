"""What a proxy counts, and tells: all of it, when it has changed, to a replica that takes it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import pytest
from aiohttp import web

from smc.certificates.credential import Credential
from smc.envoy import names
from smc.model import Name
from smc.proxy import denials
from smc.proxy.denials import Counted, counted
from smc.proxy.enrolment import Enrolment
from smc.v1 import smc_pb2 as pb
from tests.unit.certificates.authority import TestAuthority
from tests.unit.proxy.control_plane import ControlPlane, serving
from tests.unit.tasks import at_work

CA = TestAuthority.make(now=time.time() - 3600)
REPLICA = CA.credential("replica/a", now=time.time())
PROXY = CA.credential("proxy/shop/store", now=time.time())
PORT = names.cluster(Name("shop", "store"), 80)
DENIED = f"http.inbound.rbac.{PORT}.denied"


def stats(**more: Any) -> Any:
    return {"stats": [{"name": name, "value": value} for name, value in more.items()]}


# ------------------------------------------------------------------------------------------------------------- counters


def test_counters_are_joined_by_port_whatever_it_speaks_and_only_if_there_is_something_to_tell() -> None:
    found = counted(
        stats(
            **{
                DENIED: 3,
                f"http.inbound.rbac.{PORT}.shadow_denied": 4,
                "inbound.shop/store|9000.rbac.shadow_denied": 5,
                "http.inbound.rbac.plaintext.shadow_denied": 6,
                "http.inbound.rbac.shop/store|81.denied": 0,
                f"http.inbound.rbac.{PORT}.allowed": 9,
                "http.outbound.rbac.x.denied": 9,
                "listener.127.0.3.1_15003.ssl.fail_verify_san": 7,
                "listener.127.0.3.1_15001.ssl.fail_verify_san": 9,
                "listener.127.0.3.1_15003.ssl.fail_verify_error": 9,
            }
        )
    )
    assert found == {
        "tcp": Counted(7, 0),
        "plaintext": Counted(0, 6),
        PORT: Counted(3, 4),
        "shop/store|9000": Counted(0, 5),
    }


@pytest.mark.parametrize("answer", [None, [], {}, {"stats": 1}, {"stats": [1]}, {"stats": [{"name": DENIED}]}])
def test_an_answer_of_another_shape_is_no_answer(answer: Any) -> None:
    with pytest.raises(ValueError, match="another shape"):
        counted(answer)


# -------------------------------------------------------------------------------------------------------------- reports


@dataclass
class Envoy:
    """An admin interface that answers with `body`, or with 503 while that is None."""

    body: Any = None
    asked: list[dict[str, str]] = field(default_factory=list)

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append(dict(request.query))
        if self.body is None:
            return web.Response(status=503)
        return web.Response(text=self.body if isinstance(self.body, str) else json.dumps(self.body))

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        application = web.Application()
        application.router.add_get("/stats", self.answer)
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            host, port, *_ = runner.addresses[0]
            yield f"{host}:{port}"
        finally:
            await runner.cleanup()


@dataclass
class Hearing(ControlPlane):
    told: list[pb.ReportDenialsRequest] = field(default_factory=list)
    callers: list[str] = field(default_factory=list)

    async def ReportDenials(  # noqa: N802
        self, request: pb.ReportDenialsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ReportDenialsResponse:
        (peer,) = context.auth_context()["peer_spiffe_id"]
        self.callers.append(peer.decode())
        if self.failures:
            code, text, _ = self.failures.pop(0)
            await context.abort(code, text)
        self.told.append(request)
        return pb.ReportDenialsResponse()

    def counts(self) -> list[dict[str, int]]:
        return [{counted.port: counted.denied for counted in request.ports} for request in self.told]


@dataclass
class Running:
    envoy: Envoy
    plane: Hearing
    credential: Credential = PROXY


@asynccontextmanager
async def reporting() -> AsyncIterator[Running]:
    running = Running(Envoy(), Hearing(CA))
    async with running.envoy.serving() as admin, serving(running.plane, REPLICA, mutual=True) as api:
        enrolled = Enrolment(
            "shop/store", "default", CA.trust_domain, "mesh.internal", ("127.0.0.1:1",), (api,), "127.0.0.1", ""
        )
        async with at_work(denials.report(admin, lambda: (running.credential, enrolled), look=0.01)):
            yield running


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def looked(running: Running, times: int = 5) -> None:
    before = len(running.envoy.asked)
    await until(lambda: len(running.envoy.asked) >= before + times)


async def test_what_is_counted_is_told_once_and_again_when_it_has_changed() -> None:
    before = time.time()
    async with reporting() as running:
        running.envoy.body = stats()
        await looked(running)
        assert running.plane.told == []
        running.envoy.body = stats(**{DENIED: 2})
        await until(lambda: running.plane.told)
        await looked(running)
        assert running.plane.counts() == [{PORT: 2}]
        running.envoy.body = stats(**{DENIED: 7, "http.inbound.rbac.plaintext.denied": 1})
        await until(lambda: len(running.plane.told) == 2)
        assert running.plane.counts()[-1] == {PORT: 7, "plaintext": 1}
    assert set(running.plane.callers) == {PROXY.uri}
    first, second = running.plane.told
    assert first.since == second.since
    assert before <= first.since <= first.ports[0].last <= second.ports[-1].last <= time.time()


async def test_what_has_not_changed_is_told_again_for_replicas_that_have_just_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(denials, "REPEAT", 0.05)
    async with reporting() as running:
        running.envoy.body = stats(**{DENIED: 2})
        await until(lambda: len(running.plane.told) >= 3)
    assert {request.ports[0].last for request in running.plane.told} == {running.plane.told[0].ports[0].last}


async def test_a_replica_that_does_not_take_it_is_told_again_and_so_is_the_next() -> None:
    async with reporting() as running:
        running.plane.failures = [(grpc.StatusCode.UNAVAILABLE, "not now", "")] * 2
        running.envoy.body = stats(**{DENIED: 2})
        await until(lambda: running.plane.told)
    assert len(running.plane.callers) == 3


@pytest.mark.parametrize("body", [None, "no JSON", "[]"])
async def test_an_envoy_that_does_not_say_is_asked_again(body: Any) -> None:
    async with reporting() as running:
        running.envoy.body = body
        await looked(running)
        running.envoy.body = stats(**{DENIED: 2})
        await until(lambda: running.plane.told)
    assert running.plane.counts() == [{PORT: 2}]


async def test_a_renewed_credential_is_the_one_that_it_shows() -> None:
    async with reporting() as running:
        running.envoy.body = stats(**{DENIED: 1})
        await until(lambda: running.plane.told)
        running.credential = CA.credential("proxy/shop/store-2", now=time.time())
        running.envoy.body = stats(**{DENIED: 2})
        await until(lambda: len(running.plane.told) == 2)
    assert running.plane.callers == [PROXY.uri, running.credential.uri]
