"""What is stored and what becomes of it: one bad record hurts only itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.kv import View
from smc.codec import UnreadableRecord
from smc.errors import NotFound
from smc.manifests import read
from smc.mesh import Mesh, build
from smc.model import Egress, Identity, MeshConfig, Name, Problem, Service
from smc.records import CertificateRecord, SyncedRecord
from tests.unit.mesh import store as written
from tests.unit.mesh.store import KEYS, KINDS, POLICIES, Store, identity, name, service_text, workload_text


@pytest.fixture
def store() -> Store:
    made = Store()
    made.offer_service("shop/store", (80, "8080"))
    made.offer_workload("shop/caller", "caller")
    return made


@pytest.mark.parametrize(
    ("key", "at"),
    [
        (KEYS.manifest("smc.io/Service/shop/a"), "smc.io/Service/shop/a"),
        (KEYS.manifest("split.smi-spec.io/TrafficSplit/shop/a"), "split.smi-spec.io/TrafficSplit/shop/a"),
        (KEYS.service("files", Name("shop", "a")), "files:services/shop/a"),
        (KEYS.endpoints("files", Name("shop", "a")), "files:endpoints/shop/a"),
        (KEYS.workload("files", Name("shop", "a")), "files:workloads/shop/a"),
        (KEYS.synced("files"), "registry/files/synced"),
        (KEYS.certificate(Identity("shop", "a")), "certificates/shop/a"),
        (KEYS.quarantine(Name("shop", "a"), "g/k/n/m", 3), "quarantine/shop/a/g/k/n/m@3"),
    ],
)
@pytest.mark.parametrize("value", [b"", b"{}", b'{"format":99,"record":{}}', b'{"format":1,"record":{}}'])
def test_a_record_that_cannot_be_read_has_a_problem_and_hurts_nothing_else(
    store: Store, key: str, at: str, value: bytes
) -> None:
    before = store.build()
    store.put(key, value)
    mesh = store.build(before)
    assert [p.reason for p in mesh.problems[at]] == ["UnreadableRecord"]
    assert mesh.proxies == before.proxies
    assert mesh.affected == frozenset()
    store.delete(key)
    assert store.build(mesh).problems == {}


def test_a_record_that_is_not_what_its_key_says_has_no_effect(store: Store) -> None:
    store.put(KEYS.service("files", Name("shop", "other")), Service(Name("bank", "vault"), ()))
    stolen = CertificateRecord(Identity("bank", "vault"), "CHAIN", b"", "1", 0.0, 1.0, 1)
    store.put(KEYS.certificate(Identity("shop", "caller")), stolen)
    mesh = store.build()
    assert mesh.proxies[name("shop/caller")].certificate is None
    assert sorted(mesh.problems) == ["certificates/shop/caller", "files:services/shop/other"]
    assert "bank/vault" in mesh.problems["certificates/shop/caller"][0].message


def test_tables_that_nobody_here_knows_are_passed_over(store: Store) -> None:
    for key in ("registry/files/planets/shop/a", "registry/files", "ca/bundle-2", "mesh-2", "ready/a", "manifests/x"):
        store.put(KEYS.root + key, b"?")
    mesh = store.build()
    assert mesh.problems == {}
    assert [*mesh.proxies] == [name("shop/caller")]


def test_a_manifest_that_this_version_does_not_take_has_no_effect(store: Store) -> None:
    record = read(service_text("shop/other", 80), KINDS, file="a.yaml")
    store.put(KEYS.manifest(record.id), replace(record, object={**record.object, "spec": {"ports": "many"}}))
    mesh = store.build()
    (problem,) = mesh.problems[record.id]
    assert (problem.reason, problem.field) == ("InvalidManifest", "spec.ports")
    assert [*mesh.manifests] == [record.id]
    assert len(mesh.proxies[name("shop/caller")].outbound.upstreams) == 1


def test_a_manifest_of_a_group_that_no_policy_api_reads_has_a_problem(store: Store) -> None:
    store.apply(written.group_text("shop/all"))
    mesh = build(None, store.whole(), ())
    assert [p.reason for p in mesh.problems["specs.smi-spec.io/HTTPRouteGroup/shop/all"]] == ["UnknownGroup"]


def test_the_settings_are_the_one_mesh_config_or_the_defaults(store: Store) -> None:
    mesh = store.build()
    assert mesh.config == MeshConfig()
    store.apply(written.config_text("deny"))
    mesh = store.build(mesh)
    assert mesh.config == MeshConfig(egress=Egress.DENY)
    assert mesh.affected == {*mesh.proxies}
    before = mesh
    store.apply(written.config_text("deny"))
    mesh = store.build(mesh)
    assert mesh.config is before.config
    assert mesh.affected == frozenset()
    store.delete(KEYS.manifest("smc.io/MeshConfig/-/default"))
    assert store.build(mesh).config == MeshConfig()


def test_settings_that_cannot_be_read_open_nothing(store: Store) -> None:
    store.put(KEYS.manifest("smc.io/MeshConfig/-/default"), b"{}")
    mesh = store.build()
    assert mesh.config.egress is Egress.DENY
    found = [p.reason for p in mesh.problems["smc.io/MeshConfig/-/default"]]
    assert found == ["EgressDenied", "UnreadableRecord"]


def _modes(mesh: Mesh) -> dict[str, str]:
    return {proxy.namespace: found.mode.value for proxy, found in mesh.proxies.items()}


def test_a_namespace_has_its_own_mode_or_that_of_the_mesh(store: Store) -> None:
    for namespace in ("shop", "till"):
        store.apply(written.workload_text(f"{namespace}/one", "it"))
    mesh = store.build()
    assert _modes(mesh) == {"shop": "enforcing", "till": "enforcing"}
    store.apply(written.namespace_text("shop", "permissive"))
    mesh = store.build(mesh)
    assert _modes(mesh) == {"shop": "permissive", "till": "enforcing"}
    assert mesh.affected == {name("shop/caller"), name("shop/one")}
    store.apply(written.config_text("allow", "audit"))
    mesh = store.build(mesh)
    assert _modes(mesh) == {"shop": "permissive", "till": "audit"}
    store.delete(KEYS.manifest("smc.io/NamespaceConfig/shop/default"))
    mesh = store.build(mesh)
    assert _modes(mesh) == {"shop": "audit", "till": "audit"}


def test_a_mode_that_cannot_be_read_is_enforcing_whatever_the_mesh_is(store: Store) -> None:
    store.apply(written.workload_text("shop/one", "it"))
    store.apply(written.config_text("allow", "permissive"))
    mesh = store.build()
    assert _modes(mesh) == {"shop": "permissive"}
    store.put(KEYS.manifest("smc.io/NamespaceConfig/shop/default"), b"{}")
    mesh = store.build(mesh)
    assert _modes(mesh) == {"shop": "enforcing"}
    found = [p.reason for p in mesh.problems["smc.io/NamespaceConfig/shop/default"]]
    assert found == ["Enforcing", "UnreadableRecord"]


def test_while_the_settings_of_the_mesh_cannot_be_read_it_is_enforcing(store: Store) -> None:
    store.apply(written.workload_text("shop/one", "it"))
    store.apply(written.config_text("allow", "permissive"))
    mesh = store.build()
    store.put(KEYS.manifest("smc.io/MeshConfig/-/default"), b"{}")
    assert _modes(store.build(mesh)) == {"shop": "enforcing"}


def test_a_host_that_egress_lets_through_and_that_is_a_service_is_the_service(store: Store) -> None:
    store.apply(written.config_text("deny", hosts=("till.shop", "far.example")))
    mesh = store.build()
    id_ = "smc.io/MeshConfig/-/default"
    assert id_ not in mesh.problems
    store.apply(written.service_text("shop/till", 80))
    mesh = store.build(mesh)
    (problem,) = mesh.problems[id_]
    assert (problem.reason, problem.field, problem.severity) == ("HostIsService", "spec.egressHosts", "warning")
    assert "till.shop" in problem.message
    assert "shop/till" in problem.message
    store.delete(KEYS.manifest("smc.io/Service/shop/till"))
    assert id_ not in store.build(mesh).problems


def test_an_address_that_egress_lets_through_and_that_is_a_services_is_the_service(store: Store) -> None:
    store.apply(written.config_text("deny", hosts=("10.96.0.7:80", "10.96.0.8")))
    store.apply(written.service_text("shop/till", 80, address="10.96.0.7"))
    (problem,) = store.build().problems["smc.io/MeshConfig/-/default"]
    assert problem.reason == "HostIsService"
    assert "10.96.0.7:80 is service shop/till" in problem.message


def test_without_a_mesh_record_there_is_no_mesh(store: Store) -> None:
    """Whose mesh it is, is not known: to tell the proxies anything would cut them off."""
    mesh = store.build()
    store.delete(KEYS.mesh)
    with pytest.raises(NotFound, match="no record of a mesh"):
        store.build(mesh)
    with pytest.raises(NotFound):
        store.build()


@pytest.mark.parametrize("key", [KEYS.mesh, KEYS.bundle])
def test_what_the_whole_mesh_hangs_on_is_never_taken_for_absent(store: Store, key: str) -> None:
    mesh = store.build()
    store.put(key, b'{"format":99,"record":{}}')
    with pytest.raises(UnreadableRecord, match="format 99"):
        store.build(mesh)


def test_a_build_that_fails_leaves_the_mesh_before_as_it_was(store: Store) -> None:
    mesh = store.build()
    good = store.items[KEYS.bundle].value
    store.put(KEYS.bundle, b"{}")
    store.offer_workload("shop/new", "new")
    failed = store.view()
    with pytest.raises(UnreadableRecord):
        build(mesh, failed, POLICIES)
    assert [*mesh.proxies] == [name("shop/caller")]
    store.put(KEYS.bundle, good)
    later = store.view()
    mesh = build(mesh, replace(later, changed=later.changed | failed.changed), POLICIES)
    assert [*mesh.proxies] == [name("shop/caller"), name("shop/new")]
    assert mesh.affected == {name("shop/new")}


def test_another_generation_of_the_store_is_built_from_nothing(store: Store) -> None:
    before = store.build()
    other = Store()
    other.generation = 2
    other.offer_workload("shop/other", "other")
    mesh = build(before, other.whole(), POLICIES)
    assert [*mesh.proxies] == [name("shop/other")]
    assert mesh.affected == {name("shop/caller"), name("shop/other")}


def test_a_changed_trust_domain_makes_every_proxy_anew(store: Store) -> None:
    before = store.build()
    store.put(KEYS.mesh, written.MeshRecord("m", "other.example", "1"))
    mesh = store.build(before)
    assert mesh.trust_domain == "other.example"
    assert mesh.affected == {name("shop/caller")}


def test_a_source_is_synced_once_it_was_observed_whole_and_its_problems_are_carried(store: Store) -> None:
    found = Problem("files:a.yaml", "InvalidManifest", "a.yaml:3: no")
    store.put(KEYS.synced("files"), SyncedRecord("files", (found,)))
    mesh = store.build()
    assert mesh.synced == {"files"}
    assert mesh.problems == {"files:a.yaml": (found,)}
    store.put(KEYS.synced("files"), SyncedRecord("files"))
    assert store.build(mesh).problems == {}


def test_identities_are_those_that_a_workload_has(store: Store) -> None:
    mesh = store.build()
    assert mesh.identities == {identity("shop/caller")}
    store.apply(workload_text("shop/vm", "vm"))
    store.offer_workload("shop/caller", "other")
    assert store.build(mesh).identities == {identity("shop/vm"), identity("shop/other")}


def test_an_empty_store_has_no_proxies() -> None:
    mesh = Store().build()
    assert (mesh.proxies, mesh.problems, mesh.affected) == ({}, {}, frozenset())


def test_nothing_changed_is_nothing_new(store: Store) -> None:
    before = store.build()
    mesh = build(before, View(1, 1, store.revision + 1, store.items), POLICIES)
    assert mesh.revision == before.revision + 1
    assert mesh.affected == frozenset()
    assert mesh.proxies[name("shop/caller")] is before.proxies[name("shop/caller")]
    assert mesh.identities is before.identities
