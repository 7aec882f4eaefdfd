"""How a proxy comes to trust another root in time, and how it says that it was left behind."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
import structlog
from aiohttp import web

from smc.certificates import credential as credentials
from smc.certificates import x509
from smc.certificates.credential import Credential
from smc.proxy import enrolment, envoy, renewal
from smc.proxy.enrolment import CREDENTIAL, Enrolment
from smc.proxy.run import run_proxy
from smc.proxy.settings import Exit
from tests.unit.certificates.authority import TestAuthority
from tests.unit.proxy.control_plane import ControlPlane, serving
from tests.unit.proxy.test_run import Machine, machine, until

__all__ = ["machine"]

OLD, NEW = (TestAuthority.make(now=time.time() - 3600) for _ in range(2))
BOTH = tuple(sorted(x509.pin(ca.root) for ca in (OLD, NEW)))


def replica(ca: TestAuthority, *trusted: TestAuthority) -> Credential:
    """What a replica presents, and whom it lets in."""
    shown = ca.credential("replica/a", now=time.time())
    return Credential(shown.uri, shown.chain, shown.key, tuple(x509.pem(one.root) for one in trusted))


def enrolled_at(machine: Machine, address: str) -> tuple[Credential, Enrolment]:
    credential = OLD.credential("proxy/shop/buyer", now=time.time())
    machine.enrol(address)
    credentials.write(machine.directory / CREDENTIAL, credential)
    found = enrolment.read(machine.directory)
    assert found is not None
    return credential, found


def trusted(directory: Path) -> tuple[str, ...]:
    return credentials.read(directory / CREDENTIAL).pins


async def test_the_new_root_is_trusted_on_disk_before_that_is_said(machine: Machine) -> None:
    plane = ControlPlane(OLD)
    async with serving(plane, replica(OLD, OLD), mutual=True) as address:
        credential, enrolled = enrolled_at(machine, address)
        plane.newest = NEW
        confirmed, renew = await renewal.confirm(machine.directory, credential, enrolled)
    assert renew
    assert [tuple(said.roots) for said in plane.told] == [credential.pins, BOTH], "what is said last is what there is"
    assert trusted(machine.directory) == BOTH == confirmed.pins
    assert confirmed.chain == credential.chain


async def test_roots_that_its_own_credential_does_not_lead_to_come_after_a_new_credential(machine: Machine) -> None:
    plane = ControlPlane(OLD, newest=NEW, retired=OLD)
    async with serving(plane, replica(OLD, OLD), mutual=True) as address:
        credential, enrolled = enrolled_at(machine, address)
        confirmed, renew = await renewal.confirm(machine.directory, credential, enrolled)
    assert renew
    assert confirmed == credential
    assert trusted(machine.directory) == credential.pins


async def test_the_whole_way_needs_no_more_than_a_hint_each_time(machine: Machine) -> None:
    plane = ControlPlane(OLD)
    async with (
        serving(plane, replica(OLD, OLD, NEW), mutual=True) as address,
        serving(plane, replica(NEW, OLD, NEW), mutual=True) as plane.api,
    ):
        credential, enrolled = enrolled_at(machine, address)
        news = asyncio.Event()
        task = asyncio.create_task(renewal.keep_fresh(machine.directory, credential, enrolled, news=news))
        try:
            await until(lambda: plane.told)
            assert plane.renewals == [], "it was told at the start, and there was nothing to do"
            plane.newest = NEW
            news.set()
            newest = x509.key_id(NEW.intermediate)
            await until(lambda: credentials.read(machine.directory / CREDENTIAL).issuer == newest)
            await until(lambda: plane.told[-1].issuer == newest)
            assert trusted(machine.directory) == BOTH
            plane.retired = OLD
            news.set()
            await until(lambda: trusted(machine.directory) == (x509.pin(NEW.root),))
            await until(lambda: tuple(plane.told[-1].roots) == (x509.pin(NEW.root),))
        finally:
            task.cancel()
            await asyncio.wait((task,))


# -------------------------------------------------------------------------------------------------------- left behind


async def test_one_that_was_away_for_too_long_says_so_with_a_code_of_its_own(
    machine: Machine, capfd: pytest.CaptureFixture[str]
) -> None:
    async with serving(ControlPlane(NEW), replica(NEW, NEW), mutual=True) as address:
        enrolled_at(machine, address)
        assert await run_proxy(machine.settings()) == Exit.LEFT_BEHIND == 20
    said = capfd.readouterr().err
    assert "the root of this proxy's credential is no longer trusted" in said
    assert "join again with a new token" in said
    assert machine.events() == [], "Envoy was not started"


async def test_one_that_knows_the_new_root_and_shows_the_old_one_is_left_behind_as_well(machine: Machine) -> None:
    async with serving(ControlPlane(NEW), replica(NEW, NEW), mutual=True) as address:
        credential, enrolled = enrolled_at(machine, address)
        knowing = Credential(credential.uri, credential.chain, credential.key, (x509.pem(OLD.root), x509.pem(NEW.root)))
        assert await renewal.is_left_behind(knowing, enrolled)


@pytest.mark.parametrize("why", ["nobody answers", "the same root", "both are trusted"])
async def test_nothing_else_looks_like_it(machine: Machine, why: str) -> None:
    shown = replica(OLD, OLD) if why == "the same root" else replica(NEW, OLD, NEW)
    async with serving(ControlPlane(OLD), shown, mutual=True) as address:
        credential, enrolled = enrolled_at(machine, "127.0.0.1:1" if why == "nobody answers" else address)
        knowing = Credential(credential.uri, credential.chain, credential.key, (x509.pem(OLD.root), x509.pem(NEW.root)))
        assert not await renewal.is_left_behind(knowing, enrolled)


async def test_one_that_runs_goes_on_and_says_in_its_log_what_to_do(machine: Machine) -> None:
    async with serving(ControlPlane(NEW), replica(NEW, NEW), mutual=True) as address:
        credential, enrolled = enrolled_at(machine, address)
        with structlog.testing.capture_logs() as logs:
            task = asyncio.create_task(
                renewal.keep_fresh(machine.directory, credential, enrolled, news=asyncio.Event())
            )
            await until(lambda: any(line["event"] == renewal.LEFT_BEHIND for line in logs))
            assert not task.done()
            task.cancel()
            await asyncio.wait((task,))
    assert "smc token create" in next(line["hint"] for line in logs if line["event"] == renewal.LEFT_BEHIND)


# ------------------------------------------------------------------------------------------------------------ the hint


async def test_other_secrets_in_envoy_are_a_hint_and_the_same_ones_are_none() -> None:
    versions = {"identity": "1", "bundle": "1"}

    async def dump(_request: web.Request) -> web.Response:
        return web.json_response({"configs": [{"name": n, "version_info": v} for n, v in versions.items()]})

    app = web.Application()
    app.router.add_get("/config_dump", dump)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    (_, port, *_) = runner.addresses[0]
    changed = asyncio.Event()
    task = asyncio.create_task(envoy.watch_secrets(f"127.0.0.1:{port}", changed))
    try:
        await until(changed.is_set)
        changed.clear()
        await asyncio.sleep(2.5)
        assert not changed.is_set()
        versions["bundle"] = "2"
        await until(changed.is_set)
    finally:
        task.cancel()
        await asyncio.wait((task,))
        await runner.cleanup()
