"""Child processes that are started, watched, hurt on purpose, and never left behind.

A child dies with its parent however that ends: before it becomes the program that was asked for, it tells the kernel
so (PR_SET_PDEATHSIG). That is done by a small Python of its own and not between fork and exec in *this* process, where
a thread may hold a lock that the child would wait for for ever. The kernel means the parent *thread*: start children in
the main thread. Each child leads a session of its own, so that Ctrl-C on the terminal reaches it only through us.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp

from smc.errors import SmcError

POLL = 0.05
TAIL = 40

_PREPARE = """
import ctypes, os, signal, sys
parent, *command = sys.argv[1:]
if ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0) != 0:
    sys.exit("prctl: " + os.strerror(ctypes.get_errno()))
if os.getppid() != int(parent):  # it died before the kernel was told
    sys.exit(1)
os.execvp(command[0], command)
"""


class ProcessFailed(SmcError):
    """A child ended, or did not get ready in time. The message has the end of its log."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command came to its end."""

    code: int
    """As `subprocess` has it: negative for a signal."""
    output: str
    errors: str


class Process:
    """One program: a name, a command, and the log that gets its standard output and error.

    It can be started again after it ended, with the same log.
    """

    def __init__(
        self, name: str, argv: Sequence[str], log: Path, *, role: str = "", env: Mapping[str, str] | None = None
    ) -> None:
        """`env` is added to this process's own, without its proxy settings. Equal roles are stopped together."""
        self.name = name
        self.role = role or name
        self.argv = tuple(argv)
        self.log = log
        self.env = dict(env or {})
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it.

        Raises:
            ProcessFailed: it runs already.
        """
        if self.alive:
            raise ProcessFailed(f"{self.name} runs already, with pid {self.pid}")
        inherited = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", "-c", _PREPARE, str(os.getpid()), *self.argv),
                env=inherited | self.env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        """0: it was never started."""
        return self._process.pid if self._process is not None else 0

    @property
    def returncode(self) -> int | None:
        """As `subprocess` has it: negative for a signal; None while it runs, or if it never did."""
        return self._process.returncode if self._process is not None else None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it runs."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)

    def terminate(self) -> None:
        self.signal(signal.SIGTERM)

    def pause(self) -> None:
        """SIGSTOP: it hangs, and its sockets stay open."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        await self.wait()

    async def stop(self, timeout: float = 10.0) -> None:
        """SIGTERM, and SIGKILL if it has not ended after `timeout` seconds."""
        self.resume()
        self.terminate()
        try:
            async with asyncio.timeout(timeout):
                await self.wait()
        except TimeoutError:
            await self.kill()

    async def wait(self) -> None:
        """Until it has ended. Cancelling is safe."""
        if self._process is not None:
            await self._process.wait()

    async def until(self, check: Callable[[], Awaitable[bool]], what: str, *, timeout: float) -> None:
        """Ask `check` again and again until it says yes; `what` names in words what is waited for.

        Raises:
            ProcessFailed: the process ended, or `timeout` seconds went by.
        """
        try:
            async with asyncio.timeout(timeout):
                while not await check():
                    if not self.alive:
                        raise self.failure(f"ended with {self.returncode} before {what}")
                    await asyncio.sleep(POLL)
        except TimeoutError:
            raise self.failure(f"not within {timeout:g} s: {what}") from None

    def failure(self, why: str) -> ProcessFailed:
        return ProcessFailed(f"{self.name}: {why}; the end of {self.log}:\n{self.log_tail()}")

    def log_tail(self, lines: int = TAIL) -> str:
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, self.log.stat().st_size - 400 * lines))
                return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return ""


class Children:
    """All processes of one run, the directory of their logs, and an HTTP client to ask them with.

    On leaving, they are asked to end: the ones that were started last first, those of one role together, and killed
    when they do not.
    """

    def __init__(self, directory: Path, *, patience: float = 3.0) -> None:
        """`patience`: seconds that each role has to end."""
        self.directory = directory
        self.logs = directory / "logs"
        self._patience = patience
        self._processes: list[Process] = []
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self.logs.mkdir(parents=True, exist_ok=True)
        timeout = aiohttp.ClientTimeout(total=5)
        self._http = aiohttp.ClientSession(timeout=timeout, trust_env=False)
        return self

    async def __aexit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        try:
            await self.stop()
        finally:
            if self._http is not None:
                await self._http.close()

    @property
    def http(self) -> aiohttp.ClientSession:
        if self._http is None:
            raise RuntimeError("the children are not entered yet")
        return self._http

    @property
    def processes(self) -> tuple[Process, ...]:
        """In the order of their start."""
        return tuple(self._processes)

    def process(
        self, name: str, argv: Sequence[str], *, role: str = "", env: Mapping[str, str] | None = None
    ) -> Process:
        """One that is owned from now on, not started yet."""
        process = Process(name, argv, self.logs / f"{name.replace('/', '_')}.log", role=role, env=env)
        self._processes.append(process)
        return process

    async def run(self, name: str, argv: Sequence[str], *, env: Mapping[str, str], timeout: float = 30.0) -> str:
        """Run a command to its end, and return what it wrote on standard output.

        Raises:
            ProcessFailed: it ended with another code than 0, or not in `timeout` seconds; with its standard error.
        """
        ended = await self.ended(name, argv, env=env, timeout=timeout)
        if ended.code != 0:
            raise ProcessFailed(f"{name}: ended with {ended.code}:\n{ended.errors[-4000:]}")
        return ended.output

    async def ended(self, name: str, argv: Sequence[str], *, env: Mapping[str, str], timeout: float = 30.0) -> Ended:
        """Run a command to its end, whichever that is. What it writes is not written to a log.

        Raises:
            ProcessFailed: not in `timeout` seconds.
        """
        inherited = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-c", _PREPARE, str(os.getpid()), *argv),
            env=inherited | dict(env),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(timeout):
                output, errors = await process.communicate()
        except TimeoutError:
            raise ProcessFailed(f"{name}: did not end within {timeout:g} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None  # noqa: S101
        return Ended(process.returncode, output.decode(), errors.decode(errors="replace"))

    async def answers(self, url: str, *, status: int = 200) -> bool:
        """Whether a GET has this status."""
        try:
            async with self.http.get(url) as answer:
                return answer.status == status
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def stop(self) -> None:
        """Stop all that run; they may be started again."""
        for _, group in itertools.groupby(reversed(self._processes), key=lambda process: process.role):
            async with asyncio.TaskGroup() as tasks:
                for process in group:
                    tasks.create_task(process.stop(self._patience))
