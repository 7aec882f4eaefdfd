"""What must hold behind every test: no traceback in any log, and no private key in the clear in a log or in etcd."""

from __future__ import annotations

import base64
import binascii
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

_TRACEBACKS = (b"Traceback (most recent call last)", b"panic: ", b"Segmentation fault")
_PEM = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----")
_DER = (
    bytes.fromhex("301306072a8648ce3d020106082a8648ce3d030107046d306b02010104"),  # PKCS#8, P-256 with its public key
    bytes.fromhex("301306072a8648ce3d020106082a8648ce3d030107042730250201010420"),  # PKCS#8, P-256 alone
    bytes.fromhex("30770201010420"),  # SEC 1, P-256
    bytes.fromhex("301006072a8648ce3d020106052b8104002204819e"),  # PKCS#8, P-384
    bytes.fromhex("302e020100300506032b657004220420"),  # PKCS#8, Ed25519
    bytes.fromhex("020100300d06092a864886f70d010101050004"),  # PKCS#8, RSA
)
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{40,}={0,2}")
_HEX = re.compile(rb"(?:[0-9a-fA-F]{2}){20,}")


def private_key(data: bytes) -> str:
    """How a private key stands in `data`: PEM, or DER in binary, base64 of either alphabet or hex; "" if none."""
    if _PEM.search(data):
        return "PEM"
    if any(mark in data for mark in _DER):
        return "DER"
    for run in _BASE64.findall(data):
        for start in range(4):
            # A run may begin with other letters; each alignment is tried.
            text = run[start:].rstrip(b"=").replace(b"-", b"+").replace(b"_", b"/")
            decoded = _decoded(text[: len(text) // 4 * 4])
            if any(mark in decoded for mark in _DER) or _PEM.search(decoded):
                return "DER or PEM in base64"
    for run in _HEX.findall(data):
        decoded = binascii.unhexlify(run)
        if any(mark in decoded for mark in _DER):
            return "DER in hex"
    return ""


def _decoded(text: bytes) -> bytes:
    try:
        return base64.b64decode(text)
    except binascii.Error:
        return b""


def check_logs(directory: Path, *, expected: Iterable[str] = ()) -> None:
    """No log under `directory` has a traceback or a private key in it.

    `expected` are names of log files that may have a traceback, because the test asked for it.
    """
    found = list(_in_logs(directory, frozenset(expected)))
    assert not found, "\n".join(found)


def _in_logs(directory: Path, expected: frozenset[str]) -> Iterator[str]:
    for path in sorted(directory.rglob("*.log")):
        data = path.read_bytes()
        if form := private_key(data):
            yield f"{path}: a private key ({form})"
        for mark in _TRACEBACKS:
            at = data.find(mark)
            if at >= 0 and path.name not in expected:
                yield f"{path}: {data[at : at + 3000].decode(errors='replace')}"
                break


def check_store(values: Iterable[tuple[str, bytes]], directories: Iterable[Path] = ()) -> None:
    """No value has a private key in the clear, nor has any file of etcd's own, where older values still stand."""
    found = [f"{key}: a private key ({form})" for key, value in values if (form := private_key(value))]
    for directory in directories:
        for path in sorted(p for p in directory.rglob("*") if p.is_file()):
            # etcd allocates its log in advance: most of it is zeros.
            data = path.read_bytes().rstrip(b"\0")
            if form := private_key(data):
                found.append(f"{path}: a private key ({form})")
    assert not found, "\n".join(found)


def seed() -> int:
    """E2E_SEED if it is set, else a number of chance; it is printed, so that it can be given again."""
    number = int(os.environ.get("E2E_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)
    sys.stdout.write(f"E2E_SEED={number}\n")
    return number


def seeded() -> random.Random:
    """A source of randomness from `seed`."""
    return random.Random(seed())
