"""A real Envoy takes up the credential that is laid down for it, and its successor by the rename alone."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from pathlib import Path

import aiohttp
import pytest

from smc.certificates import credential as credentials
from smc.certificates import x509
from smc.certificates.credential import Credential
from smc.proxy import enrolment
from smc.proxy.enrolment import CREDENTIAL, Enrolment
from smc.proxy.run import run_proxy
from smc.proxy.settings import Exit, ProxySettings
from tests.unit.certificates.authority import TestAuthority

CA = TestAuthority.make(now=time.time() - 60)


async def has(session: aiohttp.ClientSession, admin: str, credential: Credential) -> bool:
    try:
        async with session.get(f"http://{admin}/certs") as answer:
            found = json.loads(await answer.read())
    except (aiohttp.ClientError, OSError):
        return False
    serials = {c["serial_number"] for entry in found.get("certificates", ()) for c in entry.get("cert_chain", ())}
    return x509.load(credential.chain)[0].serial_number in {int(serial, 16) for serial in serials}


async def until_it_has(session: aiohttp.ClientSession, admin: str, credential: Credential) -> None:
    while not await has(session, admin, credential):  # noqa: ASYNC110
        await asyncio.sleep(0.05)


async def test_envoy_reads_a_new_credential_when_one_rename_replaces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SMC_ENVOY", raising=False)
    first, second = (CA.credential("proxy/shop/buyer", now=time.time()) for _ in range(2))
    credentials.write(tmp_path / CREDENTIAL, first)
    enrolment.write(
        tmp_path,
        Enrolment("shop/buyer", "default", "mesh.example", "mesh.internal", ("127.0.0.1:1",), ("127.0.0.1:1",),
                  "127.0.37.1", "127.0.0.1"),
    )  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        admin = f"127.0.0.1:{free.getsockname()[1]}"
    settings = ProxySettings(directory=tmp_path, admin=admin, envoy_log=tmp_path / "log")
    task = asyncio.create_task(run_proxy(settings))
    async with aiohttp.ClientSession() as session, asyncio.timeout(30):
        await until_it_has(session, admin, first)
        credentials.write(tmp_path / CREDENTIAL, second)
        await until_it_has(session, admin, second)
    assert not (tmp_path / "ready").exists(), "no control plane has given it a certificate"
    os.kill(os.getpid(), signal.SIGTERM)
    assert await task == Exit.STOPPED
