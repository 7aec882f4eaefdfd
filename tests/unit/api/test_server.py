"""The two ports of the API, from their opening to their end."""

from __future__ import annotations

from typing import Any

import pytest

from smc.api import server
from tests.unit.api.replica import running


class Interrupted:
    """A server whose end is interrupted once it has stopped."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.stopped = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def stop(self, grace: float) -> None:
        await self._inner.stop(grace)
        self.stopped = True
        raise InterruptedError


async def test_each_server_is_stopped_although_the_end_of_the_other_is_interrupted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Interrupted] = []
    make = server._server

    def recorded(message: int, calls: int) -> Any:
        made.append(Interrupted(make(message, calls)))
        return made[-1]

    monkeypatch.setattr(server, "_server", recorded)
    with pytest.raises(ExceptionGroup):
        async with running():
            assert not any(one.stopped for one in made)
    assert [one.stopped for one in made] == [True, True]
