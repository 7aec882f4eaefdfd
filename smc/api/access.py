"""Who may call what: one literal table, read in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from smc.errors import Denied

OPERATOR, VIEWER, PROXY, REPLICA = "operator", "viewer", "proxy", "replica"

ROLES: Mapping[str, frozenset[str]] = {
    "Apply": frozenset({OPERATOR}),
    "Get": frozenset({OPERATOR, VIEWER}),
    "List": frozenset({OPERATOR, VIEWER}),
    "Delete": frozenset({OPERATOR}),
    "Proxies": frozenset({OPERATOR, VIEWER, REPLICA}),
    "Wait": frozenset({OPERATOR, VIEWER}),
    "Acks": frozenset({OPERATOR, VIEWER, REPLICA}),
    "Denials": frozenset({OPERATOR, VIEWER, REPLICA}),
    "ReportDenials": frozenset({PROXY}),
    "Explain": frozenset({OPERATOR, VIEWER}),
    "Diff": frozenset({OPERATOR, VIEWER}),
    "Config": frozenset({OPERATOR, VIEWER}),
    "Reach": frozenset({OPERATOR, VIEWER}),
    "CreateToken": frozenset({OPERATOR}),
    "Certificates": frozenset({OPERATOR, VIEWER}),
    "Revoke": frozenset({OPERATOR}),
    "Renew": frozenset({OPERATOR, VIEWER, PROXY}),
    "Trust": frozenset({PROXY}),
    "Rotate": frozenset({OPERATOR}),
    "Rotation": frozenset({OPERATOR, VIEWER}),
}
"""By method of the service `Mesh`. A method that is not here may be called by nobody."""


@dataclass(frozen=True, slots=True)
class Caller:
    trust_domain: str
    path: str
    """Of its credential: `operator/<name>`, `viewer/<name>`, `proxy/<namespace>/<workload>` or `replica/<name>`."""
    serial: str = ""
    """Of its credential, in hexadecimal."""
    not_after: float = 0.0
    """When its credential ends, in seconds since 1970."""

    @property
    def role(self) -> str:
        return self.path.partition("/")[0]

    @property
    def uri(self) -> str:
        return f"spiffe://{self.trust_domain}/{self.path}"


def authorise(caller: Caller, method: str) -> None:
    """Check that the caller's role may call the method.

    Raises:
        Denied: it may not.
    """
    roles = ROLES.get(method, frozenset())
    if caller.role not in roles:
        allowed = " or ".join(sorted(roles)) or "nobody"
        raise Denied(
            f"{caller.uri} may not call {method}: that takes the role {allowed}",
            hint="use a credential of that role; an operator makes one with smc token create",
        )
