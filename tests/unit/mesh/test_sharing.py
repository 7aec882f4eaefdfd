"""Whatever did not change is the same object, and only the proxies that a change concerns are affected."""

from __future__ import annotations

import pytest

from smc.mesh import Mesh, Proxy
from smc.records import BundleRecord
from tests.unit.mesh.store import (
    KEYS,
    Store,
    endpoint,
    group_text,
    identity,
    name,
    split_text,
    target_text,
    traffic_text,
)
from tests.unit.mesh.test_services import assignments, behind, caller, destinations, served_by, upstreams
from tests.unit.mesh.test_step_by_step import said


@pytest.fixture
def store() -> Store:
    """Two services; one caller may reach both, one only the other."""
    made = Store()
    caller(made)
    made.offer_workload("shop/narrow", "narrow", reachable=("shop/other",))
    served_by(made, "shop/store-1", "shop/store-2")
    served_by(made, "shop/other-1", service="shop/other", account="other")
    for server in ("shop/store-1", "shop/store-2", "shop/other-1"):
        made.offer_workload(server, server[5:-2], reachable=())
    return made


def proxy(mesh: Mesh, text: str) -> Proxy:
    return mesh.proxies[name(text)]


def test_a_changed_endpoint_changes_one_assignment_for_those_who_may_reach_it(store: Store) -> None:
    before = store.build()
    store.offer_endpoints("shop/store", endpoint("shop/store-1", "store", (80, 8080)))
    mesh = store.build(before)
    assert behind(mesh, "shop/store|80") == ["shop/store-1"]
    assert mesh.affected == {name("shop/caller"), name("shop/store-2")}  # which no longer listens for the service
    was, now = proxy(before, "shop/caller"), proxy(mesh, "shop/caller")
    assert (now.workload, now.policy, now.certificate) == (was.workload, was.policy, was.certificate)
    assert upstreams(mesh) == upstreams(before)
    assert destinations(mesh) == destinations(before)
    assert assignments(mesh)["shop/other|80"] is assignments(before)["shop/other|80"]
    for same in ("shop/narrow", "shop/store-1", "shop/other-1"):
        assert proxy(mesh, same) is proxy(before, same)


def test_proxies_that_know_the_same_share_what_they_know(store: Store) -> None:
    caller(store)
    store.offer_workload("shop/caller-2", "caller")
    store.offer_workload("bank/caller", "caller")
    mesh = store.build()
    assert proxy(mesh, "shop/caller").outbound is proxy(mesh, "shop/caller-2").outbound
    assert proxy(mesh, "bank/caller").outbound.upstreams is proxy(mesh, "shop/caller").outbound.upstreams
    assert proxy(mesh, "bank/caller").outbound.namespace == "bank"


def test_a_proxy_that_comes_to_know_the_same_in_another_way_keeps_what_it_has(store: Store) -> None:
    before = store.build()
    caller(store, reachable=("shop/other", "shop/store"))
    mesh = store.build(before)
    assert mesh.affected == {name("shop/caller")}
    assert proxy(mesh, "shop/caller").outbound is proxy(before, "shop/caller").outbound


def test_the_first_certificate_of_an_identity_brings_its_endpoints_and_the_next_only_its_proxies(store: Store) -> None:
    store.delete(KEYS.certificate(identity("shop/store")))
    before = store.build()
    assert behind(before, "shop/store|80") == []
    store.certify("shop/store")
    mesh = store.build(before)
    assert behind(mesh, "shop/store|80") == ["shop/store-1", "shop/store-2"]
    assert mesh.affected == {name("shop/caller"), name("shop/store-1"), name("shop/store-2")}

    store.certify("shop/store", number=2)
    renewed = store.build(mesh)
    assert renewed.affected == {name("shop/store-1"), name("shop/store-2")}
    assert proxy(renewed, "shop/caller") is proxy(mesh, "shop/caller")
    certificate = proxy(renewed, "shop/store-1").certificate
    assert certificate is not None
    assert (certificate.identity, certificate.serial) == (identity("shop/store"), "2")


def test_a_split_changes_what_its_callers_know_and_nothing_for_its_servers(store: Store) -> None:
    before = store.build()
    store.apply(split_text("shop/split", "store", other=1))
    mesh = store.build(before)
    assert mesh.affected == {name("shop/caller")}
    assert assignments(mesh) == assignments(before)
    assert destinations(mesh)["shop/other|80"] is destinations(before)["shop/other|80"]


@pytest.mark.parametrize("reachable", [None, ("shop/store",)])
def test_other_shares_of_a_split_put_one_destination_in_place_of_another(
    store: Store, monkeypatch: pytest.MonkeyPatch, reachable: tuple[str, ...] | None
) -> None:
    served_by(store, "shop/more-1", service="shop/more", account="more")
    caller(store, reachable=reachable)
    store.apply(split_text("shop/split", "store", other=1, more=1))
    before = store.build()
    store.apply(split_text("shop/split", "store", other=1, more=2))
    with monkeypatch.context() as patched:
        patched.delattr("smc.mesh.callers.Callers._know")
        mesh = store.build(before)
    assert said(mesh) == said(store.build())
    assert destinations(mesh)["shop/store|80"] is not destinations(before)["shop/store|80"]
    was, now = proxy(before, "shop/caller").outbound, proxy(mesh, "shop/caller").outbound
    assert now.upstreams is was.upstreams
    assert now.assignments is was.assignments


@pytest.mark.parametrize("reachable", [None, ("shop/store",)])
def test_other_shares_of_a_split_reach_who_does_without_the_services_policy(
    store: Store, reachable: tuple[str, ...] | None
) -> None:
    served_by(store, "shop/more-1", service="shop/more", account="more")
    caller(store, reachable=reachable)
    revision = store.apply(traffic_text("shop/slow", "store"))
    store.quarantine("shop/caller", "smc.io/TrafficPolicy/shop/slow", revision)
    store.apply(split_text("shop/split", "store", other=1, more=1))
    before = store.build()
    assert destinations(before)["shop/store|80"].treatment is None
    store.apply(split_text("shop/split", "store", other=1, more=2))
    mesh = store.build(before)
    assert said(mesh) == said(store.build())


def test_a_split_that_leads_elsewhere_brings_what_is_there(store: Store) -> None:
    served_by(store, "shop/more-1", service="shop/more", account="more")
    caller(store, reachable=("shop/store",))
    store.apply(split_text("shop/split", "store", other=1))
    before = store.build()
    store.apply(split_text("shop/split", "store", more=1))
    mesh = store.build(before)
    assert said(mesh) == said(store.build())
    assert list(upstreams(mesh)) == list(assignments(mesh)) == ["shop/more|80"]


def test_a_permission_changes_the_proxies_of_its_destination_only(store: Store) -> None:
    store.apply(group_text("shop/all"))
    before = store.build()
    store.apply(target_text("shop/target", "store", "shop/caller"))
    mesh = store.build(before)
    assert mesh.affected == {name("shop/store-1"), name("shop/store-2")}
    assert proxy(mesh, "shop/store-1").outbound is proxy(before, "shop/store-1").outbound
    assert proxy(mesh, "shop/store-1").inbound is proxy(before, "shop/store-1").inbound


def test_a_record_written_again_as_it_was_changes_nothing(store: Store) -> None:
    before = store.build()
    for key, item in list(store.items.items()):
        store.put(key, item.value)
    mesh = store.build(before)
    assert mesh.affected == frozenset()
    assert all(mesh.proxies[known] is before.proxies[known] for known in before.proxies)


def test_a_new_bundle_affects_every_proxy_and_makes_none_anew(store: Store) -> None:
    before = store.build()
    store.put(KEYS.bundle, BundleRecord(("ROOT", "NEXT")))
    mesh = store.build(before)
    assert mesh.affected == {*mesh.proxies}
    assert all(mesh.proxies[known] is before.proxies[known] for known in before.proxies)


def test_a_workload_that_goes_is_affected_and_takes_nobody_with_it(store: Store) -> None:
    before = store.build()
    store.delete(KEYS.workload("files", name("shop/narrow")))
    mesh = store.build(before)
    assert mesh.affected == {name("shop/narrow")}
    assert name("shop/narrow") not in mesh.proxies
    assert name("shop/narrow") in before.proxies
