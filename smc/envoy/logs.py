"""Access logs: a line of JSON for each request or TCP connection, with both identities, on Envoy's standard output."""

from __future__ import annotations

from typing import Any

from envoy.config.accesslog.v3 import accesslog_pb2
from envoy.config.core.v3 import substitution_format_string_pb2
from envoy.extensions.access_loggers.stream.v3 import stream_pb2

from smc.envoy import messages, names
from smc.model import MeshConfig


def http(direction: str, config: MeshConfig) -> list[Any]:
    """Of requests that come in by a listener, `names.INBOUND` or `names.OUTBOUND`; none if the mesh wants none."""
    fields = _EITHER | _REQUEST | _DIRECTIONS[direction]
    unchecked = accesslog_pb2.AccessLogFilter(not_health_check_filter=accesslog_pb2.NotHealthCheckFilter())
    return [_to_stdout(fields, filter=unchecked)] if config.access_log else []


def tcp(direction: str, config: MeshConfig) -> list[Any]:
    """Of TCP connections, when they end; as `http`."""
    return [_to_stdout(_EITHER | _CONNECTION | _DIRECTIONS[direction])] if config.access_log else []


_EITHER = {
    "time": "%START_TIME%",
    "flags": "%RESPONSE_FLAGS%",
    "duration_ms": "%DURATION%",
    "bytes_received": "%BYTES_RECEIVED%",
    "bytes_sent": "%BYTES_SENT%",
    "cluster": "%UPSTREAM_CLUSTER%",
    "upstream": "%UPSTREAM_HOST%",
    "tls_failure": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
}
_REQUEST = {
    "method": "%REQ(:METHOD)%",
    "authority": "%REQ(:AUTHORITY)%",
    # Without the query, which is where applications put what is secret.
    "path": "%PATH(NQ:ORIG_OR_PATH)%",
    "protocol": "%PROTOCOL%",
    "status": "%RESPONSE_CODE%",
    "details": "%RESPONSE_CODE_DETAILS%",
    "request_id": "%REQ(X-REQUEST-ID)%",
}
# Why a caller was not let in: most often because policy names it nowhere.
_CONNECTION = {"refused": "%DOWNSTREAM_TRANSPORT_FAILURE_REASON%"}
_DIRECTIONS = {
    names.INBOUND: {
        "direction": names.INBOUND,
        "source": "%DOWNSTREAM_PEER_URI_SAN%",
        "destination": "%DOWNSTREAM_LOCAL_URI_SAN%",
        "peer_address": "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS%",
        "sni": "%REQUESTED_SERVER_NAME%",
    },
    names.OUTBOUND: {
        "direction": names.OUTBOUND,
        "source": "%UPSTREAM_LOCAL_URI_SAN%",
        "destination": "%UPSTREAM_PEER_URI_SAN%",
    },
}


def _to_stdout(fields: dict[str, str], **how: Any) -> Any:
    format_ = substitution_format_string_pb2.SubstitutionFormatString()
    for name, operator in fields.items():
        format_.json_format.fields[name].string_value = operator
    return accesslog_pb2.AccessLog(
        name="envoy.access_loggers.stdout",
        typed_config=messages.packed(stream_pb2.StdoutAccessLog(log_format=format_)),
        **how,
    )
