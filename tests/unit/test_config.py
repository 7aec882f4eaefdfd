"""Settings are read once, and a bad one is named with what is accepted."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from smc.config import Settings, duration
from smc.errors import Invalid

GOOD = {"SMC_NAME": "a", "SMC_ETCD": "127.0.0.1:2379", "SMC_KEK_FILE": "/k", "SMC_ADDRESS": "127.0.0.1"}


def test_the_environment_is_enough() -> None:
    settings = Settings.read(GOOD)
    assert (settings.name, settings.etcd, settings.kek_file) == ("a", ("127.0.0.1:2379",), Path("/k"))
    assert settings.lease_ttl == timedelta(seconds=10)


def test_a_flag_wins_over_the_environment() -> None:
    assert Settings.read(GOOD, lease_ttl="5s").lease_ttl == timedelta(seconds=5)
    assert Settings.read({**GOOD, "SMC_LEASE_TTL": "7s"}, lease_ttl="5s").lease_ttl == timedelta(seconds=5)
    assert Settings.read({**GOOD, "SMC_LEASE_TTL": "7s"}, lease_ttl=None).lease_ttl == timedelta(seconds=7)


def test_every_bad_setting_is_named_at_once() -> None:
    bad = {"SMC_ETCD": "nowhere", "SMC_KEK_FILE": "/k", "SMC_ADDRESS": "everywhere", "SMC_LEASE_TTL": "soon"}
    with pytest.raises(Invalid) as refused:
        Settings.read(bad)
    text = str(refused.value)
    for part in ("SMC_NAME", "SMC_ETCD", "host:port", "SMC_ADDRESS", "IP address", "SMC_LEASE_TTL", "10s"):
        assert part in text


def test_a_client_certificate_without_its_key_is_refused() -> None:
    with pytest.raises(Invalid, match="go together"):
        Settings.read({**GOOD, "SMC_ETCD_CERTIFICATE": "/c"})


@pytest.mark.parametrize(
    "asked", [{"SMC_ETCD": "https://etcd:2379"}, {"SMC_ETCD_CERTIFICATE": "/c", "SMC_ETCD_KEY": "/k"}]
)
def test_whoever_asks_for_encryption_gets_it_or_an_error(asked: dict[str, str]) -> None:
    with pytest.raises(Invalid, match=r"SMC_ETCD_CA.* is missing"):
        Settings.read({**GOOD, **asked})
    assert Settings.read({**GOOD, **asked, "SMC_ETCD_CA": "/ca"}).etcd_ca == Path("/ca")


@pytest.mark.parametrize(("text", "seconds"), [("500ms", 0.5), ("10s", 10), ("1.5m", 90), ("1h30m", 5400)])
def test_durations_read_as_go_writes_them(text: str, seconds: float) -> None:
    assert duration(text).total_seconds() == seconds


@pytest.mark.parametrize("text", ["", "10", "s", "10s ", "-1s", "1d"])
def test_what_is_not_a_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        duration(text)
