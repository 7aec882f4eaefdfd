"""What every informer must do, whatever it observes; a new one inherits the class and says how to change its source."""

from __future__ import annotations

import asyncio
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from smc.errors import Unavailable
from smc.informers import Informer
from smc.informers.files import FilesInformer
from smc.model import Name, Observation

SILENCE = 0.3
"""Seconds in which an informer that polls as fast as the tests ask it to would have said something."""


class Source(ABC):
    """A provider that a test can change. Everything is in the namespace `shop`."""

    @abstractmethod
    def informer(self) -> Informer:
        """A new informer on the same provider, as the next leader has it."""

    @abstractmethod
    async def add(self, name: str) -> None:
        """A service `name` with port 80, and a workload `name` that backs it."""

    @abstractmethod
    async def move(self, name: str) -> None:
        """The workload `name` gets another address."""

    @abstractmethod
    async def remove(self, name: str) -> None:
        """The service and the workload are deleted."""

    @abstractmethod
    async def spoil(self, name: str) -> None:
        """The provider says something about the workload `name` that nobody can use."""

    @abstractmethod
    async def hurt(self) -> None:
        """The provider does not answer any more."""

    @abstractmethod
    async def mend(self) -> None:
        """The provider answers again."""


class InformerContract:
    @pytest.fixture
    @abstractmethod
    def source(self, tmp_path: Path) -> Source:
        """A provider that has nothing yet."""

    async def test_its_name_is_a_label(self, source: Source) -> None:
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", source.informer().name)

    async def test_the_first_observation_comes_at_once_and_is_whole(self, source: Source) -> None:
        for name in ("buyer", "store", "warehouse"):
            await source.add(name)
        async with observing(source.informer()) as observations:
            assert names(await anext(observations)) == ["buyer", "store", "warehouse"]

    async def test_nothing_is_an_observation_too(self, source: Source) -> None:
        async with observing(source.informer()) as observations:
            assert await anext(observations) == Observation()

    async def test_each_change_leads_to_an_observation_that_is_whole(self, source: Source) -> None:
        await source.add("buyer")
        async with observing(source.informer()) as observations:
            first = await anext(observations)
            await source.add("store")
            added = await until(observations, lambda o: names(o) == ["buyer", "store"], always="buyer")
            assert part(added, "buyer") == part(first, "buyer")
            await source.move("store")
            moved = await until(
                observations, lambda o: part(o, "store") not in ([], part(added, "store")), always="buyer"
            )
            assert len(part(moved, "store")) == len(part(added, "store"))
            await source.remove("store")
            await until(observations, lambda o: o == first, always="buyer")

    async def test_what_changed_while_nobody_observed_is_in_the_next_first_observation(self, source: Source) -> None:
        await source.add("buyer")
        await source.add("store")
        informer = source.informer()
        async with observing(informer) as observations:
            await anext(observations)
        await source.remove("buyer")
        await source.add("warehouse")
        async with observing(informer) as observations:
            assert names(await anext(observations)) == ["store", "warehouse"]

    async def test_equal_truth_gives_equal_observations_in_order(self, source: Source) -> None:
        for name in ("store", "buyer", "warehouse", "a"):
            await source.add(name)
        found = []
        for _ in range(2):
            async with observing(source.informer()) as observations:
                found.append(await anext(observations))
        assert found[0] == found[1]
        (observation, _) = found
        assert list(observation.services) == sorted(observation.services, key=lambda s: s.name)
        assert list(observation.endpoints) == sorted(observation.endpoints, key=lambda e: e.service)
        assert list(observation.workloads) == sorted(observation.workloads, key=lambda w: w.name)
        assert list(observation.problems) == sorted(observation.problems)
        assert all(list(e.endpoints) == sorted(e.endpoints) for e in observation.endpoints)

    async def test_a_source_that_cannot_be_read_is_unknown_and_not_empty(self, source: Source) -> None:
        await source.add("buyer")
        await source.hurt()
        assert await heard(source.informer()) is None
        await source.mend()
        async with observing(source.informer()) as observations:
            assert names(await anext(observations)) == ["buyer"]

    async def test_a_source_that_is_lost_loses_nothing_that_it_had(self, source: Source) -> None:
        await source.add("buyer")
        await source.add("store")
        informer = source.informer()
        async with observing(informer) as observations:
            await anext(observations)
            await source.hurt()
            try:
                async with asyncio.timeout(SILENCE):
                    observation = await anext(observations)
            except (Unavailable, TimeoutError):
                pass
            else:
                assert names(observation) == ["buyer", "store"]
        assert await heard(informer) is None
        await source.mend()
        async with observing(informer) as observations:
            assert names(await anext(observations)) == ["buyer", "store"]

    async def test_one_object_that_cannot_be_used_hurts_only_itself(self, source: Source) -> None:
        await source.add("buyer")
        await source.add("store")
        async with observing(source.informer()) as observations:
            before = await anext(observations)
            await source.spoil("store")
            spoilt = await until(observations, lambda o: bool(o.problems), always="buyer")
            assert part(spoilt, "buyer") == part(before, "buyer")
            assert all(p.manifest.startswith(f"{source.informer().name}:") for p in spoilt.problems)

    async def test_what_cannot_be_used_from_the_first_look_on_is_unknown_and_not_gone(self, source: Source) -> None:
        await source.add("buyer")
        await source.add("store")
        await source.spoil("store")
        async with observing(source.informer()) as observations:
            observation = await anext(observations)
        assert "buyer" in names(observation)
        assert observation.problems
        assert observation.unknown or "store" in names(observation)

    async def test_it_may_be_cancelled_at_any_time(self, source: Source) -> None:
        await source.add("buyer")
        informer = source.informer()

        async def follow() -> None:
            async with observing(informer) as observations:
                async for _ in observations:
                    pass

        for turns in (0, 1, 2, 5, 20):
            task = asyncio.create_task(follow())
            for _ in range(turns):
                await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
        async with observing(informer) as observations:
            assert names(await anext(observations)) == ["buyer"]


@asynccontextmanager
async def observing(informer: Informer) -> AsyncIterator[AsyncIterator[Observation]]:
    async with asyncio.timeout(20), aclosing(informer.observe()) as observations:
        yield observations


async def until(
    observations: AsyncIterator[Observation], condition: Callable[[Observation], bool], *, always: str
) -> Observation:
    """The first observation that fulfils the condition; one without `always` on the way was not whole."""
    async for observation in observations:
        assert always in names(observation)
        if condition(observation):
            return observation
    raise AssertionError("the informer ended")


async def heard(informer: Informer) -> Observation | None:
    """The first observation; None if there is none."""
    try:
        async with asyncio.timeout(SILENCE), aclosing(informer.observe()) as observations:
            return await anext(observations)
    except (Unavailable, TimeoutError):
        return None


def names(observation: Observation) -> list[str]:
    """The names of what is there whole: a service, a workload, and the endpoint that makes one back the other.

    Every service has endpoints, if only none: nobody is not the same as unknown.
    """
    assert [e.service for e in observation.endpoints] == [s.name for s in observation.services]
    workloads = {w.name for w in observation.workloads}
    backing = {(e.service, endpoint.workload) for e in observation.endpoints for endpoint in e.endpoints}
    return [s.name.name for s in observation.services if s.name in workloads and (s.name, s.name) in backing]


def part(observation: Observation, name: str) -> list[object]:
    """All that is said of one of them."""
    whose = Name("shop", name)
    return [
        *(s for s in observation.services if s.name == whose),
        *(e for e in observation.endpoints if e.service == whose),
        *(w for w in observation.workloads if w.name == whose),
    ]


class Directory(Source):
    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def informer(self) -> Informer:
        return FilesInformer(self.path, poll=0.01)

    async def add(self, name: str) -> None:
        self.write(name, address="127.0.0.9")

    async def move(self, name: str) -> None:
        self.write(name, address="127.0.0.10")

    async def remove(self, name: str) -> None:
        self.path.joinpath(f"{name}.yaml").unlink()

    async def spoil(self, name: str) -> None:
        self.write(name, address="nowhere")

    async def hurt(self) -> None:
        self.path.rename(self.path.with_suffix(".gone"))

    async def mend(self) -> None:
        self.path.with_suffix(".gone").rename(self.path)

    def write(self, name: str, *, address: str) -> None:
        new = self.path / f"{name}.new"
        new.write_text(
            f"apiVersion: smc.io/v1alpha1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n"
            "spec: {ports: [{port: 80}]}\n---\n"
            f"apiVersion: smc.io/v1alpha1\nkind: Workload\nmetadata: {{name: {name}, namespace: shop}}\n"
            f"spec: {{address: {address}, serviceAccount: {name}, services: [{name}]}}\n"
        )
        new.rename(self.path / f"{name}.yaml")


class TestFilesInformer(InformerContract):
    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        return Directory(tmp_path / "mesh")
