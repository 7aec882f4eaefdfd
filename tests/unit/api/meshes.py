"""Meshes as a replica would have built them, with just what the API looks at."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from smc.manifests import Manifest
from smc.mesh import Mesh, Proxy
from smc.model import Identity, MeshConfig, Name, Outbound, Policy, Problem, Workload
from smc.records import QuarantineRecord


def mesh(
    config: MeshConfig,
    proxies: Mapping[Name, Proxy],
    *,
    manifests: Mapping[str, Manifest] = MappingProxyType({}),
    problems: Mapping[str, tuple[Problem, ...]] = MappingProxyType({}),
) -> Mesh:
    return Mesh(
        revision=7,
        mesh_id="m",
        trust_domain="mesh.example",
        config=config,
        bundle=None,
        proxies=proxies,
        manifests=manifests,
        problems=problems,
        identities=frozenset(),
        own_addresses={},
        intercepts=False,
        synced=frozenset(),
        affected=frozenset(),
    )


def proxy(name: Name, *quarantined: QuarantineRecord) -> Proxy:
    workload = Workload(name, "127.0.0.9", Identity(name.namespace, name.name), app_address="127.0.0.10")
    return Proxy(workload, Outbound(name.namespace, (), (), ()), (), Policy(()), None, quarantined)
