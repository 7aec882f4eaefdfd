"""What policy denied: told by each proxy of itself alone, bounded, and the same whichever replica is asked."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest

from smc.api.denials import KEPT, LONGEST_PORT, MOST_PORTS, Denials, newest
from smc.errors import Exhausted, Invalid
from smc.mesh import Mesh
from smc.model import Inbound, Mode, Name, Protocol
from smc.v1 import smc_pb2 as pb
from tests.unit.api.replica import Replica, call, details, member, running
from tests.unit.envoy import nouns

STORE, TILL = Name("shop", "store"), Name("bank", "till")
PORT = "shop/store|80"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def mesh(mode: Mode = Mode.ENFORCING, protocol: Protocol = Protocol.HTTP) -> Mesh:
    store = Inbound(8080, protocol, ((STORE, 80), (STORE, 81)))
    till = Inbound(8080, Protocol.HTTP, ((TILL, 80),))
    return nouns.mesh(
        nouns.proxy(nouns.workload("shop/store", "127.0.0.1"), inbound=[store], mode=mode),
        nouns.proxy(nouns.workload("bank/till", "127.0.0.2"), inbound=[till]),
    )


def report(since: float = 10.0, last: float = 20.0, **ports: int) -> pb.ReportDenialsRequest:
    """`store_80=3` denied three; a name with `would_` in front is of what passed."""
    found: dict[str, pb.CountedPort] = {}
    for name, count in ports.items():
        service, _, number = name.removeprefix("would_").partition("_")
        port = f"shop/{service}|{number}" if number else service
        counted = found.setdefault(port, pb.CountedPort(port=port, last=last))
        setattr(counted, "would_be_denied" if name.startswith("would_") else "denied", count)
    return pb.ReportDenialsRequest(since=since, ports=found.values())


def counts(denials: list[pb.Denial]) -> dict[tuple[str, str], tuple[int, int]]:
    return {(denial.workload, denial.port): (denial.denied, denial.would_be_denied) for denial in denials}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def denials(clock: Clock) -> Denials:
    return Denials(clock)


def test_a_report_takes_the_place_of_the_one_before(denials: Denials, clock: Clock) -> None:
    denials.take(STORE, report(store_80=2), mesh())
    clock.now += 3
    denials.take(STORE, report(store_80=5, store_81=1, would_store_81=4), mesh())
    found = list(denials.of(mesh(Mode.AUDIT), "", 100.0))
    assert counts(found) == {("shop/store", PORT): (5, 0), ("shop/store", "shop/store|81"): (1, 4)}
    assert {(denial.mode, denial.since, denial.last) for denial in found} == {("audit", 10.0, 20.0)}


def test_a_proxy_is_counted_for_the_ports_that_it_has_and_for_no_other(denials: Denials) -> None:
    denials.take(STORE, report(store_80=1, store_82=1, bank_80=1, plaintext=7), mesh())
    assert counts(list(denials.of(mesh(), "", 100.0))) == {
        ("shop/store", PORT): (1, 0),
        ("shop/store", "plaintext"): (7, 0),
    }


def test_only_a_proxy_with_a_port_that_speaks_tcp_refuses_connections(denials: Denials) -> None:
    denials.take(STORE, report(store_80=1, tcp=7), mesh())
    assert counts(list(denials.of(mesh(), "", 100.0))) == {("shop/store", PORT): (1, 0)}
    assert counts(list(denials.of(mesh(protocol=Protocol.TCP), "", 100.0)))["shop/store", "tcp"] == (7, 0)


def test_who_is_not_in_the_mesh_is_not_counted(denials: Denials) -> None:
    denials.take(Name("shop", "gone"), report(store_80=1), mesh())
    denials.take(STORE, report(store_80=1), mesh())
    assert {denial.workload for denial in denials.of(mesh(), "", 100.0)} == {"shop/store"}
    assert list(denials.of(nouns.mesh(), "", 100.0)) == []


def test_a_namespace_is_that_of_who_was_called(denials: Denials) -> None:
    denials.take(STORE, report(store_80=1), mesh())
    assert list(denials.of(mesh(), "bank", 100.0)) == []
    assert len(list(denials.of(mesh(), "shop", 100.0))) == 1


def test_what_is_not_told_again_is_forgotten(denials: Denials, clock: Clock) -> None:
    denials.take(STORE, report(store_80=1), mesh())
    clock.now += KEPT - 1
    assert list(denials.of(mesh(), "", 100.0))
    clock.now += 1
    assert not list(denials.of(mesh(), "", 100.0))


def test_a_clock_that_is_ahead_tells_of_no_later_time_than_now(denials: Denials) -> None:
    denials.take(STORE, report(since=5000.0, last=6000.0, store_80=1), mesh())
    (denial,) = denials.of(mesh(), "", 100.0)
    assert (denial.since, denial.last) == (100.0, 100.0)


def test_a_report_has_bounds(denials: Denials) -> None:
    port = pb.CountedPort(port="a")
    for wrong in (
        pb.ReportDenialsRequest(ports=[port] * (MOST_PORTS + 1)),
        pb.ReportDenialsRequest(ports=[pb.CountedPort(port="a" * (LONGEST_PORT + 1))]),
        pb.ReportDenialsRequest(since=math.nan),
        pb.ReportDenialsRequest(ports=[pb.CountedPort(port="a", last=math.inf)]),
    ):
        with pytest.raises(Invalid):
            denials.take(STORE, wrong, mesh())
    assert not list(denials.of(mesh(), "", 100.0))


def test_who_reports_too_often_is_refused_and_the_others_are_not(denials: Denials, clock: Clock) -> None:
    for _ in range(5):
        denials.take(STORE, report(store_80=1), mesh())
    with pytest.raises(Exhausted, match="shop/store reports its denials too often"):
        denials.take(STORE, report(store_80=1), mesh())
    denials.take(TILL, report(), mesh())
    clock.now += 1
    denials.take(STORE, report(store_80=1), mesh())


def _denial(workload: str, port: str, denied: int, since: float = 10.0) -> pb.Denial:
    return pb.Denial(workload=workload, port=port, denied=denied, since=since)


def test_of_what_two_replicas_were_told_of_one_proxy_the_newer_counts() -> None:
    told = [
        _denial("shop/store", PORT, 3),
        _denial("bank/till", "bank/till|80", 1),
        _denial("shop/store", PORT, 5),
        _denial("shop/store", "shop/store|81", 1),
    ]
    expected = {
        ("bank/till", "bank/till|80"): (1, 0),
        ("shop/store", PORT): (5, 0),
        ("shop/store", "shop/store|81"): (1, 0),
    }
    assert counts(newest(told)) == expected
    assert newest(told) == newest(reversed(told))


def test_what_an_envoy_counted_that_is_no_more_does_not_count() -> None:
    told = [_denial("shop/store", PORT, 900), _denial("shop/store", "shop/store|81", 1, since=11.0)]
    assert counts(newest(told)) == {("shop/store", "shop/store|81"): (1, 0)}


# -------------------------------------------------------------------------------------------------------- over the wire


@pytest.fixture
async def two() -> AsyncIterator[tuple[Replica, Replica]]:
    async with running() as first, running(name="replica-2", of=first) as second:
        for replica in (first, second):
            replica.mesh = mesh()
            replica.members = [member(first, "replica-1"), member(second, "replica-2")]
        yield first, second


async def test_whichever_replica_was_told_every_replica_tells_all(two: tuple[Replica, Replica]) -> None:
    first, second = two
    store = await first.signed("proxy/shop/store")
    till = await first.signed("proxy/bank/till")
    await call(first, store, "ReportDenials", report(since=time.time(), store_80=2))
    lying = pb.ReportDenialsRequest(
        since=1.0, ports=[pb.CountedPort(port="bank/till|80", would_be_denied=4), pb.CountedPort(port=PORT, denied=99)]
    )
    await call(second, till, "ReportDenials", lying)
    for replica in two:
        answer = await call(replica, first.operator, "Denials", pb.DenialsRequest())
        assert counts(answer.denials) == {("bank/till", "bank/till|80"): (0, 4), ("shop/store", PORT): (2, 0)}
        assert not answer.unreachable
    answer = await call(first, first.operator, "Denials", pb.DenialsRequest(local=True))
    assert [denial.workload for denial in answer.denials] == ["shop/store"]


async def test_a_replica_that_does_not_answer_is_named(two: tuple[Replica, Replica]) -> None:
    first, second = two
    first.members = [member(first, "replica-1"), member(second, "replica-2")]
    first.members[1] = type(first.members[1])("gone", "127.0.0.1:1", "127.0.0.1:1", "127.0.0.1:1", (1,), True, 0, "0")
    answer = await call(first, first.operator, "Denials", pb.DenialsRequest())
    assert list(answer.unreachable) == ["gone"]


async def test_before_a_replica_has_read_the_mesh_it_takes_and_tells_nothing(two: tuple[Replica, Replica]) -> None:
    first, _ = two
    first.mesh = None
    store = await first.signed("proxy/shop/store")
    for credential, method, request in (
        (store, "ReportDenials", report(store_80=2)),
        (first.operator, "Denials", pb.DenialsRequest()),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as e:
            await call(first, credential, method, request)
        assert e.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "has not read the mesh yet" in details(e.value).message
