from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace as with_fields

import grpc
import grpc.aio
import pytest

from smc.api import server
from smc.api.access import PROXY
from smc.api.limits import MOST_PEERS, Limiter, Limits, Places, Rate
from smc.api.server import CALLS_OF_ONE, MESH_LIMITS, RARE
from smc.certificates import x509
from smc.model import MeshConfig, Name
from smc.v1 import smc_pb2 as pb
from smc.v1.smc_pb2_grpc import MeshStub
from tests.unit.api.meshes import mesh, proxy
from tests.unit.api.replica import call, calling, details, running


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_passes_and_then_calls_come_at_the_rate() -> None:
    clock = Clock()
    limiter = Limiter(Limits(peer=Rate(2, 3), overall=Rate(100, 100)), clock)
    assert [limiter.admit("a") for _ in range(3)] == [0, 0, 0]
    assert limiter.admit("a") == 0.5
    clock.now += 0.5
    assert limiter.admit("a") == 0
    assert limiter.admit("a") == 0.5


def test_one_peer_is_refused_and_the_others_are_not() -> None:
    limiter = Limiter(Limits(peer=Rate(1, 1), overall=Rate(100, 100)), Clock())
    assert limiter.admit("a") == 0
    assert limiter.admit("a") > 0
    assert limiter.admit("b") == 0


def test_what_one_peer_is_refused_is_not_taken_from_all() -> None:
    limiter = Limiter(Limits(peer=Rate(1, 1), overall=Rate(1, 2)), Clock())
    for _ in range(50):
        limiter.admit("a")
    assert limiter.admit("b") == 0


def test_all_together_are_bounded_however_many_they_are() -> None:
    limiter = Limiter(Limits(peer=Rate(1, 1), overall=Rate(1, 10)), Clock())
    assert sum(limiter.admit(f"peer-{n}") == 0 for n in range(100)) == 10


def test_a_long_pause_fills_no_more_than_the_burst() -> None:
    clock = Clock()
    limiter = Limiter(Limits(peer=Rate(1, 2), overall=Rate(100, 100)), clock)
    limiter.admit("a")
    clock.now += 3600
    assert [limiter.admit("a") == 0 for _ in range(3)] == [True, True, False]


def test_the_peers_that_are_remembered_are_bounded() -> None:
    limiter = Limiter(Limits(peer=Rate(1, 1), overall=Rate(1e9, 1e9)), Clock())
    for n in range(MOST_PEERS + 100):
        limiter.admit(str(n))
    assert len(limiter._peers) == MOST_PEERS


# ---------------------------------------------------------------------------------------------- how many calls are open


async def test_who_waits_in_as_many_calls_as_it_may_keeps_nobody_else_out(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Places] = []

    def places(most: int) -> Places:
        made.append(Places(most))
        return made[-1]

    async def until_open(calls: int) -> None:
        async with asyncio.timeout(20):
            while made[0]._open["viewer/vic"] != calls:  # noqa: ASYNC110 - calls come and go on the wire
                await asyncio.sleep(0.01)

    monkeypatch.setattr(server, "Places", places)
    never = pb.WaitRequest(resource_versions=[2**40], seconds=8)
    asked = pb.ListRequest(group="smc.io", kind="Service")
    async with running() as replica:
        replica.mesh = mesh(MeshConfig(), {})
        vic = await replica.signed("viewer/vic")
        async with calling(replica.api, vic) as channel:
            stub = MeshStub(channel)  # type: ignore[no-untyped-call]
            await stub.List(asked, timeout=20)
            waits = [asyncio.ensure_future(_waited(stub, never)) for _ in range(CALLS_OF_ONE)]
            await until_open(CALLS_OF_ONE)
            with pytest.raises(grpc.aio.AioRpcError) as e:
                await stub.List(asked, timeout=20)
            assert e.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            told = details(e.value)
            assert told.message == f"viewer/vic has {CALLS_OF_ONE} calls open here already"
            await call(replica, replica.operator, "Revoke", pb.RevokeRequest(credential="viewer/vic"))
            assert not any(wait.done() for wait in waits)
            waits.pop().cancel()
            await until_open(CALLS_OF_ONE - 1)
            await stub.List(asked, timeout=20)
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)


async def _waited(stub: MeshStub, request: pb.WaitRequest) -> None:
    await stub.Wait(request, timeout=20)


async def test_all_the_revoked_together_are_one_who_asks_and_who_was_let_in_again_does_not_pay_for_them() -> None:
    few = Limits(peer=Rate(1, 3), overall=Rate(1000, 1000))
    asked = pb.ListRequest(group="smc.io", kind="Service")
    async with running(mesh_limits=few, clock=Clock()) as replica:
        stolen, anew = await replica.signed("operator/ann"), await replica.signed("operator/ann")
        another = await replica.signed("viewer/vic")
        for path in ("operator/ann", "viewer/vic"):
            await call(replica, replica.operator, "Revoke", pb.RevokeRequest(credential=path))
        serial = f"{x509.load(anew.chain)[0].serial_number:x}"
        replica.mesh = with_fields(
            mesh(MeshConfig(), {}), revoked_credentials={"operator/ann": (serial,), "viewer/vic": ()}
        )
        for whose, allowed in ((stolen, True), (another, True), (stolen, True), (another, False), (stolen, False)):
            with pytest.raises(grpc.aio.AioRpcError) as e:
                await call(replica, whose, "List", asked)
            denied, exhausted = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.RESOURCE_EXHAUSTED
            assert e.value.code() is (denied if allowed else exhausted)
        for _ in range(3):
            await call(replica, anew, "List", asked)


# --------------------------------------------------------------------------------------------- what is asked for rarely


def of_proxies(method: str, clock: Clock) -> Limiter:
    return Limiter(Limits(RARE[PROXY, method], MESH_LIMITS.overall), clock)


def admitted(limiter: Limiter, clock: Clock, *, every: float, for_: float) -> list[float]:
    """When somebody is let through who asks so often, in seconds."""
    began, found = clock.now, []
    while clock.now < began + for_:
        if limiter.admit("proxy/shop/buyer") == 0:
            found.append(clock.now - began)
        clock.now += every
    return found


def test_the_shortest_life_that_a_credential_may_have_is_renewed_each_time() -> None:
    clock = Clock()
    assert len(admitted(of_proxies("Renew", clock), clock, every=4.0, for_=3600)) == 900


def test_who_renews_in_a_loop_gets_a_few_a_minute() -> None:
    clock = Clock()
    burst = RARE[PROXY, "Renew"].burst
    assert len(admitted(of_proxies("Renew", clock), clock, every=0.005, for_=600)) <= burst + 600 / 4 + 1


@pytest.mark.parametrize("method", ["Renew", "Trust"])
@pytest.mark.parametrize("every", [0.1, 1.0, 5.0])
def test_a_proxy_that_starts_over_and_over_is_never_shut_out_for_long(method: str, every: float) -> None:
    clock = Clock()
    passed = admitted(of_proxies(method, clock), clock, every=every, for_=600)
    assert max(later - earlier for earlier, later in itertools.pairwise(passed)) <= 5.0
    assert passed[-1] >= 595.0


@pytest.mark.parametrize("role", ["operator", "viewer"])
def test_people_who_renew_in_a_loop_are_bounded_too_and_many_machines_of_one_name_are_not(role: str) -> None:
    clock = Clock()
    limiter = Limiter(Limits(RARE[role, "Renew"], MESH_LIMITS.overall), clock)
    assert sum(limiter.admit("operator/ci") == 0 for _ in range(1000)) == 60
    clock.now += 60
    assert sum(limiter.admit("operator/ci") == 0 for _ in range(60)) == 60


async def test_a_proxy_that_renews_too_often_is_told_when_to_try_again_and_costs_nobody_else_anything() -> None:
    clock = Clock()
    names = {name: proxy(name) for name in (Name("shop", "buyer"), Name("shop", "store"))}
    async with running(clock=clock) as replica:
        replica.mesh = mesh(MeshConfig(), names)
        buyer, store = await replica.signed("proxy/shop/buyer"), await replica.signed("proxy/shop/store")
        operator = replica.operator
        renew = pb.RenewRequest(csr=x509.request(x509.new_key()))
        for _ in range(int(RARE[PROXY, "Renew"].burst)):
            await call(replica, buyer, "Renew", renew)
        # Another credential of the same proxy makes no difference: else each renewal would be good for the next.
        for again in (buyer, await replica.signed("proxy/shop/buyer")):
            with pytest.raises(grpc.aio.AioRpcError) as e:
                await call(replica, again, "Renew", renew)
            assert e.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            told = details(e.value)
            assert (told.message, told.hint) == ("proxy/shop/buyer calls Renew too often", "try again in 4.0 s")
        await call(replica, buyer, "Trust", pb.TrustRequest(roots=buyer.pins, issuer=buyer.issuer))
        await call(replica, store, "Renew", renew)
        for _ in range(int(RARE[PROXY, "Renew"].burst) + 1):
            await call(replica, operator, "Renew", renew)
        clock.now += 4.0
        await call(replica, buyer, "Renew", renew)
