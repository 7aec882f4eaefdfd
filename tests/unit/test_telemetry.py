"""A trace crosses etcd as text, and what cannot be read costs the link only."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.trace import TracerProvider

from smc.codec import encode, traceparent
from smc.records import SyncedRecord
from smc.telemetry import MOST_LINKS, current_traceparent, links

GOOD = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_without_a_span_there_is_no_traceparent() -> None:
    assert current_traceparent() == ""


def test_the_open_span_is_what_a_record_stores_and_a_link_leads_back_to_it() -> None:
    with TracerProvider().get_tracer("t").start_as_current_span("apply") as span:
        text = current_traceparent()
    (link,) = links([text])
    assert link.context.trace_id == span.get_span_context().trace_id
    assert link.context.span_id == span.get_span_context().span_id


def test_the_same_writer_is_linked_once() -> None:
    assert len(links([GOOD, GOOD])) == 1


def test_unreadable_traces_are_left_out() -> None:
    bad = ["", "x", "00-zz-00-01", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", GOOD[:-1]]
    assert links(bad) == []


def test_links_are_bounded() -> None:
    many = [f"00-{n:032x}-{n:016x}-01" for n in range(1, 100)]
    assert len(links(many)) == MOST_LINKS


@pytest.mark.parametrize(
    "value",
    [
        encode(SyncedRecord("files"), traceparent=GOOD),
        f'{{"traceparent": "{GOOD}", "format": 1, "record": {{}}}}'.encode(),
    ],
    ids=["as we write it", "as somebody else would"],
)
def test_whoever_wrote_a_record_is_found_in_it(value: bytes) -> None:
    assert traceparent(value) == GOOD


def test_a_trace_that_is_told_of_within_a_record_is_not_its_writers() -> None:
    told = f',"traceparent":"{GOOD}"}}'
    assert traceparent(encode(SyncedRecord(told))) == ""
