"""What `smc cert list` prints, and what `smc cert revoke` says will follow."""

from __future__ import annotations

import json

import pytest

from smc.cli import cert
from smc.v1 import smc_pb2 as pb

NOW = 1_900_000_000.0
HOUR = 3600.0


def answer() -> pb.CertificatesResponse:
    found = pb.CertificatesResponse(crl=40, crl_number=3)
    found.certificates.add(
        identity="shop/buyer",
        serial="1f00000000abcdef01",
        not_before=NOW - 4 * HOUR,
        not_after=NOW + 20 * HOUR,
        issuer=2,
        state="current",
    )
    found.certificates.add(
        identity="shop/buyer", serial="1a0000000012345678", not_after=NOW + HOUR, issuer=1, state="revoked"
    )
    found.revocations.add(
        proxy="shop/bad",
        identity="shop/buyer",
        reason="stolen",
        author="spiffe://mesh.example/operator/ann",
        time=NOW - 60,
        resource_version=39,
    )
    found.revocations.add(identity="shop/thief", author="spiffe://x/operator/ben", time=NOW - 5, outstanding=["1b"])
    found.revocations.add(proxy="shop/back", author="spiffe://x/operator/ben", time=NOW - 5, admitted=True)
    found.revocations.add(credential="operator/eve", author="spiffe://x/operator/ben", time=NOW - 5, reason="left")
    return found


def test_the_table() -> None:
    assert cert.render(answer(), "table", NOW) == (
        "IDENTITY     STATE     SERIAL          AGE   EXPIRES IN   ISSUER\n"
        "shop/buyer   current   1f00…abcdef01   4h    20h          2\n"
        "shop/buyer   revoked   1a00…12345678   -     60m          1\n"
        "\n"
        "REVOKED               STATE          AGE   BY    REASON\n"
        "proxy/shop/bad        revoked        60s   ann   stolen\n"
        "identity/shop/thief   pending        5s    ben   -\n"
        "proxy/shop/back       let in again   5s    ben   -\n"
        "operator/eve          revoked        5s    ben   left"
    )


def test_wide_has_whole_serials_and_name_one_a_line() -> None:
    assert "1f00000000abcdef01" in cert.render(answer(), "wide", NOW)
    assert cert.render(answer(), "name", NOW).splitlines() == [
        "certificate/1f00000000abcdef01",
        "certificate/1a0000000012345678",
    ]


def test_json_is_for_programs() -> None:
    document = json.loads(cert.render(answer(), "json", NOW))
    assert [one["state"] for one in document["revocations"]] == ["revoked", "pending", "let in again", "revoked"]
    assert [one.get("credential") for one in document["revocations"]] == [None, None, None, "operator/eve"]
    assert document["certificates"][1]["notBefore"] is None
    assert document["crl"] == {"number": 3, "resourceVersion": 40}


@pytest.mark.parametrize(
    ("response", "undo", "said"),
    [
        (
            pb.RevokeResponse(revocation=pb.Revocation(proxy="shop/bad", identity="shop/buyer"), others=2),
            False,
            "2 other proxies share its key of shop/buyer",
        ),
        (pb.RevokeResponse(revocation=pb.Revocation(proxy="shop/bad")), False, "the mesh has no such workload"),
        (
            pb.RevokeResponse(revocation=pb.Revocation(identity="shop/buyer"), proxies=["shop/a", "shop/b"]),
            False,
            "its proxies are out: shop/a, shop/b",
        ),
        (
            pb.RevokeResponse(revocation=pb.Revocation(credential="viewer/vic")),
            False,
            "to let it in again: smc token create viewer/vic",
        ),
        (pb.RevokeResponse(), True, "certificates that were revoked stay so"),
    ],
)
def test_what_follows_is_said(response: pb.RevokeResponse, undo: bool, said: str) -> None:
    assert said in "\n".join(cert._consequences(response, undo=undo))
