"""Whom a manifest has reached: who has something that is made from it."""

from __future__ import annotations

from smc.api.inspecting import _reached
from smc.model import Name
from tests.unit.mesh.store import Store, traffic_text
from tests.unit.mesh.test_services import caller, served_by

POLICY = "smc.io/TrafficPolicy/shop/web"


def test_a_traffic_policy_reaches_callers_and_a_rate_limit_the_servers_too() -> None:
    store = Store()
    caller(store, reachable=("shop/store",))
    store.offer_workload("shop/elsewhere", "caller", reachable=("shop/other",))
    served_by(store, "shop/store-1", service="shop/store")
    served_by(store, "shop/other-1", service="shop/other")
    for workload in ("shop/store-1", "shop/other-1"):
        store.offer_workload(workload, "store", reachable=())
    store.apply(traffic_text("shop/web", "store"))
    mesh = store.build()
    assert _reached(mesh, POLICY) == [Name("shop", "caller")]
    store.apply(traffic_text("shop/web", "store", "rateLimit: {requests: 1}"))
    mesh = store.build(mesh)
    assert _reached(mesh, POLICY) == [Name("shop", "caller"), Name("shop", "store-1")]
    assert _reached(mesh, "smc.io/TrafficPolicy/shop/other") == []
