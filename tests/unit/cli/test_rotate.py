"""`smc cert rotate`: what it prints, how it ends, and that the rotation does not need it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from structlog.testing import capture_logs

from cluster.kv import Put
from smc.certificates import authority
from smc.certificates import credential as credentials
from smc.cli import rotate
from smc.cli.program import program
from smc.cli.session import Config
from smc.codec import encode
from smc.keys import Keys
from smc.model import Name
from smc.records import Phase, ReadyRecord, Rotates, RotationRecord
from tests.unit.api.replica import Replica, running

BUYER = Name("shop", "buyer")


@dataclass
class Desk:
    replica: Replica
    home: Path

    @property
    def keys(self) -> Keys:
        return self.replica.keys

    async def smc(self, *arguments: str) -> Result:
        environment = {"SMC_CREDENTIAL": str(self.home), "NO_COLOR": "1"}

        def run() -> Result:
            return CliRunner().invoke(program, ["cert", "rotate", *arguments], env=environment, prog_name="smc")

        return await asyncio.to_thread(run)

    async def asked(self) -> RotationRecord:
        async with asyncio.timeout(20):
            while True:
                found = (await authority.load_stored(self.replica.kv, self.keys)).rotation
                if found is not None:
                    return found
                await asyncio.sleep(0.05)

    async def be(self, record: RotationRecord) -> None:
        """As the leader would have it."""
        await self.replica.kv.transact([Put(self.keys.rotation, encode(record))])

    async def looked(self) -> None:
        """Until the command has seen what there is now: one answer may be under way, and be of before."""
        looks = self.replica.metrics.api_calls.labels("Rotation", "OK")._value
        enough = looks.get() + 2
        async with asyncio.timeout(60):
            while looks.get() < enough:  # noqa: ASYNC110 - it is in another thread
                await asyncio.sleep(0.01)


@pytest.fixture
async def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    monkeypatch.setattr(rotate, "LOOK_AGAIN", 0.05)
    monkeypatch.setattr(rotate, "CALM", 0.2)
    with capture_logs():
        async with running() as replica:
            credentials.write(tmp_path, replica.operator)
            Config((replica.api,), "default").write(tmp_path)
            yield Desk(replica, tmp_path)


async def test_each_phase_is_a_line_and_the_end_is_the_end(desk: Desk) -> None:
    running_ = asyncio.create_task(desk.smc("--root"))
    record = replace(await desk.asked(), intermediate=1)
    for phase in (Phase.PUBLISHING, Phase.SIGNING, Phase.RETIRING):
        # This replica is no member, so nobody is missing: what phase it is, the test says.
        await desk.be(replace(record, phase=phase, since=time.time()))
        await desk.looked()
    await desk.be(replace(record, phase=Phase.DONE, since=time.time()))
    result = await running_
    assert result.exit_code == 0, result.output
    phases = [line.split(":")[1].strip() for line in result.stdout.splitlines()]
    assert phases[-4:] == ["publishing", "signing", "retiring", "done"]


async def test_who_is_missing_is_named_and_the_exit_code_says_so_after_the_timeout(desk: Desk) -> None:
    await desk.replica.kv.transact([Put(desk.keys.ready(BUYER), encode(ReadyRecord(BUYER)))])
    running_ = asyncio.create_task(desk.smc("--root", "--timeout", "3s"))
    record = await desk.asked()
    await desk.be(replace(record, phase=Phase.PUBLISHING, intermediate=1, since=time.time()))
    result = await running_
    assert result.exit_code == 6, result.output
    assert "warning: shop/buyer: connected to no replica" in result.stderr
    assert "after 3 s the rotation of the root is publishing, and waits" in result.stderr
    assert (await desk.asked()).phase is Phase.PUBLISHING, "it goes on all the same"


async def test_a_second_one_looks_on_and_says_who_has_asked(desk: Desk) -> None:
    await desk.be(RotationRecord("abc", Rotates.ROOT, "spiffe://mesh.example/operator/ann", Phase.PUBLISHING, 0, 0, 1))
    running_ = asyncio.create_task(desk.smc("--root", "-o", "json"))
    await desk.looked()
    await desk.be(replace(await desk.asked(), phase=Phase.DONE, left_behind=("shop/buyer",)))
    result = await running_
    assert result.exit_code == 0, result.output
    assert "the rotation of the root is under way: spiffe://mesh.example/operator/ann has asked for it" in result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert {line["id"] for line in lines} == {"abc"}
    assert (lines[-1]["phase"], lines[-1]["done"], lines[-1]["leftBehind"]) == ("done", True, ["shop/buyer"])
    assert "left behind: shop/buyer" in result.stderr
    assert "smc token create" in result.stderr


async def test_the_other_kind_has_to_wait(desk: Desk) -> None:
    first = asyncio.create_task(desk.smc("--root", "--timeout", "1s"))
    await desk.asked()
    result = await desk.smc("--intermediate")
    assert result.exit_code == 1
    assert "a rotation of the root is under way" in result.stderr
    await first


async def test_control_c_ends_the_command_and_not_the_rotation(desk: Desk) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "smc", "cert", "rotate", "--root"),
        env={**os.environ, "SMC_CREDENTIAL": str(desk.home), "NO_COLOR": "1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    first = await asyncio.wait_for(process.stdout.readline(), 60)
    assert first.startswith(b"root: requested")
    process.send_signal(signal.SIGINT)
    _, errors = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 130
    assert "it goes on without you; smc cert rotate --root looks on again" in errors.decode()
    assert (await desk.asked()).phase is Phase.REQUESTED


async def test_a_credential_of_the_authority_before_is_renewed_with_the_next_command(desk: Desk) -> None:
    before = credentials.read(desk.home)
    shown = desk.replica.credential
    desk.replica.credential = replace(shown, roots=(*shown.roots, shown.roots[0]))
    first = asyncio.create_task(desk.smc("--root", "--timeout", "1s"))
    await first
    assert credentials.read(desk.home).chain != before.chain
