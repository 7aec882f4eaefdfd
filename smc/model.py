"""The nouns of a mesh: frozen values that every layer speaks in.

Collections are sorted tuples, never sets or dictionaries, wherever their order could reach the wire: two replicas that
read the same records must make the same bytes. Nothing here knows where a value came from or where it goes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from enum import Enum
from typing import NamedTuple


class Name(NamedTuple):
    """A name within a namespace; written `<namespace>/<name>`.

    A tuple, for it is the key of nearly every table: a dataclass computes its hash in Python, each time.
    """

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"

    @classmethod
    def parse(cls, text: str) -> Name:
        """Read `<namespace>/<name>`.

        Raises:
            ValueError: not of that form.
        """
        namespace, slash, name = text.partition("/")
        if not (namespace and slash and name) or "/" in name:
            raise ValueError(f"{text!r} is not of the form <namespace>/<name>")
        return cls(namespace, name)


@dataclass(frozen=True, slots=True, order=True)
class Identity:
    """Who a workload is, whatever machine it runs on: a service account in a namespace.

    Any number of workloads may share one; permissions are granted to identities and to nothing else.
    """

    namespace: str
    service_account: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.service_account}"

    def uri(self, trust_domain: str) -> str:
        """The SPIFFE ID that its certificate carries as the only subject alternative name."""
        return f"spiffe://{trust_domain}/ns/{self.namespace}/sa/{self.service_account}"


class Protocol(Enum):
    """What a service port speaks to its application."""

    HTTP = "http"
    HTTP2 = "http2"
    GRPC = "grpc"
    TCP = "tcp"
    """Any bytes. All others are HTTP, and every two of them can stand for each other between proxies."""


@dataclass(frozen=True, slots=True, order=True)
class Locality:
    region: str = ""
    zone: str = ""
    sub_zone: str = ""


@dataclass(frozen=True, slots=True, order=True)
class ServicePort:
    number: int
    protocol: Protocol
    target: str
    """The workload's port: a number in decimal, or the name of one of the workload's ports."""


@dataclass(frozen=True, slots=True)
class Service:
    """The name that callers use."""

    name: Name
    ports: tuple[ServicePort, ...]
    """Sorted by number."""
    address: str = ""
    """The IP address that its platform gives it; "": none, and intercepted callers get a virtual one."""


@dataclass(frozen=True, slots=True, order=True)
class WorkloadPort:
    name: str
    number: int


class Sidecar(Enum):
    """How a workload's traffic meets the mesh."""

    EXPLICIT = "explicit"
    """The application names its proxy (`http_proxy`): HTTP, and TCP by CONNECT."""
    INTERCEPTED = "intercepted"
    """The kernel redirects what the application sends and receives to its proxy."""
    GRPC = "grpc"
    """There is none: the application is a gRPC program that is told by xDS itself, and speaks TLS itself."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What runs behind one proxy: a pod, a virtual machine, a process."""

    name: Name
    address: str
    """The IP address at which other proxies reach its proxy."""
    identity: Identity
    app_address: str = "127.0.0.1"
    """The IP address at which its own proxy reaches the application."""
    labels: tuple[tuple[str, str], ...] = ()
    ports: tuple[WorkloadPort, ...] = ()
    """What the application listens on. Empty: whatever the services say."""
    services: tuple[str, ...] = ()
    """The services of its namespace that it backs."""
    locality: Locality = Locality()
    weight: int = 1
    """Relative to the other endpoints of a service; at least 1."""
    reachable: tuple[Name, ...] | None = None
    """The services that its proxy is told about; None: all. Only a bound on its configuration, never a permission."""
    sidecar: Sidecar = Sidecar.EXPLICIT


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """One workload as it backs one service."""

    workload: Name
    address: str
    identity: Identity
    ports: tuple[tuple[int, int], ...]
    """(service port, application port), sorted."""
    locality: Locality = Locality()
    weight: int = 1
    proxyless: bool = False
    """It is dialled at the application port itself."""


@dataclass(frozen=True, slots=True)
class Endpoints:
    """All endpoints of one service from one source; sorted by workload."""

    service: Name
    endpoints: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class Observation:
    """The whole truth of one source at one moment, and how far it goes: what is missing is gone, unless there is
    something `unknown`.
    """

    services: tuple[Service, ...] = ()
    endpoints: tuple[Endpoints, ...] = ()
    workloads: tuple[Workload, ...] = ()
    problems: tuple[Problem, ...] = ()
    unknown: tuple[str, ...] = ()
    """Parts of the source that cannot be read and that the informer has never read, such as files; sorted.

    While there are any, what is missing may well be there. Each has a Problem too.
    """


class Severity(Enum):
    ERROR = "error"
    """The manifest has no effect, or less than it says."""
    WARNING = "warning"
    """The manifest has effect, and something about it is likely not meant."""


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """Why a manifest has no or less effect, said where it was written."""

    manifest: str
    """`<group>/<kind>/<namespace>/<name>`, as in the manifest's key; for an informer's objects `<source>:<file>`."""
    reason: str
    """One CamelCase word, stable, for machines: `BackendNotFound`."""
    message: str
    """For people: what, where, why, what to do."""
    field: str = ""
    """The path of the field, such as `spec.backends[1].service`."""
    severity: str = Severity.ERROR.value


# Rules: what policy manifests compile to, whatever API they were written in.


@dataclass(frozen=True, slots=True, order=True)
class HttpMatch:
    """A request matches if every part that is given matches."""

    path: str | None = None
    """An RE2 expression that must match the whole path, without the query; None: any."""
    methods: tuple[str, ...] = ()
    """Sorted upper-case names; empty: any."""
    headers: tuple[tuple[str, str], ...] = ()
    """(lower-case name, RE2 expression for the whole value), sorted; all must match."""


@dataclass(frozen=True, slots=True)
class Permission:
    """Whoever is among `sources` may do what one of `http` matches, to workloads of `destination`.

    Everything that no Permission allows is denied.
    """

    manifest: str
    mod_revision: int
    destination: Identity
    sources: tuple[Identity, ...]
    """Sorted, at least one."""
    http: tuple[HttpMatch, ...]
    """Sorted, at least one; an HttpMatch without parts allows any request."""
    also: tuple[tuple[str, int], ...] = ()
    """(manifest, mod_revision) of the other manifests that it was compiled from: route groups."""
    ports: tuple[int, ...] | None = None
    """Sorted, at least one; None: every port. As `Inbound.numbers` has them."""
    tcp: bool = False
    """Whether that includes ports that speak TCP: there is no request to match there, so whoever may do only some
    things may do nothing.
    """


@dataclass(frozen=True, slots=True)
class Binding:
    """Some identities of its own namespace, by what is known of their workloads. It says nothing of any other."""

    name: Name
    manifest: str
    mod_revision: int
    service_account: str = ""
    """This one; "": none so."""
    labels: tuple[tuple[str, str], ...] = ()
    """Those whose workloads all have all of these labels; empty: none so."""
    uris: tuple[str, ...] = ()
    """Those with one of these SPIFFE IDs."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What is a Permission to each identity of its destination, once the mesh knows whom its Bindings mean.

    The fields are a Permission's, except those that tell of identities.
    """

    manifest: str
    mod_revision: int
    destination: Identity | Name
    """An identity, or the name of a Binding."""
    sources: tuple[Identity, ...]
    """Sorted."""
    bindings: tuple[Name, ...]
    """Whose identities are sources too; sorted. One that is not there means nobody."""
    http: tuple[HttpMatch, ...]
    also: tuple[tuple[str, int], ...] = ()
    ports: tuple[int, ...] | None = None
    tcp: bool = False


@dataclass(frozen=True, slots=True, order=True)
class Backend:
    service: str
    """In the namespace of the root."""
    weight: int
    """In thousandths, at least 0; only ratios count."""


@dataclass(frozen=True, slots=True)
class Split:
    """Traffic to every port of `root` goes to the backends by weight."""

    manifest: str
    mod_revision: int
    root: Name
    backends: tuple[Backend, ...]
    """As written, at least one."""
    matches: tuple[HttpMatch, ...] = ()
    """Only the requests that one of these matches, sorted; empty: every request."""
    also: tuple[tuple[str, int], ...] = ()
    """(manifest, mod_revision) of the other manifests that it was compiled from: route groups."""

    @property
    def versions(self) -> tuple[tuple[str, int], ...]:
        """(manifest, mod_revision) of every manifest that it was compiled from."""
        return ((self.manifest, self.mod_revision), *self.also)


# What the owner of a service asks for beside policy: nothing of it is on unless somebody writes it.


@dataclass(frozen=True, slots=True)
class Retries:
    """Another attempt, at another endpoint where there is one."""

    attempts: int
    """Beside the first."""
    on: tuple[str, ...]
    """Envoy's words for what is tried again, sorted."""
    per_try_timeout: timedelta | None = None


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What one proxy may have open to one port of a service; None: as much as to any other."""

    connections: int | None = None
    pending_requests: int | None = None
    requests: int | None = None


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """How callers' proxies find out whether an endpoint is alive; None: as for any other service."""

    interval: timedelta | None = None
    timeout: timedelta | None = None
    unhealthy_threshold: int | None = None
    healthy_threshold: int | None = None


@dataclass(frozen=True, slots=True)
class OutlierDetection:
    """Endpoints whose answers say that they are ill get no traffic for a while."""

    consecutive_5xx: int
    interval: timedelta
    base_ejection_time: timedelta
    max_ejection_percent: int


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done to some requests on purpose. Shares are in millionths, 0: to none."""

    delay: timedelta | None = None
    delay_share: int = 0
    abort_status: int = 0
    abort_share: int = 0


@dataclass(frozen=True, slots=True)
class RateLimit:
    """A token bucket in each proxy of a service: what finds it empty is answered 429."""

    requests: int
    """Filled in each `per`."""
    per: timedelta
    burst: int
    """What the bucket holds; at least `requests`."""


@dataclass(frozen=True, slots=True)
class TrafficPolicy:
    """How the proxies of its callers, and for `rate_limit` its own, treat one service."""

    service: Name
    timeout: timedelta | None = None
    """Until the whole answer, retries included."""
    retries: Retries | None = None
    limits: ConnectionLimits | None = None
    health_check: HealthCheck | None = None
    outlier_detection: OutlierDetection | None = None
    fault: Fault | None = None
    rate_limit: RateLimit | None = None


@dataclass(frozen=True, slots=True)
class Treatment:
    """The TrafficPolicy that counts for a service, and who says so."""

    policy: TrafficPolicy
    source: tuple[str, int]
    """(manifest, mod_revision)"""


class Egress(Enum):
    """What becomes of a request to a host that no service answers to."""

    ALLOW = "allow"
    DENY = "deny"


@dataclass(frozen=True, slots=True)
class EgressHost:
    """Hosts outside the mesh that may be called although `Egress.DENY` holds."""

    host: str
    """Lower case, without a trailing dot. `*.<suffix>` is every host below the suffix, and not the suffix itself."""
    port: int | None = None
    """None: every port."""

    def __str__(self) -> str:
        return self.host if self.port is None else f"{self.host}:{self.port}"


class Mode(Enum):
    """What becomes of a request that no Permission allows; that of the namespace of the workload that is called."""

    ENFORCING = "enforcing"
    """It is refused."""
    AUDIT = "audit"
    """It passes, and is counted as what would have been refused."""
    PERMISSIVE = "permissive"
    """As AUDIT; and who has no identity, because it speaks plaintext, is let in as well."""


@dataclass(frozen=True, slots=True)
class NamespaceConfig:
    """What one namespace has otherwise than the mesh."""

    namespace: str
    mode: Mode


class PathAnchor(Enum):
    """How much of a path the expression of a policy manifest has to match."""

    SPEC = "spec"
    """Its beginning, as SMI's specification says."""
    FULL = "full"
    """All of it, as Open Service Mesh had it."""


@dataclass(frozen=True, slots=True)
class PolicyOptions:
    """How policy manifests are understood where their specification leaves it open, or others take it otherwise."""

    path_anchor: PathAnchor = PathAnchor.SPEC
    cross_namespace: bool = False
    """Whether a TrafficTarget may grant access to a destination in another namespace than its own."""


@dataclass(frozen=True, slots=True)
class MeshConfig:
    """The mesh-wide settings. There is one, and every field has a default."""

    mesh_domain: str = "mesh.internal"
    """`<service>.<namespace>.<mesh_domain>` names a service in every proxy, and in SNI."""
    egress: Egress = Egress.ALLOW
    egress_hosts: tuple[EgressHost, ...] = ()
    """Who may be called with `Egress.DENY`; sorted by text, none twice."""
    mode: Mode = Mode.ENFORCING
    """Of every namespace that has no NamespaceConfig."""
    policy: PolicyOptions = PolicyOptions()
    access_log: bool = True
    workload_certificate_ttl: timedelta = timedelta(hours=24)
    credential_ttl: timedelta = timedelta(hours=24)


# Compiled nouns: what a proxy's configuration is generated from. They compare by identity on purpose: a build keeps the
# object wherever nothing changed, so "the same object" means "nothing to do", and the object is the cache key.


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Upstream:
    """One port of a service, as the proxies of its callers dial it."""

    service: Name
    port: int
    protocol: Protocol
    identities: tuple[Identity, ...]
    """Who may serve it, sorted. Empty: nobody, so that nothing may be accepted as it; never: anybody."""
    treatment: Treatment | None = None


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Assignment:
    """The endpoints of an Upstream that may get traffic: each has its port, a certificate, and was ready once."""

    service: Name
    port: int
    endpoints: tuple[Endpoint, ...]
    """Sorted by workload."""


@dataclass(frozen=True, slots=True, order=True)
class Target:
    """A share of a Destination's traffic. `weight` is in thousandths, at least 1."""

    service: Name
    port: int
    weight: int


@dataclass(frozen=True, slots=True)
class Branch:
    """Where some of a Destination's requests go."""

    matches: tuple[HttpMatch, ...]
    """Those that one of these matches; sorted, at least one."""
    targets: tuple[Target, ...]
    """Sorted, at least one."""
    sources: tuple[tuple[str, int], ...] = ()
    """(manifest, mod_revision): the split that made it, and the route groups that this one names."""


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Destination:
    """Where requests to one port of a service go."""

    service: Name
    port: int
    targets: tuple[Target, ...]
    """Sorted. Without a split, the service itself. Empty: every weight is 0, and nobody gets the traffic."""
    sources: tuple[tuple[str, int], ...] = ()
    """(manifest, mod_revision), sorted: the splits that made it so, and the route groups that they name."""
    branches: tuple[Branch, ...] = ()
    """In order: a request takes the first that matches it. What none matches goes to `targets`. TCP has none."""
    protocol: Protocol = Protocol.HTTP
    """The port's; every target is TCP if it is, and none otherwise."""
    treatment: Treatment | None = None
    """Of its requests, whichever target they go to; of no meaning for TCP."""

    @property
    def versions(self) -> tuple[tuple[str, int], ...]:
        """(manifest, mod_revision) of all that it is made from."""
        return self.sources if self.treatment is None else (*self.sources, self.treatment.source)

    @property
    def all_targets(self) -> tuple[Target, ...]:
        """Of every branch too, in no order."""
        return (*self.targets, *(target for branch in self.branches for target in branch.targets))


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Frontend:
    """Where intercepted applications dial a service."""

    service: Name
    address: str
    """An IPv4 address that no other Frontend has: its own, or a virtual one."""


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Outbound:
    """All that the proxies with equal namespace, reachable services, quarantines and sidecar know of the services that
    they call.

    `upstreams` and `assignments` cover every target of `destinations`. All are sorted by (service, port).
    """

    namespace: str
    upstreams: tuple[Upstream, ...]
    assignments: tuple[Assignment, ...]
    destinations: tuple[Destination, ...]
    frontends: tuple[Frontend, ...] | None = None
    """Of the services of `destinations` that have an address, sorted by service. None: of explicit proxies, whose
    applications name services in their requests and dial nobody else.
    """


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Inbound:
    """One port of a workload's application, with the service ports that lead to it."""

    port: int
    protocol: Protocol
    services: tuple[tuple[Name, int], ...]
    """(service, service port), sorted: what callers may ask for by SNI."""
    numbers: tuple[int, ...] = ()
    """What Permissions may call it, sorted: its service ports, and its own unless that is a service port of the
    workload, which then is what the number means.
    """
    rate_limit: RateLimit | None = None
    """The tightest of its services'."""
    sources: tuple[tuple[str, int], ...] = ()
    """(manifest, mod_revision) of what says `rate_limit`."""


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Policy:
    """Every Permission to one identity; empty: nobody may call it."""

    permissions: tuple[Permission, ...]
    """Sorted by manifest."""
    barred: tuple[str, ...] = ()
    """Fingerprints (SHA-256 in hexadecimal, sorted) of revoked certificates of its sources: whoever shows one of them
    may nothing, on connections too that were open before. Where policy is not enforced, of anybody's."""
    banned: tuple[Identity, ...] = ()
    """Where policy is not enforced: the revoked identities, sorted, which may nothing all the same. Elsewhere they are
    among no sources."""

    def at(self, numbers: tuple[int, ...]) -> Policy:
        """What of it holds for a port that is called so; itself, if all does."""
        held = tuple(p for p in self.permissions if p.ports is None or not set(numbers).isdisjoint(p.ports))
        return self if held == self.permissions else replace(self, permissions=held)

    @property
    def of_connections(self) -> Policy:
        """What of it holds where there are no requests to judge."""
        return replace(self, permissions=tuple(p for p in self.permissions if p.tcp))
