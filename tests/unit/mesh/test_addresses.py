"""Where intercepted applications dial services: at an address that no other service has."""

from __future__ import annotations

from smc.mesh import Mesh
from smc.model import Name, Sidecar
from smc.records import AddressRecord
from tests.unit.mesh import store as written
from tests.unit.mesh.store import KEYS, Store, name

STORE, PAPER = "shop/bookstore", "shop/paper"


def shop() -> Store:
    """Two services, one proxy that is intercepted and one that is not."""
    store = Store()
    for service in (STORE, PAPER):
        store.apply(written.service_text(service, 80))
    store.apply(written.workload_text("shop/buyer", "buyer", sidecar=Sidecar.INTERCEPTED))
    store.apply(written.workload_text("shop/thief", "thief"))
    return store


def dialled(mesh: Mesh, proxy: str = "shop/buyer") -> dict[str, str]:
    found = mesh.proxies[name(proxy)].outbound.frontends
    assert found is not None
    return {str(frontend.service): frontend.address for frontend in found}


def test_a_service_is_dialled_at_its_own_address_or_else_at_the_virtual_one_that_it_was_given() -> None:
    store = shop()
    store.apply(written.service_text(PAPER, 80, address="10.96.0.7"))
    store.give_address(STORE, "240.1.2.3")
    store.give_address(PAPER, "240.0.0.9")
    assert dialled(store.build()) == {STORE: "240.1.2.3", PAPER: "10.96.0.7"}


def test_a_service_without_an_address_is_not_dialled_yet() -> None:
    store = shop()
    mesh = store.build()
    assert dialled(mesh) == {}
    assert mesh.own_addresses == {name(STORE): "", name(PAPER): ""}
    store.give_address(STORE, "240.1.2.3")
    assert dialled(store.build(mesh)) == {STORE: "240.1.2.3"}


def test_explicit_proxies_know_of_no_address_and_hear_of_none() -> None:
    store = shop()
    mesh = store.build()
    thief = mesh.proxies[name("shop/thief")]
    assert thief.outbound.frontends is None
    store.give_address(STORE, "240.1.2.3")
    mesh = store.build(mesh)
    assert mesh.affected == {name("shop/buyer")}
    assert mesh.proxies[name("shop/thief")] is thief


def test_a_proxy_knows_the_addresses_of_what_it_may_reach_alone() -> None:
    store = shop()
    store.apply(written.workload_text("shop/buyer", "buyer", reachable=("bookstore",), sidecar=Sidecar.INTERCEPTED))
    store.give_address(STORE, "240.1.2.3")
    mesh = store.build()
    assert dialled(mesh) == {STORE: "240.1.2.3"}
    store.give_address(PAPER, "240.0.0.9")
    assert store.build(mesh).affected == frozenset()


def test_of_two_services_with_one_address_the_first_by_name_keeps_it_and_the_other_is_told() -> None:
    store = shop()
    for service in (STORE, PAPER):
        store.apply(written.service_text(service, 80, address="10.96.0.7"))
    mesh = store.build()
    assert dialled(mesh) == {STORE: "10.96.0.7"}
    (problem,) = mesh.problems[f"smc.io/Service/{PAPER}"]
    assert (problem.reason, problem.field) == ("AddressConflict", "spec.address")
    assert problem.message.startswith(f"10.96.0.7 is the address of {STORE} too")
    store.delete(KEYS.manifest(f"smc.io/Service/{STORE}"))
    mesh = store.build(mesh)
    assert dialled(mesh) == {PAPER: "10.96.0.7"}
    assert f"smc.io/Service/{PAPER}" not in mesh.problems


def test_whose_own_an_address_is_comes_before_who_was_given_it() -> None:
    store = shop()
    store.give_address(STORE, "240.1.2.3")
    mesh = store.build()
    store.apply(written.service_text(PAPER, 80, address="240.1.2.3"))
    mesh = store.build(mesh)
    assert dialled(mesh) == {PAPER: "240.1.2.3"}
    assert mesh.problems == {}, "the leader gives the other one another"
    store.give_address(STORE, "240.1.2.4")
    assert dialled(store.build(mesh)) == {STORE: "240.1.2.4", PAPER: "240.1.2.3"}


def test_an_ipv6_address_is_as_good_as_none() -> None:
    store = shop()
    store.offer_service("shop/six", (80, "8080"), address="fd00::7")
    mesh = store.build()
    assert mesh.own_addresses[name("shop/six")] == ""
    store.give_address("shop/six", "240.0.0.6")
    assert dialled(store.build(mesh)) == {"shop/six": "240.0.0.6"}


def test_an_address_that_cannot_be_read_hurts_its_own_service_only() -> None:
    store = shop()
    store.give_address(PAPER, "240.0.0.9")
    store.put(KEYS.address(name(STORE)), b"{}")
    mesh = store.build()
    assert dialled(mesh) == {PAPER: "240.0.0.9"}
    (problem,) = mesh.problems[f"addresses/{STORE}"]
    assert problem.reason == "UnreadableRecord"
    store.put(KEYS.address(name(STORE)), AddressRecord(name(STORE), "nonsense"))
    assert dialled(store.build(mesh)) == {PAPER: "240.0.0.9"}


def test_the_mesh_tells_whether_anybody_is_intercepted() -> None:
    store = shop()
    mesh = store.build()
    assert mesh.intercepts
    store.apply(written.workload_text("shop/buyer", "buyer"))
    mesh = store.build(mesh)
    assert not mesh.intercepts
    assert mesh.proxies[Name("shop", "buyer")].outbound is mesh.proxies[Name("shop", "thief")].outbound
