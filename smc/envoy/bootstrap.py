"""What an Envoy sidecar is started with: where its replicas are, how it proves itself, and nothing of the mesh.

Everything is JSON: YAML of the kind that Envoy reads turns an unquoted `n` or `y` into a boolean. The credential lies
in a directory as `key.pem`, `certificate.pem` and `roots.pem`, links that one rename replaces together. Envoy reads
them anew after a rename in that directory, but only if a secret from a file names them: hence `secret_files`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from ipaddress import ip_address
from typing import Any

from smc.envoy import names
from smc.manifests import RE2_MAX_PROGRAM_SIZE
from smc.model import Name

KEY, CERTIFICATE, ROOTS = "key.pem", "certificate.pem", "roots.pem"
"""The files of a credential, as the proxy lays them down."""

_TYPES = "type.googleapis.com/envoy."
_SECRET = _TYPES + "extensions.transport_sockets.tls.v3.Secret"
_UPSTREAM_TLS = _TYPES + "extensions.transport_sockets.tls.v3.UpstreamTlsContext"
_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_HCM = _TYPES + "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
_ROUTER = _TYPES + "extensions.filters.http.router.v3.Router"
_CONNECTIONS = _TYPES + "extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig"


def bootstrap(
    workload: Name,
    address: str,
    replicas: Sequence[str],
    trust_domain: str,
    directory: str,
    *,
    admin: str | None = None,
    re2_max_program_size: int = RE2_MAX_PROGRAM_SIZE,
    keepalive: timedelta = timedelta(seconds=10),
) -> str:
    """The bootstrap of an explicit proxy, as JSON.

    Args:
        workload: whose proxy it is; must be what its credential says.
        address: the IP address that it listens on.
        replicas: `<host or IP address>:<xDS port>` of every replica; at least one.
        trust_domain: of the mesh; only `spiffe://<trust domain>/replica/…` is taken for a replica.
        directory: the credential's, absolute; `secret_files` must be in it when Envoy starts.
        admin: `<IP address>:<port>` of the admin interface; None: port 15000 of `address` if that is a loopback
            address, else of 127.0.0.1, because whoever reaches the admin interface may stop the proxy.
        re2_max_program_size: the largest regular expression that Envoy takes; manifests are read with the same bound.
        keepalive: how often the stream is probed; a hung replica is left within this and 3 s.

    Raises:
        ValueError: no replicas, or an address that is not of its form.
    """
    if not replicas:
        raise ValueError("a proxy needs the address of at least one replica")
    if admin is None:
        admin = f"{address if ip_address(address).is_loopback else '127.0.0.1'}:{names.ADMIN_PORT}"
    document = {
        "node": {"id": str(workload), "cluster": workload.namespace},
        "admin": {"address": _address(admin)},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC",
                "transport_api_version": "V3",
                # The message that says who we are has 60 KB, most of it a list of extensions.
                "set_node_on_first_message_only": True,
                "grpc_services": [
                    {
                        "envoy_grpc": {
                            "cluster_name": "xds",
                            "retry_policy": {"retry_back_off": {"base_interval": "0.1s", "max_interval": "2s"}},
                        }
                    }
                ],
            },
            # No time limit: a proxy that was never configured must not call itself ready.
            "cds_config": {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"},
            "lds_config": {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"},
        },
        "static_resources": {
            "listeners": [_prometheus(address)],
            "clusters": [_xds(replicas, trust_domain, directory, keepalive), _admin(admin)],
        },
        "layered_runtime": {
            "layers": [
                {
                    "name": "static",
                    "static_layer": {
                        "re2.max_program_size.error_level": re2_max_program_size,
                        "re2.max_program_size.warn_level": re2_max_program_size,
                    },
                }
            ]
        },
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {"@type": _CONNECTIONS, "max_active_downstream_connections": 50_000},
                }
            ]
        },
        # These are never looked at here, and there is a set of them for every cluster.
        "stats_config": {
            "stats_matcher": {
                "exclusion_list": {
                    "patterns": [
                        {"contains": ".circuit_breakers."},
                        {"contains": ".lb_zone_"},
                        {"contains": ".lb_subsets_"},
                        {"contains": ".retry_"},
                        {"contains": ".upstream_cx_http3_"},
                    ]
                }
            }
        },
    }
    return json.dumps(document, indent=1, sort_keys=True)


def flags(config_path: str, *, concurrency: int = 1, log_level: str = "warning") -> tuple[str, ...]:
    """Envoy's command line, without the program itself."""
    return (
        "--config-path",
        config_path,
        # A listener that changed keeps its open connections for a minute, then they are cut.
        "--drain-time-s",
        "60",
        "--drain-strategy",
        "immediate",
        "--use-dynamic-base-id",
        "--concurrency",
        str(concurrency),
        "--log-level",
        log_level,
        "--file-flush-interval-msec",
        "1000",
    )


def secret_files(directory: str) -> dict[str, str]:
    """What must be in the credential's directory beside it: file name -> content. It never changes.

    They hold no secret: they say where the PEM files are, and that a rename there means to read them again.
    """
    watched = {"path": directory}
    certificate = {
        "certificate_chain": {"filename": f"{directory}/{CERTIFICATE}"},
        "private_key": {"filename": f"{directory}/{KEY}"},
        "watched_directory": watched,
    }
    roots = {"trusted_ca": {"filename": f"{directory}/{ROOTS}"}, "watched_directory": watched}
    return {
        "credential.json": _secret_file("credential", {"tls_certificate": certificate}),
        "roots.json": _secret_file("roots", {"validation_context": roots}),
    }


def _secret_file(name: str, secret: dict[str, Any]) -> str:
    return json.dumps({"resources": [{"@type": _SECRET, "name": name, **secret}]}, indent=1)


def _xds(replicas: Sequence[str], trust_domain: str, directory: str, keepalive: timedelta) -> dict[str, Any]:
    by_name = not all(_is_ip(_split(replica)[0]) for replica in replicas)
    tls = {
        "@type": _UPSTREAM_TLS,
        "common_tls_context": {
            # Without the maximum Envoy as a client stops at 1.2, and finds no version at all.
            "tls_params": {
                "tls_minimum_protocol_version": "TLSv1_3",
                "tls_maximum_protocol_version": "TLSv1_3",
            },
            "alpn_protocols": ["h2"],
            "tls_certificate_sds_secret_configs": [_file_sds("credential", directory)],
            "combined_validation_context": {
                "default_validation_context": {
                    "match_typed_subject_alt_names": [
                        {"san_type": "URI", "matcher": {"prefix": f"spiffe://{trust_domain}/replica/"}}
                    ]
                },
                "validation_context_sds_secret_config": _file_sds("roots", directory),
            },
        },
    }
    return {
        "name": "xds",
        "type": "STRICT_DNS" if by_name else "STATIC",
        "connect_timeout": "1s",
        "lb_policy": "RANDOM",
        # A replica that does not take a connection is passed over for a while, or chance would try dead ones again and
        # again while one lives. If none takes any, all are tried.
        "outlier_detection": {
            "split_external_local_origin_errors": True,
            "consecutive_local_origin_failure": 1,
            "interval": "1s",
            "base_ejection_time": "5s",
            "max_ejection_time": "5s",
            "max_ejection_percent": 100,
            "enforcing_consecutive_5xx": 0,
            "enforcing_success_rate": 0,
            "enforcing_local_origin_success_rate": 0,
        },
        "common_lb_config": {"healthy_panic_threshold": {"value": 1}},
        "load_assignment": _assignment("xds", replicas),
        "typed_extension_protocol_options": {
            _HTTP_OPTIONS: {
                "@type": "type.googleapis.com/" + _HTTP_OPTIONS,
                "explicit_http_config": {
                    "http2_protocol_options": {
                        "connection_keepalive": {"interval": f"{keepalive.total_seconds():g}s", "timeout": "3s"}
                    }
                },
            }
        },
        "upstream_connection_options": {
            "tcp_keepalive": {"keepalive_time": 10, "keepalive_interval": 3, "keepalive_probes": 3}
        },
        "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": tls},
    }


def _file_sds(name: str, directory: str) -> dict[str, Any]:
    source = {"path": f"{directory}/{name}.json"}
    return {"name": name, "sds_config": {"path_config_source": source, "resource_api_version": "V3"}}


def _admin(address: str) -> dict[str, Any]:
    return {
        "name": "admin",
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": _assignment("admin", [address]),
    }


def _prometheus(address: str) -> dict[str, Any]:
    """The one page of the admin port that others may read."""
    routes = [
        {
            "match": {
                "path": "/stats/prometheus",
                "headers": [{"name": ":method", "string_match": {"exact": "GET"}}],
            },
            "route": {"cluster": "admin"},
        }
    ]
    manager = {
        "@type": _HCM,
        "stat_prefix": "prometheus",
        "normalize_path": True,
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {"@type": _ROUTER}}],
        "route_config": {"virtual_hosts": [{"name": "prometheus", "domains": ["*"], "routes": routes}]},
    }
    return {
        "name": "prometheus",
        "address": _socket_address(address, names.PROMETHEUS_PORT),
        "ignore_global_conn_limit": True,
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }


def _assignment(name: str, addresses: Sequence[str]) -> dict[str, Any]:
    endpoints = [{"endpoint": {"address": _address(address)}} for address in addresses]
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]}


def _address(text: str) -> dict[str, Any]:
    return _socket_address(*_split(text))


def _socket_address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"{address!r} is not of the form <host>:<port>")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _is_ip(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
