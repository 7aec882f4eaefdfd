"""Meshes made by hand, as small as a test needs them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import MappingProxyType

from smc.mesh import Mesh, Proxy
from smc.model import (
    Assignment,
    Branch,
    Destination,
    Endpoint,
    Frontend,
    HttpMatch,
    Identity,
    Inbound,
    Locality,
    MeshConfig,
    Mode,
    Name,
    Outbound,
    Permission,
    Policy,
    Protocol,
    Sidecar,
    Target,
    Upstream,
    Workload,
)
from smc.records import BundleRecord, CertificateRecord

TRUST_DOMAIN = "books.example"
NOBODY = Policy(())


def name(text: str) -> Name:
    return Name.parse(text)


def identity(text: str) -> Identity:
    return Identity(*text.split("/"))


def workload(text: str, address: str, account: str | None = None, app_address: str = "127.0.0.1") -> Workload:
    found = name(text)
    return Workload(found, address, Identity(found.namespace, account or found.name), app_address)


def endpoint(of: Workload, port: int, app_port: int, weight: int = 1, locality: Locality = Locality()) -> Endpoint:  # noqa: B008
    return Endpoint(of.name, of.address, of.identity, ((port, app_port),), locality, weight)


def upstream(service: str, port: int, *identities: str, protocol: Protocol = Protocol.HTTP) -> Upstream:
    return Upstream(name(service), port, protocol, tuple(sorted(identity(i) for i in identities)))


def assignment(service: str, port: int, *endpoints: Endpoint) -> Assignment:
    return Assignment(name(service), port, tuple(sorted(endpoints)))


def frontend(service: str, address: str) -> Frontend:
    return Frontend(name(service), address)


def intercepted(of: Workload) -> Workload:
    return replace(of, sidecar=Sidecar.INTERCEPTED)


def destination(
    service: str,
    port: int,
    targets: dict[str, int] | None = None,
    split: str = "",
    branches: Sequence[tuple[Sequence[HttpMatch], dict[str, int]]] = (),
    protocol: Protocol = Protocol.HTTP,
) -> Destination:
    """To itself, or by `targets` (service -> weight) because of the manifest `split`."""
    return Destination(
        name(service),
        port,
        _shares(port, {service: 1000} if targets is None else targets),
        ((split, 7),) if split else (),
        tuple(Branch(tuple(matches), _shares(port, to)) for matches, to in branches),
        protocol,
    )


def _shares(port: int, targets: dict[str, int]) -> tuple[Target, ...]:
    return tuple(Target(name(to), port, weight) for to, weight in sorted(targets.items()))


def permission(
    manifest: str,
    destination: str,
    sources: Sequence[str],
    *http: HttpMatch,
    also: Iterable[tuple[str, int]] = (),
    ports: tuple[int, ...] | None = None,
    tcp: bool = False,
) -> Permission:
    return Permission(
        manifest,
        9,
        identity(destination),
        tuple(sorted(identity(s) for s in sources)),
        tuple(http) or (HttpMatch(),),
        tuple(also),
        ports,
        tcp,
    )


def certificate(of: Identity, chain: str = "", number: int = 1) -> CertificateRecord:
    text = chain or f"CHAIN {number} OF {of}\n"
    return CertificateRecord(of, text, f"SEALED {number} OF {of}".encode(), f"{number:x}", 0.0, 1.0, 1)


def open_key(record: CertificateRecord) -> bytes:
    return record.sealed_key.replace(b"SEALED", b"KEY")


def proxy(
    of: Workload,
    *,
    outbound: Outbound | None = None,
    inbound: Sequence[Inbound] = (),
    policy: Policy = NOBODY,
    record: CertificateRecord | None = None,
    mode: Mode = Mode.ENFORCING,
) -> Proxy:
    outbound = outbound or Outbound(of.name.namespace, (), (), ())
    return Proxy(of, outbound, tuple(inbound), policy, record, mode=mode)


def mesh(*proxies: Proxy, config: MeshConfig | None = None, bundle: BundleRecord | None = None) -> Mesh:
    named = {p.workload.name: p for p in proxies}
    return Mesh(
        revision=1,
        mesh_id="m",
        trust_domain=TRUST_DOMAIN,
        config=config or MeshConfig(),
        bundle=bundle,
        proxies=MappingProxyType(named),
        manifests={},
        problems={},
        identities=frozenset(p.workload.identity for p in proxies),
        own_addresses={},
        intercepts=False,
        synced=frozenset({"files"}),
        affected=frozenset(named),
    )


SPLIT = "split.smi-spec.io/TrafficSplit/books/bookstore"
TARGET = "access.smi-spec.io/TrafficTarget/books/buyers"
ROUTES = "specs.smi-spec.io/HTTPRouteGroup/books/store"
READ = HttpMatch("(?:/books).*", ("GET", "HEAD"))
BUY = HttpMatch("(?:/buy).*", ("POST",), (("client-app", "(?:book).*"),))

BUYER = workload("books/bookbuyer", "127.0.1.1")
STORE_1 = workload("books/bookstore-v1", "127.0.1.3", "bookstore", "127.0.1.3")
STORE_2 = workload("books/bookstore-v2", "127.0.1.4", "bookstore", "127.0.1.4")
BUNDLE = BundleRecord(("ROOT 1\n", "ROOT 2"))
PORT, APP_PORT = 14001, 8080


def callers(
    weights: dict[str, int] | None,
    branches: Sequence[tuple[Sequence[HttpMatch], dict[str, int]]] = (),
    *,
    v2: Sequence[Endpoint] = (endpoint(STORE_2, PORT, APP_PORT),),
) -> Outbound:
    """What bookbuyer calls: the bookstore by `weights`, and both versions by name."""
    root, one, two = "books/bookstore", "books/bookstore-v1", "books/bookstore-v2"
    served = "books/bookstore"
    return Outbound(
        "books",
        tuple(upstream(s, PORT, served) for s in (root, one, two)),
        (
            assignment(root, PORT, endpoint(STORE_1, PORT, APP_PORT), endpoint(STORE_2, PORT, APP_PORT)),
            assignment(one, PORT, endpoint(STORE_1, PORT, APP_PORT)),
            assignment(two, PORT, *v2),
        ),
        (
            destination(root, PORT, weights, SPLIT if weights is not None or branches else "", branches),
            destination(one, PORT),
            destination(two, PORT),
        ),
    )


def store_inbound(version: str = "v1") -> Inbound:
    services = ((name("books/bookstore"), PORT), (name(f"books/bookstore-{version}"), PORT))
    return Inbound(APP_PORT, Protocol.HTTP, services)


def bookstore(
    *,
    weights: dict[str, int] | None = None,
    policy: Policy | None = None,
    config: MeshConfig | None = None,
    number: int = 1,
    mode: Mode = Mode.ENFORCING,
) -> Mesh:
    """A buyer and two versions of a store; `number` tells one generation of certificates from the next."""
    allowed = permission(TARGET, "books/bookstore", ["books/bookbuyer"], READ, BUY, also=[(ROUTES, 5)])
    granted = Policy((allowed,)) if policy is None else policy
    return mesh(
        proxy(BUYER, outbound=callers(weights), record=certificate(BUYER.identity, number=number)),
        proxy(
            STORE_1,
            outbound=callers(weights),
            inbound=[store_inbound()],
            policy=granted,
            record=certificate(STORE_1.identity, number=number),
            mode=mode,
        ),
        config=config,
        bundle=BUNDLE,
    )
