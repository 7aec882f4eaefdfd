"""From a revocation as the API writes it to what proxies read and what they are refused, over real mTLS."""

from __future__ import annotations

from cluster.kv import Delete
from smc.model import Identity, Name
from smc.records import CrlRecord, IssuedCertificate, RevocationRecord, RevokedCertificate
from smc.xds.snapshot import Type
from tests.feature.test_manifest_to_wire import BUYER, STORE, STORE_2, acked, bookshop, permissions, target, uri
from tests.unit.bookshop import KEYS
from tests.unit.xds.replica import Client, until

STORES = Name("shop", STORE)


def hosts(client: Client, service: str) -> int:
    """How many endpoints of a service a proxy has."""
    found = client.get(Type.ENDPOINT, f"shop/{service}|80")
    return sum(len(group.lb_endpoints) for group in found.endpoints)


def revocation(proxy: str = "", identity: str = "") -> RevocationRecord:
    had = Identity("shop", identity or proxy)
    return RevocationRecord(Name("shop", proxy) if proxy else None, had, "", "", 1.0)


async def test_a_revoked_proxy_loses_its_stream_and_its_callers_lose_its_address_and_nothing_else() -> None:
    async with bookshop(BUYER, STORE, STORE_2) as (mesh, replica, (buyer, _, other)):
        assert (hosts(buyer, STORE), hosts(buyer, STORE_2)) == (1, 1)
        revision = await mesh.put(KEYS.revoked_proxy(STORES), revocation(STORE))
        await until(lambda: STORES not in {session.proxy for session in replica.streams.sessions})
        await acked(mesh, replica, revision)
        assert (hosts(buyer, STORE), hosts(buyer, STORE_2)) == (0, 1)
        assert [(kind, names) for kind, names, _ in buyer.news()] == [("ClusterLoadAssignment", (f"shop/{STORE}|80",))]
        assert other.news() == []


async def test_a_revoked_identity_is_among_no_sources_until_that_is_taken_back() -> None:
    async with bookshop(STORE) as (mesh, replica, (store,)):
        await mesh.routes()
        await mesh.allow(BUYER, STORE)
        await acked(mesh, replica, await mesh.allow("thief", STORE))
        key = KEYS.revoked_identity(Identity("shop", BUYER))
        await acked(mesh, replica, await mesh.put(key, revocation(identity=BUYER)))
        assert permissions(store) == {target("thief-to-bookstore"): {uri("thief")}}
        revision = (await mesh.kv.transact([Delete(key)])).revision
        await acked(mesh, replica, revision)
        assert permissions(store) == {
            target("buyer-to-bookstore"): {uri(BUYER)},
            target("thief-to-bookstore"): {uri("thief")},
        }


async def test_the_lists_come_by_sds_and_what_is_on_them_is_excluded_where_it_might_have_called() -> None:
    async with bookshop(STORE, STORE_2) as (mesh, replica, (store, other)):
        await mesh.routes()
        await acked(mesh, replica, await mesh.allow(BUYER, STORE))
        for client in (store, other):
            client.news()
        leaf = IssuedCertificate("1f", 1, "0a" * 32, 9e9, 1)
        crl = CrlRecord(1, (1,), ("LIST",), (RevokedCertificate(Identity("shop", BUYER), leaf, 1.0),))
        await acked(mesh, replica, await mesh.put(KEYS.crl, crl))
        for client in (store, other):
            trusted = client.get(Type.SECRET, "bundle").validation_context
            assert (trusted.crl.inline_bytes, trusted.only_verify_leaf_cert_crl) == (b"LIST\n", True)
        assert {kind for kind, _, _ in store.news()} == {"Secret", "RouteConfiguration"}
        assert {kind for kind, _, _ in other.news()} == {"Secret"}, "nobody may call it anyway"
        body = store.get(Type.ROUTE, "inbound|8080").SerializeToString()
        assert b"Hash=" + b"0a" * 32 + b";" in body
