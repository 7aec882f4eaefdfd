"""Who holds a token, or a credential of its own, and wants more: it gets what is its own, or a clear refusal."""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from cryptography import x509 as cx509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from envoy.extensions.transport_sockets.tls.v3 import secret_pb2
from envoy.service.discovery.v3 import discovery_pb2

from e2e.kit.chaos import Chaos
from e2e.kit.mesh import Mesh, eventually, module_mesh
from smc.certificates import credential as credentials
from smc.certificates import x509
from smc.certificates.credential import Credential
from smc.certificates.tokens import Token
from smc.channels import channel_options, channel_to
from smc.codec import decode
from smc.demo import bookstore
from smc.demo.bookstore import Placement
from smc.demo.local import MESH, TRUST_DOMAIN
from smc.demo.programs import Replica
from smc.keys import Keys
from smc.proxy.join import ask, join
from smc.proxy.settings import Exit, ProxyFailed
from smc.records import TokenRecord
from smc.v1 import smc_pb2 as pb
from smc.v1.smc_pb2_grpc import JoinStub
from smc.xds.snapshot import Type

mesh = module_mesh()
pytestmark = pytest.mark.asyncio(loop_scope="module")

KEYS = Keys(MESH)
MALLORY = Placement("bookthief", "mallory", "mallory")
"""A workload of the mesh, by its own right. No Envoy is started for it: the tests speak in its place."""
NODE = MALLORY.workload
NOWHERE = "127.1.0.1"
"""Its address, in a network that no mesh is given."""
PATH = f"proxy/{NODE}"
URI = f"spiffe://{TRUST_DOMAIN}/{PATH}"
VICTIM = bookstore.BOOKBUYER.workload
Code = grpc.StatusCode

DELTA, SOTW = "Delta", "Stream"
AGGREGATED = "/envoy.service.discovery.v3.AggregatedDiscoveryService/{}AggregatedResources"
SECRETS = "/envoy.service.secret.v3.SecretDiscoveryService/{}Secrets"


@pytest_asyncio.fixture(scope="module", loop_scope="module", autouse=True)
async def mallory(mesh: Mesh) -> Credential:
    """Its own credential, as any proxy gets it."""
    mesh.write(NODE, bookstore.workload(MALLORY, NOWHERE))
    token, key = await _token(mesh), x509.new_key()
    answer = await ask(mesh.replicas[0].join, token, key, time.time)
    credential = Credential(URI, answer.chain, x509.private_pem(key).decode(), tuple(answer.roots))
    credential.check(time.time())
    return credential


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def served(mesh: Mesh) -> AsyncIterator[None]:
    """During every test, and for half a second after it, no request of the mesh fails."""
    async with mesh.prober(rate=100) as prober:
        yield
        await prober.more(50)
    prober.assert_clean(minimum=50)


# --------------------------------------------------------------------------------------------------------------- tokens


async def test_of_fifty_keys_that_use_one_token_at_once_exactly_one_gets_a_credential(mesh: Mesh) -> None:
    token = await _token(mesh)
    keys = [x509.new_key() for _ in range(50)]
    places = [mesh.replicas[n % 3].join for n in range(50)]

    outcomes = await asyncio.gather(*(_attempt(mesh, *each, token) for each in zip(places, keys, strict=True)))
    won = [key for key, outcome in zip(keys, outcomes, strict=True) if isinstance(outcome, pb.Credential)]
    assert len(won) == 1
    refusals = Counter(outcome for outcome in outcomes if not isinstance(outcome, pb.Credential))
    assert refusals == {(Code.PERMISSION_DENIED, "the token was used by another key (ask for a new token)"): 49}

    # The same key may repeat it wherever it likes; the others may not, however often they try.
    for replica in mesh.replicas:
        _leaf(mesh, await _said(mesh, replica.join, token, x509.request(won[0])), won[0])
        loser = next(key for key in keys if key is not won[0])
        assert await _attempt(mesh, replica.join, loser, token) in refusals
    record = await _record(mesh, token)
    assert record is not None
    assert record.used_by == x509.fingerprint(won[0].public_key())


async def test_one_key_that_uses_its_token_many_times_at_once_gets_an_answer_each_time(mesh: Mesh) -> None:
    token, key = await _token(mesh), x509.new_key()
    places = [mesh.replicas[n % 3].join for n in range(30)]
    answers = await asyncio.gather(*(_said(mesh, place, token, x509.request(key)) for place in places))
    for answer in answers:
        _leaf(mesh, answer, key)


async def test_a_lost_answer_costs_a_retry_and_nothing_else(mesh: Mesh, tmp_path: Path) -> None:
    token = await _token(mesh)
    before = set(await mesh.etcd.read(KEYS.answers))
    async with _network(mesh.replicas[0]) as network, asyncio.TaskGroup() as tasks:
        network.delay = 0.5
        joining = tasks.create_task(join(tmp_path, token, (network.listen,), timeout=30))

        async def answered() -> bool:
            return bool(set(await mesh.etcd.read(KEYS.answers)) - before)

        await eventually(answered, timeout=15, what="the leader has signed it")
        assert not joining.done(), "its answer is on the way"
        await network.cut()
        record = await _record(mesh, token)
        assert record is not None
        assert record.used_by, "and the token is used"
        connections = network.connections
        await network.restore()
        credential, enrolled = await joining
        assert network.connections > connections, "it asked again"
    credential.check(time.time())
    assert (credential.uri, enrolled.proxy) == (URI, NODE)
    code, _ = await _refused(mesh, mesh.replicas[1].join, token, x509.request(x509.new_key()))
    assert code is Code.PERMISSION_DENIED, "no other key can profit from it"


async def test_who_joins_while_the_leader_is_dead_gets_its_credential_from_the_next_one(
    mesh: Mesh, tmp_path: Path
) -> None:
    token = await _token(mesh, "60s")
    record = await _record(mesh, token)
    assert record is not None
    leader, key = await mesh.leader(), await mesh.leader_key()
    await leader.kill()
    assert not leader.process.alive
    others = tuple(replica.join for replica in mesh.replicas if replica is not leader)
    async with asyncio.TaskGroup() as tasks:
        joining = tasks.create_task(join(tmp_path, token, (leader.join, *others), timeout=30))
        await asyncio.sleep(1)
        assert await mesh.leader_key() == key, "nobody can sign yet"
        assert not joining.done()
        credential, _ = await joining
    assert await mesh.leader_key() != key
    assert time.time() < record.expires
    credential.check(time.time())
    assert credential.uri == URI
    await leader.start()
    await leader.until_ready()


async def test_an_expired_token_is_worth_nothing_also_to_the_key_that_used_it(mesh: Mesh, tmp_path: Path) -> None:
    used, unused = await asyncio.gather(_token(mesh, "10s"), _token(mesh, "10s"))
    key = x509.new_key()
    _leaf(mesh, await _said(mesh, mesh.replicas[0].join, used, x509.request(key)), key)
    records = [await _record(mesh, token) for token in (used, unused)]
    expires = max(record.expires for record in records if record is not None)
    await asyncio.sleep(max(0.0, expires - time.time()) + 0.1)
    for replica, token in zip(mesh.replicas, (used, unused, used), strict=True):
        code, text = await _refused(mesh, replica.join, token, x509.request(key))
        assert code is Code.UNAUTHENTICATED
        assert "expired" in text
        assert "ask for a new token" in text

    async def gone() -> bool:
        return not any([await _record(mesh, token) for token in (used, unused)])

    await eventually(gone, timeout=40, what="nothing is left of them in etcd", every=0.2)
    with pytest.raises(ProxyFailed, match="ask for a new token: smc token create") as failed:
        await join(tmp_path, unused, (mesh.replicas[0].join,), timeout=10)
    assert failed.value.exit in (Exit.TOKEN_EXPIRED, Exit.NO_SUCH_TOKEN)


async def test_a_client_with_another_pin_refuses_the_replica_before_it_says_its_token(
    mesh: Mesh, tmp_path: Path
) -> None:
    token = await _token(mesh)
    astray = dataclasses.replace(token, pins=("0" * 64,))
    async with _network(mesh.replicas[0]) as network:
        with pytest.raises(ProxyFailed, match="is not the mesh that the token is for") as failed:
            await join(tmp_path, astray, (network.listen,), timeout=10)
        assert failed.value.exit == Exit.WRONG_PIN
        assert "The token was not sent" in str(failed.value)
        assert network.connections == 1, "it looked at the certificates, and never connected to speak"
    record = await _record(mesh, token)
    assert record is not None
    assert not record.used_by
    credential, _ = await join(tmp_path, token, (mesh.replicas[0].join,), timeout=10)
    assert credential.uri == URI


# ------------------------------------------------------------------------------------------------------------- requests


async def test_of_what_a_request_asks_for_nothing_but_its_key_is_in_the_certificate(mesh: Mesh) -> None:
    token, key = await _token(mesh), x509.new_key()
    leaf = _leaf(mesh, await _said(mesh, mesh.replicas[0].join, token, _greedy_request(key)), key)
    assert leaf.subject == cx509.Name([])
    names = leaf.extensions.get_extension_for_class(cx509.SubjectAlternativeName).value
    assert list(names) == [cx509.UniformResourceIdentifier(URI)]
    assert leaf.extensions.get_extension_for_class(cx509.BasicConstraints).value.ca is False
    usage = leaf.extensions.get_extension_for_class(cx509.KeyUsage).value
    assert not usage.key_cert_sign
    assert not usage.crl_sign


async def test_a_bad_request_is_refused_with_the_reason_and_leaves_the_token_as_it_was(mesh: Mesh) -> None:
    token, key, victim = await _token(mesh), x509.new_key(), x509.new_key()
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    of_weak = cx509.CertificateSigningRequestBuilder().subject_name(cx509.Name([])).sign(weak, hashes.SHA256())
    of_another = x509.request(key).replace(_point(key), _point(victim))
    for place, (csr, why) in enumerate(
        (
            (of_weak.public_bytes(serialization.Encoding.DER), "an RSA key of 1024 bits"),
            (of_another, "the certificate request is not signed by its own key"),
            (x509.request(key)[:-7], "the certificate request cannot be read"),
        )
    ):
        code, text = await _refused(mesh, mesh.replicas[place].join, token, csr)
        assert code is Code.INVALID_ARGUMENT
        assert why in text
    record = await _record(mesh, token)
    assert record is not None
    assert not record.used_by
    _leaf(mesh, await _said(mesh, mesh.replicas[0].join, token, x509.request(key)), key)


async def test_a_token_for_another_kind_of_credential_makes_no_proxy(mesh: Mesh, tmp_path: Path) -> None:
    token = await _token(mesh, path="viewer/mallory")
    with pytest.raises(ProxyFailed, match="is no proxy's credential") as failed:
        await join(tmp_path, token, (mesh.replicas[0].join,), timeout=10)
    assert failed.value.exit == Exit.REFUSED
    assert f"spiffe://{TRUST_DOMAIN}/viewer/mallory" in str(failed.value)
    assert not (tmp_path / "credential").exists()


# ------------------------------------------------------------------------------------------------------------------ xDS


@pytest.mark.parametrize("variant", [DELTA, SOTW])
@pytest.mark.parametrize("method", [AGGREGATED, SECRETS], ids=["aggregated", "secrets"])
async def test_a_proxy_that_asks_for_anothers_secret_is_refused_counted_and_logged(
    mesh: Mesh, mallory: Credential, method: str, variant: str
) -> None:
    replica = mesh.replicas[1]
    foreign = (VICTIM, f"spiffe://{TRUST_DOMAIN}/ns/bookbuyer/sa/bookbuyer", "*")
    before = await _refusals(replica, "foreign_secret")
    for name in foreign:
        asked = _request(variant, Type.SECRET, "identity", name, node=NODE)
        code, text, received = await _answer(replica, mallory, method.format(variant), asked)
        assert (code, received) == (Code.PERMISSION_DENIED, 0)
        assert text == f"{NODE} asks for the secret '{name}': a proxy has identity and bundle"
    # And so is one that has said something innocent before.
    if method is AGGREGATED:
        first = _request(variant, Type.CLUSTER, node=NODE)
        asked = _request(variant, Type.SECRET, VICTIM)
        code, _, _ = await _answer(replica, mallory, method.format(variant), first, asked)
        assert code is Code.PERMISSION_DENIED
    assert await _refusals(replica, "foreign_secret") == before + len(foreign) + (method is AGGREGATED)
    lines = [line for line in replica.process.log.read_text().splitlines() if "a secret that is not its own" in line]
    assert lines
    assert all(NODE in line for line in lines)
    assert any(VICTIM in line for line in lines)


async def test_neither_a_workloads_certificate_nor_an_operators_credential_opens_a_stream(
    mesh: Mesh, mallory: Credential
) -> None:
    replica = mesh.replicas[2]
    workloads = await _identity(replica, mallory)
    assert workloads.uri.endswith("/ns/bookthief/sa/mallory")
    operators = credentials.read(mesh.credential)
    before = await _refusals(replica, "denied")
    for other, why in (
        (workloads, "a workload's certificate is for the traffic of the mesh"),
        (operators, f"{operators.path} is no proxy's credential: only a proxy's may open a stream"),
    ):
        first = _request(DELTA, Type.SECRET, "identity", node=NODE)
        code, text, received = await _answer(replica, other, AGGREGATED.format(DELTA), first)
        assert (code, received) == (Code.PERMISSION_DENIED, 0)
        assert why in text
    assert await _refusals(replica, "denied") == before + 2


@pytest.mark.parametrize("variant", [DELTA, SOTW])
async def test_a_proxy_cannot_say_that_it_is_another(mesh: Mesh, mallory: Credential, variant: str) -> None:
    replica = mesh.replicas[0]
    before = await _refusals(replica, "impostor")
    own, as_victim = (_request(variant, Type.CLUSTER, node=node) for node in (NODE, VICTIM))
    for messages in ([as_victim], [own, as_victim]):
        code, text, _ = await _answer(replica, mallory, AGGREGATED.format(variant), *messages)
        assert code is Code.PERMISSION_DENIED
        assert text == f"node.id is '{VICTIM}', and the credential is of {NODE}: they must be equal"
    assert await _refusals(replica, "impostor") == before + 2


# --------------------------------------------------------------------------------------------------------- what is said


async def _token(mesh: Mesh, ttl: str = "10m", path: str = PATH) -> Token:
    return Token.parse(await mesh.smc("token", "create", path, "--ttl", ttl))


def _network(replica: Replica) -> Chaos:
    """In front of its join port, on another port of its address."""
    return Chaos(f"{replica.address}:25130", replica.join)


async def _record(mesh: Mesh, token: Token) -> TokenRecord | None:
    """What etcd has of a token."""
    key = KEYS.token(token.sha256)
    found = (await mesh.etcd.read(key)).get(key)
    return decode(TokenRecord, found[0], key="a token") if found else None


async def _said(mesh: Mesh, address: str, token: Token, csr: bytes) -> pb.Credential:
    """One bare call of `Join`, with whatever a client might send."""
    roots = credentials.read(mesh.credential).roots_pem.encode()
    tls = grpc.ssl_channel_credentials(root_certificates=roots)
    async with grpc.aio.secure_channel(
        address, tls, options=channel_options(x509.replica_host(TRUST_DOMAIN))
    ) as channel:
        answer: pb.Credential = await JoinStub(channel).Join(  # type: ignore[no-untyped-call]
            pb.JoinRequest(token=token.text(), csr=csr), timeout=20
        )
        return answer


async def _attempt(
    mesh: Mesh, address: str, key: ec.EllipticCurvePrivateKey, token: Token
) -> pb.Credential | tuple[Code, str]:
    """The credential, or the refusal."""
    try:
        return await _said(mesh, address, token, x509.request(key))
    except grpc.aio.AioRpcError as e:
        return e.code(), e.details() or ""


async def _refused(mesh: Mesh, address: str, token: Token, csr: bytes) -> tuple[Code, str]:
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await _said(mesh, address, token, csr)
    text = e.value.details() or ""
    assert token.text()[4:47] not in text
    return e.value.code(), text


def _leaf(mesh: Mesh, answer: pb.Credential, key: ec.EllipticCurvePrivateKey) -> cx509.Certificate:
    """The leaf of an answer, once it proved to be for this key, the token's name, and of this mesh."""
    roots = credentials.read(mesh.credential).roots
    return x509.check_answer(answer.chain, key.public_key(), URI, roots, time.time())[0]


def _point(key: ec.EllipticCurvePrivateKey) -> bytes:
    form = serialization.PublicFormat.UncompressedPoint
    return key.public_key().public_bytes(serialization.Encoding.X962, form)


def _greedy_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A request for an authority that is a replica, an operator and another proxy."""
    names = [
        cx509.UniformResourceIdentifier(f"spiffe://{TRUST_DOMAIN}/proxy/{VICTIM}"),
        cx509.UniformResourceIdentifier(f"spiffe://{TRUST_DOMAIN}/operator/admin"),
        cx509.DNSName(x509.replica_host(TRUST_DOMAIN)),
        cx509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    ]
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    builder = (
        cx509.CertificateSigningRequestBuilder()
        .subject_name(cx509.Name([cx509.NameAttribute(NameOID.COMMON_NAME, VICTIM)]))
        .add_extension(cx509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(cx509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            cx509.KeyUsage(digital_signature=True, key_cert_sign=True, crl_sign=True, **usage), critical=True
        )
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


@asynccontextmanager
async def _stream(replica: Replica, credential: Credential, method: str) -> AsyncIterator[Any]:
    """A stream of bytes, both ways."""
    async with channel_to(replica.xds, credential) as channel:
        yield channel.stream_stream(method)()


def _request(variant: str, type_: Type, *names: str, node: str = "") -> bytes:
    message: Any
    if variant == DELTA:
        message = discovery_pb2.DeltaDiscoveryRequest(type_url=type_.value, resource_names_subscribe=names)
    else:
        message = discovery_pb2.DiscoveryRequest(type_url=type_.value, resource_names=names)
    if node:
        message.node.id = node
    data: bytes = message.SerializeToString()
    return data


async def _answer(
    replica: Replica, credential: Credential, method: str, first: bytes, *more: bytes
) -> tuple[Code, str, int]:
    """Say these things on a new stream; returns how it ended, and how many answers came before that.

    What follows the first is said once that is answered.
    """
    received = 0
    async with asyncio.timeout(10), _stream(replica, credential, method) as call:
        try:
            await call.write(first)
            for message in more:
                assert await call.read() is not grpc.aio.EOF
                received += 1
                await call.write(message)
            while await call.read() is not grpc.aio.EOF:
                received += 1
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # it was ended meanwhile: how, the call knows
        return await call.code(), await call.details(), received


async def _identity(replica: Replica, credential: Credential) -> Credential:
    """The certificate with which mallory's traffic would go, and its key: what its own proxy is given."""
    async with asyncio.timeout(20), _stream(replica, credential, SECRETS.format(DELTA)) as call:
        await call.write(_request(DELTA, Type.SECRET, "identity", node=NODE))
        while True:
            data = await call.read()
            assert data is not grpc.aio.EOF, await call.details()
            for resource in discovery_pb2.DeltaDiscoveryResponse.FromString(data).resources:
                secret = secret_pb2.Secret()
                assert resource.resource.Unpack(secret)
                chain = secret.tls_certificate.certificate_chain.inline_bytes.decode()
                key = secret.tls_certificate.private_key.inline_bytes.decode()
                call.cancel()
                return Credential(x509.uri(x509.load(chain)[0]), chain, key, credential.roots)


async def _refusals(replica: Replica, reason: str) -> float:
    return (await replica.metrics()).get(f'smc_xds_refused_total{{reason="{reason}"}}', 0.0)
