"""The messages of the incremental variant, against the generated classes."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import pytest
from envoy.config.core.v3 import base_pb2
from envoy.service.discovery.v3 import discovery_pb2
from google.rpc import status_pb2
from hypothesis import given
from hypothesis import strategies as st

from smc.xds import delta
from smc.xds.snapshot import Type
from smc.xds.stream import ProtocolError, Request
from smc.xds.subscription import Response, empty_route
from tests.unit.xds.resources import CLUSTER, ENDPOINT, ROUTE, SECRET, assignment, cluster, secret


def test_a_request_is_read_whole() -> None:
    message = discovery_pb2.DeltaDiscoveryRequest(
        type_url=ENDPOINT.value,
        resource_names_subscribe=["a", "b"],
        resource_names_unsubscribe=["c"],
        initial_resource_versions={"a": "1"},
        response_nonce="7",
    )
    assert delta.request(message) == Request(ENDPOINT, ("a", "b"), ("c",), {"a": "1"}, "7", resumed=True)


@pytest.mark.parametrize("type_", list(Type))
def test_an_ack_is_read_without_a_parser(type_: Type) -> None:
    message = discovery_pb2.DeltaDiscoveryRequest(type_url=type_.value, response_nonce="17")
    assert delta.acknowledgement(message.SerializeToString()) == Request(type_, nonce="17") == delta.request(message)


REQUESTS = st.builds(
    discovery_pb2.DeltaDiscoveryRequest,
    type_url=st.sampled_from([CLUSTER.value, ENDPOINT.value, "", "another"]),
    response_nonce=st.sampled_from(["", "1", "2" * 127, "3" * 128, "é"]),
    resource_names_subscribe=st.lists(st.sampled_from(["a", "*"]), max_size=2),
    resource_names_unsubscribe=st.lists(st.just("b"), max_size=1),
    initial_resource_versions=st.dictionaries(st.just("c"), st.just("1"), max_size=1),
    error_detail=st.none() | st.builds(status_pb2.Status, message=st.just("no")),
    node=st.none() | st.builds(base_pb2.Node, id=st.just("shop/buyer")),
)


@given(REQUESTS, st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=3), st.integers(0, 300))
def test_what_is_taken_for_an_ack_says_nothing_else(message: Any, damage: list[tuple[int, int]], end: int) -> None:
    data = bytearray(message.SerializeToString())
    for at, byte in damage:
        if at < len(data):
            data[at] = byte
    for said in (bytes(data), bytes(data[:end])):
        if (ack := delta.acknowledgement(said)) is not None:
            read = discovery_pb2.DeltaDiscoveryRequest.FromString(said)
            assert delta.request(read) == ack
            assert not read.HasField("node")


def test_an_error_makes_it_a_nack() -> None:
    refused = discovery_pb2.DeltaDiscoveryRequest(
        type_url=CLUSTER.value, response_nonce="7", error_detail=status_pb2.Status(code=3, message="no")
    )
    assert delta.request(refused).error == "no"


def test_an_error_without_a_message_is_a_nack_too() -> None:
    refused = discovery_pb2.DeltaDiscoveryRequest(type_url=CLUSTER.value, error_detail=status_pb2.Status(code=3))
    assert delta.request(refused).error == "no reason given, code 3"


def test_a_type_that_is_not_served_is_an_error_that_says_so() -> None:
    message = discovery_pb2.DeltaDiscoveryRequest(type_url="type.googleapis.com/envoy.service.runtime.v3.Runtime")
    with pytest.raises(ProtocolError, match=r"runtime\.v3\.Runtime' is not served here \(served are .*Cluster"):
        delta.request(message)


def test_resource_locators_are_an_error() -> None:
    message = discovery_pb2.DeltaDiscoveryRequest(type_url=CLUSTER.value)
    message.resource_locators_subscribe.add(name="xdstp://x/y")
    with pytest.raises(ProtocolError, match="locators"):
        delta.request(message)


def test_a_response_is_written_whole() -> None:
    given = Response(ENDPOINT, (assignment("a", "one"), assignment("b", "two")), ("c", "d"), "v", "3")
    message = discovery_pb2.DeltaDiscoveryResponse.FromString(b"".join(delta.Encoder("replica-1").encode(given)))
    assert [(r.name, r.version, r.resource.type_url, r.resource.value) for r in message.resources] == [
        ("a", given.resources[0].version, ENDPOINT.value, b"one"),
        ("b", given.resources[1].version, ENDPOINT.value, b"two"),
    ]
    assert list(message.removed_resources) == ["c", "d"]
    assert (message.type_url, message.system_version_info, message.nonce) == (ENDPOINT.value, "v", "3")
    assert message.control_plane.identifier == "replica-1"


def test_an_empty_response_says_who_answers() -> None:
    encoded = b"".join(delta.Encoder("replica-1").encode(Response(SECRET, (), (), "v", "1")))
    assert discovery_pb2.DeltaDiscoveryResponse.FromString(encoded).control_plane.identifier == "replica-1"


def test_what_a_second_stream_is_told_is_kept_for_all_that_follow() -> None:
    encoder = delta.Encoder("replica-1")
    a, b = cluster("a"), cluster("b")
    first, second, third = (encoder.encode(Response(CLUSTER, (a,), (), "v", nonce))[0] for nonce in ("1", "2", "3"))
    assert first == second
    assert second is third
    for other in (
        Response(CLUSTER, (b,), (), "v", "1"),
        Response(CLUSTER, (a,), (), "w", "1"),
        Response(CLUSTER, (a,), ("b",), "v", "1"),
        Response(CLUSTER, (a, b), (), "v", "1"),
    ):
        assert encoder.encode(other)[0] != first


@pytest.mark.parametrize("length", [6, 256], ids="names of {}".format)
@pytest.mark.parametrize("names", [1, 1_000], ids="{} in a response".format)
@pytest.mark.parametrize("exist", [True, False], ids=["that exist", "that do not"])
def test_all_that_is_kept_for_others_is_bounded(
    exist: bool, names: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta, "MOST_SHARED", 3_000_000)
    encoder = delta.Encoder("replica-1")
    tracemalloc.start()
    try:
        for first in range(0, 8_000, names):
            asked = [f"{number}".rjust(length, "n") for number in range(first, first + names)]
            found, missing = (tuple(map(empty_route, asked)), ()) if exist else ((), tuple(asked))
            for nonce in ("1", "2"):
                encoder.encode(Response(ROUTE, found, missing, "v", nonce))
            del asked, found, missing
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert encoder._shared
    assert held <= delta.MOST_SHARED, "the resources and names that are kept with a response count as well"


def test_what_one_stream_alone_is_told_is_not_kept() -> None:
    encoder = delta.Encoder("replica-1")
    given = [Response(CLUSTER, (cluster(f"c{number}"),), (), "v", "1") for number in range(100)]
    for response in given:
        encoder.encode(response)
    assert not encoder._shared
    assert not encoder._encoded


def test_what_is_remembered_of_it_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "MOST_MARKS", 10)
    encoder = delta.Encoder("replica-1")
    for number in range(100):
        encoder.encode(Response(CLUSTER, (cluster(f"c{number}"),), (), "v", "1"))
        assert len(encoder._written_once) <= 10


def test_a_secret_is_kept_encoded_and_forgotten_with_it() -> None:
    encoder = delta.Encoder("replica-1")
    given = Response(SECRET, (secret("a"),), (), "v", "1")
    assert encoder.encode(given) == encoder.encode(given)
    assert len(encoder._encoded) == 1
    del given
    assert len(encoder._encoded) == 0
