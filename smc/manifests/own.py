"""The kinds of SMC's own group: what the mesh is set to, and what runs in it where no platform says so."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from smc.manifests import schema
from smc.manifests.findings import Unfit, shown
from smc.manifests.kinds import Kind, Metadata, Schema, noun
from smc.manifests.schema import Boolean, Field, Integer, ListOf, Object, OneOf, Text
from smc.manifests.traffic import TRAFFIC_POLICY
from smc.model import (
    Egress,
    EgressHost,
    Identity,
    Locality,
    MeshConfig,
    Mode,
    Name,
    NamespaceConfig,
    PathAnchor,
    PolicyOptions,
    Protocol,
    Service,
    ServicePort,
    Sidecar,
    Workload,
    WorkloadPort,
)
from smc.records import ManifestRecord

T = TypeVar("T")

GROUP = "smc.io"
VERSION = "v1alpha1"
PORT = Integer(1, 65535)
CONFIG_NAME = "default"
"""Of the one MeshConfig, and of each namespace's one NamespaceConfig."""


def mesh_config(record: ManifestRecord) -> MeshConfig:
    """What a stored MeshConfig says.

    Raises:
        InvalidManifest: this version of SMC does not take it.
    """
    return _as(record, MeshConfig)


def service(record: ManifestRecord) -> Service:
    """What a stored Service says. Raises as `mesh_config`."""
    return _as(record, Service)


def workload(record: ManifestRecord) -> Workload:
    """What a stored Workload says. Raises as `mesh_config`."""
    return _as(record, Workload)


def _as(record: ManifestRecord, wanted: type[T]) -> T:
    found = noun(record, OWN_KINDS)
    if not isinstance(found, wanted):
        raise TypeError(f"{record.id} is a {type(found).__name__}, not a {wanted.__name__}")
    return found


# ---------------------------------------------------------------------------------------------------------- MeshConfig


def _only_default(one: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text != CONFIG_NAME:
            raise Unfit(f"{shown(text)}: there is one {one}", f"call it {CONFIG_NAME}")
        return text

    return parse


_LIFE = Text(schema.duration(timedelta(seconds=10), timedelta(hours=24 * 30)))
_MODE = Text(schema.choice({mode.value: mode for mode in Mode}))
_EGRESS_PORT = re.compile(r"[1-9][0-9]{0,4}")
MOST_EGRESS_HOSTS = 256


def _egress_host(text: str) -> EgressHost:
    """`<host>`, `*.<suffix>` or an IPv4 address, each with `:<port>` or without."""
    host, colon, port = text.partition(":")
    hint = 'write one such as "example.com", "*.example.com" or "example.com:443"'
    if "/" in text:
        raise Unfit(f"{shown(text)} is no host: it has a /", hint)
    if colon and not (_EGRESS_PORT.fullmatch(port) and int(port) <= 65535):
        raise Unfit(f"{shown(text)} has no port from 1 to 65535 after its colon", hint)
    name = host.lower().removesuffix(".")
    suffix = name.removeprefix("*.")
    if name == "*":
        raise Unfit(f"{shown(text)} is every host", "write egress: allow")
    try:
        schema.subdomain(suffix)
    except Unfit:
        raise Unfit(f"{shown(text)} is no host", hint) from None
    return EgressHost(name, int(port) if colon else None)


def _given(*names: str) -> Callable[..., dict[str, Any]]:
    """Keyword arguments from the values that are there; the noun knows the defaults of the others."""
    return lambda *values: {n: v for n, v in zip(names, values, strict=True) if v is not None}


_CERTIFICATES = Object(
    (Field("workloadTTL", _LIFE), Field("credentialTTL", _LIFE)),
    _given("workload_certificate_ttl", "credential_ttl"),
)


_SMI = Object(
    (
        Field("pathRegexAnchor", Text(schema.choice({anchor.value: anchor for anchor in PathAnchor}))),
        Field("crossNamespaceTargets", Boolean()),
    ),
    _given("path_anchor", "cross_namespace"),
)


def _mesh_config(_metadata: Metadata, values: dict[str, Any]) -> MeshConfig:
    hosts = tuple(sorted(values.pop("egress_hosts", ()), key=str))
    policy = PolicyOptions(**values.pop("smi", {}))
    return MeshConfig(egress_hosts=hosts, policy=policy, **values.pop("certificates", {}), **values)


_MESH_CONFIG = Schema(
    (
        Field(
            "spec",
            Object(
                (
                    Field("meshDomain", Text(schema.domain)),
                    Field("egress", Text(schema.choice({e.value: e for e in Egress}))),
                    Field(
                        "egressHosts",
                        ListOf(Text(_egress_host), most=MOST_EGRESS_HOSTS, unique=lambda host: host, named=str),
                    ),
                    Field("accessLog", Boolean()),
                    Field("certificates", _CERTIFICATES),
                    Field("mode", _MODE),
                    Field("smi", _SMI),
                ),
                _given("mesh_domain", "egress", "egress_hosts", "access_log", "certificates", "mode", "smi"),
            ),
            required=True,
        ),
    ),
    _mesh_config,
)

# ----------------------------------------------------------------------------------------------------- NamespaceConfig

_NAMESPACE_CONFIG = Schema(
    (Field("spec", Object((Field("mode", _MODE, required=True),), lambda mode: mode), required=True),),
    lambda metadata, mode: NamespaceConfig(metadata.name.namespace, mode),
)

# ------------------------------------------------------------------------------------------------------------- Service


def _service_port(number: int, target: str | int | None, protocol: Protocol) -> ServicePort:
    return ServicePort(number, protocol, str(number if target is None else target))


_NO_PROTOCOL = {"udp": "UDP does not go through the proxies"}
_SERVICE_PORT = Object(
    (
        Field("port", PORT, required=True),
        Field("targetPort", OneOf({int: PORT, float: PORT, str: Text(schema.port_name)}, "port number or name")),
        Field(
            "protocol",
            Text(schema.choice({p.value: p for p in Protocol}, refused=_NO_PROTOCOL)),
            default=Protocol.HTTP,
        ),
    ),
    _service_port,
    {"number": "write port", "name": "ports of a Service have no names: targetPort may be the name of a Workload's"},
)


def _service_address(text: str) -> str:
    """What intercepted callers dial, and what the rules of interception redirect."""
    address = ipaddress.ip_address(schema.ip_address(text))
    hint = "leave the address out to have a virtual one"
    if address.version != 4:
        raise Unfit(f"{shown(text)} is an IPv6 address, and only IPv4 is intercepted", hint)
    if address.is_loopback:
        raise Unfit(f"{shown(text)} means another machine to each caller", hint)
    return str(address)


_SERVICE = Schema(
    (
        Field(
            "spec",
            Object(
                (
                    Field(
                        "ports",
                        ListOf(
                            _SERVICE_PORT,
                            least=1,
                            most=100,
                            unique=lambda port: port.number,
                            named=lambda port: f"port {port.number}",
                        ),
                        required=True,
                    ),
                    Field("address", Text(_service_address), default=""),
                ),
                lambda ports, address: (tuple(sorted(ports, key=lambda port: port.number)), address),
                {"selector": "Workloads name their services: spec.services of the Workload"},
            ),
            required=True,
        ),
    ),
    lambda metadata, spec: Service(metadata.name, *spec),
)

# ------------------------------------------------------------------------------------------------------------ Workload

_PLACE = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


def _place(text: str) -> str:
    if not _PLACE.fullmatch(text):
        raise Unfit(f"{shown(text)} names no place: letters, digits and ._- , at most 63")
    return text


def _reachable(text: str) -> tuple[str, str]:
    """`<namespace>/<name>`, or a name in the workload's own namespace, which is written as ""."""
    namespace, slash, name = text.rpartition("/")
    if slash:
        schema.label(namespace)
    return namespace, schema.label(name)


def _ports_of_a_workload(ports: tuple[WorkloadPort, ...]) -> tuple[WorkloadPort, ...]:
    names: set[str] = set()
    for index, port in enumerate(ports):
        if port.name and port.name in names:
            raise Unfit(f"a second port is called {port.name}", "give each a name of its own", field=f"ports[{index}]")
        names.add(port.name)
    return tuple(sorted(ports))


def _workload_spec(
    address: str,
    app_address: str,
    service_account: str,
    ports: tuple[WorkloadPort, ...],
    services: tuple[str, ...],
    locality: Locality,
    weight: int,
    reachable: tuple[tuple[str, str], ...] | None,
    sidecar: Sidecar,
) -> Callable[[Metadata], Workload]:
    ports = _ports_of_a_workload(ports)

    def of(metadata: Metadata) -> Workload:
        own = metadata.name.namespace
        return Workload(
            name=metadata.name,
            address=address,
            identity=Identity(own, service_account),
            app_address=app_address,
            labels=metadata.labels,
            ports=ports,
            services=tuple(sorted(services)),
            locality=locality,
            weight=weight,
            reachable=None if reachable is None else tuple(sorted({Name(ns or own, name) for ns, name in reachable})),
            sidecar=sidecar,
        )

    return of


_WORKLOAD_PORT = Object(
    (Field("name", Text(schema.port_name), default=""), Field("port", PORT, required=True)), WorkloadPort
)
_LOCALITY = Object(tuple(Field(name, Text(_place), default="") for name in ("region", "zone", "subZone")), Locality)
_WORKLOAD = Schema(
    (
        Field(
            "spec",
            Object(
                (
                    Field("address", Text(schema.ip_address), required=True),
                    Field("appAddress", Text(schema.ip_address), default="127.0.0.1"),
                    Field("serviceAccount", Text(schema.subdomain), required=True),
                    Field(
                        "ports",
                        ListOf(
                            _WORKLOAD_PORT,
                            most=100,
                            unique=lambda port: port.number,
                            named=lambda port: f"port {port.number}",
                        ),
                        default=(),
                    ),
                    Field("services", ListOf(Text(schema.label), most=100, unique=lambda name: name), default=()),
                    Field("locality", _LOCALITY, default=Locality()),
                    Field("weight", Integer(1, 10_000), default=1),
                    Field("reachableServices", ListOf(Text(_reachable), unique=lambda name: name, named="/".join)),
                    Field("sidecar", Text(schema.choice({s.value: s for s in Sidecar})), default=Sidecar.EXPLICIT),
                ),
                _workload_spec,
            ),
            required=True,
        ),
    ),
    lambda metadata, spec: spec(metadata),
)

OWN_KINDS: tuple[Kind, ...] = (
    Kind(
        GROUP,
        "MeshConfig",
        "meshconfigs",
        ("mc",),
        {VERSION: _MESH_CONFIG},
        namespaced=False,
        name_is=_only_default("MeshConfig"),
    ),
    Kind(
        GROUP,
        "NamespaceConfig",
        "namespaceconfigs",
        ("nc",),
        {VERSION: _NAMESPACE_CONFIG},
        name_is=_only_default("NamespaceConfig in each namespace"),
    ),
    Kind(GROUP, "Service", "services", ("svc",), {VERSION: _SERVICE}, name_is=schema.label),
    Kind(GROUP, "TrafficPolicy", "trafficpolicies", ("tp",), {VERSION: TRAFFIC_POLICY}),
    Kind(GROUP, "Workload", "workloads", ("wl",), {VERSION: _WORKLOAD}),
)
"""What SMC itself understands; policy APIs add theirs."""
