from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import grpc.aio
import pytest

from smc.api import waiting
from smc.api.backends import ProxyStatus
from smc.model import MeshConfig, Name
from smc.records import MemberRecord, Nack, QuarantineRecord
from smc.v1 import smc_pb2 as pb
from tests.unit.api.meshes import mesh, proxy
from tests.unit.api.replica import UNREACHABLE, Replica, call, details, member, running

LISTENER = "type.googleapis.com/envoy.config.listener.v3.Listener"
TEXT = "regex 'a' RE2 program size of 101 > max program size of 100"
BUYER, STORE = Name("shop", "buyer-1"), Name("shop", "store-1")
WRITTEN = 7
"""The revision of what is waited for; the Mesh of a replica is at 7 in these tests, unless it is said otherwise."""


def has(name: Name, *, acked: int = WRITTEN, revision: int = WRITTEN, state: str = "") -> ProxyStatus:
    return ProxyStatus(name, "", 0.0, revision, acked, state or ("synced" if acked == revision else "pending"))


def refusing(name: Name, revision: int) -> ProxyStatus:
    """What it refuses counts as ACKed, all but the refusal itself."""
    nack = Nack(name, LISTENER, ("outbound",), TEXT, (), revision)
    return replace(has(name, state="nacked"), nacks=(nack,))


def there(*names: Name, quarantined: QuarantineRecord | None = None) -> object:
    records = (quarantined,) if quarantined is not None else ()
    return mesh(MeshConfig(), {name: proxy(name, *records) for name in names})


@pytest.fixture
async def replica(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Replica]:
    monkeypatch.setattr(waiting, "ABSENCE", 0.4)
    async with running() as replica:
        replica.mesh = there(BUYER, STORE)
        replica.streams = [has(BUYER), has(STORE)]
        yield replica


@asynccontextmanager
async def two(first: Replica) -> AsyncIterator[Replica]:
    """Another replica of the same mesh, which nobody is connected to."""
    async with running(name="replica-2", of=first) as second:
        first.members = [member(first, "replica-1"), member(second, "replica-2")]
        second.members = first.members
        second.mesh = first.mesh
        yield second


async def wait(
    replica: Replica, *versions: int, seconds: float = 0.0, lagging: tuple[str, ...] = ()
) -> pb.WaitResponse:
    request = pb.WaitRequest(resource_versions=versions or (WRITTEN,), seconds=seconds, lagging=lagging)
    response: pb.WaitResponse = await call(replica, replica.operator, "Wait", request)
    return response


def told(response: pb.WaitResponse) -> list[tuple[str, str, str]]:
    return [(found.proxy, found.replica, found.state) for found in response.laggards]


# ------------------------------------------------------------------------------------------------------- what is done


async def test_it_is_done_once_every_proxy_of_every_replica_has_acked(replica: Replica) -> None:
    replica.streams = [has(BUYER)]
    async with two(replica) as other:
        other.streams = [has(STORE)]
        response = await wait(replica)
    assert (response.done, response.proxies, response.acked, told(response)) == (True, 2, 2, [])


async def test_a_proxy_that_newer_meshes_did_not_concern_has_what_there_is(replica: Replica) -> None:
    replica.reached = 9
    replica.streams = [has(BUYER), has(STORE)]
    assert (await wait(replica, 9)).done, "nothing between 7 and 9 has changed the Mesh"


async def test_one_that_lags_behind_something_newer_has_what_is_waited_for(replica: Replica) -> None:
    replica.reached = 9
    replica.streams = [has(BUYER, revision=9, acked=8), has(STORE, revision=9, acked=9)]
    assert (await wait(replica, 8)).done
    assert not (await wait(replica, 9)).done


async def test_the_answer_comes_as_soon_as_the_last_proxy_has_acked(replica: Replica) -> None:
    replica.streams = [has(BUYER, acked=6), has(STORE)]
    waiting_for = asyncio.create_task(wait(replica, seconds=8))
    await asyncio.sleep(0.3)
    assert not waiting_for.done()
    replica.streams = [has(BUYER), has(STORE)]
    async with asyncio.timeout(4):
        assert (await waiting_for).done


async def test_the_answer_comes_before_its_time_when_one_more_has_acked(replica: Replica) -> None:
    replica.streams = [has(BUYER, acked=6), has(STORE, acked=6)]
    waiting_for = asyncio.create_task(wait(replica, seconds=8))
    await asyncio.sleep(0.3)
    replica.streams = [has(BUYER), has(STORE, acked=6)]
    async with asyncio.timeout(4):
        response = await waiting_for
    assert (response.done, response.acked) == (False, 1)


async def test_of_several_writes_the_newest_is_waited_for(replica: Replica) -> None:
    replica.streams = [has(BUYER, acked=6), has(STORE)]
    assert (await wait(replica, 6, 5)).done
    assert not (await wait(replica, 6, 7)).done


# ------------------------------------------------------------------------------------------------------ who lags behind


@pytest.mark.parametrize("state", ["pending", "stalled"])
async def test_a_laggard_is_named_with_its_replica_and_why(replica: Replica, state: str) -> None:
    replica.streams = [has(BUYER)]
    async with two(replica) as other:
        other.streams = [has(STORE, acked=6, state=state)]
        response = await wait(replica)
    assert (response.done, response.proxies, response.acked) == (False, 2, 1)
    assert told(response) == [("shop/store-1", "replica-2", state)]


async def test_a_refusal_is_told_in_envoys_words(replica: Replica) -> None:
    replica.streams = [has(BUYER), refusing(STORE, WRITTEN)]
    response = await wait(replica)
    assert (response.done, told(response)) == (False, [("shop/store-1", "replica-1", "nacked")])
    assert response.laggards[0].text == f"Listener outbound: {TEXT}"


async def test_a_refusal_of_something_older_says_nothing_about_what_is_waited_for(replica: Replica) -> None:
    replica.streams = [has(BUYER), refusing(STORE, WRITTEN - 1)]
    assert (await wait(replica)).done


async def test_what_a_proxy_goes_without_because_it_refused_it_will_never_come(replica: Replica) -> None:
    left_out = QuarantineRecord(STORE, "smc.io/Service/shop/store", WRITTEN, LISTENER, "outbound", TEXT)
    replica.mesh = there(STORE, quarantined=left_out)
    replica.streams = [has(STORE)]
    response = await wait(replica, 3, WRITTEN)
    assert (response.done, response.acked, told(response)) == (True, 0, [("shop/store-1", "replica-1", "refused")])
    assert response.laggards[0].text == f"smc.io/Service/shop/store is left out: {TEXT}"
    assert told(await wait(replica, 6)) == [], "another version than what is waited for"


async def test_a_replica_that_has_not_read_it_yet_is_not_done(replica: Replica) -> None:
    async with two(replica) as other:
        other.reached = WRITTEN - 1
        response = await wait(replica)
        assert (response.done, told(response)) == (False, [("", "replica-2", "pending")])
        other.streams, replica.streams = [has(STORE, revision=WRITTEN - 1, acked=WRITTEN - 1)], [has(BUYER)]
        assert told(await wait(replica)) == [("shop/store-1", "replica-2", "pending"), ("", "replica-2", "pending")]


async def test_a_replica_that_does_not_answer_is_unknown_until_it_is_no_member_any_more(replica: Replica) -> None:
    dead = MemberRecord("replica-2", "127.0.0.1:1", "127.0.0.1:1", "127.0.0.1:1", (1,), True, 0, "0.1.0")
    replica.members.append(dead)
    assert told(await wait(replica)) == [("", "replica-2", "unknown")]
    replica.members.remove(dead)
    assert (await wait(replica)).done


async def test_the_answer_names_a_hundred_and_counts_all(replica: Replica) -> None:
    names = [Name("shop", f"buyer-{n}") for n in range(150)]
    replica.mesh = there(*names)
    replica.streams = [has(name, acked=6) for name in names]
    response = await wait(replica)
    assert (response.proxies, response.acked, len(response.laggards)) == (150, 0, 100)


# --------------------------------------------------------------------------------------------------- who is not there


async def test_a_proxy_that_is_connected_nowhere_is_told_and_not_waited_for(replica: Replica) -> None:
    replica.streams = [has(BUYER)]
    response = await wait(replica, seconds=8)
    assert (response.done, response.proxies, response.acked) == (True, 1, 1)
    assert (list(response.disconnected), response.absent) == (["shop/store-1"], 1)


async def test_it_may_be_on_its_way_to_another_replica(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "ABSENCE", 30.0)
    replica.streams = [has(BUYER)]
    async with two(replica) as other:
        waiting_for = asyncio.create_task(wait(replica, seconds=4))
        await asyncio.sleep(0.15)
        assert not waiting_for.done(), "between two replicas is not done"
        other.streams = [has(STORE, acked=0)]
        response = await waiting_for
        assert told(response) == [("shop/store-1", "replica-2", "pending")]


async def test_a_laggard_that_loses_its_stream_is_waited_for_until_it_is_back(replica: Replica) -> None:
    replica.streams = [has(BUYER), has(STORE, acked=6)]
    waiting_for = asyncio.create_task(wait(replica, seconds=4))
    await asyncio.sleep(0.15)
    replica.streams = [has(BUYER)]
    response = await waiting_for
    assert (response.done, response.proxies, response.acked) == (False, 2, 1)
    assert told(response) == [("shop/store-1", "", "disconnected")]
    async with two(replica) as other:
        assert told(await wait(other, seconds=1.0, lagging=("shop/store-1",))) == [("shop/store-1", "", "disconnected")]
        other.streams = [has(STORE)]
        assert (await wait(other, lagging=("shop/store-1",))).done


async def test_a_laggard_whose_workload_is_taken_away_is_forgotten(replica: Replica) -> None:
    replica.mesh, replica.streams = there(BUYER), [has(BUYER)]
    assert (await wait(replica, lagging=("shop/store-1",))).done


# ------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize("versions", [(0,), (5, -1)])
async def test_there_must_be_something_to_wait_for(replica: Replica, versions: tuple[int, ...]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await wait(replica, *versions)
    assert e.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_nothing_is_said_while_it_is_not_known_which_replicas_there_are(replica: Replica) -> None:
    replica.kv.error = UNREACHABLE  # type: ignore[attr-defined]
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await wait(replica)
    assert details(e.value).kind == "Unavailable"
