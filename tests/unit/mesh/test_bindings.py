# ruff: noqa: N802 - the identifiers of the rules are in capitals
"""Whom a binding means, and what targets that name it allow."""

from __future__ import annotations

import pytest

from smc.mesh import Mesh
from tests.unit.mesh.store import (
    KEYS,
    TRUST_DOMAIN,
    Store,
    binding_text,
    bound_text,
    group_text,
    name,
    target_text,
    workload_text,
)

TARGET = "access.smi-spec.io/TrafficTarget/shop/target"
TILLS = "access.smi-spec.io/IdentityBinding/shop/tills"
STORES = "access.smi-spec.io/IdentityBinding/shop/stores"
BY_LABEL = "{podLabelSelector: {matchLabels: {app: till}}}"


@pytest.fixture
def store() -> Store:
    """A store that tills may call: whom that means is for the tests to say."""
    made = Store()
    for workload, account, labels in (
        ("shop/store-1", "store", "{app: store}"),
        ("shop/till-1", "till", "{app: till, floor: '1'}"),
        ("shop/till-2", "other", "{app: till}"),
        ("shop/door", "door", "{app: door}"),
        ("bank/till", "till", "{app: till}"),
    ):
        made.apply(workload_text(workload, account, labels=labels))
    made.apply(group_text("shop/all"))
    made.apply(binding_text("shop/stores", "{serviceAccount: store}"))
    made.apply(bound_text("shop/target", "stores", "shop/tills"))
    return made


def callers(mesh: Mesh, proxy: str = "shop/store-1") -> list[str]:
    return [str(source) for p in mesh.proxies[name(proxy)].policy.permissions for source in p.sources]


def reasons(mesh: Mesh, manifest: str) -> list[str]:
    return [problem.reason for problem in mesh.problems.get(manifest, ())]


@pytest.mark.parametrize(
    ("schemes", "meant"),
    [
        (BY_LABEL, ["shop/other", "shop/till"]),
        ("{podLabelSelector: {matchLabels: {app: till, floor: '1'}}}", ["shop/till"]),
        ("{serviceAccount: till}", ["shop/till"]),
        (f"{{spiffeIdentities: [{TRUST_DOMAIN}/ns/shop/sa/till]}}", ["shop/till"]),
        (f"{{spiffeIdentities: ['spiffe://{TRUST_DOMAIN}/ns/shop/sa/door']}}", ["shop/door"]),
        ("{podLabelSelector: {matchLabels: {app: door}}, serviceAccount: till}", ["shop/door", "shop/till"]),
    ],
)
def test_ACCESS_8_schemes_are_alternatives_within_the_namespace_of_the_binding(
    store: Store, schemes: str, meant: list[str]
) -> None:
    store.apply(binding_text("shop/tills", schemes))
    mesh = store.build()
    assert callers(mesh) == meant
    assert mesh.problems == {}


def test_ACCESS_8_an_identity_that_workloads_without_the_labels_have_too_is_not_meant(store: Store) -> None:
    """They would be let in with the others: all of them show the same certificate."""
    store.apply(binding_text("shop/tills", BY_LABEL))
    mesh = store.build()
    store.apply(workload_text("shop/intruder", "till"))
    mesh = store.build(mesh)
    assert callers(mesh) == ["shop/other"]
    assert reasons(mesh, TILLS) == ["SharedIdentity"]
    store.delete(KEYS.manifest("smc.io/Workload/shop/intruder"))
    mesh = store.build(mesh)
    assert callers(mesh) == ["shop/other", "shop/till"]
    assert mesh.problems == {}


def test_ACCESS_8_a_binding_that_is_missing_means_nobody(store: Store) -> None:
    mesh = store.build()
    assert callers(mesh) == []
    assert reasons(mesh, TARGET) == ["BindingNotFound", "GrantsNothing"]
    store.apply(binding_text("shop/tills", BY_LABEL))
    mesh = store.build(mesh)
    assert callers(mesh) == ["shop/other", "shop/till"]
    store.delete(KEYS.manifest(STORES))
    mesh = store.build(mesh)
    assert callers(mesh) == []
    assert reasons(mesh, TARGET) == ["BindingNotFound", "GrantsNothing"]
    assert mesh.problems[TARGET][0].field == "spec.destination"


def test_ACCESS_8_a_binding_that_selects_nobody_allows_nobody_until_it_does(store: Store) -> None:
    store.apply(binding_text("shop/tills", "{podLabelSelector: {matchLabels: {app: kiosk}}}"))
    mesh = store.build()
    assert callers(mesh) == []
    assert (reasons(mesh, TARGET), reasons(mesh, TILLS)) == (["GrantsNothing"], ["SelectsNobody"])
    store.apply(workload_text("shop/door", "door", labels="{app: kiosk}"))
    mesh = store.build(mesh)
    assert callers(mesh) == ["shop/door"]
    assert mesh.problems == {}


@pytest.mark.parametrize("uri", ["far.example/ns/shop/sa/till", f"{TRUST_DOMAIN}/host/till"])
def test_ACCESS_8_an_identity_of_another_trust_domain_or_form_is_nobody(store: Store, uri: str) -> None:
    store.apply(binding_text("shop/tills", f"{{spiffeIdentities: [{uri}], serviceAccount: door}}"))
    mesh = store.build()
    assert callers(mesh) == ["shop/door"]
    assert reasons(mesh, TILLS) == ["ForeignIdentity"]


def test_ACCESS_8_each_identity_of_the_destination_may_be_called(store: Store) -> None:
    store.apply(binding_text("shop/tills", "{serviceAccount: door}"))
    store.apply(binding_text("shop/stores", BY_LABEL))
    mesh = store.build()
    assert callers(mesh) == []
    assert callers(mesh, "shop/till-1") == callers(mesh, "shop/till-2") == ["shop/door"]


def test_ACCESS_8_a_source_may_be_a_binding_of_another_namespace(store: Store) -> None:
    store.apply(bound_text("shop/target", "stores", "bank/tills", "shop/tills"))
    store.apply(binding_text("shop/tills", "{serviceAccount: door}"))
    store.apply(binding_text("bank/tills", BY_LABEL))
    assert callers(store.build()) == ["bank/till", "shop/door"]


def test_ACCESS_8_a_change_reaches_only_those_that_the_binding_concerns(store: Store) -> None:
    store.apply(binding_text("shop/tills", BY_LABEL))
    store.apply(target_text("shop/plain", "door", "shop/till"))
    before = store.build()
    store.apply(workload_text("shop/door", "door", labels="{app: till}"))
    mesh = store.build(before)
    assert mesh.affected == {name("shop/door"), name("shop/store-1")}
    assert callers(mesh) == ["shop/door", "shop/other", "shop/till"]


@pytest.mark.parametrize("refused", [TILLS, STORES])
def test_a_quarantined_binding_takes_the_permissions_that_came_by_it(store: Store, refused: str) -> None:
    store.apply(binding_text("shop/tills", BY_LABEL))
    mesh = store.build()
    store.quarantine("shop/store-1", refused, store.items[KEYS.manifest(refused)].mod_revision)
    assert callers(store.build(mesh)) == []
