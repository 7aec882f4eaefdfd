"""What an Envoy says about itself on its admin interface: the witness that is not SMC."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import aiohttp

ADMIN_PORT = 15000

_UPDATES = re.compile(
    r"^(cluster_manager\.cds|listener_manager\.lds|cluster\..+|http\..+\.rds\..+|sds\..+)\.update_success$"
)
_BY_SDS = re.compile(r"\.ssl_context_update_by_sds$")


@dataclass(frozen=True, slots=True)
class Host:
    """One endpoint of a cluster, as Envoy has it."""

    address: str
    """ip:port"""
    health: str
    """Envoy's own overall word, or what its checks say against it: `HEALTHY`, `failed_active_health_check` …"""
    weight: int

    @property
    def healthy(self) -> bool:
        return self.health == "HEALTHY"


class EnvoyAdmin:
    """The admin interface of one Envoy. If it does not answer, calls raise `aiohttp.ClientError` or TimeoutError."""

    def __init__(self, http: aiohttp.ClientSession, address: str, port: int = ADMIN_PORT) -> None:
        self._http = http
        self.url = f"http://{address}:{port}"

    async def ready(self) -> bool:
        """Whether it is LIVE. No answer counts as no."""
        try:
            async with self._http.get(f"{self.url}/ready") as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def stats(self, pattern: str = "") -> dict[str, int]:
        """Counters and gauges whose names match the regular expression, zeros included."""
        return {n: v for n, v in (await self._stats(pattern)).items() if isinstance(v, int)}

    async def stat(self, name: str) -> int:
        """One counter or gauge; 0 if Envoy has none of that name."""
        return (await self.stats(f"^{re.escape(name)}$")).get(name, 0)

    async def identifier(self) -> str:
        """Which control plane it last heard: `control_plane.identifier`; "" if none."""
        return str((await self._stats(r"^control_plane\.identifier$")).get("control_plane.identifier", ""))

    async def updates(self) -> dict[str, int]:
        """`update_success` of CDS, LDS, and every EDS, RDS, VHDS and SDS resource: it rises whenever one arrives."""
        found = await self.stats(r"\.update_success$")
        return {name: value for name, value in found.items() if _UPDATES.match(name)}

    async def secret_updates(self) -> dict[str, int]:
        """Every `ssl_context_update_by_sds`: it rises each time that a TLS context is made anew from a secret."""
        found = await self.stats(r"ssl_context_update_by_sds")
        return {name: value for name, value in found.items() if _BY_SDS.search(name)}

    async def pending(self) -> str:
        """What it was sent and does not use, in words: `1 warming`, `2 refused`; "" if it uses all of it."""
        found = await self.stats(r"^cluster_manager\.warming_clusters$|^listener_manager\.total_listeners_warming$")
        refused = await self.stats(r"\.update_rejected$")
        counts = (("warming", sum(found.values())), ("refused", sum(refused.values())))
        return ", ".join(f"{count} {what}" for what, count in counts if count)

    async def control_plane_bytes(self) -> int:
        """Bytes received from the control plane, over all connections, TLS included."""
        return await self.stat("cluster.xds.upstream_cx_rx_bytes_total")

    async def verdicts(self) -> tuple[int, int]:
        """(allowed, denied): the requests that its RBAC filters judged."""
        found = await self.stats(r"\.rbac\.(.+\.)?(allowed|denied)$")
        return (
            sum(value for name, value in found.items() if name.endswith(".allowed")),
            sum(value for name, value in found.items() if name.endswith(".denied")),
        )

    async def config_dump(self, resource: str = "", mask: str = "") -> list[dict[str, Any]]:
        """`configs` of /config_dump, such as of the resource `dynamic_active_clusters`, without private keys."""
        given = {"resource": resource, "mask": mask}
        document = await self._json("/config_dump", {name: value for name, value in given.items() if value})
        configs: list[dict[str, Any]] = document.get("configs", [])
        return configs

    async def clusters(self) -> dict[str, tuple[Host, ...]]:
        """The endpoints of every cluster, sorted by address."""
        document = await self._json("/clusters", {"format": "json"})
        return {
            str(cluster["name"]): tuple(
                sorted((_host(h) for h in cluster.get("host_statuses", ())), key=lambda h: h.address)
            )
            for cluster in document.get("cluster_statuses", ())
        }

    async def certificates(self) -> list[dict[str, Any]]:
        """What it holds: lists `cert_chain` and `ca_cert` of serial_number, subject_alt_names, expiration_time …"""
        found: list[dict[str, Any]] = (await self._json("/certs", {})).get("certificates", [])
        return found

    async def serials(self, path: str = "/ns/") -> tuple[str, ...]:
        """Serial numbers of the certificates that it presents and whose URI has `path` in it, sorted.

        `/ns/` is in a workload's, `/proxy/` in the credential's.
        """
        presented = [c for entry in await self.certificates() for c in entry.get("cert_chain", ())]
        uris = [(c["serial_number"], name.get("uri", "")) for c in presented for name in c.get("subject_alt_names", ())]
        return tuple(sorted({serial for serial, uri in uris if path in uri}))

    async def _stats(self, pattern: str) -> dict[str, int | str]:
        document = await self._json("/stats", {"format": "json", "filter": pattern} if pattern else {"format": "json"})
        return {s["name"]: s["value"] for s in document.get("stats", ()) if "name" in s and "value" in s}

    async def _json(self, path: str, query: dict[str, str]) -> dict[str, Any]:
        async with self._http.get(self.url + path, params=query) as answer:
            answer.raise_for_status()
            document: dict[str, Any] = await answer.json(content_type=None)
            return document


def _host(status: dict[str, Any]) -> Host:
    socket = status.get("address", {}).get("socket_address", {})
    health = dict(status.get("health_status", {}))
    said = health.pop("eds_health_status", "HEALTHY")
    against = ",".join(sorted(name for name, value in health.items() if value)) or said
    return Host(f"{socket.get('address', '')}:{socket.get('port_value', 0)}", against, int(status.get("weight", 1)))
