from __future__ import annotations

import inspect

import grpc
import pytest

from cluster import kv
from smc import errors
from smc.api.calls import failure_of
from smc.api.status import CODES, MOST_DETAILS, Failure, Remote, from_rpc, kind_of
from smc.v1 import smc_pb2 as pb


class Failed(Exception):
    """A grpc.RpcError as a client sees it."""

    def __init__(self, code: grpc.StatusCode, text: str, metadata: tuple[tuple[str, str | bytes], ...] = ()) -> None:
        self._code, self._text, self._metadata = code, text, metadata

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._text

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self._metadata


KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.SmcError) and kind is not errors.SmcError
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_comes_out_as_it_went_in(kind: type[errors.SmcError]) -> None:
    failure = failure_of(kind("what is wrong", hint="what to do"), 0)
    assert failure.code == CODES[kind.__name__]
    error, findings, more = from_rpc(Failed(failure.code, failure.text(), failure.metadata()), "here:1")
    assert (type(error), error.message, error.hint) == (kind, "what is wrong", "what to do")
    assert (findings, more) == ((), 0)


def test_a_kind_of_an_error_is_told_as_that_error() -> None:
    class UnreadableRecord(errors.Invalid):
        pass

    assert kind_of(UnreadableRecord("x")) == "Invalid"


def test_findings_that_do_not_fit_are_counted() -> None:
    findings = tuple(pb.Finding(line=n, field=f"spec.backends[{n}].weight", message="x" * 100) for n in range(1, 201))
    failure = Failure("Invalid", "200 things are wrong", findings=findings)
    told = from_rpc(Failed(failure.code, "", failure.metadata()), "here:1")
    assert 0 < len(told[1]) < 200
    assert len(told[1]) + told[2] == 200
    assert list(told[1]) == list(findings[: len(told[1])])
    assert sum(len(value) for _, value in failure.metadata()) < MOST_DETAILS + 2048


def test_a_long_message_is_cut_between_characters() -> None:
    failure = Failure("Invalid", "ü" * 5000)
    assert failure.text().endswith("ü…")
    assert len(failure.text().encode()) <= 1024


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (kv.Unavailable("no quorum"), grpc.StatusCode.UNAVAILABLE, "for 42 s now"),
        (kv.Ambiguous("answer lost"), grpc.StatusCode.UNKNOWN, "may or may not have been written"),
        (kv.Refused("too large"), grpc.StatusCode.INVALID_ARGUMENT, "too large"),
        (kv.LeaseLost("gone"), grpc.StatusCode.UNAVAILABLE, "gone"),
        (kv.ClusterChanged(1, 2), grpc.StatusCode.UNAVAILABLE, "cluster id changed"),
    ],
)
def test_what_the_store_says_is_told_with_how_long_it_has_lasted(
    error: kv.StoreError, code: grpc.StatusCode, text: str
) -> None:
    failure = failure_of(error, 42)
    assert failure.code == code
    assert text in failure.message


def test_a_translated_failure_of_the_store_says_how_long_it_has_lasted() -> None:
    error = errors.Unavailable("the token cannot be created: no quorum", hint="try again")
    error.__cause__ = kv.Unavailable("no quorum")
    assert "for 42 s now" in failure_of(error, 42).message


def test_a_failure_inside_a_replica_is_none_of_our_errors() -> None:
    failure = Failure("Internal", "Apply failed inside the replica", "its log says why", id="abcd")
    error, _, _ = from_rpc(Failed(failure.code, failure.text(), failure.metadata()), "here:1")
    assert isinstance(error, Remote)
    assert error.message == "Apply failed inside the replica [abcd]"


@pytest.mark.parametrize(
    ("code", "text", "said"),
    [
        (grpc.StatusCode.UNAVAILABLE, "Connection refused", "here:1 cannot be reached: Connection refused"),
        (grpc.StatusCode.UNAVAILABLE, "x CERTIFICATE_VERIFY_FAILED x", "here:1 is no replica of the mesh"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline", "here:1 did not answer in time"),
    ],
)
def test_a_replica_that_does_not_answer_is_unavailable(code: grpc.StatusCode, text: str, said: str) -> None:
    error, _, _ = from_rpc(Failed(code, text), "here:1")
    assert isinstance(error, errors.Unavailable)
    assert said in error.message
    assert error.hint


def test_details_that_cannot_be_read_are_not_believed() -> None:
    broken = Failed(grpc.StatusCode.NOT_FOUND, "no such", (("grpc-status-details-bin", b"\xff\xff"),))
    error, _, _ = from_rpc(broken, "here:1")
    assert isinstance(error, errors.NotFound)
