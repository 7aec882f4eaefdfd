from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest

from smc.api.limits import Limits, Rate
from smc.certificates import x509
from smc.certificates.tokens import Token
from smc.model import MeshConfig, Name
from smc.proxy.join import presented_chain
from smc.v1 import smc_pb2 as pb
from tests.unit.api.meshes import mesh, proxy
from tests.unit.api.replica import Replica, ask_to_join, call, calling, details, running

BUYER = Name("shop", "buyer")


@pytest.fixture
async def replica() -> AsyncIterator[Replica]:
    async with running() as replica:
        replica.mesh = mesh(MeshConfig(), {BUYER: proxy(BUYER)})
        yield replica


async def token(replica: Replica, credential: str = "proxy/shop/buyer") -> str:
    made = await call(replica, replica.operator, "CreateToken", pb.CreateTokenRequest(credential=credential))
    return str(made.token)


async def failing(replica: Replica, text: str, csr: bytes) -> tuple[grpc.StatusCode, pb.Error]:
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await ask_to_join(replica, text, csr)
    return e.value.code(), details(e.value)


async def test_a_token_turns_a_key_into_the_credential_that_it_names(replica: Replica) -> None:
    key = x509.new_key()
    answer = await ask_to_join(replica, await token(replica), x509.request(key))
    uri = "spiffe://mesh.example/proxy/shop/buyer"
    x509.check_answer(answer.chain, key.public_key(), uri, tuple(answer.roots), replica.backends.now())
    assert (answer.address, answer.app_address) == ("127.0.0.9", "127.0.0.10")
    assert list(answer.xds_addresses) == ["127.0.0.1:15128"]


async def test_the_same_key_may_ask_again_and_another_may_not(replica: Replica) -> None:
    text = await token(replica)
    csr = x509.request(x509.new_key())
    await ask_to_join(replica, text, csr)
    await ask_to_join(replica, text, csr)
    code, told = await failing(replica, text, x509.request(x509.new_key()))
    assert (code, told.kind) == (grpc.StatusCode.PERMISSION_DENIED, "Denied")


async def test_a_token_that_nobody_made_is_no_proof(replica: Replica) -> None:
    made = Token.parse(await token(replica))
    forged = Token(b"\0" * 32, made.pins).text()
    code, told = await failing(replica, forged, x509.request(x509.new_key()))
    assert (code, told.kind) == (grpc.StatusCode.UNAUTHENTICATED, "Unauthenticated")


@pytest.mark.parametrize(("text", "csr"), [("nonsense", None), (None, b"nonsense"), (None, b"")])
async def test_what_is_no_token_and_what_is_no_request_is_invalid(
    replica: Replica, text: str | None, csr: bytes | None
) -> None:
    text = await token(replica) if text is None else text
    csr = x509.request(x509.new_key()) if csr is None else csr
    code, told = await failing(replica, text, csr)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert text not in str(told) or text == "nonsense"


async def test_a_proxy_of_no_workload_is_told_what_to_apply(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smc.api.credentials.PATIENCE", 0.05)
    code, told = await failing(replica, await token(replica, "proxy/shop/nobody"), x509.request(x509.new_key()))
    assert code == grpc.StatusCode.NOT_FOUND
    assert "no workload shop/nobody" in told.message
    assert "apply its Workload" in told.hint


async def test_the_port_presents_the_chain_up_to_the_pinned_root(replica: Replica) -> None:
    chain = await presented_chain(replica.join)
    assert len(chain) == 3
    assert (x509.pin(chain[-1]),) == Token.parse(await token(replica)).pins
    assert x509.uri(chain[0]) == "spiffe://mesh.example/replica/replica-1"


async def test_the_join_port_serves_nothing_but_join(replica: Replica) -> None:
    async with calling(replica.join, None, roots=replica.operator.roots_pem) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as e:
            await channel.unary_unary("/smc.v1.Mesh/CreateToken")(b"", timeout=5)
    assert e.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_a_large_message_is_refused_before_it_is_read(replica: Replica) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await ask_to_join(replica, "x" * (64 * 1024 + 1), b"")
    assert e.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_joins_are_limited_in_rate_and_the_refusal_says_when_to_come_back() -> None:
    async with running(join_limits=Limits(peer=Rate(0.1, 3), overall=Rate(100, 100))) as replica:
        codes = [(await failing(replica, "nonsense", b"")) for _ in range(4)]
    assert [code for code, _ in codes] == [grpc.StatusCode.INVALID_ARGUMENT] * 3 + [grpc.StatusCode.RESOURCE_EXHAUSTED]
    assert codes[3][1].kind == "Exhausted"
    assert "try again in" in codes[3][1].hint
