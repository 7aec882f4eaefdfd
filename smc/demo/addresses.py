"""Loopback addresses that nobody else uses: every participant of a mesh has its own, because its ports are fixed."""

from __future__ import annotations

import random
import socket
from types import TracebackType
from typing import Self

from smc.errors import Exhausted

PORTS = (2379, 2380, 8080, 8081, 15000, 15001, 15003, 15010, 15014, 15128, 15129, 15130)
"""What may be bound on an address, by whichever program gets it."""
_LOCK_PORT = 15999
_TRIES = 50
_LAST = 250


class Addresses:
    """Hands out addresses of one network 127.x.y.0/24, chosen at random and held as long as this is open.

    Runs side by side hold different networks: each listens on a port of its network's last address, and whoever comes
    second finds it in use.
    """

    def __init__(self, choice: random.Random | None = None) -> None:
        self._choice = choice or random.SystemRandom()
        self._lock: socket.socket | None = None
        self._network = ""
        self._host = 0

    def __enter__(self) -> Self:
        for _ in range(_TRIES):
            network = f"127.{self._choice.randint(16, 250)}.{self._choice.randint(0, 255)}"
            lock = socket.socket()
            try:
                lock.bind((f"{network}.254", _LOCK_PORT))
                lock.listen(1)
            except OSError:
                lock.close()
                continue
            self._lock, self._network, self._host = lock, network, 0
            return self
        raise Exhausted(
            f"no free loopback network after {_TRIES} tries",
            hint=f"does a program listen on port {_LOCK_PORT} of all addresses?",
        )

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        if self._lock is not None:
            self._lock.close()

    def take(self) -> str:
        """The next address on which none of `PORTS` is in use.

        Raises:
            Exhausted: there is none left; the message names the port that was last in the way.
        """
        why = ""
        while self._host < _LAST:
            self._host += 1
            address = f"{self._network}.{self._host}"
            taken = next((port for port in PORTS if not _free(address, port)), None)
            if taken is None:
                return address
            why = f", {address}:{taken} is in use"
        raise Exhausted(
            f"no loopback address is left in {self._network}.0/24{why}",
            hint="end what listens on that port of all addresses (0.0.0.0)",
        )


def _free(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True
