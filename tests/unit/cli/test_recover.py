from __future__ import annotations

from dataclasses import replace as with_fields
from pathlib import Path

import pytest

from smc.certificates.signers.local import LocalSigner
from smc.cli.replica import recover
from smc.errors import Invalid, NotFound
from smc.v1 import smc_pb2 as pb
from tests.unit.api.replica import call, running


async def test_the_key_encryption_key_makes_an_operator_again(tmp_path: Path) -> None:
    kek = tmp_path / "kek"
    async with running(kek=kek) as replica:
        operator = await recover(replica.kv, "default", kek, "ann")
        assert operator.uri == "spiffe://mesh.example/operator/ann"
        await call(replica, operator, "List", pb.ListRequest(group="smc.io", kind="Service"))


async def test_the_key_encryption_key_lets_in_an_operator_that_was_revoked(tmp_path: Path) -> None:
    kek = tmp_path / "kek"
    async with running(kek=kek) as replica:
        await call(replica, replica.operator, "Revoke", pb.RevokeRequest(credential="operator/admin"))
        replica.mesh = with_fields(replica.mesh, revoked_credentials={"operator/admin": ()})
        operator = await recover(replica.kv, "default", kek, "admin")
        await call(replica, operator, "List", pb.ListRequest(group="smc.io", kind="Service"))


async def test_another_key_makes_nobody(tmp_path: Path) -> None:
    LocalSigner.create(tmp_path / "other")
    async with running() as replica:
        with pytest.raises(Invalid, match="does not unwrap"):
            await recover(replica.kv, "default", tmp_path / "other", "ann")
        with pytest.raises(NotFound, match="no mesh"):
            await recover(replica.kv, "nowhere", tmp_path / "other", "ann")
