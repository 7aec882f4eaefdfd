"""A NACK costs the proxy that sent it one manifest after the other until it ACKs, and costs nobody else anything."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import asynccontextmanager

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from cluster.election import Deposed, Election, Leadership
from cluster.kv import KV, Delete, Listing, Put, View
from cluster.memory import MemoryKV, MemoryStore
from smc import plugins, quarantine
from smc.codec import decode, encode
from smc.keys import Keys
from smc.mesh import Mesh, build
from smc.model import Name
from smc.quarantine import LOOK_AGAIN, next_suspect
from smc.records import AckRecord, Nack, QuarantineRecord
from smc.xds.snapshot import Resource, Snapshot, Source, Type
from smc.xds.stream import Refusal, Request, Response, Stream
from tests.unit.bookshop import Shop, workload
from tests.unit.cluster.hostile import HostileKV
from tests.unit.leadership import elect
from tests.unit.tasks import at_work

pytestmark = pytest.mark.looptime

KEYS = Keys("default")
PROXY, OTHER = Name("shop", "buyer"), Name("shop", "store")
TEXT = "outbound: no such cluster"
Suspect = tuple[str, int]


def manifest(name: str) -> str:
    return f"split.smi-spec.io/TrafficSplit/shop/{name}"


class Judged:
    """A store with manifests, a leader that judges, and replicas that report."""

    def __init__(self, kv: KV) -> None:
        self.kv = kv

    async def write(self, name: str, text: str = "") -> Suspect:
        outcome = await self.kv.transact([Put(KEYS.manifest(manifest(name)), text.encode())])
        return manifest(name), outcome.revision

    async def delete(self, name: str) -> None:
        await self.kv.transact([Delete(KEYS.manifest(manifest(name)))])

    async def report(self, *nacks: Nack, replica: str = "a") -> None:
        record = AckRecord(replica, 1, len(nacks), nacks=nacks)
        await self.kv.transact([Put(KEYS.acks + replica, encode(record))])

    async def revision(self) -> int:
        return (await self.kv.status()).revision

    async def quarantines(self) -> list[QuarantineRecord]:
        """In the order in which they were made, once nothing happens any more."""
        await asyncio.sleep(5)
        items = (await self.kv.list(KEYS.quarantines)).items
        return [decode(QuarantineRecord, item.value) for item in sorted(items, key=lambda i: i.create_revision)]

    async def left_out(self, proxy: Name = PROXY) -> list[Suspect]:
        return [(q.manifest, q.mod_revision) for q in await self.quarantines() if q.proxy == proxy]


def nack(revision: int, *suspects: Suspect, proxy: Name = PROXY, resource: str = "outbound", text: str = TEXT) -> Nack:
    newest_first = tuple(sorted(suspects, key=lambda suspect: -suspect[1]))
    return Nack(proxy, Type.ROUTE.value, (resource,), text, newest_first, revision)


@asynccontextmanager
async def judged() -> AsyncIterator[Judged]:
    """A mesh with a leader that was really elected."""
    kv = MemoryKV(MemoryStore())
    election = Election(kv, KEYS.leader, "a")
    async with at_work(election.run(lambda leadership: quarantine.run(leadership, kv, KEYS))):
        await asyncio.sleep(1)
        assert election.leading
        yield Judged(MemoryKV(kv.store))
        assert election.leading, "judging has failed"


# ------------------------------------------------------------------------------------------------------ one at a time


async def test_the_newest_suspect_is_left_out_for_the_proxy_that_refuses_it() -> None:
    async with judged() as mesh:
        old, new = await mesh.write("old"), await mesh.write("new")
        await mesh.report(nack(await mesh.revision(), old, new))
        (found,) = await mesh.quarantines()
        assert found == QuarantineRecord(PROXY, *new, Type.ROUTE.value, "outbound", TEXT)
        assert await mesh.kv.get(KEYS.quarantine(PROXY, *new)) is not None


async def test_a_nack_without_it_takes_the_next_suspect() -> None:
    async with judged() as mesh:
        old, new = await mesh.write("old"), await mesh.write("new")
        await mesh.report(nack(await mesh.revision(), old, new))
        assert await mesh.left_out() == [new]
        await mesh.report(nack(await mesh.revision(), old))
        assert await mesh.left_out() == [new, old]


async def test_a_nack_from_before_the_quarantine_proves_nothing_about_the_others() -> None:
    async with judged() as mesh:
        old, new = await mesh.write("old"), await mesh.write("new")
        revision = await mesh.revision()
        for text in ("once", "twice", "thrice"):
            await mesh.report(nack(revision, old, new, text=text))
        assert await mesh.left_out() == [new]


async def test_what_makes_no_difference_to_what_is_refused_is_no_suspect_any_more() -> None:
    """The proxy is sent nothing then, so it says nothing new: its old NACK stands, of what is left."""
    async with judged() as mesh:
        old, new = await mesh.write("old"), await mesh.write("new")
        revision = await mesh.revision()
        await mesh.report(nack(revision, old, new))
        assert await mesh.left_out() == [new]
        await mesh.report(nack(revision, old))
        assert await mesh.left_out() == [new, old]


async def test_two_resources_that_are_refused_do_not_wait_for_each_other() -> None:
    async with judged() as mesh:
        split, target = await mesh.write("split"), await mesh.write("target")
        revision = await mesh.revision()
        await mesh.report(nack(revision, split), nack(revision, target, resource="inbound|8080"))
        assert await mesh.left_out() == [split, target]


async def test_one_manifest_behind_two_refusals_is_left_out_alone() -> None:
    async with judged() as mesh:
        old, new = await mesh.write("old"), await mesh.write("new")
        revision = await mesh.revision()
        await mesh.report(nack(revision, old, new), nack(revision, old, new, resource="inbound|8080"))
        assert await mesh.left_out() == [new]


async def test_only_the_proxy_that_refuses_it_loses_it() -> None:
    async with judged() as mesh:
        suspect = await mesh.write("split")
        await mesh.report(nack(await mesh.revision(), suspect))
        assert await mesh.left_out(PROXY) == [suspect]
        assert await mesh.left_out(OTHER) == []
        await mesh.report(nack(await mesh.revision(), suspect, proxy=OTHER), replica="b")
        assert await mesh.left_out(OTHER) == [suspect]


async def test_when_every_suspect_is_left_out_there_is_nothing_to_do() -> None:
    async with judged() as mesh:
        suspect = await mesh.write("split")
        await mesh.report(nack(await mesh.revision(), suspect))
        assert await mesh.left_out() == [suspect]
        written = await mesh.kv.get(KEYS.quarantine(PROXY, *suspect))
        await mesh.report(nack(await mesh.revision() + 5, suspect, text="again"))
        await mesh.report(nack(await mesh.revision() + 5, text="without a suspect"))
        assert await mesh.left_out() == [suspect]
        assert await mesh.kv.get(KEYS.quarantine(PROXY, *suspect)) == written


async def test_a_report_in_which_no_refusal_is_new_costs_no_reading_of_every_manifest() -> None:
    class Counting(MemoryKV):
        read = 0

        async def list(self, prefix: str, *, revision: int = 0) -> Listing:
            self.read += prefix == KEYS.manifests
            return await super().list(prefix, revision=revision)

    kv = Counting(MemoryStore())
    task = asyncio.create_task(quarantine.run(await elect(kv, KEYS), kv, KEYS))
    stands = nack(1)
    for revision in range(10):
        await asyncio.sleep(1)
        await kv.transact([Put(KEYS.acks + "a", encode(AckRecord("a", revision, 1, nacks=(stands,))))])
    await asyncio.sleep(1)
    assert kv.read == 2  # at the start, and when it was first reported
    task.cancel()
    await asyncio.wait([task])


async def test_what_was_reported_before_there_was_a_leader_is_judged() -> None:
    kv = MemoryKV(MemoryStore())
    mesh = Judged(kv)
    suspect = await mesh.write("split")
    await mesh.report(nack(await mesh.revision(), suspect))
    task = asyncio.create_task(quarantine.run(await elect(kv, KEYS), kv, KEYS))
    assert await mesh.left_out() == [suspect]
    task.cancel()
    await asyncio.wait([task])


# ------------------------------------------------------------------------------------------------------------ its end


async def test_a_nack_of_what_was_written_anew_meanwhile_costs_nobody_anything() -> None:
    async with judged() as mesh:
        old, new = await mesh.write("old"), await mesh.write("new")
        revision = await mesh.revision()
        await mesh.write("new", "better")
        await mesh.report(nack(revision, old, new))
        assert await mesh.left_out() == []


async def whole(kv: KV) -> View:
    listing = await kv.list(KEYS.root)
    return View(listing.cluster_id, 1, listing.revision, {item.key: item for item in listing.items})


class Forgetting:
    """A shop whose buyer and store are proxies that refuse manifests, and a leader that forgets what has ended."""

    def __init__(self) -> None:
        self.kv = HostileKV(MemoryStore())
        self.shop = Shop(MemoryKV(self.kv.store))
        self.looks = 0

    async def found(self) -> None:
        await self.shop.found()
        for name in (PROXY, OTHER):
            await self.shop.put(KEYS.workload("files", name), workload(name.name))

    async def refuse(self, proxy: Name, name: str) -> str:
        """Have a new split left out for a proxy; returns the key of the quarantine."""
        revision = await self.split(name)
        key = KEYS.quarantine(proxy, manifest(name), revision)
        await self.shop.put(key, QuarantineRecord(proxy, manifest(name), revision, Type.ROUTE.value, "outbound", TEXT))
        return key

    async def split(self, name: str, weight: int = 1) -> int:
        return await self.shop.split(name, **{f"{name}_v1": weight})

    async def meshes(self) -> AsyncGenerator[Mesh, None]:
        """As a replica builds them: each newer one."""
        last = 0
        while True:
            view = await whole(self.shop.kv)
            if view.revision != last:
                last = view.revision
                self.looks += 1
                yield build(None, view, plugins.policies())
            await asyncio.sleep(0.1)

    @asynccontextmanager
    async def led(self) -> AsyncIterator[asyncio.Task[None]]:
        leadership = await elect(self.kv, KEYS)
        async with at_work(quarantine.forget(leadership, self.kv, KEYS, self.meshes())) as task:
            yield task

    def there(self) -> set[str]:
        return {item.key for item in self.kv.store.list(KEYS.quarantines, 0)}


@pytest.fixture
async def mesh() -> Forgetting:
    mesh = Forgetting()
    await mesh.found()
    return mesh


async def test_a_quarantine_of_what_was_written_anew_or_is_gone_is_deleted(mesh: Forgetting) -> None:
    changed, deleted, stays = [await mesh.refuse(PROXY, name) for name in ("changed", "deleted", "stays")]
    theirs = await mesh.refuse(OTHER, "theirs")
    async with mesh.led():
        await asyncio.sleep(2 * LOOK_AGAIN)
        assert mesh.there() == {changed, deleted, stays, theirs}
        await mesh.split("changed", 2)
        await mesh.shop.kv.transact([Delete(KEYS.manifest(manifest("deleted")))])
        await asyncio.sleep(LOOK_AGAIN + 1)
        assert mesh.there() == {stays, theirs}


async def test_a_quarantine_of_a_workload_that_is_gone_is_deleted(mesh: Forgetting) -> None:
    mine, theirs = await mesh.refuse(PROXY, "one"), await mesh.refuse(OTHER, "two")
    async with mesh.led():
        await asyncio.sleep(2 * LOOK_AGAIN)
        await mesh.shop.kv.transact([Delete(KEYS.workload("files", PROXY))])
        await asyncio.sleep(LOOK_AGAIN + 1)
        assert mine not in mesh.there()
        assert theirs in mesh.there()


async def test_the_next_leader_clears_away_what_has_ended(mesh: Forgetting) -> None:
    for number in range(250):
        await mesh.refuse(Name("shop", "gone"), f"split-{number}")
    async with mesh.led():
        await asyncio.sleep(1)
        assert mesh.there() == set()


async def test_what_is_newer_than_the_mesh_is_not_judged_by_it(mesh: Forgetting) -> None:
    """Its proxy, or its manifest, may be newer as well."""
    old = build(None, await whole(mesh.kv), plugins.policies())
    key = await mesh.refuse(PROXY, "new")

    async def meshes() -> AsyncGenerator[Mesh, None]:
        yield old

    task = asyncio.create_task(quarantine.forget(await elect(mesh.kv, KEYS), mesh.kv, KEYS, meshes()))
    await asyncio.wait_for(task, 2 * LOOK_AGAIN)
    assert mesh.there() == {key}


async def test_a_mesh_that_changes_all_the_time_is_looked_at_now_and_then(mesh: Forgetting) -> None:
    async with mesh.led():
        for number in range(1, 600):
            await mesh.split("busy", number)
            await asyncio.sleep(1)
    assert mesh.looks <= 600 / LOOK_AGAIN + 1


async def test_what_has_ended_is_forgotten_when_the_store_is_there_again(mesh: Forgetting) -> None:
    key = await mesh.refuse(Name("shop", "gone"), "split")
    async with mesh.led() as task:
        mesh.kv.disconnect()
        await asyncio.sleep(30)
        assert mesh.there() == {key}
        mesh.kv.reconnect()
        await asyncio.sleep(2)
        assert mesh.there() == set()
        await elect(mesh.shop.kv, KEYS)
        await mesh.refuse(Name("shop", "gone"), "split-2")
        with pytest.raises(Deposed):
            await asyncio.wait_for(task, 2 * LOOK_AGAIN)
        assert len(mesh.there()) == 1


# --------------------------------------------------------------------------------------------------------- what fails


async def test_a_report_that_cannot_be_read_hurts_nobody() -> None:
    async with judged() as mesh:
        suspect = await mesh.write("split")
        with structlog.testing.capture_logs() as logs:
            await mesh.kv.transact([Put(KEYS.acks + "newer", b'{"format": 99}')])
            await mesh.report(nack(await mesh.revision(), suspect))
            assert await mesh.left_out() == [suspect]
        assert "a replica's report cannot be read" in {line["event"] for line in logs}


async def test_a_quarantine_that_cannot_be_read_hurts_nobody() -> None:
    async with judged() as mesh:
        suspect = await mesh.write("split")
        odd = KEYS.quarantine(OTHER, manifest("split"), 1)
        await mesh.kv.transact([Put(odd, b"{")])
        await mesh.report(nack(await mesh.revision(), suspect))
        await asyncio.sleep(5)
        assert await mesh.kv.get(KEYS.quarantine(PROXY, *suspect)) is not None
        assert await mesh.kv.get(odd) is not None, "who knows who needs it"


async def test_a_deposed_leader_leaves_nothing_out_and_says_so() -> None:
    kv = MemoryKV(MemoryStore())
    mesh = Judged(kv)
    suspect = await mesh.write("split")
    task = asyncio.create_task(quarantine.run(await elect(kv, KEYS), kv, KEYS))
    await asyncio.sleep(1)
    await elect(kv, KEYS)
    await mesh.report(nack(await mesh.revision(), suspect))
    with pytest.raises(Deposed):
        await asyncio.wait_for(task, 5)
    assert await mesh.left_out() == []


async def test_a_lost_store_delays_a_quarantine_and_does_not_end_the_leader() -> None:
    store = MemoryStore()
    mesh, mine = Judged(MemoryKV(store)), MemoryKV(store)
    suspect = await mesh.write("split")
    leadership: Leadership = await elect(mine, KEYS)
    task = asyncio.create_task(quarantine.run(leadership, mine, KEYS))
    await asyncio.sleep(1)
    store.compact(store.revision)
    mine.disconnect()
    await mesh.report(nack(await mesh.revision(), suspect))
    assert await mesh.left_out() == []
    mine.reconnect()
    assert await mesh.left_out() == [suspect]
    task.cancel()
    await asyncio.wait([task])


# -------------------------------------------------------------------------------------------------------- convergence


class Replica:
    """A proxy's real stream, and a Mesh of which each manifest is a word in some resources."""

    def __init__(self, words: dict[str, Collection[str]], culprits: Collection[str], silent: Collection[str]) -> None:
        """
        Args:
            words: resource -> the manifests that it is made from, the oldest first.
            culprits: whose words the proxy refuses.
            silent: of these nothing is in the bytes.
        """
        self.words = words
        self.culprits = culprits
        self.silent = silent
        self.versions = {name: n for n, name in enumerate(sorted({m for ms in words.values() for m in ms}), 10)}
        self.quarantined: dict[Suspect, int] = {}
        self.revision = 100
        self.stream = Stream()
        self.stream.receive(Request(Type.CLUSTER), 0)
        self.offer()

    def offer(self) -> None:
        resources = []
        for name, manifests in self.words.items():
            left = [m for m in manifests if (m, self.versions[m]) not in self.quarantined]
            body = " ".join(m for m in left if m not in self.silent).encode()
            resources.append(
                Resource(Type.CLUSTER, name, body or b"-", tuple(Source(m, self.versions[m]) for m in sorted(left)))
            )
        self.stream.offer(Snapshot.of(resources), self.revision)
        while responses := self.stream.to_send(0):
            for response in responses:
                self.stream.receive(self.answer(response), 0)

    def answer(self, response: Response) -> Request:
        bad = [r.name for r in response.resources if set(r.body.decode().split()) & set(self.culprits)]
        error = "".join(f"{name}: refused\n" for name in bad) or None
        return Request(response.type, nonce=response.nonce, error=error)

    def judge(self) -> bool:
        """As the leader does; False when there was nothing to do."""
        before = len(self.quarantined)
        for refusal in self.stream.refusals:
            found = next_suspect(_nack(refusal), self.quarantined, self.versions)
            if found is not None:
                self.revision += 1
                self.quarantined[found.manifest, found.mod_revision] = self.revision
        return len(self.quarantined) > before


def _nack(refusal: Refusal) -> Nack:
    suspects = tuple((source.manifest, source.mod_revision) for source in refusal.suspects)
    return Nack(PROXY, refusal.type.value, refusal.names, refusal.text, suspects, refusal.revision)


def converge(replica: Replica) -> None:
    for _ in range(100):
        if not replica.judge():
            return
        replica.offer()
    raise AssertionError("it goes on for ever")


def test_what_is_in_no_byte_does_not_shield_the_suspects_behind_it() -> None:
    replica = Replica({"r": ["1-culprit", "2-silent", "3-silent"]}, {"1-culprit"}, {"2-silent", "3-silent"})
    converge(replica)
    assert replica.stream.refusals == ()
    assert [name for name, _ in replica.quarantined] == ["3-silent", "2-silent", "1-culprit"]


def test_the_search_ends_with_the_culprit() -> None:
    replica = Replica({"r": ["1-older", "2-culprit", "3-newer"]}, {"2-culprit"}, ())
    converge(replica)
    assert replica.stream.refusals == ()
    assert [name for name, _ in replica.quarantined] == ["3-newer", "2-culprit"]


MANIFESTS = st.sampled_from([f"m{number}" for number in range(6)])


@given(
    st.dictionaries(st.sampled_from("abcd"), st.lists(MANIFESTS, unique=True, max_size=6), min_size=1),
    st.sets(MANIFESTS, max_size=3),
    st.sets(MANIFESTS),
)
def test_whatever_is_refused_and_why_in_the_end_nothing_is(
    words: dict[str, list[str]], culprits: set[str], silent: set[str]
) -> None:
    silent -= culprits
    replica = Replica(words, culprits, silent)
    converge(replica)
    assert replica.stream.refusals == ()
    used = {name for manifests in words.values() for name in manifests}
    assert culprits & used <= {name for name, _ in replica.quarantined}
    assert culprits & used or not replica.quarantined
