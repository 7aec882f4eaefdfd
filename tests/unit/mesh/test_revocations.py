"""What a revocation takes from a proxy and from an identity, and what gives it back."""

from __future__ import annotations

import pytest

from smc.codec import UnreadableRecord
from smc.mesh import Mesh, with_revocations
from smc.model import Mode
from smc.records import AdmissionRecord
from tests.unit.mesh import store
from tests.unit.mesh.store import KEYS, Store, identity, name


def shop() -> Store:
    """Two proxies of one identity back a service, and a buyer may call it."""
    written = Store()
    written.apply(store.service_text("shop/web", 80))
    for workload in ("shop/web-1", "shop/web-2"):
        written.apply(store.workload_text(workload, "web", "web", address=f"10.0.0.{workload[-1]}"))
    written.apply(store.workload_text("shop/buyer", "buyer"))
    written.apply(store.group_text("shop/all"))
    written.apply(store.target_text("shop/to-web", "web", "shop/buyer", "shop/other"))
    written.ready("shop/web-1", "shop/web-2", "shop/buyer")
    written.certify("shop/web", "shop/buyer")
    return written


def dialled(mesh: Mesh) -> list[str]:
    (assignment,) = mesh.proxies[name("shop/buyer")].outbound.assignments
    return [str(endpoint.workload) for endpoint in assignment.endpoints]


def callers(mesh: Mesh) -> list[str]:
    policy = mesh.proxies[name("shop/web-1")].policy
    return [str(source) for permission in policy.permissions for source in permission.sources]


def test_a_revoked_proxy_is_dialled_by_nobody_and_its_credentials_are_refused() -> None:
    written = shop()
    before = written.build()
    assert dialled(before) == ["shop/web-1", "shop/web-2"]
    assert before.refuses(name("shop/web-1"), "a1") == ""
    written.revoke("shop/web-1", "shop/web")
    mesh = written.build(before)
    assert dialled(mesh) == ["shop/web-2"]
    assert mesh.refuses(name("shop/web-1"), "a1") == "the credential of shop/web-1 is revoked: ask for a new token"
    assert mesh.refuses(name("shop/web-2"), "a1") == ""
    (problem,) = mesh.problems["smc.io/Workload/shop/web-1"]
    assert problem.reason == "Revoked"
    assert callers(mesh) == ["shop/buyer", "shop/other"]


def test_a_proxy_that_was_let_in_again_has_only_what_was_signed_since() -> None:
    written = shop()
    revoked = written.revoke("shop/web-1", "shop/web")
    written.admit("shop/web-1", "a2", "a3")
    mesh = written.build()
    assert [bool(mesh.refuses(name("shop/web-1"), serial)) for serial in ("a1", "a2", "a3")] == [True, False, False]
    assert dialled(mesh) == ["shop/web-1", "shop/web-2"]
    assert not mesh.is_out(name("shop/web-1"))
    again = written.revoke("shop/web-1", "shop/web")
    assert again > revoked
    mesh = written.build(mesh)
    assert [bool(mesh.refuses(name("shop/web-1"), serial)) for serial in ("a1", "a2", "a3")] == [True, True, True]
    assert dialled(mesh) == ["shop/web-2"]


def test_a_revoked_identity_may_call_nobody_and_is_dialled_by_nobody() -> None:
    written = shop()
    before = written.build()
    written.revoke_identity("shop/buyer")
    mesh = written.build(before)
    assert callers(mesh) == ["shop/other"]
    assert mesh.refuses(name("shop/buyer"), "a1") == "the identity shop/buyer of shop/buyer is revoked"
    assert dialled(mesh) == ["shop/web-1", "shop/web-2"]
    written.revoke_identity("shop/web")
    mesh = written.build(mesh)
    assert dialled(mesh) == []
    for account in ("shop/web", "shop/buyer"):
        written.delete(KEYS.revoked_identity(identity(account)))
    mesh = written.build(mesh)
    assert (callers(mesh), dialled(mesh)) == (callers(before), dialled(before))


def test_the_revoked_certificates_of_its_callers_are_barred_and_of_nobody_else() -> None:
    written = shop()
    before = written.build()
    assert before.proxies[name("shop/web-1")].policy.barred == ()
    written.list_revoked(("shop/buyer", "f2"), ("shop/buyer", "f1"), ("shop/stranger", "f3"))
    mesh = written.build(before)
    assert mesh.proxies[name("shop/web-1")].policy.barred == ("f1", "f2")
    assert mesh.proxies[name("shop/buyer")].policy.barred == ()
    assert mesh.affected == frozenset(mesh.proxies), "everybody gets the lists"


def test_where_policy_is_not_enforced_whoever_is_revoked_is_shut_out_all_the_same() -> None:
    written = shop()
    written.apply(store.config_text("allow", "permissive"))
    before = written.build()
    policy = before.proxies[name("shop/web-1")].policy
    assert (before.proxies[name("shop/web-1")].mode, policy.barred, policy.banned) == (Mode.PERMISSIVE, (), ())
    written.list_revoked(("far/away", "f1"))
    written.revoke_identity("far/other")
    policy = written.build(before).proxies[name("shop/web-1")].policy
    assert (policy.barred, policy.banned) == (("f1",), (identity("far/other"),))


def test_a_revocation_that_cannot_be_read_revokes_and_an_admission_that_cannot_be_read_admits_nobody() -> None:
    written = shop()
    written.put(KEYS.revoked_proxy(name("shop/web-1")), b"{}")
    written.put(KEYS.revoked_identity(identity("shop/buyer")), b"?")
    written.put(KEYS.admission(name("shop/web-1")), b"{}")
    mesh = written.build()
    assert mesh.refuses(name("shop/web-1"), "a1")
    assert mesh.refuses(name("shop/buyer"), "a1")
    assert mesh.revoked_proxies[name("shop/web-1")].identity is None
    assert mesh.problems["revocations/proxies/shop/web-1"][0].reason == "UnreadableRecord"


def test_the_credentials_of_a_revoked_operator_are_refused_and_no_proxy_is_offered_anything() -> None:
    written = shop()
    before = written.build()
    assert before.refuses_credential("operator/ann", "a1") == ""
    written.revoke_credential("operator/ann")
    mesh = written.build(before)
    assert mesh.refuses_credential("operator/ann", "a1") == (
        "the credential of operator/ann is revoked: log in with a new token"
    )
    for other in ("operator/ben", "viewer/ann", "proxy/shop/web-1", "proxy/operator/ann", "replica/ann"):
        assert mesh.refuses_credential(other, "a1") == "", other
    assert not mesh.affected
    written.delete(KEYS.revoked_credential("operator/ann"))
    assert written.build(mesh).refuses_credential("operator/ann", "a1") == ""


def test_an_operator_that_was_let_in_again_has_only_what_was_signed_since() -> None:
    written = shop()
    written.revoke_credential("operator/ann")
    written.admit_credential("operator/ann", "a2")
    mesh = written.build()
    assert [bool(mesh.refuses_credential("operator/ann", serial)) for serial in ("a1", "a2")] == [True, False]
    written.revoke_credential("operator/ann")
    assert written.build(mesh).refuses_credential("operator/ann", "a2"), "an admission is of one revocation"


def test_a_proxy_is_refused_by_the_path_of_its_credential_as_by_its_name() -> None:
    written = shop()
    written.revoke("shop/web-1", "shop/web")
    mesh = written.build()
    assert mesh.refuses_credential("proxy/shop/web-1", "a1") == mesh.refuses(name("shop/web-1"), "a1") != ""


def test_a_revocation_of_an_operator_that_cannot_be_read_revokes_and_its_admission_admits_nobody() -> None:
    written = shop()
    revoked = written.put(KEYS.revoked_credential("operator/ann"), b"{}")
    written.put(KEYS.admitted_credential("operator/ann"), b"?")
    mesh = written.build()
    assert mesh.refuses_credential("operator/ann", "a1")
    assert mesh.problems["revocations/credentials/operator/ann"][0].reason == "UnreadableRecord"
    written.put(
        KEYS.admitted_credential("operator/ann"), AdmissionRecord(None, revoked, (("a1", 9.0),), "operator/ben")
    )
    assert written.build(mesh).refuses_credential("operator/ann", "a1"), "it is about somebody else"


def test_lists_that_cannot_be_read_leave_the_mesh_as_it_was() -> None:
    written = shop()
    mesh = written.build()
    written.put(KEYS.crl, b"{}")
    with pytest.raises(UnreadableRecord):
        written.build(mesh)


def test_of_a_view_that_no_mesh_can_be_made_of_the_revocations_hold_and_nobody_is_let_in_by_what_is_missing() -> None:
    written = shop()
    written.revoke("shop/web-1", "shop/web")
    written.revoke_credential("operator/ann")
    before = written.build()
    written.put(KEYS.crl, b"{}")
    assert with_revocations(before, written.view()) is before
    written.revoke_identity("shop/buyer")
    written.put(KEYS.revoked_proxy(name("shop/web-2")), b"?")
    written.delete(KEYS.revoked_proxy(name("shop/web-1")))
    written.admit_credential("operator/ann", "a2")
    mesh = with_revocations(before, written.view())
    assert mesh.refuses(name("shop/buyer"), "a1") == "the identity shop/buyer of shop/buyer is revoked"
    assert mesh.refuses(name("shop/web-2"), "a1"), "what cannot be read revokes"
    assert mesh.refuses(name("shop/web-1"), "a1"), "that it was taken back counts once a Mesh says so"
    assert [bool(mesh.refuses_credential("operator/ann", serial)) for serial in ("a1", "a2")] == [True, False]
    assert (mesh.revision, mesh.proxies) == (before.revision, before.proxies)
