"""A store by hand: what a mesh is built from, written record by record, and seen as Views."""

from __future__ import annotations

from dataclasses import replace
from textwrap import dedent

from cluster.kv import KeyValue, View
from smc import smi
from smc.codec import encode
from smc.keys import Keys
from smc.manifests import OWN_KINDS, read_all
from smc.mesh import Mesh, build
from smc.model import Endpoint, Endpoints, Identity, Locality, Name, Protocol, Service, ServicePort, Sidecar, Workload
from smc.records import (
    AddressRecord,
    AdmissionRecord,
    BundleRecord,
    CertificateRecord,
    CrlRecord,
    IssuedCertificate,
    MeshRecord,
    QuarantineRecord,
    ReadyRecord,
    RevocationRecord,
    RevokedCertificate,
    SyncedRecord,
)

KEYS = Keys("books")
KINDS = (*OWN_KINDS, *smi.KINDS)
POLICIES = (smi.API,)
TRUST_DOMAIN = "books.example"


def name(text: str) -> Name:
    return Name.parse(text)


def identity(text: str) -> Identity:
    return Identity(*text.split("/"))


class Store:
    """Each write is a revision. `view` gives what changed since the last one; `whole` a View as after a start."""

    def __init__(self) -> None:
        self.revision = 0
        self.items: dict[str, KeyValue] = {}
        self.generation = 1
        self._changed: set[str] = set()
        self.put(KEYS.mesh, MeshRecord("m", TRUST_DOMAIN, "1"))
        self.put(KEYS.bundle, BundleRecord(("ROOT",)))

    # -------------------------------------------------------------------------------------------------------- writing

    def put(self, key: str, record: object) -> int:
        """Returns the mod_revision. Bytes are stored as they are."""
        self.revision += 1
        value = record if isinstance(record, bytes) else encode(record)
        there = self.items.get(key)
        created = there.create_revision if there is not None else self.revision
        self.items[key] = KeyValue(key, value, created, self.revision)
        self._changed.add(key)
        return self.revision

    def delete(self, key: str) -> None:
        self.revision += 1
        self.items.pop(key, None)
        self._changed.add(key)

    def apply(self, text: str, *, created: float = 0.0) -> int:
        """Store the manifests of a text; returns the mod_revision of the last."""
        for record in read_all(dedent(text), KINDS, file="books.yaml"):
            revision = self.put(KEYS.manifest(record.id), replace(record, created=created))
        return revision

    def offer_service(
        self,
        service: str,
        *ports: tuple[int, str],
        protocol: Protocol = Protocol.HTTP,
        address: str = "",
        source: str = "files",
    ) -> None:
        """Ports are (number, target)."""
        offered = tuple(ServicePort(number, protocol, target) for number, target in ports)
        found = Service(name(service), offered, address)
        self.put(KEYS.service(source, found.name), found)

    def offer_endpoints(self, service: str, *endpoints: Endpoint, source: str = "files") -> None:
        found = tuple(sorted(endpoints))
        self.put(KEYS.endpoints(source, name(service)), Endpoints(name(service), found))

    def offer_workload(
        self,
        workload: str,
        account: str,
        *,
        reachable: tuple[str, ...] | None = None,
        source: str = "files",
        address: str = "10.0.0.1",
        sidecar: Sidecar = Sidecar.EXPLICIT,
    ) -> None:
        found = Workload(
            name(workload),
            address,
            Identity(name(workload).namespace, account),
            reachable=None if reachable is None else tuple(sorted(map(name, reachable))),
            sidecar=sidecar,
        )
        self.put(KEYS.workload(source, found.name), found)

    def leaves(self, workload: str, account: str, *services: str, revision: int = 1) -> None:
        """It had these services, at that revision, and its callers may not have heard that it has others now."""
        found = Workload(name(workload), "10.0.0.1", Identity(name(workload).namespace, account), services=services)
        self.put(KEYS.leaving(found.name, revision), found)

    def ready(self, *workloads: str) -> None:
        for workload in workloads:
            self.put(KEYS.ready(name(workload)), ReadyRecord(name(workload)))

    def certify(self, *identities: str, number: int = 1) -> None:
        for text in identities:
            chain = f"CHAIN {number} OF {text}"
            record = CertificateRecord(identity(text), chain, b"SEALED " + chain.encode(), f"{number:x}", 0.0, 1.0, 1)
            self.put(KEYS.certificate(identity(text)), record)

    def give_address(self, service: str, address: str) -> None:
        self.put(KEYS.address(name(service)), AddressRecord(name(service), address))

    def revoke(self, proxy: str, had: str = "") -> int:
        """Returns the mod_revision."""
        record = RevocationRecord(name(proxy), identity(had) if had else None, "stolen", "spiffe://x/operator/a", 1.0)
        return self.put(KEYS.revoked_proxy(name(proxy)), record)

    def revoke_identity(self, text: str) -> None:
        record = RevocationRecord(None, identity(text), "stolen", "spiffe://x/operator/a", 1.0)
        self.put(KEYS.revoked_identity(identity(text)), record)

    def revoke_credential(self, path: str) -> int:
        """Of an operator or a viewer; returns the mod_revision."""
        record = RevocationRecord(None, None, "stolen", "spiffe://x/operator/a", 1.0, path)
        return self.put(KEYS.revoked_credential(path), record)

    def admit_credential(self, path: str, *serials: str) -> None:
        """Let an operator or a viewer in with these, since its revocation."""
        there = self.items.get(KEYS.revoked_credential(path))
        since = there.mod_revision if there is not None else 1
        record = AdmissionRecord(None, since, tuple((serial, 9.0) for serial in serials), path)
        self.put(KEYS.admitted_credential(path), record)

    def admit(self, proxy: str, *serials: str, revocation: int = 0) -> None:
        """Let a proxy in with these, since its revocation or another one."""
        there = self.items.get(KEYS.revoked_proxy(name(proxy)))
        since = revocation or (there.mod_revision if there is not None else 1)
        record = AdmissionRecord(name(proxy), since, tuple((serial, 9.0) for serial in serials))
        self.put(KEYS.admission(name(proxy)), record)

    def list_revoked(self, *certificates: tuple[str, str]) -> None:
        """(identity, fingerprint)"""
        found = {
            RevokedCertificate(identity(text), IssuedCertificate(fingerprint, 1, fingerprint, 9.0, 1), 1.0)
            for text, fingerprint in certificates
        }
        said = " ".join(sorted(one.certificate.serial for one in found))
        self.put(KEYS.crl, CrlRecord(1, (1,), (f"LIST {said}",), tuple(sorted(found))))

    def sync(self, source: str = "files") -> None:
        self.put(KEYS.synced(source), SyncedRecord(source))

    def quarantine(self, proxy: str, manifest: str, mod_revision: int, reason: str = "Envoy says no") -> None:
        record = QuarantineRecord(name(proxy), manifest, mod_revision, "type", "resource", reason)
        self.put(KEYS.quarantine(name(proxy), manifest, mod_revision), record)

    # --------------------------------------------------------------------------------------------------------- reading

    def view(self) -> View:
        changed, self._changed = frozenset(self._changed), set()
        return View(1, self.generation, self.revision, dict(self.items), changed)

    def whole(self) -> View:
        return View(1, self.generation, self.revision, dict(self.items), frozenset(self.items))

    def build(self, previous: Mesh | None = None) -> Mesh:
        """The Mesh now: from nothing, or from what changed since the last View."""
        changed = self.view()
        return build(previous, changed if previous is not None else self.whole(), POLICIES)


def endpoint(
    workload: str, account: str, *ports: tuple[int, int], weight: int = 1, address: str = "10.0.0.1"
) -> Endpoint:
    """Ports are (of the service, of the application)."""
    found = name(workload)
    return Endpoint(found, address, Identity(found.namespace, account), tuple(sorted(ports)), Locality(), weight)


# -------------------------------------------------------------------------------------------------- manifests as text


def service_text(service: str, *ports: int, protocol: str = "http", target: int | str = 8080, address: str = "") -> str:
    lines = "".join(f"\n  - {{port: {port}, targetPort: {target}, protocol: {protocol}}}" for port in ports)
    return f"""\
apiVersion: smc.io/v1alpha1
kind: Service
metadata: {{name: {name(service).name}, namespace: {name(service).namespace}}}
spec:
  ports:{lines}
{f"  address: {address}" if address else ""}
"""


def workload_text(
    workload: str,
    account: str,
    *services: str,
    address: str = "10.0.0.1",
    reachable: tuple[str, ...] | None = None,
    labels: str = "{}",
    sidecar: Sidecar = Sidecar.EXPLICIT,
) -> str:
    bound = "" if reachable is None else f"  reachableServices: [{', '.join(reachable)}]\n"
    return f"""\
apiVersion: smc.io/v1alpha1
kind: Workload
metadata: {{name: {name(workload).name}, namespace: {name(workload).namespace}, labels: {labels}}}
spec:
  address: {address}
  sidecar: {sidecar.value}
  serviceAccount: {account}
  services: [{", ".join(services)}]
{bound}"""


def config_text(egress: str, mode: str = "enforcing", hosts: tuple[str, ...] = (), smi: str = "{}") -> str:
    return f"""\
apiVersion: smc.io/v1alpha1
kind: MeshConfig
metadata: {{name: default}}
spec: {{egress: {egress}, mode: {mode}, egressHosts: [{", ".join(f"'{host}'" for host in hosts)}], smi: {smi}}}
"""


def namespace_text(namespace: str, mode: str) -> str:
    return f"""\
apiVersion: smc.io/v1alpha1
kind: NamespaceConfig
metadata: {{name: default, namespace: {namespace}}}
spec: {{mode: {mode}}}
"""


def split_text(split: str, root: str, *groups: str, **weights: int) -> str:
    """`groups` name the requests that it is for; without any it is for all."""
    references = ", ".join(f"{{kind: HTTPRouteGroup, name: {g}}}" for g in groups)
    matches = f"  matches: [{references}]\n" if groups else ""
    backends = ", ".join(f"{{service: {service.replace('_', '-')}, weight: {w}}}" for service, w in weights.items())
    return f"""\
apiVersion: split.smi-spec.io/v1alpha4
kind: TrafficSplit
metadata: {{name: {name(split).name}, namespace: {name(split).namespace}}}
spec:
  service: {root}
  backends: [{backends}]
{matches}"""


def target_text(target: str, destination: str, *sources: str, group: str = "all") -> str:
    """Sources are `<namespace>/<account>`."""
    callers = "".join(
        f"\n  - {{kind: ServiceAccount, namespace: {identity(s).namespace}, name: {identity(s).service_account}}}"
        for s in sources
    )
    return f"""\
apiVersion: access.smi-spec.io/v1alpha3
kind: TrafficTarget
metadata: {{name: {name(target).name}, namespace: {name(target).namespace}}}
spec:
  destination: {{kind: ServiceAccount, name: {destination}}}
  rules: [{{kind: HTTPRouteGroup, name: {group}}}]
  sources:{callers}
"""


def bound_text(target: str, destination: str, *sources: str, group: str = "all") -> str:
    """A target whose destination, a binding of its namespace, and sources, `<namespace>/<binding>`, are bindings."""
    found = target_text(target, destination, *sources, group=group).replace("v1alpha3", "v1alpha4")
    return found.replace("ServiceAccount", "IdentityBinding")


def binding_text(binding: str, schemes: str) -> str:
    return f"""\
apiVersion: access.smi-spec.io/v1alpha4
kind: IdentityBinding
metadata: {{name: {name(binding).name}, namespace: {name(binding).namespace}}}
spec: {{schemes: {schemes}}}
"""


def ports_text(route: str, *ports: int) -> str:
    return f"""\
apiVersion: specs.smi-spec.io/v1alpha4
kind: TCPRoute
metadata: {{name: {name(route).name}, namespace: {name(route).namespace}}}
spec: {{matches: {{ports: [{", ".join(map(str, ports))}]}}}}
"""


def group_text(group: str, path: str = "/.*") -> str:
    return f"""\
apiVersion: specs.smi-spec.io/v1alpha4
kind: HTTPRouteGroup
metadata: {{name: {name(group).name}, namespace: {name(group).namespace}}}
spec:
  matches: [{{name: all, pathRegex: {path}, methods: ['*']}}]
"""


def traffic_text(policy: str, service: str, settings: str = "timeout: 1s") -> str:
    return f"""\
apiVersion: smc.io/v1alpha1
kind: TrafficPolicy
metadata: {{name: {name(policy).name}, namespace: {name(policy).namespace}}}
spec: {{service: {service}, {settings}}}
"""
