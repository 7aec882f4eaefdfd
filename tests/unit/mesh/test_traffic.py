"""Which TrafficPolicy counts for a service, and whom it reaches."""

from __future__ import annotations

from datetime import timedelta

import pytest

from smc.mesh import Mesh
from smc.model import RateLimit
from tests.unit.mesh.store import Store, name, service_text, split_text, traffic_text
from tests.unit.mesh.test_services import caller, destinations, served_by, upstreams

WEB = "smc.io/TrafficPolicy/shop/web"
OTHER = "smc.io/TrafficPolicy/shop/other"


@pytest.fixture
def store() -> Store:
    made = Store()
    caller(made)
    served_by(made, "shop/store-1", service="shop/store")
    served_by(made, "shop/store-2", service="shop/other")
    return made


def timeouts(mesh: Mesh, proxy: str = "shop/caller") -> dict[str, float]:
    """In seconds, by service and port, of the destinations that have one."""
    found = destinations(mesh, proxy).items()
    policies = {at: d.treatment.policy for at, d in found if d.treatment is not None}
    return {at: p.timeout.total_seconds() for at, p in policies.items() if p.timeout is not None}


def reasons(mesh: Mesh, manifest: str = WEB) -> list[str]:
    return [problem.reason for problem in mesh.problems.get(manifest, ())]


def test_it_reaches_every_caller_of_its_service_and_of_no_other(store: Store) -> None:
    revision = store.apply(traffic_text("shop/web", "store"))
    mesh = store.build()
    assert timeouts(mesh) == {"shop/store|80": 1.0}
    treatment = destinations(mesh)["shop/store|80"].treatment
    assert treatment is not None
    assert treatment.source == (WEB, revision)
    assert upstreams(mesh)["shop/store|80"].treatment == treatment
    assert upstreams(mesh)["shop/other|80"].treatment is None
    assert reasons(mesh) == []


def test_requests_that_a_split_sends_elsewhere_are_treated_as_the_root_asks_and_dialled_as_the_backend_does(
    store: Store,
) -> None:
    store.apply(traffic_text("shop/web", "store", "timeout: 1s, limits: {maxRequests: 1}"))
    store.apply(traffic_text("shop/other", "other", "timeout: 2s, limits: {maxRequests: 2}"))
    store.apply(split_text("shop/split", "store", other=1))
    mesh = store.build()
    assert timeouts(mesh) == {"shop/store|80": 1.0, "shop/other|80": 2.0}
    treatment = upstreams(mesh)["shop/other|80"].treatment
    assert treatment is not None
    assert treatment.policy.limits is not None
    assert treatment.policy.limits.requests == 2


def test_of_two_for_one_service_the_older_counts_and_the_other_says_so(store: Store) -> None:
    store.apply(traffic_text("shop/web", "store", "timeout: 1s"), created=2.0)
    mesh = store.build()
    store.apply(traffic_text("shop/other", "store", "timeout: 2s"), created=1.0)
    mesh = store.build(mesh)
    assert timeouts(mesh) == {"shop/store|80": 2.0}
    assert (reasons(mesh), reasons(mesh, OTHER)) == (["Conflict"], [])
    store.delete(f"/smc/books/manifests/{OTHER}")
    mesh = store.build(mesh)
    assert timeouts(mesh) == {"shop/store|80": 1.0}
    assert reasons(mesh) == []


def test_one_for_a_service_that_is_not_there_says_so_and_counts_once_it_is(store: Store) -> None:
    store.apply(traffic_text("shop/web", "late"))
    mesh = store.build()
    assert reasons(mesh) == ["ServiceNotFound"]
    store.apply(service_text("shop/late", 80))
    mesh = store.build(mesh)
    assert timeouts(mesh) == {"shop/late|80": 1.0}
    assert reasons(mesh) == []


def test_settings_of_requests_for_a_port_that_speaks_tcp_are_told(store: Store) -> None:
    store.apply(service_text("shop/raw", 80, protocol="tcp"))
    store.apply(traffic_text("shop/web", "raw"))
    store.apply(traffic_text("shop/other", "raw2", "limits: {maxConnections: 1}"))
    store.apply(service_text("shop/raw2", 80, protocol="tcp"))
    mesh = store.build()
    assert (reasons(mesh), reasons(mesh, OTHER)) == (["HTTPSettingsOnTCP"], [])


def test_a_port_of_an_application_takes_the_tightest_limit_of_its_services(store: Store) -> None:
    served_by(store, "shop/store-1", service="shop/front")
    store.apply(traffic_text("shop/web", "store", "rateLimit: {requests: 100, per: 1m}"))
    store.apply(traffic_text("shop/other", "front", "rateLimit: {requests: 10}"))
    mesh = store.build()
    (inbound,) = mesh.proxies[name("shop/store-1")].inbound
    assert inbound.rate_limit == RateLimit(100, timedelta(minutes=1), 100)
    assert [manifest for manifest, _ in inbound.sources] == [WEB]
    (untouched,) = mesh.proxies[name("shop/store-2")].inbound
    assert (untouched.rate_limit, untouched.sources) == (None, ())


@pytest.mark.parametrize("reachable", [None, ("shop/store",)])
def test_for_a_proxy_that_refuses_it_the_service_is_as_any_other(
    store: Store, reachable: tuple[str, ...] | None
) -> None:
    store.offer_workload("shop/odd", "caller", reachable=reachable)
    revision = store.apply(traffic_text("shop/web", "store", "timeout: 1s, rateLimit: {requests: 1}"))
    mesh = store.build()
    for proxy in ("shop/odd", "shop/store-1"):
        store.quarantine(proxy, WEB, revision)
    mesh = store.build(mesh)
    assert timeouts(mesh, "shop/odd") == {}
    assert upstreams(mesh, "shop/odd")["shop/store|80"].treatment is None
    assert mesh.proxies[name("shop/store-1")].inbound[0].rate_limit is None
    assert timeouts(mesh) == {"shop/store|80": 1.0}
    assert reasons(mesh) == ["Quarantined"]
    store.apply(traffic_text("shop/web", "store", "timeout: 2s"))
    mesh = store.build(mesh)
    assert timeouts(mesh, "shop/odd") == {"shop/store|80": 2.0}, "a newer version is tried again"
