"""The records of a View, each read once and again only when its key changes.

A record that cannot be read is as good as not there, and a Problem says so. Only what the whole mesh hangs on is never
taken for absent: without it there is no Mesh.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from cluster.kv import KeyValue, View
from smc.codec import UnreadableRecord, decode
from smc.errors import NotFound
from smc.manifests import MESH_WIDE, OWN_KINDS, InvalidManifest, Manifest, noun
from smc.manifests.own import CONFIG_NAME, GROUP
from smc.mesh.problems import Problems, invalid
from smc.mesh.tables import Table, Tables
from smc.model import (
    Egress,
    Endpoint,
    Endpoints,
    Identity,
    MeshConfig,
    Mode,
    Name,
    NamespaceConfig,
    PathAnchor,
    PolicyOptions,
    Problem,
    Service,
    TrafficPolicy,
    Workload,
)
from smc.records import (
    REGISTERED,
    AddressRecord,
    AdmissionRecord,
    BundleRecord,
    CertificateRecord,
    CrlRecord,
    ManifestRecord,
    MeshRecord,
    QuarantineRecord,
    RevocationRecord,
    SyncedRecord,
)

OWN: Final = ""
"""The source of Services and Workloads that were applied as manifests; it sorts before every informer's name."""

DEFAULTS: Final = MeshConfig()
CLOSED: Final = MeshConfig(egress=Egress.DENY, policy=PolicyOptions(path_anchor=PathAnchor.FULL))
"""What counts while the MeshConfig cannot be read: it may have denied what the defaults allow."""

Offered = tuple[str, Name]
"""(source, name)"""


@dataclass(frozen=True, slots=True)
class Revoked:
    """That a proxy is, or the credential of an operator or a viewer."""

    revision: int
    """At which it was."""
    identity: Identity | None
    """Of a proxy: whose key it had; None: that is not known."""


Quarantined = tuple[Name, str, int]
"""(proxy, manifest, mod_revision)"""

_CLOSED: Final = (
    "the settings of the mesh cannot be read, so the defaults count, and nothing outside the mesh may be called: "
    "write it anew"
)
_ENFORCING: Final = (
    "the settings of the namespace cannot be read, so its mode is enforcing, whatever the mesh's is: write it anew"
)
_ONE: Final = "the one"


def manifest_of(source: str, table: str, name: Name) -> str:
    """Where the Problems of a source's object are told: at its manifest, or else at its place in the registry."""
    return f"{source}:{table}/{name}" if source != OWN else f"{GROUP}/{_KIND_OF[table]}/{name}"


@dataclass(slots=True)
class Records(Tables):
    mesh: Table[str, MeshRecord] = field(default_factory=Table)
    bundles: Table[str, BundleRecord] = field(default_factory=Table)
    configs: Table[str, MeshConfig] = field(default_factory=Table)
    namespaces: Table[str, NamespaceConfig] = field(default_factory=Table)
    traffic: Table[str, TrafficPolicy] = field(default_factory=Table)
    """By manifest."""
    manifests: Table[str, Manifest] = field(default_factory=Table)
    services: Table[Offered, Service] = field(default_factory=Table)
    workloads: Table[Offered, Workload] = field(default_factory=Table)
    endpoints: Table[Offered, tuple[Endpoint, ...]] = field(default_factory=Table)
    leaving: Table[tuple[Name, str], Workload] = field(default_factory=Table)
    """(workload, revision) -> as it was then: what it has left of that, its callers may not know yet."""
    synced: Table[str, SyncedRecord] = field(default_factory=Table)
    ready: Table[Name, bool] = field(default_factory=Table)
    """That the key exists is all that it says."""
    certificates: Table[Identity, CertificateRecord] = field(default_factory=Table)
    quarantines: Table[Quarantined, QuarantineRecord] = field(default_factory=Table)
    crls: Table[str, CrlRecord] = field(default_factory=Table)
    revoked_proxies: Table[Name, Revoked] = field(default_factory=Table)
    revoked_identities: Table[Identity, bool] = field(default_factory=Table)
    """That the key exists is all that it says."""
    admissions: Table[Name, AdmissionRecord] = field(default_factory=Table)
    revoked_credentials: Table[str, Revoked] = field(default_factory=Table)
    """By path: of operators and viewers."""
    credential_admissions: Table[str, AdmissionRecord] = field(default_factory=Table)
    addresses: Table[Name, str] = field(default_factory=Table)
    """service -> the virtual IP address that it was given"""

    def update(self, view: View, problems: Problems) -> None:
        """Read what changed.

        Raises:
            NotFound: there is no record `mesh`.
            UnreadableRecord: the record `mesh`, the bundle of roots or the lists of revoked certificates cannot be
                read: without them nothing can be said to anybody, and to say less than before would be wrong.
        """
        for key in sorted(view.changed):
            self._read(_path(key), view.items.get(key), problems)
        if _ONE not in self.mesh:
            raise NotFound("the store has no record of a mesh", hint="make one: smc init")

    def read_revocations(self, view: View, problems: Problems) -> None:
        """Read all of them, and nothing else."""
        for key, item in view.items.items():
            if (path := _path(key))[0] == "revocations":
                self._read(path, item, problems)

    @property
    def the_mesh(self) -> MeshRecord:
        return self.mesh[_ONE]

    @property
    def bundle(self) -> BundleRecord | None:
        return self.bundles.get(_ONE)

    @property
    def crl(self) -> CrlRecord | None:
        return self.crls.get(_ONE)

    @property
    def config(self) -> MeshConfig:
        return self.configs.get(_ONE) or DEFAULTS

    @property
    def had_other_options(self) -> bool:
        """Whether policy manifests were understood in another way before."""
        return bool(self.configs.changed) and (self.configs.was(_ONE) or DEFAULTS).policy != self.config.policy

    def mode(self, namespace: str) -> Mode:
        """That of the namespace, or else the mesh's; ENFORCING while the one that counts cannot be read."""
        own = self.namespaces.get(namespace)
        return own.mode if own is not None else self.config.mode

    def _read(self, path: list[str], item: KeyValue | None, problems: Problems) -> None:
        """Take in one key, by its path below the mesh's root; one of no known table is nobody's business here."""
        match path:
            case ["mesh"]:
                self.mesh.put(_ONE, None if item is None else decode(MeshRecord, item.value, key=item.key))
            case ["ca", "bundle"]:
                self.bundles.put(_ONE, None if item is None else decode(BundleRecord, item.value, key=item.key))
            case ["ca", "crl"]:
                self.crls.put(_ONE, None if item is None else decode(CrlRecord, item.value, key=item.key))
            case ["revocations", table, namespace, name]:
                self._revoked(table, namespace, name, item, problems)
            case ["manifests", group, kind, namespace, name]:
                id_ = f"{group}/{kind}/{namespace}/{name}"
                manifest = self._manifest(id_, item, problems)
                self.manifests.put(id_, manifest)
                if group == GROUP:
                    said = _said(id_, manifest, problems)
                    if (kind, namespace, name) == ("MeshConfig", MESH_WIDE, CONFIG_NAME):
                        closed = said is None and item is not None
                        self.configs.put(_ONE, CLOSED if closed else said)
                        problems.report("config", id_, [Problem(id_, "EgressDenied", _CLOSED)] if closed else ())
                    elif (kind, name) == ("NamespaceConfig", CONFIG_NAME):
                        closed = said is None and item is not None
                        self.namespaces.put(namespace, NamespaceConfig(namespace, Mode.ENFORCING) if closed else said)
                        problems.report("config", id_, [Problem(id_, "Enforcing", _ENFORCING)] if closed else ())
                    elif kind == "TrafficPolicy":
                        self.traffic.put(id_, said)
                    elif kind == "Service":
                        self.services.put((OWN, Name(namespace, name)), said)
                    elif kind == "Workload":
                        self.workloads.put((OWN, Name(namespace, name)), said)
            case ["registry", source, "synced"] if source:
                synced = _record(SyncedRecord, item, "/".join(path), problems)
                self.synced.put(source, synced)
                problems.report("synced", source, synced.problems if synced is not None else ())
            case ["registry", source, table, namespace, name] if source and table in REGISTERED:
                self._registered(source, table, Name(namespace, name), item, problems)
            case ["leaving", namespace, workload, revision] if revision.isdecimal():
                left = Name(namespace, workload)
                self.leaving.put((left, revision), _record(Workload, item, "/".join(path), problems, name=left))
            case ["ready", namespace, workload]:
                self.ready.put(Name(namespace, workload), None if item is None else True)
            case ["certificates", namespace, account]:
                identity = Identity(namespace, account)
                found = _record(CertificateRecord, item, "/".join(path), problems, identity=identity)
                self.certificates.put(identity, found)
            case ["addresses", namespace, service]:
                of = Name(namespace, service)
                given = _record(AddressRecord, item, "/".join(path), problems, service=of)
                self.addresses.put(of, given.address if given is not None else None)
            case ["quarantine", namespace, workload, *rest]:
                manifest_id, _, revision = "/".join(rest).rpartition("@")
                if revision.isdecimal():
                    key = (Name(namespace, workload), manifest_id, int(revision))
                    expected = dict(zip(("proxy", "manifest", "mod_revision"), key, strict=True))
                    self.quarantines.put(key, _record(QuarantineRecord, item, "/".join(path), problems, **expected))

    def _revoked(self, table: str, namespace: str, name: str, item: KeyValue | None, problems: Problems) -> None:
        """What cannot be read revokes as well as anything, and admits nobody."""
        proxy, identity = Name(namespace, name), Identity(namespace, name)
        at = f"revocations/{table}/{namespace}/{name}"
        match table:
            case "proxies":
                said = _record(RevocationRecord, item, at, problems, proxy=proxy)
                had = said.identity if said is not None else None
                self.revoked_proxies.put(proxy, None if item is None else Revoked(item.mod_revision, had))
            case "identities":
                _record(RevocationRecord, item, at, problems, proxy=None, identity=identity)
                self.revoked_identities.put(identity, None if item is None else True)
            case "admitted":
                self.admissions.put(proxy, _record(AdmissionRecord, item, at, problems, proxy=proxy))
            case "credentials":
                path = f"{namespace}/{name}"
                _record(RevocationRecord, item, at, problems, credential=path)
                self.revoked_credentials.put(path, None if item is None else Revoked(item.mod_revision, None))
            case "credentials-admitted":
                path = f"{namespace}/{name}"
                self.credential_admissions.put(path, _record(AdmissionRecord, item, at, problems, credential=path))

    def _manifest(self, id_: str, item: KeyValue | None, problems: Problems) -> Manifest | None:
        record = _record(ManifestRecord, item, id_, problems, id=id_)
        return Manifest(record, item.mod_revision) if record is not None and item is not None else None

    def _registered(self, source: str, table: str, name: Name, item: KeyValue | None, problems: Problems) -> None:
        at = manifest_of(source, table, name)
        match table:
            case "services":
                service = _record(Service, item, at, problems, name=name)
                self.services.put((source, name), _in_order(service) if service is not None else None)
            case "workloads":
                self.workloads.put((source, name), _record(Workload, item, at, problems, name=name))
            case "endpoints":
                found = _record(Endpoints, item, at, problems, service=name)
                self.endpoints.put((source, name), found.endpoints or None if found is not None else None)


def _path(key: str) -> list[str]:
    """Below the mesh's root."""
    return key.split("/")[3:]  # "", "smc", the mesh's name, …


def _said(id_: str, manifest: Manifest | None, problems: Problems) -> Any:
    """What a manifest of our own group says; None, with Problems, if this version does not take it."""
    said = None
    found: tuple[Problem, ...] = ()
    if manifest is not None:
        try:
            said = noun(manifest.record, OWN_KINDS)
        except InvalidManifest as e:
            found = invalid(id_, e)
    problems.report("own", id_, found)
    return said


def _record(kind: type[Any], item: KeyValue | None, at: str, problems: Problems, **expected: object) -> Any:
    """What is stored; None, with a Problem at `at`, if it cannot be read or is not what its key says."""
    found = None
    wrong = ""
    if item is not None:
        try:
            found = decode(kind, item.value, key=item.key)
        except UnreadableRecord as e:
            wrong = f"{e}; it has no effect"
        else:
            strange = [name for name, value in expected.items() if getattr(found, name) != value]
            if strange:
                says = ", ".join(f"{name} {getattr(found, name)}" for name in strange)
                wrong = f"the {kind.__name__} at {item.key} is of {says}, not what its key says; it has no effect"
                found = None
    problems.report("record", at, (Problem(at, "UnreadableRecord", wrong),) if wrong else ())
    return found


def _in_order(service: Service) -> Service:
    """Ports by number, none twice: a name that occurs twice would cost every caller its whole configuration."""
    ports = {port.number: port for port in reversed(service.ports)}
    ordered = tuple(ports[number] for number in sorted(ports))
    return service if ordered == service.ports else replace(service, ports=ordered)


_KIND_OF: Mapping[str, str] = {"services": "Service", "workloads": "Workload"}
