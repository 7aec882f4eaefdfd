"""What the mesh makes of things, for people: a request explained, a change compared, a proxy's configuration, a
manifest's reach. Everything is made anew from a Mesh, in a thread, with caches of its own: the streams notice nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from smc import explaining, manifests, registry
from smc.api import waiting
from smc.api.backends import Backends
from smc.codec import encode
from smc.envoy.readable import plain
from smc.envoy.requests import Request
from smc.envoy.routes import policy_sources
from smc.envoy.snapshot import Generator
from smc.errors import Exhausted, Invalid, NotFound, Unavailable
from smc.explaining import Effect, Explanation, Server, Source
from smc.manifests import Finding, InvalidManifest
from smc.mesh import Mesh
from smc.model import HttpMatch, Identity, Name, Outbound
from smc.records import CertificateRecord, ManifestRecord
from smc.v1 import smc_pb2 as pb
from smc.xds.snapshot import Resource, Snapshot, Type, short

MOST_SERVERS, MOST_PROBLEMS, MOST_GROUPS, MOST_NAMED, MOST_REACHED = 100, 100, 50, 20, 100
MOST_COMPARED = 5_000
"""Proxies that one Diff looks at."""
MOST_BYTES = 16 * 1024 * 1024
"""Of messages in one answer."""
BY_SERVICE_ACCOUNT = "sa:"

_TYPES = {short(type_): type_ for type_ in Type}


def _mesh(b: Backends) -> Mesh:
    mesh = b.mesh()
    if mesh is None:
        raise Unavailable("this replica has not built the mesh yet", hint="try again in a moment")
    return mesh


def _name(text: str, what: str) -> Name:
    try:
        return Name.parse(text)
    except ValueError as e:
        raise Invalid(f"{what}: {e}") from None


# ------------------------------------------------------------------------------------------------------------- explain


async def explain(b: Backends, request: pb.ExplainRequest) -> pb.ExplainResponse:
    """Raises Invalid, NotFound, Unavailable."""
    mesh = _mesh(b)
    headers = tuple((header.name, header.value) for header in request.headers)
    asked = Request(request.method, request.path or "/", headers)
    service = _name(request.service, "the service")
    caller = _caller(mesh, request.caller)
    found = await asyncio.to_thread(explaining.explain, mesh, caller, service, asked, request.port or None)
    return _explanation(mesh, found)


def _caller(mesh: Mesh, text: str) -> Name:
    """The workload of that name, or else the first that has the identity of that name."""
    name = _name(text.removeprefix(BY_SERVICE_ACCOUNT), "the caller")
    if not text.startswith(BY_SERVICE_ACCOUNT) and name in mesh.proxies:
        return name
    identity = Identity(name.namespace, name.name)
    having = (known for known, proxy in mesh.proxies.items() if proxy.workload.identity == identity)
    if (first := min(having, default=None)) is None:
        raise NotFound(
            f"there is no workload {name}, and none with the identity {name}",
            hint="smc get workloads -A lists those that were applied",
        )
    return first


def _explanation(mesh: Mesh, e: Explanation) -> pb.ExplainResponse:
    response = pb.ExplainResponse(
        verdict=e.verdict.value,
        reason=e.reason,
        caller=str(e.caller),
        identity=str(e.identity),
        service=str(e.service),
        port=e.port,
        protocol=e.protocol.value,
        method=e.request.method,
        path=e.request.path,
        headers=[pb.Header(name=name, value=value) for name, value in e.request.headers],
        branch=[_shown(match) for match in e.branch or ()],
        split_by=[_rule(mesh, source) for source in e.split_by],
        effects=_effects(mesh, e.effects),
        unanswered=e.unanswered,
    )
    for way in e.ways:
        response.ways.add(
            service=str(way.target.service),
            port=way.target.port,
            share=way.share,
            servers=[_server(mesh, server) for server in way.servers[:MOST_SERVERS]],
            more=max(0, len(way.servers) - MOST_SERVERS),
            effects=_effects(mesh, way.effects),
        )
    return response


def _effects(mesh: Mesh, effects: Iterable[Effect]) -> list[pb.Effect]:
    return [pb.Effect(rule=_rule(mesh, e.source), kind=e.kind, share=e.share, what=e.what) for e in effects]


def _server(mesh: Mesh, server: Server) -> pb.Server:
    return pb.Server(
        workload=str(server.workload),
        identity=str(server.identity),
        app_port=server.app_port,
        ready=server.ready,
        allowed=server.allowed,
        passes=server.passes,
        mode=server.mode.value,
        by=[_rule(mesh, (by.manifest, by.mod_revision)) for by in server.by],
        misses=[
            pb.Miss(rule=_rule(mesh, (miss.permission.manifest, miss.permission.mod_revision)), why=miss.why)
            for miss in server.misses
        ],
        left_out=server.left_out,
        refused=server.refused,
        effects=_effects(mesh, server.effects),
    )


def _rule(mesh: Mesh, source: Source) -> pb.Rule:
    manifest, mod_revision = source
    found = mesh.manifests.get(manifest)
    file, line = (found.record.file, found.record.line) if found is not None else ("", 0)
    return pb.Rule(manifest=manifest, file=file, line=line, resource_version=mod_revision)


def _shown(match: HttpMatch) -> str:
    parts = [
        *([f"path {match.path}"] if match.path is not None else []),
        *([f"method {' or '.join(match.methods)}"] if match.methods else []),
        *(f"header {name} {expression}" for name, expression in match.headers),
    ]
    return ", ".join(parts) or "any request"


# ---------------------------------------------------------------------------------------------------------------- diff


async def diff(b: Backends, request: pb.DiffRequest, author: str) -> pb.DiffResponse:
    """Compare the Mesh with what it would be; `author` is who would write it.

    Raises:
        InvalidManifest: with the findings of all documents.
        Invalid, NotFound, Unavailable: there is no document; what would be deleted is not there; there is no Mesh.
    """
    mesh = _mesh(b)
    records = await asyncio.to_thread(_read, b, request, author)
    response = pb.DiffResponse()
    changes: dict[str, bytes | None] = {}
    for record in records:
        there = mesh.manifests.get(record.id)
        if request.delete and there is None:
            raise NotFound(f"there is no {record.kind} {record.name}, so it cannot be deleted")
        if there is None:
            word, value = "created", encode(record)
        elif request.delete:
            word, value = "deleted", None
        elif registry.says_the_same(there.record, record):
            response.changes.add(manifest=record.id, change="unchanged")
            continue
        else:
            word, value = "configured", encode(replace(record, created=there.record.created))
        response.changes.add(manifest=record.id, change=word)
        changes[b.keys.manifest(record.id)] = value
    before, after = await b.imagine(changes)
    response.revision = before.revision
    await asyncio.to_thread(_compare, before, after, response)
    return response


def _read(b: Backends, request: pb.DiffRequest, author: str) -> Sequence[ManifestRecord]:
    if not request.documents:
        raise Invalid("there is no document to compare", hint="send at least one")
    read: dict[str, ManifestRecord] = {}
    findings: list[Finding] = []
    for document in request.documents:
        try:
            file, line = document.file or "-", document.line or 1
            record = manifests.read(document.text, b.kinds, file=file, line=line, author=author, now=b.now())
            record = manifests.within(record, request.namespace)
        except InvalidManifest as e:
            findings.extend(e.findings)
            continue
        read[record.id] = record
    if findings:
        raise InvalidManifest(findings)
    return list(read.values())


def _compare(before: Mesh, after: Mesh, response: pb.DiffResponse) -> None:
    """Fill in what is different. No private key is opened for it, since none is shown."""
    was, now = Generator(_unopened), Generator(_unopened)
    affected = sorted(after.affected)
    groups: dict[tuple[tuple[str, ...], ...], tuple[list[str], Sequence[_Change]]] = {}
    for name in affected[:MOST_COMPARED]:
        old = was.snapshot(before, name) if name in before.proxies else Snapshot()
        new = now.snapshot(after, name) if name in after.proxies else Snapshot()
        if changes := _changes(old, new):
            key = tuple(
                (short(c.any.type), c.any.name, *(r.version if r else "" for r in (c.old, c.new))) for c in changes
            )
            groups.setdefault(key, ([], changes))[0].append(str(name))
    response.proxies = sum(len(names) for names, _ in groups.values())
    response.more = max(0, len(affected) - MOST_COMPARED)
    room = MOST_BYTES
    for names, changes in sorted(groups.values(), key=lambda group: group[0]):
        if len(response.differences) == MOST_GROUPS:
            response.more += len(names)
            continue
        told = response.differences.add(proxies=names[:MOST_NAMED], more=max(0, len(names) - MOST_NAMED))
        for change in changes:
            shown = change.shown()
            room -= shown.ByteSize()
            if room >= 0:
                told.resources.append(shown)
            else:
                response.more += 1
    _problems(before, after, response)


class _Change(NamedTuple):
    """What a proxy has and would have under one name; at least one of the two."""

    old: Resource | None
    new: Resource | None

    @property
    def any(self) -> Resource:
        found = self.new or self.old
        assert found is not None  # noqa: S101
        return found

    def shown(self) -> pb.ChangedResource:
        word = "added" if self.old is None else "removed" if self.new is None else "changed"
        shown = pb.ChangedResource(type=short(self.any.type), name=self.any.name, change=word)
        shown.sources.extend(sorted({source.manifest for r in self if r is not None for source in r.sources}))
        if self.any.type is not Type.SECRET:
            shown.before = _json(self.old) if self.old is not None else ""
            shown.after = _json(self.new) if self.new is not None else ""
        return shown


def _changes(old: Snapshot, new: Snapshot) -> Sequence[_Change]:
    found: list[_Change] = []
    for type_ in Type:
        before, after = old.of_type(type_), new.of_type(type_)
        for name in sorted(before.keys() | after.keys()):
            was, now = before.get(name), after.get(name)
            if was is None or now is None or was.version != now.version:
                found.append(_Change(was, now))
    return found


def _unopened(record: CertificateRecord) -> bytes:
    """In place of a private key: another one for another certificate."""
    return record.serial.encode()


def _json(resource: Resource) -> str:
    return json.dumps(plain(resource), ensure_ascii=False)


def _problems(before: Mesh, after: Mesh, response: pb.DiffResponse) -> None:
    for told, here, there in ((response.come, after, before), (response.go, before, after)):
        found = [
            problem
            for manifest in sorted(here.problems)
            if here.problems[manifest] != there.problems.get(manifest)
            for problem in here.problems[manifest]
            if problem not in there.problems.get(manifest, ())
        ]
        response.more += max(0, len(found) - MOST_PROBLEMS)
        for p in found[:MOST_PROBLEMS]:
            shown = pb.Problem(reason=p.reason, message=p.message, field=p.field, severity=p.severity)
            told.add(manifest=p.manifest, problem=shown)


# -------------------------------------------------------------------------------------------------------------- config


async def config(b: Backends, request: pb.ConfigRequest, connected: Sequence[pb.Proxy]) -> pb.ConfigResponse:
    """`connected` are the proxies of all replicas, as `Proxies` tells them.

    Raises:
        Invalid: there is no such type.
        NotFound: there is no such proxy, or no such resource of it.
        Unavailable: this replica has no Mesh.
    """
    mesh = _mesh(b)
    name = _name(request.proxy, "the proxy")
    if request.type and request.type not in _TYPES:
        raise Invalid(f"{request.type[:80]!r} is no type of resource", hint=f"known are {', '.join(_TYPES)}")
    if name not in mesh.proxies:
        raise NotFound(f"there is no proxy {name}", hint="smc get workloads -A lists the workloads that were applied")
    generator = Generator(lambda c: b.keyring.open(b.keys.certificate(c.identity), c.sealed_key))
    snapshot = await asyncio.to_thread(generator.snapshot, mesh, name)
    status = next((p for p in connected if p.name == str(name)), pb.Proxy())
    response = pb.ConfigResponse(proxy=str(name), revision=mesh.revision, replica=status.replica)
    types = [type_ for type_ in Type if request.type in ("", short(type_))]
    for type_ in types:
        acked = status.versions.get(short(type_), "")
        response.types.add(type=short(type_), version=snapshot.versions[type_], acked=acked)
    wanted = [r for t in types for r in snapshot.of_type(t).values() if request.name in ("", r.name)]
    if request.name and not wanted:
        raise NotFound(f"proxy {name} has no resource {request.name[:200]}", hint="leave out --name to see all")
    response.resources.extend(await asyncio.to_thread(_configured, wanted, status.nacks))
    if response.ByteSize() > MOST_BYTES:
        raise Exhausted(f"the configuration has {response.ByteSize()} bytes", hint="ask for one --type or --name")
    return response


def _configured(resources: Iterable[Resource], nacks: Iterable[pb.Nack]) -> list[pb.ConfiguredResource]:
    refused = {(nack.type_url, name): nack.text for nack in nacks for name in nack.resource.split(", ")}
    return [
        pb.ConfiguredResource(
            type=short(resource.type),
            name=resource.name,
            version=resource.version,
            json=_json(resource),
            sources=sorted({source.manifest for source in resource.sources}),
            refused=refused.get((resource.type.value, resource.name), ""),
        )
        for resource in resources
    ]


# --------------------------------------------------------------------------------------------------------------- reach


async def reach(b: Backends, manifest: str, mod_revision: int) -> pb.ReachResponse:
    """Which proxies have something that comes from a manifest, and which of them have ACKed it as of `mod_revision`.

    Raises:
        Unavailable, StoreError: this replica has no Mesh; it is not known which replicas there are.
    """
    mesh = _mesh(b)
    reached = await asyncio.to_thread(_reached, mesh, manifest)
    if not reached:
        return pb.ReachResponse()
    acks = await waiting.survey(b, mod_revision)
    unknown = "; ".join(f"{replica} {why}" for replica, why in sorted(acks.behind.items()))

    def state(proxy: str) -> str:
        if proxy in acks.lagging:
            return acks.lagging[proxy]
        return "acked" if proxy in acks.connected else f"disconnected ({unknown})" if unknown else "disconnected"

    found = sorted(((state(proxy), proxy) for proxy in map(str, reached)), key=lambda s: (s[0] == "acked", s[1]))
    return pb.ReachResponse(
        proxies=len(found),
        acked=sum(state == "acked" for state, _ in found),
        reached=[pb.ReachedProxy(proxy=proxy, state=state) for state, proxy in found[:MOST_REACHED]],
    )


def _reached(mesh: Mesh, manifest: str) -> list[Name]:
    """The nouns of many proxies are the same objects: each is looked at once."""
    known: dict[int, bool] = {}

    def of(noun: object, sources: Iterable[tuple[str, int]]) -> bool:
        if id(noun) not in known:
            known[id(noun)] = any(source == manifest for source, _ in sources)
        return known[id(noun)]

    return sorted(
        name
        for name, proxy in mesh.proxies.items()
        if of(proxy.outbound, _called_by(proxy.outbound))
        or of(proxy.policy, policy_sources(proxy.policy))
        or of(proxy.inbound, (source for inbound in proxy.inbound for source in inbound.sources))
    )


def _called_by(outbound: Outbound) -> Iterator[tuple[str, int]]:
    for destination in outbound.destinations:
        yield from destination.versions
    for upstream in outbound.upstreams:
        if upstream.treatment is not None:
            yield upstream.treatment.source
