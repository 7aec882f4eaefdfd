"""The life of a proxy: get a credential or use the one there is, start Envoy, keep both going until told to stop.

Or, for a gRPC program, what stands there in place of Envoy.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import structlog

from smc.certificates import credential as credentials
from smc.certificates.credential import Credential
from smc.certificates.tokens import Token
from smc.envoy import bootstrap as bootstraps
from smc.envoy import proxyless
from smc.errors import Denied, Expired, Invalid, NotFound, SmcError
from smc.injector.rules import Interception
from smc.model import Name
from smc.proxy import denials, enrolment, envoy, interception, program, resolver
from smc.proxy.enrolment import CREDENTIAL, Enrolment
from smc.proxy.join import join
from smc.proxy.renewal import LEFT_BEHIND, LEFT_BEHIND_HINT, is_left_behind, keep_fresh, renew
from smc.proxy.settings import Exit, ProxyFailed, ProxySettings

BOOTSTRAP, READY, LOCK, ENVOY_LOG = "bootstrap.json", "ready", ".lock", "envoy.log"

_STDOUT = 1
STILL_TAKEN = 5.0
"""Seconds that a proxy with a token asks whether the credential that it has is revoked."""

_log = structlog.get_logger(__name__)


async def run_proxy(settings: ProxySettings, *, now: Callable[[], float] = time.time) -> int:
    """Run one proxy until SIGTERM or SIGINT; returns the exit code, one of `Exit`.

    It must be called in the main thread. What went wrong is on standard error and in the log, never with a key or a
    token. Once Envoy is live and holds its workload's certificate, and only then, there is a file `ready` in the
    directory; beside a gRPC program, once there is what that needs. SIGUSR1 goes on to Envoy, which then opens its
    logs anew.

    With interception the rules come first, and Envoy second: what begins in between is refused, not let through. They
    are taken back when it is told to stop, and only then; a failure leaves them, and what they redirect is refused.
    """
    stop = asyncio.Event()
    user = settings.interception.proxy_uid if settings.interception is not None else None
    log = settings.envoy_log
    if log is None and not envoy.may_open(_STDOUT, user):
        log = settings.directory / ENVOY_LOG
        _log.info("Envoy cannot open our standard output, and writes to a file", file=str(log))
    run = _Run(settings, user, log, now, stop)
    ended = Exit.STOPPED
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    for number in signals:
        loop.add_signal_handler(number, run.on_signal, number)
    try:
        async with AsyncExitStack() as held:
            if settings.interception is not None:
                held.enter_context(interception.claimed())
                interception.prepare(settings.interception, settings.directory, log)
                await held.enter_async_context(resolver.answering(group=settings.interception.proxy_uid))
            held.enter_context(_owned(settings.directory))
            await run.run()
            if settings.interception is not None:
                _log.info("interception ended", removed=interception.remove())
    except* ProxyFailed as group:
        failed = _first(group)
        _log.error("the proxy cannot run", error=failed.message, hint=failed.hint, exit=int(failed.exit))
        sys.stderr.write(f"error: {failed}\n")
        if run.intercepts:
            sys.stderr.write("traffic stays redirected, and is refused, until a proxy runs or `smc proxy clean`\n")
        ended = failed.exit
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
    return int(ended)


def _first(error: BaseExceptionGroup[ProxyFailed] | ProxyFailed) -> ProxyFailed:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class _Run:
    def __init__(
        self,
        settings: ProxySettings,
        user: int | None,
        log: Path | None,
        now: Callable[[], float],
        stop: asyncio.Event,
    ) -> None:
        self._settings = settings
        self._user = user
        self._log = log
        self._now = now
        self._stop = stop
        self._rules: Interception | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._entered: tuple[Credential, Enrolment] | None = None
        self._beside: list[asyncio.Task[None]] = []
        self._news = asyncio.Event()

    def on_signal(self, number: signal.Signals) -> None:
        _log.info("signal received", signal=number.name)
        if number == signal.SIGUSR1:
            envoy.pass_on(self._process, number)
        else:
            self._stop.set()

    @property
    def intercepts(self) -> bool:
        """Whether it has written rules."""
        return self._rules is not None

    async def run(self) -> None:
        directory = self._settings.directory
        self._died()
        self._intercept_again()
        # Before the token is used: a machine without Envoy should not spend it.
        executable = "" if self._settings.grpc else envoy.find(self._settings.envoy, os.environ)
        entered = await envoy.first(self._enter(), self._stop.wait())
        if entered is None:
            return
        self._entered = credential, enrolled = entered
        self._intercept(enrolled)
        async with asyncio.TaskGroup() as tasks:
            fresh = tasks.create_task(
                keep_fresh(
                    directory,
                    credential,
                    enrolled,
                    news=self._news,
                    now=self._now,
                    renewed=self._renewed,
                    rejoin=self._join if self._settings.token else None,
                ),
                name="proxy: renewal",
            )
            if self._settings.grpc:
                beside = program.serve(directory, self._who, news=self._news, ready=self._program_ready)
                try:
                    await envoy.first(beside, self._stop.wait())
                finally:
                    self._died()
            else:
                await self._run_envoy(executable, tasks)
            fresh.cancel()

    async def _run_envoy(self, executable: str, tasks: asyncio.TaskGroup) -> None:
        credential, enrolled = self._who()
        admin = self._write_bootstrap(credential, enrolled)
        flags = bootstraps.flags(
            str(self._settings.directory / BOOTSTRAP),
            concurrency=self._settings.concurrency,
            log_level=self._settings.envoy_log_level,
        )
        # Hot restart leaves a segment of shared memory behind at every start, and nobody here restarts hot.
        command = [executable, *flags, "--disable-hot-restart"]

        def started(process: asyncio.subprocess.Process) -> None:
            self._process = process
            self._beside = [
                tasks.create_task(self._report_ready(admin, enrolled), name="proxy: ready"),
                tasks.create_task(denials.report(admin, self._who, now=self._now), name="proxy: denials"),
                tasks.create_task(envoy.watch_secrets(admin, self._news), name="proxy: secrets"),
            ]

        await envoy.supervise(
            command,
            stop=self._stop,
            user=self._user,
            log=self._log,
            stop_timeout=self._settings.stop_timeout,
            started=started,
            died=self._died,
        )

    async def _enter(self) -> tuple[Credential, Enrolment]:
        """The credential that is there, if it is still good, or one for the token."""
        settings = self._settings
        try:
            credential = credentials.read(settings.directory / CREDENTIAL)
            enrolled = enrolment.read(settings.directory)
            if enrolled is None:
                raise NotFound(f"there is no enrolment in {settings.directory}")  # noqa: TRY301
            credential.check(self._now())
        except NotFound:
            failure = ProxyFailed(
                Exit.USAGE,
                f"there is no credential in {settings.directory}, and no token was given",
                hint="give a token: smc token create makes one",
            )
        except Expired as e:
            late = credential.not_after <= self._now()
            failure = ProxyFailed(
                Exit.CREDENTIAL_EXPIRED if late else Exit.CLOCK_SKEW,
                e.message,
                hint="ask for a new token: smc token create" if late else e.hint,
            )
        except Invalid as e:
            failure = ProxyFailed(Exit.FAILED, e.message, hint=e.hint or "join again with a new token")
        else:
            if await is_left_behind(credential, enrolled):
                failure = ProxyFailed(Exit.LEFT_BEHIND, LEFT_BEHIND, hint=LEFT_BEHIND_HINT)
            else:
                fresh = await self._still_taken(credential, enrolled) if settings.token else (credential, enrolled)
                if fresh is not None:
                    credential = fresh[0]
                    _log.info(
                        "using the credential that is there", credential=credential.uri, not_after=credential.not_after
                    )
                    return fresh
                failure = ProxyFailed(Exit.REFUSED, f"the credential of {credential.uri} is revoked")
        if not settings.token:
            raise failure
        return await self._join()

    async def _join(self) -> tuple[Credential, Enrolment]:
        """A credential for the token."""
        settings = self._settings
        try:
            token = Token.parse(settings.token)
        except Invalid as e:
            raise ProxyFailed(Exit.USAGE, e.message, hint=e.hint) from None
        if not settings.join:
            raise ProxyFailed(
                Exit.USAGE, "a token was given, but no address of a join port", hint="--join <host>:15130"
            )
        joined = await join(settings.directory, token, settings.join, timeout=settings.join_timeout, now=self._now)
        _log.info("joined", credential=joined[0].uri, not_after=joined[0].not_after, mesh=joined[1].mesh)
        return joined

    async def _still_taken(self, credential: Credential, enrolled: Enrolment) -> tuple[Credential, Enrolment] | None:
        """The credential, perhaps renewed; None if it is revoked, as far as anybody says within a few seconds.

        It is asked only where there is a token that would mend it: a restart has to need no control plane.
        """
        try:
            async with asyncio.timeout(STILL_TAKEN):
                return await renew(self._settings.directory, credential, enrolled, now=self._now)
        except Denied as e:
            _log.warning("the credential that is there is refused, so the token is used", error=str(e))
            return None
        except (TimeoutError, SmcError) as e:
            _log.info("it is not known whether the credential is still taken", error=str(e))
            return credential, enrolled

    def _write_bootstrap(self, _credential: Credential, enrolled: Enrolment) -> str:
        """Write what Envoy reads when it starts; returns its admin interface's host:port.

        Replicas that have moved since are found after the next start.
        """
        directory = self._settings.directory
        credential = (directory / CREDENTIAL).absolute()
        try:
            text = bootstraps.bootstrap(
                Name.parse(enrolled.proxy),
                enrolled.address,
                enrolled.xds_addresses,
                enrolled.trust_domain,
                str(credential),
                admin=self._settings.admin or None,
                re2_max_program_size=self._settings.re2_max_program_size,
            )
        except ValueError as e:
            raise ProxyFailed(
                Exit.REFUSED,
                f"the control plane's answer makes no bootstrap: {e}",
                hint="does the workload have an address?",
            ) from None
        for name, content in bootstraps.secret_files(str(credential)).items():
            enrolment.write_file(credential / name, content)
        enrolment.write_file(directory / BOOTSTRAP, text)
        admin = json.loads(text)["admin"]["address"]["socket_address"]
        return f"{admin['address']}:{admin['port_value']}"

    def _who(self) -> tuple[Credential, Enrolment]:
        assert self._entered is not None  # noqa: S101 - Envoy starts after that
        return self._entered

    def _renewed(self, credential: Credential, enrolled: Enrolment) -> None:
        self._entered = credential, enrolled
        self._intercept(enrolled)
        if not self._settings.grpc:
            self._write_bootstrap(credential, enrolled)

    def _intercept_again(self) -> None:
        """A machine that has joined before is closed from here on, whatever becomes of its credential or of Envoy."""
        try:
            enrolled = enrolment.read(self._settings.directory)
        except Invalid:
            return  # it will be said when it is needed
        if enrolled is not None:
            self._intercept(enrolled)

    def _intercept(self, enrolled: Enrolment) -> None:
        """Write the rules, if it is to intercept and they are not those that are there."""
        settings = self._settings.interception
        if settings is None:
            return
        wanted = interception.rules_of(settings, enrolled)
        if wanted != self._rules:
            backend = interception.apply(settings.backend, wanted)
            self._rules = wanted
            _log.info("interception begins", backend=backend, address=str(wanted.address))
            interception.check_route()

    async def _report_ready(self, admin: str, enrolled: Enrolment) -> None:
        await envoy.wait_until_ready(admin, intercepts=self.intercepts)
        pid = self._process.pid if self._process is not None else 0
        self._ready(enrolled, pid=pid, admin=admin)

    def _program_ready(self) -> None:
        bootstrap = str((self._settings.directory / program.BOOTSTRAP).absolute())
        self._ready(self._who()[1], **{proxyless.VARIABLE: bootstrap})

    def _ready(self, enrolled: Enrolment, **what: Any) -> None:
        text = json.dumps({"proxy": enrolled.proxy, **what}) + "\n"
        try:
            enrolment.write_file(self._settings.directory / READY, text)
        except OSError as e:
            # A full disk must not take Envoy with it.
            _log.warning("the file ready cannot be written", error=str(e))
        _log.info("ready", proxy=enrolled.proxy, mesh=enrolled.mesh, **what)

    def _died(self) -> None:
        """Envoy, or what is in its place, does not run: it is not ready, and nothing that is beside it goes on."""
        for task in self._beside:
            task.cancel()
        self._beside = []
        (self._settings.directory / READY).unlink(missing_ok=True)


@contextmanager
def _owned(directory: Path) -> Iterator[None]:
    """Hold the directory for this process alone; the kernel gives it free however the process ends.

    Raises:
        ProxyFailed: another process holds it, or it cannot be made.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise ProxyFailed(Exit.FAILED, f"{directory} cannot be written: {e.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ProxyFailed(
            Exit.FAILED, f"another process runs a proxy in {directory}", hint="one proxy, one directory"
        ) from None
    finally:
        os.close(descriptor)
