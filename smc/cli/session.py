"""A call to the control plane: with the credential of a directory, to the first replica that answers."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from smc.cli import say
from smc.errors import Exhausted, Expired, Invalid, NotFound, SmcError, Unavailable

if TYPE_CHECKING:
    from smc.certificates.credential import Credential
    from smc.v1 import smc_pb2 as pb

CONFIG = "config.json"
API_PORT = 15129
TIMEOUT = 25.0
"""Seconds for one call: the replica itself takes at most 20."""
BUSY = 10.0
"""Seconds to go on trying while the replica says that it is too much."""
RENEW_AGAIN = 60.0
"""Seconds."""
MAX_MESSAGE = 64 * 1024 * 1024
OPTIONS = (
    ("grpc.min_reconnect_backoff_ms", 3000),
    ("grpc.max_metadata_size", 64 * 1024),
    ("grpc.absolute_max_metadata_size", 128 * 1024),
)

F = TypeVar("F", bound=Callable[..., Any])


class InvalidDocument(Invalid):
    """The control plane refuses a manifest."""

    def __init__(self, message: str, hint: str, findings: Sequence[pb.Finding], more: int) -> None:
        super().__init__(message, hint=hint)
        self.findings = tuple(findings)
        self.more = more


@dataclass(frozen=True, slots=True)
class Config:
    """`config.json` beside the credential."""

    servers: tuple[str, ...] = ()
    """host:port of the API."""
    mesh: str = ""

    @classmethod
    def read(cls, directory: Path) -> Config:
        """Read it; one that is not there has no servers.

        Raises:
            Invalid: it cannot be read.
        """
        path = directory / CONFIG
        try:
            document = json.loads(path.read_text())
            return cls(tuple(str(s) for s in document["servers"]), str(document.get("mesh", "")))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise Invalid(f"{path} cannot be read: {type(e).__name__}", hint="log in again with a new token") from None

    def write(self, directory: Path) -> None:
        new = directory / f".{CONFIG}.new"
        new.write_text(json.dumps({"servers": self.servers, "mesh": self.mesh}, indent=2) + "\n")
        new.replace(directory / CONFIG)


class Session:
    """Calls the API. Servers are tried in turn; the one that answered is asked first the next time.

    The credential in `directory` is read at the first call. `servers` win over those of its configuration.
    """

    def __init__(self, directory: Path, servers: Sequence[str]) -> None:
        self._directory = directory
        self._servers = [with_port(s) for s in servers]
        self._channels: dict[str, Any] = {}
        self._renew_again = 0.0
        self._authority = ""
        """Of the replica that answered last: see `Credential.authority`."""

    @cached_property
    def credential(self) -> Credential:
        """Read it.

        Raises:
            NotFound: there is none.
            Invalid: it cannot be used, or no server is known.
            Expired: it is past its time.
        """
        from smc.certificates import credential as credentials

        try:
            credential = credentials.read(self._directory)
        except NotFound:
            raise NotFound(
                f"there is no credential in {self._directory}",
                hint="make one with smc init or smc login, or name its directory by --credential or SMC_CREDENTIAL",
            ) from None
        if credential.not_after <= time.time():
            raise Expired(
                f"the credential of {credential.uri} in {self._directory} has expired",
                hint="smc login, with a token from another operator; if there is none, smc recover",
            )
        self._servers = self._servers or [with_port(s) for s in Config.read(self._directory).servers]
        if not self._servers:
            raise Invalid("it is not known where the control plane is", hint=f"--server <host>:{API_PORT}")
        return credential

    @property
    def servers(self) -> tuple[str, ...]:
        """host:port of each; known once the credential was read."""
        return tuple(self._servers)

    def call(
        self, method: str, request: Any, *, metadata: Mapping[str, str] | None = None, timeout: float = TIMEOUT
    ) -> Any:
        """Call one method of the service Mesh; `timeout` is the seconds that each replica has.

        Raises:
            SmcError: what the replica says; Unavailable if none answers, with each one's reason.
        """
        credential = self.credential
        failures: list[Unavailable] = []
        for server in tuple(self._servers):
            try:
                response = self._ask(server, credential, method, request, metadata or {}, timeout)
            except Unavailable as e:
                failures.append(e)
                continue
            self._servers.remove(server)
            self._servers.insert(0, server)
            return response
        reasons = list(dict.fromkeys(e.message for e in failures))
        raise Unavailable("; ".join(reasons), hint=failures[0].hint)

    def _ask(
        self,
        server: str,
        credential: Credential,
        method: str,
        request: Any,
        metadata: Mapping[str, str],
        timeout: float,
    ) -> Any:
        import grpc

        from smc.api.status import AUTHORITY, from_rpc
        from smc.channels import blocking_channel_to
        from smc.v1 import smc_pb2_grpc

        if server not in self._channels:
            self._channels[server] = blocking_channel_to(server, credential, *OPTIONS, max_message=MAX_MESSAGE)
        stub = smc_pb2_grpc.MeshStub(self._channels[server])  # type: ignore[no-untyped-call]
        give_up = time.monotonic() + min(BUSY, timeout)
        wait = 0.1
        while True:
            try:
                response, call = getattr(stub, method).with_call(
                    request, timeout=timeout, metadata=tuple(metadata.items())
                )
                self._authority = dict(call.trailing_metadata() or ()).get(AUTHORITY, "")
                return response
            except grpc.RpcError as e:
                error, findings, more = from_rpc(e, server)
                if isinstance(error, Exhausted) and time.monotonic() + wait < give_up:
                    time.sleep(wait)
                    wait = min(2 * wait, 2.0)
                    continue
                if findings:
                    raise InvalidDocument(error.message, error.hint, findings, more) from None
                raise error from None

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()

    def keep_fresh(self) -> None:
        """Renew the credential, and use the new one from then on.

        It is due past half of its life, and once the replicas trust other roots or show what another intermediate has
        signed. If that fails it is used while it lives, and a call within the next RENEW_AGAIN does not try.
        """
        if "credential" not in self.__dict__ or time.time() < self._renew_again:
            return
        is_outdated = self._authority not in ("", self.credential.authority)
        if time.time() < self.credential.renew_at and not is_outdated:
            return
        from smc.certificates import credential as credentials
        from smc.certificates import x509
        from smc.certificates.credential import Credential
        from smc.v1 import smc_pb2 as pb

        try:
            key = x509.new_key()
            answer = self.call("Renew", pb.RenewRequest(csr=x509.request(key)))
            roots = tuple(answer.roots)
            x509.check_answer(answer.chain, key.public_key(), self.credential.uri, roots, time.time())
            renewed = Credential(self.credential.uri, answer.chain, x509.private_pem(key).decode(), roots)
            credentials.write(self._directory, renewed)
            # Unless it is reached in another way than by its replicas' own addresses.
            if set(Config.read(self._directory).servers) & set(answer.api_addresses):
                Config(tuple(answer.api_addresses), answer.mesh).write(self._directory)
            self.close()
            del self.credential
        except (SmcError, OSError) as e:
            self._renew_again = time.time() + RENEW_AGAIN
            left = max(0.0, self.credential.not_after - time.time()) / 3600
            say.warning(
                f"the credential in {self._directory} could not be renewed; it is good for {left:.1f} h more: {e}"
            )


def with_port(server: str) -> str:
    """`host` with the API's port, unless it says one."""
    host, colon, port = server.rpartition(":")
    if colon and port.isdigit() and (":" not in host or host.endswith("]")):
        return server
    return f"[{server}]:{API_PORT}" if ":" in server and not server.startswith("[") else f"{server}:{API_PORT}"


def default_directory() -> Path:
    return Path(os.environ.get("SMC_CREDENTIAL") or Path.home() / ".smc")


def credential_option(f: F) -> F:
    return click.option(
        "--credential",
        type=click.Path(path_type=Path, file_okay=False),
        default=default_directory,
        show_default="~/.smc",
        help="The directory with your credential [SMC_CREDENTIAL].",
    )(f)


def server_option(f: F) -> F:
    return click.option(
        "--server",
        multiple=True,
        metavar="HOST[:PORT]",
        help="A replica's API; several are tried in turn. Default: those that the credential came with.",
    )(f)


def connected(f: Callable[..., Any]) -> Callable[..., Any]:
    """A command that talks to the control plane: it gets a Session first."""

    def run(credential: Path, server: tuple[str, ...], **arguments: Any) -> Any:
        with contextlib.closing(Session(credential, server)) as session:
            result = f(session, **arguments)
            session.keep_fresh()
            return result

    return credential_option(server_option(update_wrapper(run, f)))
