"""A small mesh in a store in memory: who is in it is observed, what they may do is applied, as in a real one."""

from __future__ import annotations

from textwrap import dedent

from cluster.kv import KV, Put
from cluster.memory import MemoryKV, MemoryStore
from smc import endpoints, plugins
from smc.codec import encode
from smc.keys import Keys
from smc.manifests import read
from smc.model import Identity, Name, Observation, Protocol, Service, ServicePort, Workload
from smc.records import CertificateRecord, MeshRecord, ReadyRecord
from smc.registry import Registry
from tests.unit.leadership import elect

TRUST_DOMAIN = "mesh.example"
SOURCE = "files"
KEYS = Keys("default")


def service(name: str, port: int = 80) -> Service:
    return Service(Name("shop", name), (ServicePort(port, Protocol.HTTP, "8080"),))


def workload(name: str, *services: str, address: str = "", reachable: tuple[Name, ...] | None = None) -> Workload:
    """In the namespace `shop`, with an identity of its own name."""
    number = sum(name.encode()) % 250 + 1
    return Workload(
        Name("shop", name),
        address or f"127.0.1.{number}",
        Identity("shop", name),
        f"127.0.2.{number}",
        services=services,
        reachable=reachable,
    )


class Shop:
    """What its operators and its leader do, in a few words."""

    def __init__(self, kv: KV | None = None) -> None:
        self.kv: KV = kv or MemoryKV(MemoryStore())
        self.registry = Registry(self.kv, KEYS)

    async def found(self) -> None:
        """Write the mesh record alone: without an authority, so without certificates."""
        await self.put(KEYS.mesh, MeshRecord("m", TRUST_DOMAIN, "1"))

    async def put(self, key: str, record: object, *, traceparent: str = "") -> int:
        return (await self.kv.transact([Put(key, encode(record, traceparent=traceparent))])).revision

    async def observe(self, *found: Service | Workload, source: str = SOURCE, traceparent: str = "") -> None:
        """Say that these services and workloads are all there are."""
        services = tuple(sorted((s for s in found if isinstance(s, Service)), key=lambda s: s.name))
        workloads = tuple(sorted((w for w in found if isinstance(w, Workload)), key=lambda w: w.name))
        joined, _ = endpoints.join(services, workloads, manifest_of_workload={w.name: str(w.name) for w in workloads})
        observation = Observation(services, joined, workloads)
        await self.registry.replace(await elect(self.kv, KEYS), source, observation, traceparent=traceparent)

    async def certify(self, *names: str) -> None:
        """Pretend that each identity has a certificate, and that its proxy was ready once."""
        for name in names:
            identity = Identity("shop", name)
            record = CertificateRecord(identity, "CHAIN", b"sealed", "1", 0.0, 1.0, 1)
            await self.put(KEYS.certificate(identity), record)
            await self.put(KEYS.ready(Name("shop", name)), ReadyRecord(Name("shop", name)))

    async def apply(self, text: str, *, traceparent: str = "") -> int:
        """Write one manifest; returns its mod_revision."""
        record = read(dedent(text), plugins.kinds(), file="policy.yaml", author="spiffe://mesh.example/operator/test")
        written = await self.registry.put_manifest(record, expected=None, traceparent=traceparent, dry_run=False)
        return written.revision

    async def allow(self, source: str, destination: str, *, name: str = "") -> int:
        """Let one identity call another; returns the mod_revision of the TrafficTarget."""
        return await self.apply(
            f"""\
            apiVersion: access.smi-spec.io/v1alpha3
            kind: TrafficTarget
            metadata: {{name: {name or f"{source}-to-{destination}"}, namespace: shop}}
            spec:
              destination: {{kind: ServiceAccount, name: {destination}, namespace: shop}}
              sources: [{{kind: ServiceAccount, name: {source}, namespace: shop}}]
              rules: [{{kind: HTTPRouteGroup, name: everything}}]
            """
        )

    async def routes(self, path: str = "/.*") -> int:
        """The HTTPRouteGroup that `allow` refers to."""
        return await self.apply(
            f"""\
            apiVersion: specs.smi-spec.io/v1alpha4
            kind: HTTPRouteGroup
            metadata: {{name: everything, namespace: shop}}
            spec:
              matches:
              - name: all
                pathRegex: "{path}"
                methods: ["*"]
            """
        )

    async def split(self, root: str, name: str = "", **weights: int) -> int:
        backends = ", ".join(f"{{service: {b.replace('_', '-')}, weight: {w}}}" for b, w in weights.items())
        return await self.apply(
            f"""\
            apiVersion: split.smi-spec.io/v1alpha4
            kind: TrafficSplit
            metadata: {{name: {name or root}, namespace: shop}}
            spec: {{service: {root}, backends: [{backends}]}}
            """
        )
