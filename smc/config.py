"""The settings of one replica: one frozen value, read once, every bad one named with its key and what is accepted."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

from smc.errors import Invalid

PREFIX = "SMC_"

XDS_PORT = 15128
API_PORT = 15129
JOIN_PORT = 15130
HEALTH_PORT = 15014

TRACE_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""OpenTelemetry's own variables: either says where traces go, without both there are none."""

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def duration(text: str) -> timedelta:
    """Read `10s`, `1.5m`, `1h30m` or `500ms`.

    Raises:
        ValueError: not of that form.
    """
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError("a duration such as 500ms, 10s or 1h30m")
    return timedelta(seconds=sum(float(number) * _UNITS[unit] for number, unit in parts))


def _label(text: str) -> str:
    if not _LABEL.fullmatch(text):
        raise ValueError("lower-case letters, digits and hyphens, at most 63")
    return text


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise ValueError("an IP address") from None


def _endpoints(text: str) -> tuple[str, ...]:
    endpoints = tuple(part.strip().removeprefix("http://").removeprefix("https://") for part in text.split(","))
    for endpoint in endpoints:
        host, colon, port = endpoint.rpartition(":")
        if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
            raise ValueError("host:port, separated by commas")
    return endpoints


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError("true or false")
    return text.lower() in ("true", "1")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ValueError("a whole number, at least 1")
    return int(text)


def _read(read: Callable[[str], Any], help_: str) -> Mapping[str, Any]:
    return {"read": read, "help": help_}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What `smc serve` needs to know. Each field is the environment variable SMC_<FIELD>, and a flag of that name."""

    name: str = field(metadata=_read(_label, "this replica's name, unique in the mesh"))
    etcd: tuple[str, ...] = field(metadata=_read(_endpoints, "etcd's client endpoints"))
    kek_file: Path = field(metadata=_read(Path, "the key-encryption key that `smc init` wrote, mode 0600"))
    address: str = field(
        metadata=_read(_address, "the IP address to bind, and at which proxies and operators reach this replica")
    )
    mesh: str = field(default="default", metadata=_read(_label, "the mesh's name in etcd"))
    files: Path | None = field(
        default=None, metadata=_read(Path, "a directory of Services and Workloads that the leader reads")
    )
    etcd_ca: Path | None = field(
        default=None, metadata=_read(Path, "PEM: whom to trust as etcd; without it the connection is not encrypted")
    )
    etcd_certificate: Path | None = field(default=None, metadata=_read(Path, "PEM: this replica's certificate at etcd"))
    etcd_key: Path | None = field(default=None, metadata=_read(Path, "PEM: its key"))
    etcd_shared: bool = field(default=False, metadata=_read(_flag, "others use this etcd too: never compact it"))
    lease_ttl: timedelta = field(
        default=timedelta(seconds=10), metadata=_read(duration, "how long a dead leader stays leader")
    )
    max_connection_age: timedelta = field(
        default=timedelta(minutes=30), metadata=_read(duration, "after this long a proxy is asked to connect anew")
    )
    max_staleness: timedelta = field(
        default=timedelta(hours=1),
        metadata=_read(duration, "for how long a new stream gets the last known mesh while etcd cannot be reached"),
    )
    max_streams: int = field(default=10000, metadata=_read(_count, "xDS streams that this replica serves at most"))
    log_level: str = field(default="info", metadata=_read(str, "debug, info, warning or error"))

    @classmethod
    def read(cls, environment: Mapping[str, str], **flags: str | None) -> Settings:
        """Merge flags over the environment; an empty value counts as absent.

        Raises:
            Invalid: a setting is missing or bad; the text names every such one.
        """
        values: dict[str, Any] = {}
        wrong: list[str] = []
        for setting in fields(cls):
            text = flags.get(setting.name) or environment.get(PREFIX + setting.name.upper(), "")
            if not text:
                if setting.default is MISSING:
                    wrong.append(f"{option(setting.name)} is missing: {setting.metadata['help']}")
                continue
            try:
                values[setting.name] = setting.metadata["read"](text)
            except ValueError as e:
                wrong.append(f"{option(setting.name)} is {text!r}, which is not {e}")
        if (values.get("etcd_certificate") is None) != (values.get("etcd_key") is None):
            wrong.append(f"{option('etcd_certificate')} and {option('etcd_key')} go together")
        etcd = flags.get("etcd") or environment.get(f"{PREFIX}ETCD", "")
        if values.get("etcd_ca") is None and ("https://" in etcd or values.get("etcd_certificate") is not None):
            wrong.append(f"{option('etcd_ca')} is missing: without it the connection to etcd would not be encrypted")
        if wrong:
            raise Invalid("; ".join(wrong), hint="see smc serve --help")
        return cls(**values)


def option(name: str) -> str:
    """How a setting is named to people: `--lease-ttl (SMC_LEASE_TTL)`."""
    return f"--{name.replace('_', '-')} ({PREFIX}{name.upper()})"
