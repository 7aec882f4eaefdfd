from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from smc.envoy.snapshot import Generator
from smc.mesh import Mesh
from smc.model import (
    Destination,
    Egress,
    EgressHost,
    HttpMatch,
    Inbound,
    MeshConfig,
    Mode,
    Name,
    Outbound,
    Permission,
    Policy,
    Protocol,
    Target,
    Workload,
)
from smc.records import BundleRecord, CertificateRecord, QuarantineRecord
from smc.xds.snapshot import Resource, Snapshot, Source, Type
from tests.unit.envoy import nouns
from tests.unit.envoy.rendering import message

BUYER, STORE = nouns.BUYER.name, nouns.STORE_1.name
ROOT_HOST = "outbound/bookstore.books|14001"
BUYER_URI = nouns.BUYER.identity.uri(nouns.TRUST_DOMAIN)


def snapshots(generator: Generator, mesh: Mesh) -> dict[Name, Snapshot]:
    return {name: generator.snapshot(mesh, name) for name in mesh.proxies}


def changed(before: Snapshot, after: Snapshot) -> set[str]:
    """The resources that Envoy would be sent."""
    return {
        f"{type_.name} {name}"
        for type_ in Type
        for name in {*before.of_type(type_), *after.of_type(type_)}
        if (a := before.of_type(type_).get(name)) is None
        or (b := after.of_type(type_).get(name)) is None
        or a.version != b.version
    }


def hosts(snapshot: Snapshot) -> dict[str, Resource]:
    return dict(snapshot.of_type(Type.VIRTUAL_HOST))


def calling(*services: tuple[str, int], namespace: str = "books") -> Outbound:
    """Where requests go, and nothing else of the services; made anew each time."""
    named = [(Name.parse(service), port) for service, port in services]
    destinations = tuple(Destination(service, port, (Target(service, port, 1),)) for service, port in named)
    return Outbound(namespace, (), (), destinations)


def told(generator: Generator, outbound: Outbound, of: Workload = nouns.BUYER) -> Snapshot:
    return generator.snapshot(nouns.mesh(nouns.proxy(of, outbound=outbound)), of.name)


def told_intercepted(generator: Generator, outbound: Outbound, of: Workload = nouns.BUYER) -> Snapshot:
    addresses = (nouns.frontend(str(d.service), f"240.0.0.{i}") for i, d in enumerate(outbound.destinations))
    return told(generator, replace(outbound, frontends=tuple(addresses)), nouns.intercepted(of))


PLACES = (Name("books", "a"), Name("books", "a.books"), Name("a", "books"), Name("b", "books"))
"""Some of which spell a host alike, when they are called from `books`."""


@given(
    st.lists(
        st.dictionaries(st.tuples(st.sampled_from(PLACES), st.sampled_from((80, 81))), st.sampled_from((1, 2))),
        min_size=2,
        max_size=6,
    )
)
def test_whatever_was_made_before_the_virtual_hosts_are_those_that_a_new_generator_makes(
    steps: list[dict[tuple[Name, int], int]],
) -> None:
    generator, seen = Generator(nouns.open_key), {}
    destinations: dict[tuple[Name, int, int], Destination] = {}
    for step in steps:
        for (service, port), weight in step.items():
            targets = (Target(service, port, weight), Target(Name("books", "other"), port, 1))
            destinations.setdefault((service, port, weight), Destination(service, port, targets))
        outbound = Outbound("books", (), (), tuple(destinations[s, p, w] for (s, p), w in sorted(step.items())))
        made, anew = told(generator, outbound), told(Generator(nouns.open_key), outbound)
        assert changed(anew, made) == set()
        again = seen.setdefault(tuple(sorted(step.items())), made)
        assert again.sets == made.sets, "of what comes again every set is the same object"


def test_a_changed_destination_leaves_the_others_and_their_domains_unlooked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(nouns.open_key)
    before = calling(("books/a", 80), ("books/b", 80))
    told(generator, before)
    monkeypatch.delattr("smc.envoy.routes.disjoint")
    moved = replace(before.destinations[1], targets=before.destinations[0].targets)
    after = told(generator, replace(before, destinations=(before.destinations[0], moved)))
    assert b"books/a|80" in hosts(after)["outbound/b.books|80"].body


def test_a_service_that_has_lost_all_its_domains_has_none_after_a_change_either() -> None:
    generator = Generator(nouns.open_key)
    for _ in range(2):
        made = told(generator, calling(("books/a", 80), ("books/A", 80)))
        assert list(hosts(made)) == ["outbound/a.books|80", "outbound/others"]


def test_an_unchanged_mesh_gives_the_same_snapshot_even_when_it_was_built_anew() -> None:
    generator = Generator(nouns.open_key)
    mesh = nouns.bookstore()
    first = snapshots(generator, mesh)
    assert snapshots(generator, mesh) == first
    again = nouns.bookstore()  # equal in all, another object in each
    assert again.proxies[BUYER].outbound is not mesh.proxies[BUYER].outbound
    assert snapshots(generator, again) == first


def test_two_generators_make_equal_bytes() -> None:
    one = snapshots(Generator(nouns.open_key), nouns.bookstore())
    two = snapshots(Generator(nouns.open_key), nouns.bookstore())
    for name in one:
        assert one[name].versions == two[name].versions


def test_a_policy_changes_the_servers_routes_and_nothing_else() -> None:
    generator = Generator(nouns.open_key)
    before = snapshots(generator, nouns.bookstore())
    after = snapshots(generator, nouns.bookstore(policy=Policy(())))
    assert changed(before[STORE], after[STORE]) == {"ROUTE inbound|8080"}
    assert after[BUYER] is before[BUYER]


def test_a_split_changes_the_callers_virtual_host_of_that_service_and_nothing_else() -> None:
    generator = Generator(nouns.open_key)
    before = snapshots(generator, nouns.bookstore())
    after = snapshots(generator, nouns.bookstore(weights={"books/bookstore-v1": 1, "books/bookstore-v2": 1}))
    assert changed(before[BUYER], after[BUYER]) == {f"VIRTUAL_HOST {ROOT_HOST}"}
    assert after[BUYER].of_type(Type.ROUTE) is before[BUYER].of_type(Type.ROUTE)
    was, now = hosts(before[BUYER]), hosts(after[BUYER])
    assert was.keys() == now.keys()
    assert {name for name in now if now[name] is not was[name]} == {ROOT_HOST}, "the others are not even made anew"


def test_one_more_service_is_one_more_virtual_host_and_one_fewer_takes_its_own_away() -> None:
    generator = Generator(nouns.open_key)
    one, both = calling(("books/a", 80)), calling(("books/a", 80), ("books/b", 80))
    before, after = told(generator, one), told(generator, both)
    assert changed(before, after) == {"VIRTUAL_HOST outbound/b.books|80"}
    assert told(generator, one).sets == before.sets


def test_another_egress_changes_the_virtual_host_of_all_others_and_no_services() -> None:
    generator = Generator(nouns.open_key)

    def with_(config: MeshConfig) -> Snapshot:
        return generator.snapshot(nouns.bookstore(config=config), BUYER)

    allowed, denied = with_(MeshConfig()), with_(MeshConfig(egress=Egress.DENY))
    assert changed(allowed, denied) == {"CLUSTER passthrough", "VIRTUAL_HOST outbound/others"}
    some = with_(MeshConfig(egress=Egress.DENY, egress_hosts=(EgressHost("a.example"),)))
    more = with_(MeshConfig(egress=Egress.DENY, egress_hosts=(EgressHost("a.example"), EgressHost("b.example"))))
    assert changed(some, more) == {"VIRTUAL_HOST outbound/others"}
    assert {name for name, host in hosts(more).items() if host is not hosts(some)[name]} == {"outbound/others"}


def test_a_destination_that_is_equal_and_made_anew_has_the_same_virtual_host() -> None:
    """The same object, so that nobody compares bytes to see that there is nothing to send."""
    generator = Generator(nouns.open_key)
    for told_ in (told, told_intercepted):
        before = told_(generator, calling(("books/a", 80), ("books/b", 80)))
        after = told_(generator, calling(("books/a", 80), ("books/b", 80), ("books/c", 80)))
        assert len(hosts(after)) == len(hosts(before)) + 1
        assert all(hosts(after)[name] is host for name, host in hosts(before).items())


def test_hosts_that_two_services_spell_alike_are_in_one_virtual_host_which_stays_the_same_object() -> None:
    """`a.b` is how one spells its short name, and the other its name with its namespace: that one has it."""
    generator = Generator(nouns.open_key)
    alike = (("b/a", 80), ("b/a.b", 80))
    for told_, route in ((told, "outbound"), (told_intercepted, "outbound|80")):
        before = told_(generator, calling(*alike, namespace="b"))
        found = {name: set(message(host).domains) for name, host in hosts(before).items()}
        assert found.keys() == {f"{route}/a.b|80", f"{route}/a.b.b|80", f"{route}/others"}
        assert "a.b" in found[f"{route}/a.b|80"]
        assert "a.b.b" in found[f"{route}/a.b.b|80"]
        assert sum(map(len, found.values())) == len(set().union(*found.values())), "Envoy refuses a route otherwise"
        after = told_(generator, calling(*alike, ("b/c", 80), namespace="b"))
        assert len(hosts(after)) == len(hosts(before)) + 1
        assert all(hosts(after)[name] is host for name, host in hosts(before).items())


def test_a_rotation_changes_secrets_and_nothing_else() -> None:
    generator = Generator(nouns.open_key)
    before = snapshots(generator, nouns.bookstore())
    after = snapshots(generator, nouns.bookstore(number=2))
    for name in before:
        assert changed(before[name], after[name]) == {"SECRET identity"}
    trusted = snapshots(generator, replace(nouns.bookstore(number=2), bundle=BundleRecord(("ROOT 3\n",))))
    for name in after:
        assert changed(after[name], trusted[name]) == {"SECRET bundle"}


def test_no_policy_split_endpoint_or_certificate_enters_a_listener() -> None:
    meshes = [
        nouns.bookstore(),
        nouns.bookstore(policy=Policy(()), number=2),
        nouns.bookstore(weights={"books/bookstore-v1": 1}),
        nouns.bookstore(config=MeshConfig(egress=Egress.DENY)),
    ]
    versions = [
        [Generator(nouns.open_key).snapshot(mesh, name).versions[Type.LISTENER] for name in (BUYER, STORE)]
        for mesh in meshes
    ]
    assert all(found == versions[0] for found in versions)


def test_another_service_on_the_same_proxy_leaves_a_filter_chain_as_it_was() -> None:
    def chains(*inbound: Inbound) -> dict[str, bytes]:
        mesh = nouns.mesh(nouns.proxy(nouns.STORE_1, inbound=inbound))
        listener = message(Generator(nouns.open_key).snapshot(mesh, STORE).of_type(Type.LISTENER)["inbound"])
        return {chain.name: chain.SerializeToString(deterministic=True) for chain in listener.filter_chains}

    other = Inbound(9000, Protocol.GRPC, ((nouns.name("books/other"), 80),))
    alone, together = chains(nouns.store_inbound()), chains(nouns.store_inbound(), other)
    assert len(together) == len(alone) + 1
    assert {name: together[name] for name in alone} == alone


def _listener(*permissions: Permission, barred: tuple[str, ...] = ()) -> tuple[Resource, dict[str, bytes]]:
    """The listener of a server with a port of HTTP and one of TCP, and its filter chains."""
    inbound = [
        Inbound(8080, Protocol.HTTP, ((nouns.name("books/store"), 80),), (80, 8080)),
        Inbound(6379, Protocol.TCP, ((nouns.name("books/cache"), 6379),), (6379,)),
    ]
    mesh = nouns.mesh(nouns.proxy(nouns.STORE_1, inbound=inbound, policy=Policy(permissions, barred)))
    snapshot = Generator(nouns.open_key).snapshot(mesh, STORE)
    assert [*snapshot.of_type(Type.ROUTE)] == ["inbound|8080", "outbound"]
    found = snapshot.of_type(Type.LISTENER)["inbound"]
    chains = message(found).filter_chains
    return found, {chain.name: chain.SerializeToString(deterministic=True) for chain in chains}


def test_the_policy_of_a_tcp_port_is_in_its_chain_and_in_no_other() -> None:
    allowed = nouns.permission(nouns.TARGET, "books/bookstore", ["books/bookbuyer"], ports=(6379,), tcp=True)
    nobody, before = _listener()
    somebody, after = _listener(allowed)
    assert {name for name in before if before[name] != after[name]} == {"books/cache|6379"}
    assert before.keys() == after.keys() == {"books/store|80", "books/cache|6379", "books/cache|6379|health"}
    assert nobody.sources == ()
    assert somebody.sources == (Source(nouns.TARGET, 9),), "an Envoy that refuses it is refusing this manifest"
    uri = BUYER_URI.encode()
    assert (uri in before["books/cache|6379"], uri in after["books/cache|6379"]) == (False, True)


def test_a_revoked_certificate_changes_the_chain_so_that_what_is_open_by_it_is_cut() -> None:
    _, before = _listener()
    _, after = _listener(barred=("0" * 64,))
    assert {name for name in before if before[name] != after[name]} == {"books/cache|6379"}


def test_who_may_do_some_or_all_requests_may_not_connect() -> None:
    """The regression that the ancestor had: rules of HTTP opened every TCP port of their destination."""
    nobody, _ = _listener()
    for http in ((nouns.READ,), (HttpMatch(),)):
        for ports in (None, (6379,)):
            found, _ = _listener(
                nouns.permission(nouns.TARGET, "books/bookstore", ["books/bookbuyer"], *http, ports=ports)
            )
            assert found.body == nobody.body
    elsewhere = nouns.permission(nouns.TARGET, "books/bookstore", ["books/bookbuyer"], ports=(6380,), tcp=True)
    assert _listener(elsewhere)[0].body == nobody.body


def test_a_tcp_port_that_nobody_may_use_accepts_an_identity_that_nobody_has() -> None:
    """Envoy reads an empty list as anybody."""
    _, chains = _listener()
    assert b"spiffe://books.example/nobody" in chains["books/cache|6379"]
    assert b"spiffe://books.example/ns/" not in chains["books/cache|6379"]


def test_a_changed_endpoint_changes_its_load_assignment_for_all_who_share_it() -> None:
    generator = Generator(nouns.open_key)
    outbound = nouns.callers(None)
    twin = replace(nouns.BUYER, name=Name("books", "twin"), address="127.0.1.2")

    def mesh(calls: Outbound) -> Mesh:
        return nouns.mesh(nouns.proxy(nouns.BUYER, outbound=calls), nouns.proxy(twin, outbound=calls))

    before = snapshots(generator, mesh(outbound))
    fewer = nouns.assignment("books/bookstore", nouns.PORT, nouns.endpoint(nouns.STORE_1, nouns.PORT, nouns.APP_PORT))
    after = snapshots(generator, mesh(replace(outbound, assignments=(fewer, *outbound.assignments[1:]))))
    for name in before:
        assert changed(before[name], after[name]) == {"ENDPOINT books/bookstore|14001"}
        for type_ in (Type.CLUSTER, Type.ROUTE, Type.VIRTUAL_HOST, Type.LISTENER, Type.SECRET):
            assert after[name].of_type(type_) is before[name].of_type(type_)
    assert after[BUYER].of_type(Type.ENDPOINT) is after[twin.name].of_type(Type.ENDPOINT)


def test_proxies_with_equal_inputs_share_one_snapshot() -> None:
    outbound = nouns.callers(None)
    twin = replace(nouns.BUYER, name=Name("books", "twin"))
    mesh = nouns.mesh(nouns.proxy(nouns.BUYER, outbound=outbound), nouns.proxy(twin, outbound=outbound))
    generator = Generator(nouns.open_key)
    assert generator.snapshot(mesh, BUYER) is generator.snapshot(mesh, twin.name)
    moved = replace(outbound, assignments=outbound.assignments[1:])
    mesh = nouns.mesh(nouns.proxy(nouns.BUYER, outbound=moved), nouns.proxy(twin, outbound=moved))
    assert generator.snapshot(mesh, BUYER) is generator.snapshot(mesh, twin.name), "after a change as well"


def test_proxies_that_have_the_same_of_their_own_and_call_others_do_not_get_each_others() -> None:
    outbound = nouns.callers(None)
    fewer = replace(outbound, assignments=outbound.assignments[1:])
    twin = replace(nouns.BUYER, name=Name("books", "twin"))
    generator = Generator(nouns.open_key)
    for calls, others in ((outbound, fewer), (fewer, outbound), (outbound, fewer)):
        mesh = nouns.mesh(nouns.proxy(nouns.BUYER, outbound=calls), nouns.proxy(twin, outbound=others))
        made = snapshots(generator, mesh)
        assert [len(made[name].of_type(Type.ENDPOINT)) for name in (BUYER, twin.name)] == [
            len(calls.assignments),
            len(others.assignments),
        ]


def test_a_key_is_opened_once_for_an_identity_and_given_to_no_other() -> None:
    opened: list[CertificateRecord] = []

    def open_key(record: CertificateRecord) -> bytes:
        opened.append(record)
        return nouns.open_key(record)

    other = replace(nouns.STORE_2, services=())
    record = nouns.certificate(nouns.STORE_1.identity)
    mesh = nouns.mesh(
        nouns.proxy(nouns.STORE_1, record=record),
        nouns.proxy(other, record=record),
        nouns.proxy(nouns.BUYER, record=nouns.certificate(nouns.BUYER.identity)),
    )
    made = snapshots(Generator(open_key), mesh)
    assert len(opened) == 2
    keys = {n: message(s.of_type(Type.SECRET)["identity"]).tls_certificate.private_key for n, s in made.items()}
    assert keys[STORE].inline_bytes == keys[other.name].inline_bytes == b"KEY 1 OF books/bookstore"
    assert keys[BUYER].inline_bytes == b"KEY 1 OF books/bookbuyer"


def test_what_open_key_raises_reaches_the_caller_and_a_later_try_succeeds() -> None:
    failures = [ValueError("cannot be opened")]

    def open_key(record: CertificateRecord) -> bytes:
        if failures:
            raise failures.pop()
        return nouns.open_key(record)

    generator = Generator(open_key)
    with pytest.raises(ValueError, match="cannot be opened"):
        generator.snapshot(nouns.bookstore(), BUYER)
    assert "identity" in generator.snapshot(nouns.bookstore(), BUYER).of_type(Type.SECRET)


def test_a_proxy_without_certificate_or_trust_has_no_such_secret() -> None:
    made = Generator(nouns.open_key).snapshot(nouns.mesh(nouns.proxy(nouns.BUYER)), BUYER)
    assert made.of_type(Type.SECRET) == {}


def test_each_resource_knows_the_manifests_that_made_it() -> None:
    made = snapshots(Generator(nouns.open_key), nouns.bookstore(weights={"books/bookstore-v1": 1}))
    assert {name: host.sources for name, host in hosts(made[BUYER]).items() if host.sources} == {
        ROOT_HOST: (Source(nouns.SPLIT, 7),)
    }
    assert made[BUYER].of_type(Type.ROUTE)["outbound"].sources == (), "nobody's manifest is in it"
    inbound = made[STORE].of_type(Type.ROUTE)["inbound|8080"]
    assert inbound.sources == (Source(nouns.TARGET, 9), Source(nouns.ROUTES, 5))


def test_everything_that_envoy_waits_for_is_there() -> None:
    for snapshot in snapshots(Generator(nouns.open_key), nouns.bookstore()).values():
        wanted = {w for t in Type for resource in snapshot.of_type(t).values() for w in resource.warms}
        assert wanted
        assert all(name in snapshot.of_type(type_) for type_, name in wanted)


def test_an_upstream_that_nobody_may_serve_accepts_a_name_that_no_certificate_has() -> None:
    calls = Outbound("a", (nouns.upstream("a/b", 80),), (nouns.assignment("a/b", 80),), ())
    made = Generator(nouns.open_key).snapshot(nouns.mesh(nouns.proxy(nouns.BUYER, outbound=calls)), BUYER)
    body = made.of_type(Type.CLUSTER)["a/b|80"].body
    assert b"spiffe://books.example/nobody" in body
    assert b"spiffe://books.example/ns/" not in body


def test_changed_settings_reach_every_resource() -> None:
    generator = Generator(nouns.open_key)
    first = generator.snapshot(nouns.bookstore(), STORE)
    second = generator.snapshot(nouns.bookstore(config=MeshConfig(mesh_domain="corp")), STORE)
    for type_, name in (
        (Type.LISTENER, "inbound"),
        (Type.CLUSTER, "books/bookstore|14001"),
        (Type.VIRTUAL_HOST, ROOT_HOST),
    ):
        assert b"bookstore.books.corp" in second.of_type(type_)[name].body
        assert b"bookstore.books.corp" not in first.of_type(type_)[name].body


def test_what_is_gone_is_forgotten() -> None:
    generator = Generator(nouns.open_key)
    mesh = nouns.bookstore()
    snapshot = generator.snapshot(mesh, BUYER)
    generator.snapshot(mesh, STORE)
    dead: list[weakref.ref[Any]] = [
        weakref.ref(mesh.proxies[BUYER].outbound),
        weakref.ref(mesh.proxies[BUYER].outbound.destinations[0]),
        weakref.ref(snapshot),
        weakref.ref(snapshot.of_type(Type.SECRET)["identity"]),
        *(weakref.ref(host) for name, host in hosts(snapshot).items() if name != "outbound/others"),
        *(weakref.ref(found) for found in snapshot.sets.values()),
    ]
    del mesh, snapshot
    told_intercepted(generator, calling(), nouns.STORE_2)  # it has no set in common with the others
    gc.collect()
    assert [ref() for ref in dead] == [None] * len(dead)


@pytest.mark.parametrize(
    ("field", "value", "sent"),
    [
        ("policy", Policy(()), {"ROUTE inbound|8080"}),
        ("certificate", nouns.certificate(nouns.STORE_1.identity, number=2), {"SECRET identity"}),
        ("certificate", None, {"SECRET identity"}),
        ("inbound", (), {"LISTENER inbound", "CLUSTER local|8080", "ROUTE inbound|8080"}),
        ("workload", replace(nouns.STORE_1, app_address="127.0.0.9"), {"CLUSTER local|8080"}),
        ("workload", replace(nouns.STORE_1, address="127.0.1.9"), {"LISTENER inbound", "LISTENER outbound"}),
        ("outbound", nouns.callers({"books/bookstore-v1": 1}), {f"VIRTUAL_HOST {ROOT_HOST}"}),
        ("mode", Mode.PERMISSIVE, {"LISTENER inbound", "ROUTE inbound|8080", "ROUTE inbound|plaintext"}),
        ("quarantined", (QuarantineRecord(STORE, "m", 1, Type.ROUTE.value, "r", "no"),), set()),
    ],
)
def test_each_part_of_a_proxy_reaches_its_configuration_when_nothing_else_changes(
    field: str, value: object, sent: set[str]
) -> None:
    generator = Generator(nouns.open_key)
    mesh = nouns.bookstore()
    before = generator.snapshot(mesh, STORE)
    proxy = mesh.proxies[STORE]._replace(**{field: value})  # type: ignore[arg-type]
    after = generator.snapshot(replace(mesh, proxies={**mesh.proxies, STORE: proxy}), STORE)
    assert changed(before, after) == sent


def test_a_mesh_that_was_replaced_is_not_kept() -> None:
    generator, mesh = Generator(nouns.open_key), nouns.bookstore()
    snapshot, gone = generator.snapshot(mesh, STORE), weakref.ref(mesh)
    del mesh
    gc.collect()
    assert gone() is None
    assert generator.snapshot(nouns.bookstore(), STORE) is snapshot


def test_no_hash_seed_enters_a_version() -> None:
    program = (
        "from smc.envoy.snapshot import Generator\n"
        "from tests.unit.envoy import nouns\n"
        "mesh = nouns.bookstore(weights={'books/bookstore-v1': 1, 'books/bookstore-v2': 2})\n"
        "made = [Generator(nouns.open_key).snapshot(mesh, name).versions for name in mesh.proxies]\n"
        "print([sorted((t.name, v) for t, v in versions.items()) for versions in made])\n"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[3],
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1


@pytest.mark.parametrize(
    ("address", "app_address", "chains"),
    [
        ("127.0.1.1", "127.0.0.1", [""]),
        ("192.0.2.7", "127.0.0.1", ["host"]),
        ("192.0.2.7", "192.0.2.7", ["host"]),
        ("192.0.2.7", "192.0.2.8", ["host", "application"]),
    ],
)
def test_nobody_on_the_network_speaks_with_the_identity_of_an_explicit_proxy(
    address: str, app_address: str, chains: list[str]
) -> None:
    web = nouns.workload("shop/web", address, app_address=app_address)
    snapshot = Generator(nouns.open_key).snapshot(nouns.mesh(nouns.proxy(web)), web.name)
    listener = message(snapshot.of_type(Type.LISTENER)["outbound"])
    assert [chain.name for chain in listener.filter_chains] == chains
    own_host = [chain.filter_chain_match.source_type == 1 for chain in listener.filter_chains]
    assert own_host == [name == "host" for name in chains]
