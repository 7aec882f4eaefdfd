"""One chain of spans leads from `smc apply` to the last ACK of a real Envoy, across replicas."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from e2e.kit.collector import Collector, Span
from e2e.kit.mesh import Mesh, eventually
from smc.demo import bookstore
from smc.demo.addresses import Addresses
from smc.demo.local import Plan

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def collector() -> AsyncIterator[Collector]:
    with Addresses() as addresses:
        async with Collector(f"{addresses.take()}:4318") as running:
            yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(collector: Collector) -> AsyncIterator[Mesh]:
    quick = (("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url), ("OTEL_BSP_SCHEDULE_DELAY", "100"))
    async with Mesh(Plan(replica_env=(*Plan().replica_env, *quick))) as running:
        yield running


async def test_a_change_is_traced_from_its_command_to_every_ack(
    mesh: Mesh, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    await mesh.wait_synced()
    serving = await mesh.serving()
    homes = {
        workload: next(replica.name for replica in mesh.replicas if replica.name in identifier)
        for workload, identifier in serving.items()
    }
    assert len(set(homes.values())) > 1, f"more than one replica serves: {homes}"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    await mesh.apply(bookstore.split(30, 70))

    async def arrived() -> bool:
        return {span.attributes["smc.proxy"] for _, acks in _traced(collector) for span in acks} == set(homes)

    await eventually(arrived, timeout=10, what="an ACK of every proxy is in the trace")

    # One trace from the command to the store …
    (command,) = collector.called("smc apply")
    assert command.parent == ""
    (call,) = collector.children(command)
    assert (call.name, call.trace) == ("smc.v1.Mesh/Apply", command.trace)
    assert call.instance in {replica.name for replica in mesh.replicas}
    written = [span for span in collector.children(call, "etcd.txn") if span.attributes["etcd.txn.succeeded"]]
    (transaction,) = [span for span in written if span.attributes["etcd.txn.operations"]]
    revision = transaction.attributes["etcd.revision"]
    # … and from there a root of its own in every replica, which links to the writer and ends with the ACKs.
    traced = _traced(collector)
    assert sorted(build.instance for build, _ in traced) == sorted(replica.name for replica in mesh.replicas)
    found: dict[str, str] = {}
    for build, acks in traced:
        assert build.parent == ""
        assert build.trace != command.trace
        assert build.attributes["smc.revision"] >= revision
        for ack in acks:
            proxy = ack.attributes["smc.proxy"]
            found[proxy] = ack.instance
            pushes = [s for s in collector.children(build, "smc.push") if s.attributes["smc.proxy"] == proxy]
            assert "VirtualHost" in {push.attributes["smc.type"] for push in pushes}
            assert ack.attributes["smc.revision"] == build.attributes["smc.revision"]
            assert {ack.instance, *(push.instance for push in pushes)} == {build.instance}
            assert command.start < call.start < transaction.start < transaction.end < ack.end
            assert build.start < min(push.start for push in pushes) < ack.end
    assert found == homes, "each proxy's ACK is told by the replica that serves it"


def _traced(collector: Collector) -> list[tuple[Span, list[Span]]]:
    """The builds that link to a call of Apply, each with the ACKs below it."""
    writers = {call.context for call in collector.called("smc.v1.Mesh/Apply") if call.parent}
    return [
        (build, collector.children(build, "smc.ack"))
        for build in collector.called("smc.build")
        if writers & {*build.links}
    ]
