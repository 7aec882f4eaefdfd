"""Every command in docs/ does what the chapter says, on a mesh that was made by the first chapter alone.

`first-mesh.md` makes it; each other chapter goes on with it and leaves it as it was, so any of them may be read alone.
`vms-and-processes.md` has machines that are network namespaces.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import pytest
import pytest_asyncio

from e2e.kit import invariants
from e2e.kit.namespaces import Host, Namespaces
from e2e.kit.reader import Places, Reader
from smc import plugins
from smc.cli.session import Session
from smc.demo.addresses import Addresses
from smc.demo.processes import Children
from smc.demo.programs import find_etcd
from smc.v1 import smc_pb2 as pb
from tests.documentation import CHAPTERS, DOCS

pytestmark = pytest.mark.asyncio(loop_scope="module")

FIRST = DOCS / "first-mesh.md"
MACHINES = DOCS / "vms-and-processes.md"
_ETCD = (
    "etcd --data-dir etcd --listen-client-urls http://192.0.2.10:2379 --advertise-client-urls http://192.0.2.10:2379"
    " --listen-peer-urls http://192.0.2.10:2380 --initial-advertise-peer-urls http://192.0.2.10:2380"
    " --initial-cluster default=http://192.0.2.10:2380"
)


def _until(answers: str) -> str:
    return f"until curl -sf http://{answers} > /dev/null; do sleep 0.2; done"


@contextlib.asynccontextmanager
async def _reading(places: Places, hosts: Mapping[str, Host] | None = None) -> AsyncIterator[Reader]:
    """Somebody with an empty directory. What they left running is stopped, and what it wrote is looked at."""
    directory = Path(tempfile.mkdtemp(prefix="smc-docs-"))
    try:
        # Envoys of another user go through it; what is secret in it has a mode of its own.
        await asyncio.to_thread(directory.chmod, 0o711)
        async with Children(directory) as children:
            home, programs = directory / "home", directory / "programs"
            home.mkdir()
            programs.mkdir()
            etcd = await find_etcd()
            (programs / "etcd").symlink_to(etcd.path)
            (programs / "smc").symlink_to(Path(sys.prefix, "bin", "smc"))
            yield Reader(children, places, home, hosts=hosts, programs=[programs])
            await children.stop()
            invariants.check_logs(children.logs)
            await asyncio.to_thread(_no_traceback, home)
    except BaseException:
        sys.stdout.write(f"what was written is in {directory}\n")
        raise
    await asyncio.to_thread(shutil.rmtree, directory)


def _no_traceback(home: Path) -> None:
    for log in home.rglob("*.log"):
        assert "Traceback" not in log.read_text(errors="replace"), log


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reader() -> AsyncIterator[Reader]:
    with Addresses() as places:
        async with _reading(places) as found:
            await found.read(FIRST)
            yield found


async def test_the_first_mesh_is_made_by_its_chapter_alone(reader: Reader) -> None:
    assert (await reader.try_out("smc proxy status -o name")).split() == [
        *("proxy/shop/buyer-1", "proxy/shop/store-1", "proxy/shop/store-2"),
    ]


@pytest.mark.parametrize(
    "chapter", [path for path in CHAPTERS if path not in (FIRST, MACHINES)], ids=lambda path: path.stem
)
async def test_every_command_of_a_chapter_does_what_it_says(chapter: Path, reader: Reader) -> None:
    before = await _mesh(reader)
    await reader.read(chapter)
    assert await _mesh(reader) == before, "it leaves the mesh as it was"


async def _mesh(reader: Reader) -> Sequence[str]:
    """Every manifest as it is written, and every proxy."""
    return await asyncio.to_thread(_all_of, reader.home / "admin")


def _all_of(credential: Path) -> Sequence[str]:
    # One session and no commands: each of those begins a Python of its own.
    with contextlib.closing(Session(credential, ())) as session:
        lists = [session.call("List", pb.ListRequest(group=k.group, kind=k.name)) for k in plugins.kinds()]
        manifests = [f"{o.kind} {o.namespace}/{o.name} {o.json}" for listed in lists for o in listed.objects]
        return [*manifests, *sorted(proxy.name for proxy in session.call("Proxies", pb.ProxiesRequest()).proxies)]


async def test_machines_of_their_own_join_as_their_chapter_says() -> None:
    with Namespaces() as network:
        hosts = {address: network.add(f"vm{address[-1]}") for address in ("192.0.2.21", "192.0.2.22", "192.0.2.23")}
        async with _reading(network, hosts) as reader:
            await reader.leave_running(_ETCD)
            await reader.try_out(_until("192.0.2.10:2379/health"))
            await reader.type(
                "smc init --etcd 192.0.2.10:2379 --trust-domain mesh.example.com --kek-file kek --out admin"
                " --server 192.0.2.11"
            )
            await reader.leave_running(
                "smc serve --name replica-1 --address 192.0.2.11 --etcd 192.0.2.10:2379 --kek-file kek"
            )
            await reader.try_out(_until("192.0.2.11:15014/readyz"))
            await reader.read(MACHINES)
