"""The filter that TCP connections end in, on either side: which cluster carries them.

Nothing is read of them, and no timeout ends one: a database's connection may rest for a night. A peer that is gone
without a word is found by TCP's own keepalive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from envoy.config.listener.v3 import listener_components_pb2
from envoy.config.rbac.v3 import rbac_pb2
from envoy.extensions.filters.network.rbac.v3 import rbac_pb2 as filter_pb2
from envoy.extensions.filters.network.tcp_proxy.v3 import tcp_proxy_pb2

from smc.envoy import logs, messages, names, tls
from smc.model import Identity, MeshConfig, Target

_Tcp = tcp_proxy_pb2.TcpProxy
_ATTEMPTS = 3


def to_services(targets: Sequence[Target], config: MeshConfig) -> Any:
    """A network filter: each connection goes to one of a Destination's targets, drawn by weight; with none, nowhere.

    A connection that is not made has carried nothing, so that it is tried again, at another endpoint if there is one.
    """
    if len(targets) < 2:
        return to(names.cluster(targets[0].service, targets[0].port) if targets else names.NOWHERE, config)
    weights = messages.ratio([target.weight for target in targets])
    shares = _Tcp.WeightedCluster(
        clusters=[
            _Tcp.WeightedCluster.ClusterWeight(name=names.cluster(target.service, target.port), weight=weight)
            for target, weight in zip(targets, weights, strict=True)
        ]
    )
    return _outbound(config, weighted_clusters=shares)


def to(cluster: str, config: MeshConfig) -> Any:
    """A network filter: each connection goes to that cluster. Tried again as in `to_services`."""
    return _outbound(config, cluster=cluster)


def to_application(app_port: int, config: MeshConfig) -> Any:
    """A network filter: to the proxy's own application, once it is known who calls.

    By default Envoy dials as soon as anybody has connected, before the handshake.
    """
    proxy = _Tcp(
        stat_prefix=names.INBOUND,
        cluster=names.local(app_port),
        upstream_connect_mode=tcp_proxy_pb2.ON_DOWNSTREAM_TLS_HANDSHAKE,
        max_early_data_bytes=messages.uint32(0),
    )
    return _filter(proxy, logs.tcp(names.INBOUND, config))


def counting(name: str, callers: Sequence[Identity], trust_domain: str, banned: Sequence[Identity] = ()) -> Any:
    """A network filter that lets all but `banned` pass, and counts under `name` who is none of `callers`."""
    config = filter_pb2.RBAC(
        stat_prefix=f"{names.INBOUND}.{name}.",
        shadow_rules=_of(rbac_pb2.RBAC.ALLOW, "callers", callers, trust_domain),
    )
    if banned:
        config.rules.CopyFrom(_of(rbac_pb2.RBAC.DENY, "banned", banned, trust_domain))
    return listener_components_pb2.Filter(name="envoy.filters.network.rbac", typed_config=messages.packed(config))


def _of(action: Any, called: str, identities: Sequence[Identity], trust_domain: str) -> Any:
    """What is done with these, whatever they send. A policy that names none would be refused."""
    rules = rbac_pb2.RBAC(action=action)
    if identities:
        rules.policies[called].permissions.add(any=True)
        rules.policies[called].principals.extend(
            rbac_pb2.Principal(authenticated=rbac_pb2.Principal.Authenticated(principal_name=uri))
            for uri in tls.exactly(identities, trust_domain)
        )
    return rules


def _outbound(config: MeshConfig, **where: Any) -> Any:
    proxy = _Tcp(stat_prefix=names.OUTBOUND, max_connect_attempts=messages.uint32(_ATTEMPTS), **where)
    return _filter(proxy, logs.tcp(names.OUTBOUND, config))


def _filter(proxy: Any, access_log: Sequence[Any]) -> Any:
    proxy.idle_timeout.SetInParent()
    proxy.access_log.extend(access_log)
    return listener_components_pb2.Filter(name="envoy.filters.network.tcp_proxy", typed_config=messages.packed(proxy))
