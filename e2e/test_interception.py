"""Applications that know of no proxy meet the mesh: what they begin and what reaches them passes Envoy, or is refused.

Five hosts, each a network namespace: `a` is the bookbuyer's and redirects with nft, `b` the bookstore's and redirects
with iptables, `c` is outside the mesh and is everybody's name server, `k` has no default route and is hurt on purpose.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from e2e.kit.intercepted import Answer, InterceptedMesh, curl
from e2e.kit.mesh import eventually
from e2e.kit.namespaces import AT_ONCE, Host
from smc.demo import bookstore
from smc.demo.apps import identities
from smc.demo.bookstore import Placement
from smc.demo.figures import is_fair
from smc.demo.local import Plan
from smc.demo.processes import Process
from smc.proxy.settings import Exit

pytestmark = pytest.mark.asyncio(loop_scope="module")

BOOKS = "http://bookstore.bookstore/books"
BUYER = "spiffe://demo.smc.internal/ns/bookbuyer/sa/bookbuyer"
STORE = "spiffe://demo.smc.internal/ns/bookstore/sa/bookstore-v1"
PROXY_UID, FREE_UID, FREE_PORT = 1337, 4242, 9000
METADATA = "169.254.169.254"
REFUSED, NO_NAME, CLOSED = 7, 6, {52, 56}
"""What curl ends with: nobody listens; no such name; closed without an answer."""
CONNECTIONS = 300


@dataclass(frozen=True)
class World:
    mesh: InterceptedMesh
    a: Host
    b: Host
    c: Host
    outside: Process
    """What `c` serves; its log is what it was asked."""
    elsewhere: str
    """Another address of `c`, which `a` excludes."""

    def asked(self, process: Process | None = None) -> list[dict[str, object]]:
        text = (process or self.outside).log.read_text()
        return [json.loads(line) for line in text.splitlines()]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    async with InterceptedMesh(Plan(replicas=1, workloads=(), manifests=(bookstore.policy(),))) as mesh:
        network = mesh.network
        c = network.add("c")
        a, b = (network.add(name, name_server=c.address) for name in ("a", "b"))
        elsewhere = network.add_address(c)
        await c.run("ip", "address", "add", f"{METADATA}/32", "dev", "lo")
        await a.run("ip", "route", "add", METADATA, "via", c.address)
        listens = (
            f"{c.address}:8080",
            f"[{c.address6}]:8080",
            f"{c.address}:{FREE_PORT}",
            f"[{c.address6}]:{FREE_PORT}",
        )
        outside = await mesh.plain(
            c,
            *(part for listen in (*listens, f"{elsewhere}:8080", f"{METADATA}:80") for part in ("--http", listen)),
            *("--dns", c.address, "--zone", f"outside.example={c.address}"),
        )
        await mesh.intercept(b, bookstore.store("v1"), "--backend", "iptables")
        await mesh.intercept(
            a,
            bookstore.BOOKBUYER,
            *("--exclude-outbound-port", str(FREE_PORT), "--exclude-cidr", f"{elsewhere}/32"),
            *("--exclude-uid", str(FREE_UID)),
        )
        await eventually(lambda: _bought(a), timeout=30, every=0.2, what="the bookbuyer's Envoy knows the bookstore")
        yield World(mesh, a, b, c, outside, elsewhere)


async def _bought(host: Host) -> bool:
    return (await curl(host, BOOKS)).status == 200


# ---------------------------------------------------------------------------------------------------------- in the mesh


@pytest.mark.parametrize(
    "name",
    [
        "bookstore.bookstore",
        "bookstore.bookstore.svc.cluster.local",
        "bookstore.bookstore.mesh.internal",
        "bookstore-v1.bookstore",
    ],
)
async def test_an_application_reaches_a_service_by_name_with_both_identities(world: World, name: str) -> None:
    answer = await curl(world.a, f"http://{name}/books")
    assert answer.status == 200
    assert answer.address.startswith(("24", "25")), "the address is a virtual one"
    assert identities(answer.document["x-forwarded-client-cert"]) == (BUYER, STORE)


async def test_policy_refuses_a_path_at_the_server(world: World) -> None:
    admin = world.mesh.sidecar("bookstore-v1").admin
    _, denied = await admin.verdicts()
    answer = await curl(world.a, "http://bookstore.bookstore/admin")
    assert (answer.status, answer.body) == (403, "RBAC: access denied")
    assert await admin.verdicts() >= (0, denied + 1)
    assert '"/admin"' not in _access_log(world), "no application has seen it"


async def test_traffic_of_an_application_without_any_setting_loses_nothing(world: World) -> None:
    visitor = await world.mesh.visit_intercepted("bookbuyer", rate=100.0, url=BOOKS)

    async def answered(number: int) -> bool:
        return int((await visitor.counters())["answered"]) >= number

    await eventually(lambda: answered(300), timeout=60, every=0.1, what="300 answers")
    # Policy changes under it, and so do the listeners: one more service has one more address.
    await world.mesh.apply(bookstore.split(100, 0))
    world.mesh.write("extra", bookstore.services().replace("bookstore", "annex"))
    await eventually(lambda: answered(1500), timeout=120, every=0.1, what="1500 answers")
    counters = await visitor.counters()
    await visitor.process.stop()
    world.mesh.write("extra", None)
    assert (counters["failed"], {answer["status"] for answer in counters["answers"]}) == (0, {200}), counters


LEDGER = """
apiVersion: smc.io/v1alpha1
kind: Service
metadata: {name: NAME, namespace: ledger}
spec:
  ports: [{port: 5432, protocol: tcp}]
"""
LEDGER_SPLIT = """
apiVersion: split.smi-spec.io/v1alpha4
kind: TrafficSplit
metadata: {name: ledger, namespace: ledger}
spec:
  service: ledger
  backends: [{service: ledger-v1, weight: 90}, {service: ledger-v2, weight: 10}]
"""
LEDGER_POLICY = """
apiVersion: specs.smi-spec.io/v1alpha4
kind: TCPRoute
metadata: {name: ledger, namespace: ledger}
spec: {}
---
apiVersion: access.smi-spec.io/v1alpha3
kind: TrafficTarget
metadata: {name: buyer-to-VERSION, namespace: ledger}
spec:
  destination: {kind: ServiceAccount, name: VERSION, namespace: ledger}
  rules: [{kind: TCPRoute, name: ledger}]
  sources: [{kind: ServiceAccount, name: bookbuyer, namespace: bookbuyer}]
"""


async def test_tcp_connections_are_split_and_greeted_by_servers_that_speak_first(world: World) -> None:
    versions = ("ledger-v1", "ledger-v2")
    names = ("ledger", *versions)
    world.mesh.write("ledger", "---".join(LEDGER.replace("NAME", name) for name in names))
    for version in versions:
        host = world.mesh.network.add(version[-2:], name_server=world.c.address)
        await world.mesh.plain(host, "--greet", f"{host.address}:5432", "--name", version)
        await world.mesh.intercept(host, Placement("ledger", version, version, ("ledger", version)))
    await world.mesh.apply(LEDGER_SPLIT)
    denied = await _greetings(world.a, 10)
    assert denied == {"": 10}, "nobody has allowed it, and the application's greeting did not get through"

    await world.mesh.apply("---".join(LEDGER_POLICY.replace("VERSION", version) for version in versions))

    async def greeted() -> bool:
        return (await _greetings(world.a, 5)).keys() <= set(versions)

    await eventually(greeted, timeout=30, every=0.2, what="both may be called")
    found = await _greetings(world.a, CONNECTIONS)
    assert found.keys() == set(versions)
    assert found.total() == CONNECTIONS
    assert is_fair(found["ledger-v2"], CONNECTIONS, 0.1), found


async def _greetings(host: Host, number: int) -> Counter[str]:
    """What so many connections to the ledger, one after the other, are told first; "" for nothing."""
    script = (
        "import collections, json, socket\n"
        "def greeting():\n"
        "    try:\n"
        "        with socket.create_connection(('ledger.ledger', 5432), 5) as s:\n"
        "            return s.makefile().readline().strip()\n"
        "    except ConnectionError:\n"
        "        return ''\n"
        f"print(json.dumps(collections.Counter(greeting() for _ in range({number}))))\n"
    )
    done = await host.run(sys.executable, "-c", script, timeout=60)
    assert done.code == 0, done.errors
    return Counter(json.loads(done.out))


# ----------------------------------------------------------------------------------------------------- from the outside


async def test_plaintext_of_an_outsider_reaches_no_application_and_no_listener(world: World) -> None:
    before = len(_access_log(world))
    for port in (8080, 15003, 15001, 9999):
        answer = await curl(world.c, f"http://{world.b.address}:{port}/books")
        assert answer.exit in CLOSED | {REFUSED}, f"port {port}: {answer}"
        assert answer.status == 0
    tls = await curl(world.c, f"https://{world.b.address}:15003/books", "--insecure")
    assert tls.status == 0
    assert len(_access_log(world)) == before
    assert (await curl(world.b, f"http://{world.b.address}:8080/books")).status == 200, "it serves, on its own host"


MODE = """
apiVersion: smc.io/v1alpha1
kind: NamespaceConfig
metadata: {name: default, namespace: bookstore}
spec: {mode: MODE}
"""


async def test_an_outsiders_plaintext_is_let_in_where_the_namespace_is_permissive_and_refused_where_it_is_enforcing(
    world: World,
) -> None:
    url = f"http://{world.b.address}:8080/books"
    forged = ("--header", f"x-forwarded-client-cert: URI={BUYER}")
    assert (await curl(world.c, url)).status == 0

    async def let_in() -> bool:
        return (await curl(world.c, url)).status == 200

    async def refused() -> bool:
        return not await let_in()

    await world.mesh.apply(MODE.replace("MODE}", "permissive}"))
    try:
        await eventually(let_in, timeout=30, every=0.2, what="plaintext is let in")
        answer = await curl(world.c, url, *forged)
        assert answer.status == 200
        assert not answer.document.get("x-forwarded-client-cert"), "who speaks plaintext is nobody"
        assert await _bought(world.a), "and mutual TLS beside it"
        assert (await curl(world.c, f"http://{world.b.address}:9999/")).status == 0, "only the ports of its services"
    finally:
        await world.mesh.apply(MODE.replace("MODE}", "enforcing}"))
    await eventually(refused, timeout=10, every=0.1, what="plaintext is refused again")
    assert await _bought(world.a)


async def test_an_excluded_port_is_reached_from_the_outside(world: World) -> None:
    # The test's own eyes, which are excluded: the application's counters.
    assert (await curl(world.c, f"http://{world.b.address}:8081/_counters")).status == 200


# ------------------------------------------------------------------------------------------------------- to the outside


async def test_what_is_outside_the_mesh_is_reached_through_envoy(world: World) -> None:
    for url in (f"http://{world.c.address}:8080/by-address", "http://outside.example:8080/by-name"):
        answer = await curl(world.a, url)
        assert answer.status == 200
        assert answer.document["peer"] == world.a.address
    log = (world.mesh.logs / "envoy-bookbuyer.log").read_text
    await eventually(lambda: log().count(f"{world.c.address}:8080") >= 2, timeout=20, what="Envoy logs both")


DENY = "apiVersion: smc.io/v1alpha1\nkind: MeshConfig\nmetadata: {name: default}\nspec: {egress: EGRESS}\n"


async def test_with_egress_denied_only_exclusions_are_reached_outside(world: World) -> None:
    await world.mesh.apply(DENY.replace("EGRESS", "deny"))
    plain = f"http://{world.c.address}:8080/denied"

    async def denied() -> bool:
        return (await curl(world.a, plain)).status != 200

    try:
        await eventually(denied, timeout=30, every=0.2, what="egress is denied")
        excluded: dict[str, Answer] = {
            "port": await curl(world.a, f"http://{world.c.address}:{FREE_PORT}/port"),
            "network": await curl(world.a, f"http://{world.elsewhere}:8080/network"),
            "user": await curl(world.a, f"http://{world.c.address}:8080/user", uid=FREE_UID),
            "metadata": await curl(world.a, f"http://{METADATA}/metadata"),
        }
        assert {what: answer.status for what, answer in excluded.items()} == dict.fromkeys(excluded, 200)
        assert (await curl(world.a, plain)).status != 200, "all else still is"
        assert await _bought(world.a)
    finally:
        await world.mesh.apply(DENY.replace("EGRESS", "allow"))

    async def allowed() -> bool:
        return not await denied()

    await eventually(allowed, timeout=30, every=0.2, what="egress is allowed again")


# ----------------------------------------------------------------------------------------------------------------- IPv6


async def test_ipv6_is_refused_and_never_goes_round(world: World) -> None:
    inner = await world.mesh.plain(world.b, "--http", f"[{world.b.address6}]:8080")
    outward, inward = f"http://[{world.c.address6}]:8080/v6", f"http://[{world.b.address6}]:8080/v6"
    for host, url in ((world.a, outward), (world.c, inward), (world.a, inward)):
        answer = await curl(host, url)
        assert (answer.exit, answer.status) == (REFUSED, 0)
        assert answer.seconds < AT_ONCE
    assert not [line for line in (*world.asked(), *world.asked(inner)) if line.get("http") == "/v6"]
    # Both listen, and it is the rules that refuse.
    assert (await curl(world.a, outward, uid=PROXY_UID)).status == 200
    assert (await curl(world.b, inward)).status == 200
    assert (await curl(world.a, f"http://[{world.c.address6}]:{FREE_PORT}/v6")).status == 200, "an excluded port"


# ------------------------------------------------------------------------------------------------------------------ DNS


async def test_names_of_the_mesh_are_answered_here_and_all_others_by_the_hosts_own_server(world: World) -> None:
    found = await world.a.run("getent", "ahostsv4", "outside.example")
    assert found.out.split()[0] == world.c.address
    mesh = await world.a.run("getent", "ahostsv4", "bookstore.bookstore")
    assert mesh.out.startswith(("24", "25"))
    assert (await curl(world.a, "http://nowhere.example/")).exit == NO_NAME
    questions = {(line["dns"], line["peer"]) for line in world.asked() if "dns" in line}
    assert ("outside.example", world.a.address) in questions
    assert not [name for name, _ in questions if "bookstore" in str(name)], "nobody else hears of the mesh's names"


async def test_a_name_of_the_mesh_has_no_ipv6_address_and_says_so_at_once(world: World) -> None:
    script = (
        "import socket, time\n"
        "begun = time.monotonic()\n"
        "try:\n"
        "    print(socket.getaddrinfo('bookstore.bookstore', 80, socket.AF_INET6))\n"
        "except socket.gaierror:\n"
        "    print(time.monotonic() - begun)\n"
    )
    found = await world.a.run(sys.executable, "-c", script)
    assert float(found.out) < AT_ONCE, "no server was waited for"


# ------------------------------------------------------------------------------------------------------------- its life


async def test_the_life_of_interception_on_a_host(world: World) -> None:
    """From a host that is in no mesh, over a crash, to one that is in none again."""
    mesh, smc = world.mesh, (sys.executable, "-m", "smc", "proxy")
    host = mesh.network.add("k", name_server=world.c.address, routed=False)
    await mesh.plain(host, "--http", f"{host.address}:9300")
    reader, writer = await asyncio.open_connection(host.address, 9300)

    async def ask() -> bytes:
        writer.write(b"GET /kept HTTP/1.1\r\n\r\n")
        head = await asyncio.wait_for(reader.readuntil(b"}"), 5)
        return head.splitlines()[0]

    assert await ask() == b"HTTP/1.1 200 OK"
    assert await host.rules() == ""

    # Joined: what was open stays, what begins is judged.
    sidecar = await mesh.intercept(host, bookstore.BOOKTHIEF)
    assert await ask() == b"HTTP/1.1 200 OK", "a connection that was open before is left alone"
    assert (await curl(world.c, f"http://{host.address}:9300/")).status == 0
    writer.close()
    rules = await host.rules()
    assert "this host has no route to virtual addresses" in sidecar.process.log_tail()
    assert (await curl(host, BOOKS)).exit == REFUSED
    await host.run("ip", "route", "add", "240.0.0.0/4", "dev", "lo")
    assert (await curl(host, BOOKS)).status == 403, "the bookthief may not, but it arrives"

    # One at a time, and nothing is taken from the one that runs.
    second = await host.run(*smc, "run", "--intercept", "--dir", str(mesh.directory / "proxies" / "second"))
    assert second.code == Exit.CANNOT_INTERCEPT
    assert "another process intercepts in this network namespace" in second.errors
    refused = await host.run(*smc, "clean")
    assert refused.code != 0
    assert await host.rules() == rules

    # Killed: it stays closed, and the next one takes over.
    envoy = sidecar.envoy_pid
    await sidecar.process.kill()
    await eventually(lambda: not _alive(envoy), timeout=10, what="its Envoy is gone")
    assert await host.rules() == rules
    assert (await curl(host, f"http://{world.c.address}:8080/")).exit == REFUSED, "a crash opens nothing"
    assert (await curl(world.c, f"http://{host.address}:9300/")).exit == REFUSED
    await sidecar.process.start()
    await eventually(lambda: _thief_refused(host), timeout=30, every=0.2, what="the next one runs")
    assert await host.rules() == rules, "the same rules, once"

    # Killed again, and cleaned.
    await sidecar.process.kill()
    cleaned = await host.run(*smc, "clean")
    assert (cleaned.code, cleaned.out) == (0, "removed nft: table inet smc\n")
    assert await host.rules() == ""
    again = await host.run(*smc, "clean")
    assert again.code == 0
    assert "nothing to remove" in again.errors
    assert (await curl(world.c, f"http://{host.address}:9300/")).status == 200

    # Told to stop, it takes them back itself.
    await sidecar.process.start()
    await eventually(lambda: _thief_refused(host), timeout=30, every=0.2, what="it runs once more")
    assert await host.rules() == rules
    await sidecar.process.stop()
    assert sidecar.process.returncode == Exit.STOPPED
    assert await host.rules() == ""
    assert (await curl(host, f"http://{world.c.address}:8080/")).status == 200


async def _thief_refused(host: Host) -> bool:
    return (await curl(host, BOOKS)).status == 403


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _access_log(world: World) -> str:
    log = world.mesh.app("bookstore-v1").access_log
    assert log is not None
    return log.read_text()
