"""One replica's API on loopback with real TLS, on a store in memory, and whoever calls it."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from cluster.kv import KV, Guard, Operation, Outcome, Unavailable
from cluster.memory import MemoryKV
from smc import plugins
from smc.api.backends import Backends, ProxyStatus, ReplicaStatus
from smc.api.limits import Limits
from smc.api.server import JOIN_LIMITS, MESH_LIMITS, Ports, serving
from smc.certificates import x509
from smc.certificates.answering import Answers
from smc.certificates.authority import load_authority, load_keyring
from smc.certificates.credential import Credential
from smc.certificates.initialise import initialise
from smc.certificates.requests import replica_credential
from smc.certificates.signers.local import LocalSigner
from smc.keys import Keys
from smc.metrics import Metrics
from smc.model import MeshConfig
from smc.records import MemberRecord
from smc.registry import Registry
from smc.v1 import smc_pb2 as pb
from smc.v1.smc_pb2_grpc import JoinStub, MeshStub
from tests.unit.api.meshes import mesh

TRUST_DOMAIN = "mesh.example"
DAY = timedelta(hours=24)

SERVICE = b"""\
apiVersion: smc.io/v1alpha1
kind: Service
metadata:
  name: bookstore
  namespace: shop
spec:
  ports:
  - port: 80
"""


class Leads:
    """A leadership that nobody contests."""

    def __init__(self, kv: KV) -> None:
        self.kv = kv

    async def transact(self, operations: Sequence[Operation], guards: Sequence[Guard] = ()) -> Outcome:
        return await self.kv.transact(operations, guards)


@dataclass
class Replica:
    """What a test may change while it runs: each is read anew by the API."""

    kv: KV
    keys: Keys
    ports: Ports
    signer_authority: Any
    operator: Credential
    credential: Credential
    backends: Backends
    metrics: Metrics
    mesh: Any = None
    imagine: Any = None
    reached: int = 7
    streams: list[ProxyStatus] = field(default_factory=list)
    members: list[MemberRecord] = field(default_factory=list)
    unreachable_for: float = 0.0
    clock: float = 0.0
    """Seconds that it is ahead of the real one."""

    @property
    def api(self) -> str:
        return f"127.0.0.1:{self.ports.api}"

    @property
    def join(self) -> str:
        return f"127.0.0.1:{self.ports.join}"

    async def signed(self, path: str, *, ttl: timedelta = DAY) -> Credential:
        """A credential by the mesh's own authority."""
        key = x509.new_key()
        uri = x509.credential_uri(TRUST_DOMAIN, path)
        return await self.certified(uri, key, ttl=ttl)

    async def certified(self, uri: str, key: Any, *, ttl: timedelta = DAY) -> Credential:
        _, chain = await self.signer_authority.issue(key.public_key(), uri, now=time.time(), ttl=ttl)
        return Credential(uri, chain, x509.private_pem(key).decode(), self.operator.roots)


class BreakableKV:
    """A store that can be made to fail: `error` is raised by every call while it is set."""

    def __init__(self, kv: KV) -> None:
        self._kv = kv
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        if self.error is not None:
            raise self.error
        return getattr(self._kv, name)


UNREACHABLE = Unavailable("no endpoint answered within 5 s")


@asynccontextmanager
async def running(
    *,
    mesh_limits: Limits = MESH_LIMITS,
    join_limits: Limits = JOIN_LIMITS,
    clock: Callable[[], float] = time.monotonic,
    name: str = "replica-1",
    of: Replica | None = None,
    kek: Path | None = None,
) -> AsyncIterator[Replica]:
    """A replica of a new mesh, or another one of the mesh `of`; a leader answers requests for credentials."""
    keys = Keys("default")
    with tempfile.TemporaryDirectory() as directory:
        signer = LocalSigner.create(kek or Path(directory) / "kek")
    if of is None:
        kv: Any = BreakableKV(MemoryKV())
        operator = await initialise(kv, keys, signer, TRUST_DOMAIN, time.time())
        keyring = await load_keyring(kv, keys, signer)
        authority = await load_authority(kv, keys, keyring, signer)
    else:
        kv, operator, keyring, authority = of.kv, of.operator, of.backends.keyring, of.signer_authority
    async with asyncio.TaskGroup() as tasks:
        answers = tasks.create_task(
            Answers(
                kv, keys, keyring, lambda: authority, Leads(kv), time.time, lambda: DAY, dict, lambda _kind: None
            ).run()
        )
        credential = await replica_credential(kv, keys, keyring, name, now=time.time())
        replica: Replica

        async def members() -> Sequence[MemberRecord]:
            if replica.kv.error is not None:  # type: ignore[attr-defined]
                raise UNREACHABLE
            return replica.members

        backends = Backends(
            kv=kv,
            keys=keys,
            keyring=keyring,
            registry=Registry(kv, keys),
            kinds=plugins.kinds(),
            trust_domain=TRUST_DOMAIN,
            mesh=lambda: replica.mesh,
            imagine=lambda changes: replica.imagine(changes),
            replica=lambda: ReplicaStatus(name, of is None, True, 7, len(replica.streams), "0.1.0"),
            reached=lambda: replica.reached,
            proxies=lambda: replica.streams,
            members=members,
            credential=lambda: replica.credential,
            unreachable_for=lambda: replica.unreachable_for,
            now=lambda: time.time() + replica.clock,
        )
        replica = Replica(kv, keys, Ports(0, 0), authority, operator, credential, backends, Metrics())
        async with serving(
            backends,
            replica.metrics,
            api="127.0.0.1:0",
            join="127.0.0.1:0",
            mesh_limits=mesh_limits,
            join_limits=join_limits,
            clock=clock,
        ) as ports:
            replica.ports = ports
            replica.mesh = mesh(MeshConfig(), {})
            replica.members = [member(replica, name)]
            yield replica
        if of is None:
            answers.cancel()
            await asyncio.wait([answers])
        else:
            answers.cancel()


def member(replica: Replica, name: str) -> MemberRecord:
    return MemberRecord(name, "127.0.0.1:15128", replica.api, replica.join, (1,), True, 0, "0.1.0")


@asynccontextmanager
async def calling(address: str, credential: Credential | None, *, roots: str = "") -> AsyncIterator[grpc.aio.Channel]:
    pem = roots or (credential.roots_pem if credential else "")
    tls = grpc.ssl_channel_credentials(
        pem.encode(), credential.key.encode() if credential else None, credential.chain.encode() if credential else None
    )
    options = [
        ("grpc.ssl_target_name_override", x509.replica_host(TRUST_DOMAIN)),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    async with grpc.aio.secure_channel(address, tls, options) as channel:
        yield channel


async def call(replica: Replica, credential: Credential, method: str, request: Any, **more: Any) -> Any:
    async with calling(replica.api, credential) as channel:
        return await getattr(MeshStub(channel), method)(request, timeout=20, **more)  # type: ignore[no-untyped-call]


async def ask_to_join(replica: Replica, token: str, csr: bytes) -> pb.Credential:
    async with calling(replica.join, None, roots=replica.operator.roots_pem) as channel:
        answer: pb.Credential = await JoinStub(channel).Join(  # type: ignore[no-untyped-call]
            pb.JoinRequest(token=token, csr=csr), timeout=20
        )
        return answer


def details(error: grpc.aio.AioRpcError) -> pb.Error:
    """The `Error` that a failed call carries."""
    from google.rpc.status_pb2 import Status

    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            told = pb.Error()
            (detail,) = Status.FromString(value).details  # type: ignore[arg-type]
            assert detail.Unpack(told)
            return told
    raise AssertionError(f"no details in {error}")
