"""Who is waited for in each phase of a rotation, and what comes next: the rules alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from smc.certificates import making, rotation, x509
from smc.certificates.rotation import FORCED_AFTER, Found, Holder, Kind, Missing, missing, next_phase
from smc.records import Phase, Rotates, RotationRecord
from tests.unit.certificates.authority import NOW, TestAuthority, serial, sign

OLD, NEW = "old root", "new root"
BOTH = frozenset({OLD, NEW})
SIGNER, BEFORE = "new intermediate", "old intermediate"
ROOT = RotationRecord("1", Rotates.ROOT, "spiffe://mesh.example/operator/admin", since=NOW)


def holder(name: str = "shop/buyer", *, roots: frozenset[str] = BOTH, issuer: str = BEFORE, **more: object) -> Holder:
    return Holder(name, roots, issuer, **more)  # type: ignore[arg-type]


def whose(phase: Phase, found: Found, of: Rotates = Rotates.ROOT) -> list[str]:
    """Who is missing."""
    return [one.who for one in missing(replace(ROOT, of=of, phase=phase), found)]


AWAY = holder("shop/away", connected=False)
SILENT = Holder("shop/silent")
STALLED = holder("shop/stalled", lag="stalled")


# ---------------------------------------------------------------------------------------------------------- publishing


def test_nothing_is_signed_before_every_replica_and_every_proxy_trusts_the_new_root() -> None:
    old = frozenset({OLD})
    found = Found(BOTH, SIGNER, [holder("replica-1"), holder("replica-2", roots=old)], [holder("a/a", roots=old)])
    assert whose(Phase.PUBLISHING, found) == ["replica-2", "a/a"]
    trusting = replace(found, replicas=[holder("replica-1")], proxies=[holder()])
    assert whose(Phase.PUBLISHING, trusting) == []


@pytest.mark.parametrize("proxy", [AWAY, SILENT, STALLED])
@pytest.mark.parametrize("phase", [Phase.PUBLISHING, Phase.SIGNING])
def test_what_is_not_known_of_a_proxy_is_waited_for(phase: Phase, proxy: Holder) -> None:
    found = Found(BOTH, SIGNER, proxies=[holder(issuer=SIGNER), proxy])
    assert whose(phase, found) == [proxy.name]


def test_each_reason_says_what_is_the_matter() -> None:
    found = Found(BOTH, SIGNER, proxies=[AWAY, SILENT, STALLED, holder(roots=frozenset({OLD}))])
    assert [one.why for one in missing(replace(ROOT, phase=Phase.PUBLISHING), found)] == [
        "connected to no replica",
        "has not said what it trusts: does smc proxy run keep its credential?",
        "stalled",
        "does not trust the new root yet",
    ]


def test_a_token_that_knows_the_old_root_alone_has_to_be_used_or_to_end_first() -> None:
    found = Found(BOTH, SIGNER, tokens=2)
    assert whose(Phase.PUBLISHING, found) == ["2 join tokens"]
    assert whose(Phase.SIGNING, found) == []


def test_a_new_intermediate_below_the_same_root_need_not_be_published() -> None:
    found = Found(BOTH, SIGNER, proxies=[AWAY, SILENT, STALLED])
    assert whose(Phase.PUBLISHING, found, Rotates.INTERMEDIATE) == []


def test_but_its_list_of_revoked_certificates_has_to_be_there_before_its_certificates() -> None:
    listed = Found(BOTH, SIGNER, proxies=[holder(), STALLED], listed=True)
    assert whose(Phase.PUBLISHING, replace(listed, listed=False), Rotates.INTERMEDIATE) == [
        "the list of revoked certificates",
        "shop/stalled",
    ]
    assert whose(Phase.PUBLISHING, listed, Rotates.INTERMEDIATE) == ["shop/stalled"]


# ------------------------------------------------------------------------------------------------- signing and retiring


def test_the_old_one_is_not_retired_before_nobody_shows_what_it_has_signed() -> None:
    found = Found(
        BOTH,
        SIGNER,
        [holder("replica-1", issuer=SIGNER), holder("replica-2")],
        [holder("a/a", issuer=SIGNER), holder("b/b")],
        outdated=3,
    )
    assert whose(Phase.SIGNING, found) == ["3 workload certificates", "replica-2", "b/b"]


def test_it_is_done_once_nobody_who_is_there_trusts_the_old_root() -> None:
    new = frozenset({NEW})
    found = Found(new, SIGNER, [holder("replica-1", roots=new), holder("replica-2")], [holder("a/a"), AWAY, SILENT])
    assert whose(Phase.RETIRING, found) == ["replica-2", "a/a", "shop/silent"]


def test_who_is_away_shows_nothing_old_any_more_when_the_old_root_goes() -> None:
    assert whose(Phase.RETIRING, Found(frozenset({NEW}), SIGNER, proxies=[AWAY])) == []


# ---------------------------------------------------------------------------------------------------------- what comes

PROXY = Missing(Kind.PROXY, "shop/buyer", "connected to no replica")
PHASES = [(Phase.PUBLISHING, Phase.SIGNING), (Phase.SIGNING, Phase.RETIRING), (Phase.RETIRING, Phase.DONE)]


@pytest.mark.parametrize(("phase", "following"), PHASES)
def test_a_phase_ends_when_nobody_is_missing_and_not_before(phase: Phase, following: Phase) -> None:
    running = replace(ROOT, phase=phase)
    assert next_phase(running, (), NOW) is following
    assert next_phase(running, (PROXY,), NOW + 86400 * 365) is None


@pytest.mark.parametrize("phase", [Phase.REQUESTED, Phase.DONE])
def test_a_request_and_an_end_wait_for_nobody_and_lead_to_nothing(phase: Phase) -> None:
    assert next_phase(replace(ROOT, phase=phase), (), NOW) is None


@pytest.mark.parametrize(("phase", "following"), PHASES)
def test_a_forced_one_leaves_a_proxy_behind_once_the_others_had_their_time(phase: Phase, following: Phase) -> None:
    forced = replace(ROOT, phase=phase, forced=NOW + 5)
    assert next_phase(forced, (PROXY,), NOW + 4.9 + FORCED_AFTER) is None
    assert next_phase(forced, (PROXY,), NOW + 5 + FORCED_AFTER) is following


@pytest.mark.parametrize("kind", [Kind.REPLICA, Kind.CERTIFICATES])
def test_what_the_mesh_itself_has_to_do_is_never_left_behind(kind: Kind) -> None:
    forced = replace(ROOT, phase=Phase.SIGNING, forced=NOW)
    assert next_phase(forced, (PROXY, Missing(kind, "replica-1", "")), NOW + 3600) is None


# ------------------------------------------------------------------------------------------------------------ when due


def test_an_intermediate_is_due_at_half_its_life_and_urgent_in_its_last_quarter() -> None:
    made = TestAuthority.make()
    days = making.INTERMEDIATE_TTL.total_seconds() / 86400

    def at(share: float) -> float:
        return NOW + share * days * 86400

    assert rotation.due(made.root, made.intermediate, at(0.39)) is None
    assert rotation.due(made.root, made.intermediate, at(0.61)) is Rotates.INTERMEDIATE
    assert not rotation.is_urgent(made.intermediate, at(0.74))
    assert rotation.is_urgent(made.intermediate, at(0.76))


def test_a_root_is_due_while_two_intermediates_would_fit_in() -> None:
    key = x509.new_key()
    root = sign(
        making.root(
            key.public_key(), "mesh.example", number=1, serial=serial(), now=NOW, ttl=3 * making.INTERMEDIATE_TTL
        ),
        key,
    )
    made = sign(
        making.intermediate(x509.new_key().public_key(), root, "mesh.example", number=1, serial=serial(), now=NOW),
        key,
    )
    days = making.INTERMEDIATE_TTL.total_seconds()
    assert rotation.due(root, made, NOW) is None
    assert rotation.due(root, made, NOW + 1.01 * days) is Rotates.ROOT
