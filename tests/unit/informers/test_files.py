"""A directory as a source: what counts as a file, what a mistake does, and how changes are seen."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from smc.errors import Unavailable
from smc.informers import files as module
from smc.informers.files import FilesInformer
from smc.model import Endpoint, Endpoints, Identity, Name, Observation, Protocol, Service, ServicePort, Workload


def service(name: str, port: int | str = 80) -> str:
    head = f"apiVersion: smc.io/v1alpha1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: shop\n"
    return f"{head}spec:\n  ports:\n  - port: {port}\n"


def workload(name: str, address: str = "127.0.0.9", *services: str) -> str:
    head = f"apiVersion: smc.io/v1alpha1\nkind: Workload\nmetadata:\n  name: {name}\n  namespace: shop\n"
    return f"{head}spec:\n  address: {address}\n  serviceAccount: {name}\n  services: [{', '.join(services)}]\n"


class Directory:
    """A directory and its informer, with every write done by renaming."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.informer = FilesInformer(path, poll=0.01)
        self._observations: AsyncGenerator[Observation, None] | None = None

    def write(self, file: str, *documents: str) -> None:
        new = self.path / f"{file}.new"
        new.write_text("---\n".join(documents))
        new.rename(self.path / file)

    def delete(self, file: str) -> None:
        (self.path / file).unlink()

    async def next(self) -> Observation:
        """The next observation of one and the same `observe`."""
        if self._observations is None:
            self._observations = self.informer.observe()
        async with asyncio.timeout(10):
            return await anext(self._observations)

    async def nothing_new(self) -> None:
        """Nothing is observed for several polls. Ends this `observe`: the next one begins anew."""
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await self.next()
        await self.close()

    async def close(self) -> None:
        if self._observations is not None:
            await self._observations.aclose()
        self._observations = None


@pytest.fixture
async def directory(tmp_path: Path) -> AsyncIterator[Directory]:
    directory = Directory(tmp_path / "mesh")
    yield directory
    await directory.close()


def names(observation: Observation) -> list[str]:
    return [s.name.name for s in observation.services] + [w.name.name for w in observation.workloads]


def told(observation: Observation) -> list[tuple[str, str, str]]:
    return [(p.manifest, p.reason, p.field) for p in observation.problems]


# ---------------------------------------------------------------------------------------------------------- what counts


async def test_services_and_workloads_are_joined_to_endpoints(directory: Directory) -> None:
    directory.write("a.yaml", workload("store-1", "127.0.0.9", "store"), service("store"))
    directory.write("b.yaml", service("lonely"))
    store, lonely, first = Name("shop", "store"), Name("shop", "lonely"), Name("shop", "store-1")
    identity, ports = Identity("shop", "store-1"), (ServicePort(80, Protocol.HTTP, "80"),)
    assert await directory.next() == Observation(
        services=(Service(lonely, ports), Service(store, ports)),
        endpoints=(
            Endpoints(lonely, ()),
            Endpoints(store, (Endpoint(first, "127.0.0.9", identity, ((80, 80),)),)),
        ),
        workloads=(Workload(first, "127.0.0.9", identity, services=("store",)),),
    )


async def test_yaml_and_json_are_read_and_nothing_else(directory: Directory) -> None:
    for file in ("a.yaml", "b.yml", "c.json"):
        text = service(file[0])
        if file.endswith(".json"):
            text = (
                '{"apiVersion": "smc.io/v1alpha1", "kind": "Service", "metadata": {"name": "c", "namespace": "shop"}, '
                '"spec": {"ports": [{"port": 80}]}}'
            )
        directory.write(file, text)
    for leftover in (".d.yaml", ".a.yaml.swp", "a.yaml~", "#a.yaml#", ".#a.yaml", "a.yaml.bak", "README", "4913"):
        directory.write(leftover, service("leftover"))
    (directory.path / "below.yaml").mkdir()
    (directory.path / "below.yaml" / "e.yaml").write_text(service("e"))
    os.mkfifo(directory.path / "pipe.yaml")
    observation = await directory.next()
    assert names(observation) == ["a", "b", "c"]
    assert observation.problems == ()


async def test_links_are_followed_as_a_mounted_config_map_has_them(directory: Directory) -> None:
    for version in ("1", "2"):
        (directory.path / f"..{version}").mkdir()
        (directory.path / f"..{version}" / "a.yaml").write_text(service(f"store-{version}"))
    (directory.path / "..data").symlink_to("..1")
    (directory.path / "a.yaml").symlink_to("..data/a.yaml")
    assert names(await directory.next()) == ["store-1"]
    (directory.path / "..data_tmp").symlink_to("..2")
    (directory.path / "..data_tmp").rename(directory.path / "..data")
    assert names(await directory.next()) == ["store-2"]


@pytest.mark.parametrize("kind", ["MeshConfig", "TrafficSplit", "Pod"])
async def test_other_kinds_are_refused_for_that_file(directory: Directory, kind: str) -> None:
    directory.write("a.yaml", service("a"))
    directory.write("b.yaml", service("b"), service("c").replace("Service", kind))
    observation = await directory.next()
    assert names(observation) == ["a"]
    (problem,) = observation.problems
    assert (problem.manifest, problem.field) == ("files:b.yaml", "kind")
    assert "known are Service, Workload" in problem.message


# ------------------------------------------------------------------------------------------------------------- changes


async def test_a_file_that_vanishes_takes_its_objects_with_it(directory: Directory) -> None:
    directory.write("a.yaml", service("a"))
    directory.write("b.yaml", service("b"))
    assert names(await directory.next()) == ["a", "b"]
    directory.delete("a.yaml")
    assert names(await directory.next()) == ["b"]
    directory.delete("b.yaml")
    assert await directory.next() == Observation()


async def test_a_change_that_leaves_size_and_times_as_they_were_is_seen(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # File systems count time in steps, and two writes may fall into one.
    monkeypatch.setattr(module, "_stamp", lambda _found: (1,))
    directory.write("a.yaml", service("a", 80))
    assert (await directory.next()).services[0].ports[0].number == 80
    directory.write("a.yaml", service("a", 81))
    assert (await directory.next()).services[0].ports[0].number == 81


async def test_a_file_that_is_touched_or_says_the_same_is_no_change(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = asyncio.Event()
    real = module._observation

    def joining(files: object) -> Observation:
        observation: Observation = real(files)  # type: ignore[arg-type]
        loop.call_soon_threadsafe(joined.set)
        return observation

    loop = asyncio.get_running_loop()
    directory.write("a.yaml", service("a"))
    await directory.next()
    monkeypatch.setattr(module, "_observation", joining)
    directory.write("a.yaml", service("a"))
    directory.write("b.txt", "x")
    directory.write("a.yaml", "# a comment\n" + service("a"))
    following = asyncio.create_task(directory.next())
    await joined.wait()
    directory.write("a.yaml", service("a", 81))
    assert (await following).services[0].ports[0].number == 81


async def test_only_what_changed_is_read(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = module.read_all

    def counting(*args: object, file: str) -> object:
        read.append(file)
        return real(*args, file=file)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "read_all", counting)
    for name in ("a", "b", "c"):
        directory.write(f"{name}.yaml", service(name))
    await directory.next()
    directory.write("b.yaml", service("b", 81))
    await directory.next()
    assert read == ["a.yaml", "b.yaml", "c.yaml", "b.yaml"]


async def test_a_file_at_rest_is_not_even_opened(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    directory.write("a.yaml", service("a"))
    monkeypatch.setattr(module, "SETTLED", -1.0)
    await directory.next()

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("it was opened")

    monkeypatch.setattr(Path, "open", opened)
    await directory.nothing_new()


def test_the_times_of_a_file_are_believed_only_once_they_are_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(service("a"))
    os.utime(path, (0, 0))
    assert not module._settled(path.stat()), "its times were changed just now"
    now = time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + 2)
    assert module._settled(path.stat())
    os.utime(path, (now + 3600, now + 3600))
    assert not module._settled(path.stat())


# ------------------------------------------------------------------------------------------------------------ mistakes


async def test_a_mistake_keeps_what_the_file_said_and_tells_where_it_is(directory: Directory) -> None:
    directory.write("a.yaml", service("a"), workload("a-1", "127.0.0.9", "a"))
    directory.write("b.yaml", service("b"))
    before = await directory.next()
    directory.write("a.yaml", service("a", 81), workload("a-1", "127.0.0.9", "a"), service("c", "eighty"))
    spoilt = await directory.next()
    assert (spoilt.services, spoilt.endpoints, spoilt.workloads) == (
        before.services,
        before.endpoints,
        before.workloads,
    )
    (problem,) = spoilt.problems
    assert (problem.manifest, problem.reason, problem.field) == (
        "files:a.yaml",
        "InvalidManifest",
        "spec.ports[0].port",
    )
    assert problem.message.startswith("a.yaml:27:11: ")
    assert problem.message.endswith("; what it said before stays in effect")
    # The others go on, and mending it needs no restart.
    directory.write("b.yaml", service("b", 82))
    assert [s.ports[0].number for s in (await directory.next()).services] == [80, 82]
    directory.write("a.yaml", service("a", 81))
    mended = await directory.next()
    assert [s.ports[0].number for s in mended.services] == [81, 82]
    assert (mended.workloads, mended.problems) == ((), ())


async def test_a_file_that_is_spoilt_at_the_first_look_is_unknown_until_it_is_mended_or_gone(
    directory: Directory,
) -> None:
    directory.write("a.yaml", service("a"))
    directory.write("b.yaml", service("b"), "kind: [")
    directory.write("c.yaml", service("c"), "kind: [")
    observation = await directory.next()
    assert (names(observation), observation.unknown) == (["a"], ("b.yaml", "c.yaml"))
    assert {p.manifest for p in observation.problems} == {"files:b.yaml", "files:c.yaml"}
    effect = "; what it said before is not known, so nothing is removed from the mesh until it is mended"
    assert all(p.message.endswith(effect) for p in observation.problems)
    directory.write("b.yaml", "nonsense")
    assert (await directory.next()).unknown == ("b.yaml", "c.yaml")
    directory.write("b.yaml", service("b"))
    observation = await directory.next()
    assert (names(observation), observation.unknown) == (["a", "b"], ("c.yaml",))
    directory.write("b.yaml", "nonsense")
    observation = await directory.next()
    assert (names(observation), observation.unknown) == (["a", "b"], ("c.yaml",))
    directory.delete("c.yaml")
    observation = await directory.next()
    assert (names(observation), observation.unknown) == (["a", "b"], ())


async def test_a_file_that_came_after_the_first_look_and_never_was_good_is_a_problem_and_nothing_else(
    directory: Directory,
) -> None:
    directory.write("a.yaml", service("a"))
    await directory.next()
    directory.write("b.yaml", service("b"), "kind: [")
    observation = await directory.next()
    assert (names(observation), observation.unknown) == (["a"], ())
    assert {p.manifest for p in observation.problems} == {"files:b.yaml"}
    assert all(p.message.endswith("; nothing in it has effect") for p in observation.problems)
    directory.delete("b.yaml")
    assert (await directory.next()).problems == ()


async def test_what_was_known_when_it_was_last_observed_is_not_taken_for_what_stands_now(directory: Directory) -> None:
    directory.write("a.yaml", service("a", 80))
    await directory.next()
    await directory.close()
    # Another replica leads and reads 81; then it is spoilt, and we lead again.
    directory.write("a.yaml", service("a", 81))
    directory.write("a.yaml", "nonsense")
    observation = await directory.next()
    assert (names(observation), observation.unknown) == ([], ("a.yaml",))


async def test_a_service_that_may_be_in_an_unknown_file_is_not_called_missing(directory: Directory) -> None:
    directory.write("a.yaml", workload("a-1", "127.0.0.9", "a"))
    directory.write("b.yaml", "nonsense")
    assert told(await directory.next()) == [("files:b.yaml", "InvalidManifest", "")]
    directory.write("b.yaml", service("b"))
    assert told(await directory.next()) == [("files:a.yaml", "ServiceNotFound", "spec.services[0]")]


@pytest.mark.parametrize("text", ["", "\xff", "a: &a [*a, *a]", "x" * (module.MAX_TEXT + 1)])
async def test_whatever_is_in_a_file_the_others_are_read(directory: Directory, text: str) -> None:
    directory.write("a.yaml", service("a"))
    (directory.path / "b.yaml").write_bytes(text.encode("latin-1"))
    observation = await directory.next()
    assert names(observation) == ["a"]
    assert next((p.manifest, p.reason) for p in observation.problems) == ("files:b.yaml", "InvalidManifest")


async def test_a_file_that_cannot_be_read_keeps_what_it_said(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.write("a.yaml", service("a"))
    directory.write("b.yaml", service("b"))
    await directory.next()
    real = Path.open

    def denied(path: Path, *args: object, **more: object) -> object:
        if path.name == "b.yaml":
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", denied)
    directory.write("b.yaml", service("b", 81))
    observation = await directory.next()
    assert [s.ports[0].number for s in observation.services] == [80, 80]
    assert told(observation) == [("files:b.yaml", "UnreadableFile", "")]
    assert "b.yaml: it cannot be read: Permission denied" in observation.problems[0].message
    monkeypatch.undo()
    observation = await directory.next()
    assert [s.ports[0].number for s in observation.services] == [80, 81]
    assert observation.problems == ()


async def test_a_link_that_leads_nowhere_cannot_be_read_and_is_not_gone(directory: Directory) -> None:
    (directory.path / "a.target").write_text(service("a"))
    (directory.path / "a.yaml").symlink_to("a.target")
    assert names(await directory.next()) == ["a"]
    directory.delete("a.target")
    observation = await directory.next()
    assert names(observation) == ["a"]
    assert told(observation) == [("files:a.yaml", "UnreadableFile", "")]


async def test_a_file_that_is_written_to_while_it_is_read_keeps_what_it_said(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.write("a.yaml", service("a"))
    await directory.next()
    real = os.fstat
    monkeypatch.setattr(module.os, "fstat", lambda fd: os.stat_result((*real(fd)[:6], 1, *real(fd)[7:])))
    directory.write("a.yaml", service("a", 81))
    observation = await directory.next()
    assert [s.ports[0].number for s in observation.services] == [80]
    assert told(observation) == [("files:a.yaml", "UnreadableFile", "")]
    assert "it is written to while it is read" in observation.problems[0].message
    monkeypatch.undo()
    assert [s.ports[0].number for s in (await directory.next()).services] == [81]


async def test_of_an_object_in_two_files_the_first_counts(directory: Directory) -> None:
    directory.write("b.yaml", service("other"), service("a", 82))
    directory.write("a.yaml", service("a", 81))
    observation = await directory.next()
    assert [(s.name.name, s.ports[0].number) for s in observation.services] == [("a", 81), ("other", 80)]
    assert told(observation) == [("files:b.yaml", "Duplicate", "")]
    assert observation.problems[0].message == (
        "b.yaml:10: Service shop/a is in a.yaml too, and that one counts: remove one of them"
    )
    directory.delete("a.yaml")
    observation = await directory.next()
    assert [s.ports[0].number for s in observation.services] == [82, 80]
    assert observation.problems == ()


async def test_a_service_and_a_workload_of_one_name_are_two_objects(directory: Directory) -> None:
    directory.write("a.yaml", service("a"))
    directory.write("b.yaml", workload("a", "127.0.0.9", "a"))
    observation = await directory.next()
    assert (names(observation), observation.problems) == (["a", "a"], ())


async def test_a_workload_that_backs_no_service_is_a_problem_of_its_file(directory: Directory) -> None:
    directory.write("w.yaml", workload("a-1", "127.0.0.9", "a"))
    observation = await directory.next()
    assert names(observation) == ["a-1"]
    assert told(observation) == [("files:w.yaml", "ServiceNotFound", "spec.services[0]")]


async def test_a_name_that_is_not_utf8_can_still_be_told(directory: Directory) -> None:
    (directory.path / os.fsdecode(b"\xff.yaml")).write_text("nonsense")
    (problem, *_) = (await directory.next()).problems
    assert problem.manifest == "files:\\udcff.yaml"
    problem.message.encode()


# ----------------------------------------------------------------------------------------------------------- directory


async def test_a_directory_that_vanishes_is_unknown_and_the_text_says_which(directory: Directory) -> None:
    directory.write("a.yaml", service("a"))
    await directory.next()
    directory.path.rename(directory.path.with_suffix(".gone"))
    with pytest.raises(Unavailable, match=f"{directory.path} cannot be read: No such file or directory"):
        await directory.next()


async def test_a_file_in_its_place_is_unknown_too(tmp_path: Path) -> None:
    (tmp_path / "mesh").write_text("x")
    with pytest.raises(Unavailable, match="Not a directory"):
        async with aclosing(FilesInformer(tmp_path / "mesh").observe()) as observations:
            await anext(observations)
