from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace

import grpc
import grpc.aio
import pytest
import structlog

from cluster.kv import Ambiguous
from smc.api.backends import ProxyStatus
from smc.certificates import x509
from smc.codec import decode, traceparent
from smc.manifests import Manifest
from smc.model import Frontend, MeshConfig, Name, Outbound, Problem
from smc.records import ManifestRecord, MemberRecord, Nack, QuarantineRecord
from smc.v1 import smc_pb2 as pb
from tests.unit.api.meshes import mesh, proxy
from tests.unit.api.replica import SERVICE, UNREACHABLE, Replica, call, calling, details, member, running

ID = "smc.io/Service/shop/bookstore"
GET = pb.GetRequest(group="smc.io", kind="Service", namespace="shop", name="bookstore")
CREATED, CONFIGURED, UNCHANGED = (
    pb.ApplyResponse.CREATED,
    pb.ApplyResponse.CONFIGURED,
    pb.ApplyResponse.UNCHANGED,
)


@pytest.fixture
async def replica() -> AsyncIterator[Replica]:
    async with running() as replica:
        replica.mesh = None
        yield replica


async def apply(replica: Replica, text: bytes = SERVICE, **more: object) -> pb.ApplyResponse:
    request = pb.ApplyRequest(**{"document": text, "file": "shop.yaml", "line": 11, **more})  # type: ignore[arg-type]
    response: pb.ApplyResponse = await call(replica, replica.operator, "Apply", request)
    return response


async def failing(replica: Replica, method: str, request: object) -> tuple[grpc.StatusCode, pb.Error]:
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await call(replica, replica.operator, method, request)
    return e.value.code(), details(e.value)


async def failing_to_apply(replica: Replica, text: bytes = SERVICE, **more: object) -> tuple[grpc.StatusCode, pb.Error]:
    request = pb.ApplyRequest(**{"document": text, "file": "shop.yaml", "line": 11, **more})  # type: ignore[arg-type]
    return await failing(replica, "Apply", request)


async def stored(replica: Replica, id_: str = ID) -> ManifestRecord | None:
    item = await replica.kv.get(replica.keys.manifest(id_))
    return decode(ManifestRecord, item.value) if item else None


# --------------------------------------------------------------------------------------------------------------- apply


async def test_apply_says_created_then_unchanged_then_configured(replica: Replica) -> None:
    outcomes = [(await apply(replica, text)).outcome for text in (SERVICE, SERVICE, SERVICE.replace(b"80", b"81"))]
    assert outcomes == [CREATED, UNCHANGED, CONFIGURED]


async def test_what_is_applied_is_stored_with_its_place_and_its_author(replica: Replica) -> None:
    response = await apply(replica)
    record = await stored(replica)
    assert record is not None
    assert (record.file, record.line) == ("shop.yaml", 11)
    assert record.author == "spiffe://mesh.example/operator/admin"
    assert record.text == SERVICE.decode()
    assert response.object.resource_version > 0
    assert json.loads(response.object.json) == record.object


async def test_a_bad_document_is_refused_with_every_finding_and_what_is_live_stays(replica: Replica) -> None:
    await apply(replica)
    before = await stored(replica)
    bad = SERVICE.replace(b"port: 80", b"port: 99999\n  - port: http").replace(b"spec:", b"specs: 1\nspec:")
    code, told = await failing_to_apply(replica, bad)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert told.kind == "Invalid"
    assert sorted((f.line, f.field) for f in told.findings) == [
        (16, "specs"),
        (19, "spec.ports[0].port"),
        (20, "spec.ports[1].port"),
    ]
    assert all(f.message and f.column for f in told.findings)
    assert await stored(replica) == before


async def test_a_dry_run_says_what_would_become_of_it_and_writes_nothing(replica: Replica) -> None:
    assert (await apply(replica, dry_run=True)).outcome == CREATED
    assert await stored(replica) is None
    assert (await failing_to_apply(replica, b"kind: Nonsense", dry_run=True))[0] == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_write_over_another_version_than_the_named_one_conflicts(replica: Replica) -> None:
    first = (await apply(replica)).object.resource_version
    second = (await apply(replica, SERVICE.replace(b"80", b"81"), resource_version=first)).object.resource_version
    assert second > first
    code, told = await failing_to_apply(replica, SERVICE.replace(b"80", b"82"), resource_version=first)
    assert (code, told.kind) == (grpc.StatusCode.ABORTED, "Conflict")
    record = await stored(replica)
    assert record is not None
    assert record.object["spec"]["ports"] == [{"port": 81}]


async def test_a_manifest_without_a_namespace_goes_where_the_request_says(replica: Replica) -> None:
    await apply(replica, SERVICE.replace(b"  namespace: shop\n", b""), namespace="books")
    record = await stored(replica, "smc.io/Service/books/bookstore")
    assert record is not None
    assert record.object["metadata"]["namespace"] == "books"


async def test_a_manifest_that_names_another_namespace_than_the_request_is_refused(replica: Replica) -> None:
    code, told = await failing_to_apply(replica, namespace="books")
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "names its own namespace" in told.message


async def test_nothing_is_applied_while_the_store_cannot_be_reached_and_it_says_for_how_long(replica: Replica) -> None:
    replica.kv.error = UNREACHABLE  # type: ignore[attr-defined]
    replica.unreachable_for = 42.0
    code, told = await failing_to_apply(replica)
    assert (code, told.kind) == (grpc.StatusCode.UNAVAILABLE, "Unavailable")
    assert "42 s" in told.message
    replica.kv.error = None  # type: ignore[attr-defined]
    assert await stored(replica) is None


async def test_an_unforeseen_failure_has_an_id_and_shows_nothing_of_the_inside(replica: Replica) -> None:
    replica.kv.error = ZeroDivisionError("secret detail")  # type: ignore[attr-defined]
    with structlog.testing.capture_logs() as logs:
        code, told = await failing(replica, "Get", GET)
    assert (code, told.kind) == (grpc.StatusCode.INTERNAL, "Internal")
    assert told.id
    assert [log["exc_info"] for log in logs if log.get("id") == told.id] == [True]
    assert told.id in told.hint
    assert "secret" not in str(told)
    replica.kv.error = None  # type: ignore[attr-defined]
    assert (await failing(replica, "Get", GET))[0] == grpc.StatusCode.NOT_FOUND


async def test_a_message_above_the_limit_is_refused_before_it_is_read(replica: Replica) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await call(replica, replica.operator, "Apply", pb.ApplyRequest(document=b"x" * (4 * 1024 * 1024 + 1)))
    assert e.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_what_is_no_message_is_refused(replica: Replica) -> None:
    async with calling(replica.api, replica.operator) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as e:
            await channel.unary_unary("/smc.v1.Mesh/Apply")(b"\xff\xff\xff", timeout=5)
    assert e.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "no message of Apply" in details(e.value).message


async def test_the_record_carries_the_trace_of_its_writer(replica: Replica) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    request = pb.ApplyRequest(document=SERVICE)
    await call(replica, replica.operator, "Apply", request, metadata=(("traceparent", trace),))
    item = await replica.kv.get(replica.keys.manifest(ID))
    assert item is not None
    assert traceparent(item.value).split("-")[1] == trace.split("-")[1]


async def test_calls_are_counted_by_their_end(replica: Replica) -> None:
    await apply(replica)
    await failing_to_apply(replica, b"kind: Nonsense")
    value = replica.metrics.registry.get_sample_value
    assert value("smc_api_calls_total", {"method": "Apply", "code": "OK"}) == 1
    assert value("smc_api_calls_total", {"method": "Apply", "code": "INVALID_ARGUMENT"}) == 1


# ---------------------------------------------------------------------------------------------------------------- read


async def test_what_one_replica_confirmed_the_other_one_shows(replica: Replica) -> None:
    async with running(of=replica, name="replica-2") as other:
        other.mesh = None
        applied = (await apply(replica)).object
        shown = await call(other, replica.operator, "Get", GET)
    assert shown.resource_version == applied.resource_version
    assert shown.json == applied.json


async def test_what_is_not_there_is_not_found(replica: Replica) -> None:
    code, told = await failing(replica, "Get", GET)
    assert (code, told.message) == (grpc.StatusCode.NOT_FOUND, "there is no Service shop/bookstore")


@pytest.mark.parametrize("name", ["", "../../ca/roots", "a/b", "x" * 300])
async def test_no_name_leads_out_of_the_manifests(replica: Replica, name: str) -> None:
    request = pb.GetRequest(group="smc.io", kind="Service", namespace="shop", name=name)
    assert (await failing(replica, "Get", request))[0] == grpc.StatusCode.NOT_FOUND


async def test_a_list_has_one_namespace_or_all(replica: Replica) -> None:
    for namespace in (b"shop", b"shop-2", b"books"):
        await apply(replica, SERVICE.replace(b"shop", namespace))

    async def names(namespace: str) -> list[str]:
        request = pb.ListRequest(group="smc.io", kind="Service", namespace=namespace)
        listed = await call(replica, replica.operator, "List", request)
        return [f"{o.namespace}/{o.name}" for o in listed.objects]

    assert await names("") == ["books/bookstore", "shop-2/bookstore", "shop/bookstore"]
    assert await names("shop") == ["shop/bookstore"]
    assert await names("nowhere") == []
    assert (await failing(replica, "List", pb.ListRequest(kind="Service")))[0] == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_service_is_shown_with_the_address_at_which_it_is_dialled(replica: Replica) -> None:
    await apply(replica)
    one, two = Name("shop", "one"), Name("shop", "two")
    everybodys = Outbound("shop", (), (), (), (Frontend(Name("shop", "bookstore"), "240.0.0.7"),))
    replica.mesh = mesh(MeshConfig(), {one: proxy(one), two: proxy(two)._replace(outbound=everybodys)})
    get = pb.GetRequest(group="smc.io", kind="Service", namespace="shop", name="bookstore")
    assert (await call(replica, replica.operator, "Get", get)).address == "240.0.0.7"
    listed = await call(replica, replica.operator, "List", pb.ListRequest(group="smc.io", kind="Service"))
    assert [o.address for o in listed.objects] == ["240.0.0.7"]
    replica.mesh = mesh(MeshConfig(), {one: proxy(one)})
    assert (await call(replica, replica.operator, "Get", get)).address == "", "nobody dials it"


async def test_one_unreadable_record_does_not_hide_the_others(replica: Replica) -> None:
    from cluster.kv import Put

    await apply(replica)
    await replica.kv.transact([Put(replica.keys.manifest("smc.io/Service/shop/broken"), b'{"format": 99}')])
    listed = await call(replica, replica.operator, "List", pb.ListRequest(group="smc.io", kind="Service"))
    assert [o.name for o in listed.objects] == ["bookstore"]


async def test_problems_and_nacks_are_shown_of_the_version_that_the_mesh_was_built_from(replica: Replica) -> None:
    version = (await apply(replica)).object.resource_version
    record = await stored(replica)
    assert record is not None
    buyer = Name("shop", "buyer")
    refusal = QuarantineRecord(buyer, ID, version, "type.googleapis.com/x.Listener", "outbound", "Envoy says no")
    replica.mesh = mesh(
        MeshConfig(),
        {buyer: proxy(buyer, refusal)},
        manifests={ID: Manifest(record, version)},
        problems={ID: (Problem(ID, "NoEndpoints", "nobody backs it", "spec"),)},
    )
    shown = await call(replica, replica.operator, "Get", GET)
    assert [(p.reason, p.message, p.field) for p in shown.problems] == [("NoEndpoints", "nobody backs it", "spec")]
    assert [(n.proxy, n.text) for n in shown.nacks] == [("shop/buyer", "Envoy says no")]
    # The Mesh knows nothing of the next version: no problem of it is known, and neither that there is none.
    newer = await apply(replica, SERVICE.replace(b"80", b"81"))
    assert [p.reason for p in newer.object.problems] == ["NotBuiltYet"]
    assert not newer.object.nacks


async def test_apply_waits_for_the_mesh_and_tells_the_problems(replica: Replica) -> None:
    replica.mesh = mesh(MeshConfig(), {})
    async with aclosing(replica.kv.watch(replica.keys.manifests, await replica.kv.status())) as batches:
        applying = asyncio.create_task(apply(replica))
        (item,) = (await anext(batches)).puts
    problem = Problem(ID, "NoEndpoints", "nobody backs it")
    manifests = {ID: Manifest(decode(ManifestRecord, item.value), item.mod_revision)}
    replica.mesh = mesh(MeshConfig(), {}, manifests=manifests, problems={ID: (problem,)})
    assert [p.reason for p in (await applying).object.problems] == ["NoEndpoints"]


async def test_what_is_deleted_is_gone_and_is_not_found_the_second_time(replica: Replica) -> None:
    await apply(replica)
    request = pb.DeleteRequest(group="smc.io", kind="Service", namespace="shop", name="bookstore")
    await call(replica, replica.operator, "Delete", request)
    assert await stored(replica) is None
    assert (await failing(replica, "Delete", request))[0] == grpc.StatusCode.NOT_FOUND


async def test_a_delete_of_another_version_conflicts(replica: Replica) -> None:
    version = (await apply(replica)).object.resource_version
    request = pb.DeleteRequest(
        group="smc.io", kind="Service", namespace="shop", name="bookstore", resource_version=version + 1
    )
    assert (await failing(replica, "Delete", request))[0] == grpc.StatusCode.ABORTED
    assert await stored(replica) is not None


# ------------------------------------------------------------------------------------------------------------- proxies


def stream(name: str) -> ProxyStatus:
    nack = Nack(Name("shop", name), "type.googleapis.com/x.Cluster", ("c",), "no", (), 6)
    return ProxyStatus(
        Name("shop", name), f"spiffe://mesh.example/ns/shop/sa/{name}", 1.0, 7, 6, "nacked", {"Cluster": "ab"}, (nack,)
    )


async def test_proxies_of_every_replica_are_shown_and_those_that_do_not_answer_are_named(replica: Replica) -> None:
    async with running(of=replica, name="replica-2") as other:
        replica.streams, other.streams = [stream("buyer")], [stream("thief")]
        gone = MemberRecord("replica-3", "127.0.0.1:1", "127.0.0.1:1", "127.0.0.1:1", (1,), True, 0, "0.1.0")
        replica.members = [member(replica, "replica-1"), member(other, "replica-2"), gone]
        shown = await call(replica, replica.operator, "Proxies", pb.ProxiesRequest())
        local = await call(replica, replica.operator, "Proxies", pb.ProxiesRequest(local=True))
    assert [(p.name, p.replica, p.state, p.nacks[0].text) for p in shown.proxies] == [
        ("shop/buyer", "replica-1", "nacked", "no"),
        ("shop/thief", "replica-2", "nacked", "no"),
    ]
    assert [r.name for r in shown.replicas] == ["replica-1", "replica-2"]
    assert list(shown.unreachable) == ["replica-3"]
    assert [p.name for p in local.proxies] == ["shop/buyer"]


async def test_a_proxy_is_shown_with_what_is_left_out_for_it(replica: Replica) -> None:
    buyer = Name("shop", "buyer")
    refusal = QuarantineRecord(buyer, ID, 5, "type.googleapis.com/x.Route", "outbound", "Envoy says no")
    replica.mesh = mesh(MeshConfig(), {buyer: proxy(buyer, refusal)})
    replica.streams = [replace(stream("buyer"), nacks=(), state="synced")]
    (shown,) = (await call(replica, replica.operator, "Proxies", pb.ProxiesRequest())).proxies
    assert [(n.resource, n.text) for n in shown.nacks] == [("outbound", f"{ID} is left out: Envoy says no")]


async def test_own_proxies_are_shown_while_the_store_cannot_be_reached(replica: Replica) -> None:
    replica.mesh = mesh(MeshConfig(), {})
    replica.streams = [stream("buyer")]
    replica.kv.error = UNREACHABLE  # type: ignore[attr-defined]
    shown = await call(replica, replica.operator, "Proxies", pb.ProxiesRequest())
    assert [p.name for p in shown.proxies] == ["shop/buyer"]
    assert "every other replica" in shown.unreachable[0]


# --------------------------------------------------------------------------------------------------------- credentials


async def test_renew_certifies_the_callers_own_name_whatever_is_asked(replica: Replica) -> None:
    replica.mesh = mesh(MeshConfig(mesh_domain="books.internal"), {Name("shop", "buyer"): proxy(Name("shop", "buyer"))})
    buyer = await replica.signed("proxy/shop/buyer")
    key = x509.new_key()
    answer = await call(replica, buyer, "Renew", pb.RenewRequest(csr=x509.request(key)))
    x509.check_answer(answer.chain, key.public_key(), buyer.uri, tuple(answer.roots), replica.backends.now())
    assert (answer.trust_domain, answer.mesh, answer.mesh_domain) == ("mesh.example", "default", "books.internal")
    assert list(answer.api_addresses) == [replica.api]
    assert (answer.address, answer.app_address) == ("127.0.0.9", "127.0.0.10")


async def test_a_token_lives_for_ten_minutes_at_most(replica: Replica) -> None:
    code, told = await failing(
        replica, "CreateToken", pb.CreateTokenRequest(credential="operator/ann", ttl_seconds=601)
    )
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "601" in told.message


async def test_no_token_is_made_for_a_replica(replica: Replica) -> None:
    code, _ = await failing(replica, "CreateToken", pb.CreateTokenRequest(credential="replica/replica-9"))
    assert code == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_renewed_certificate_is_presented_without_a_restart(replica: Replica) -> None:
    async def presented() -> int:
        from smc.proxy.join import presented_chain

        return (await presented_chain(replica.join))[0].serial_number

    before = await presented()
    replica.credential = await replica.signed("replica/replica-1")
    after = await presented()
    assert before != after == x509.load(replica.credential.chain)[0].serial_number


async def test_a_write_whose_fate_is_unknown_says_so(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    async def lost(*_: object) -> None:
        raise Ambiguous("answer lost")

    replica.mesh = mesh(MeshConfig(), {})
    monkeypatch.setattr(replica.kv, "transact", lost, raising=False)
    code, told = await failing_to_apply(replica)
    assert (code, told.kind) == (grpc.StatusCode.UNKNOWN, "Ambiguous")
    assert "may or may not have been written" in told.message


async def test_a_call_has_an_end(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(_key: str) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("smc.api.server.DEADLINE", 0.05)
    async with running(of=replica, name="replica-2") as slow:
        monkeypatch.setattr(replica.kv, "get", hang, raising=False)
        code, told = await failing(slow, "Get", GET)
    assert (code, told.kind) == (grpc.StatusCode.UNKNOWN, "Ambiguous")
    assert "no end within 0.05 s" in told.message


async def test_an_open_connection_goes_on_after_the_replica_renewed(replica: Replica) -> None:
    async with calling(replica.api, replica.operator) as channel:
        method = channel.unary_unary(
            "/smc.v1.Mesh/List",
            request_serializer=pb.ListRequest.SerializeToString,
            response_deserializer=pb.ListResponse.FromString,
        )
        await method(pb.ListRequest(group="smc.io", kind="Service"), timeout=5)
        replica.credential = await replica.signed("replica/replica-1")
        await method(pb.ListRequest(group="smc.io", kind="Service"), timeout=5)
