"""The one way that every call goes: who is it, how often, may he, is he still let in, the work within its deadline, and
the answer.

Whatever fails on that way ends as a status with its details, is counted, and opens nothing.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from opentelemetry import propagate
from opentelemetry.trace import SpanKind, StatusCode

from cluster import kv as store
from smc import errors, telemetry
from smc.api.limits import Limiter, Places
from smc.api.status import Failure, kind_of
from smc.manifests import InvalidManifest
from smc.metrics import Metrics
from smc.v1 import smc_pb2 as pb

log = structlog.get_logger(__name__)
tracer = telemetry.tracer(__name__)

Work = Callable[[Any, Any], Awaitable[Any]]
"""(request, caller) -> response; raises SmcError and StoreError."""

LOOK_AGAIN = 1.0
"""Seconds after which it is asked again, of a call that lasts, whether its caller is still let in."""

_SERVICES = pb.DESCRIPTOR.services_by_name


@dataclass(frozen=True, slots=True)
class Gate:
    """What stands before every method of one service."""

    service: str
    identify: Callable[[grpc.aio.ServicerContext[Any, Any]], tuple[str, Any]]
    """Whom to count the call to, and the caller as the method gets it; raises SmcError."""
    authorise: Callable[[Any, str], None]
    """(caller, method); raises Denied."""
    admit: Callable[[Any], Awaitable[None]]
    """Raises Denied once the caller is revoked, and SmcError when that cannot be told."""
    limiter: Limiter
    rarer: Callable[[Any, str], float]
    """(caller, method), as `Limiter.admit`: for methods that somebody may call less often than others."""
    places: Places
    deadline: float
    """Seconds."""
    metrics: Metrics
    unreachable_for: Callable[[], float]
    metadata: Callable[[], tuple[tuple[str, str], ...]] = tuple
    """What goes with every answer."""

    def open(self, methods: Mapping[str, Work]) -> grpc.GenericRpcHandler:
        """Make gRPC's part from the methods by name.

        Raises:
            ValueError: `methods` are not exactly those of the service.
        """
        described = {method.name: method for method in _SERVICES[self.service].methods}
        if described.keys() != methods.keys():
            raise ValueError(f"the methods of {self.service} are {sorted(described)}, not {sorted(methods)}")
        return grpc.method_handlers_generic_handler(
            _SERVICES[self.service].full_name,
            {
                name: grpc.unary_unary_rpc_method_handler(
                    # The request comes as bytes: it is not even parsed before it is known who sent it.
                    self._behaviour(name, getattr(pb, described[name].input_type.name).FromString, work),
                    response_serializer=getattr(pb, described[name].output_type.name).SerializeToString,
                )
                for name, work in methods.items()
            },
        )

    def _behaviour(
        self, method: str, parse: Callable[[bytes], Any], work: Work
    ) -> Callable[[bytes, grpc.aio.ServicerContext[Any, Any]], Any]:
        async def answer(request: bytes, call: grpc.aio.ServicerContext[Any, Any]) -> Any:
            carrier = {k: v for k, v in call.invocation_metadata() or () if isinstance(v, str)}
            with tracer.start_as_current_span(
                f"smc.v1.{self.service}/{method}", context=propagate.extract(carrier), kind=SpanKind.SERVER
            ) as span:
                response, failure = await self._try(method, parse, work, request, call)
                if failure is not None:
                    span.set_status(StatusCode.ERROR, failure.kind)
            self.metrics.api_calls.labels(method, failure.code.name if failure else "OK").inc()
            if failure is not None:
                await call.abort(failure.code, failure.text(), failure.metadata())
            call.set_trailing_metadata(self.metadata())
            return response

        return answer

    async def _try(
        self,
        method: str,
        parse: Callable[[bytes], Any],
        work: Work,
        request: bytes,
        call: grpc.aio.ServicerContext[Any, Any],
    ) -> tuple[Any, Failure | None]:
        try:
            peer, caller = self.identify(call)
            with self.places.one_of(peer):
                async with asyncio.timeout(self.deadline):
                    await self._let_in(peer, caller, method)
                    return await self._while_let_in(work(parse(request), caller), caller), None
        except DecodeError:
            return None, Failure(
                "Invalid", f"the request is no message of {method}", "use the .proto files of this version"
            )
        except TimeoutError:
            return None, Failure(
                "Ambiguous", f"{method} had no end within {self.deadline:g} s", "look what became of it, then try again"
            )
        except (errors.SmcError, store.StoreError) as e:
            return None, failure_of(e, self.unreachable_for())
        except Exception:
            id_ = secrets.token_hex(4)
            log.exception("a call failed in a way that nobody foresaw", method=method, id=id_)
            return None, Failure(
                "Internal", f"{method} failed inside the replica", f"its log says why, under the id {id_}", id=id_
            )

    async def _let_in(self, peer: str, caller: Any, method: str) -> None:
        """Check all that can be told before the request is read.

        Raises:
            Exhausted: too many calls.
            Denied: the caller may not, or is revoked.
            SmcError: that cannot be told.
        """
        if wait := self.limiter.admit(peer):
            raise _exhausted(f"too many calls from {peer}", wait)
        self.authorise(caller, method)
        await self.admit(caller)
        # After that: whoever is revoked is told so, however often he asks.
        if wait := self.rarer(caller, method):
            raise _exhausted(f"{peer} calls {method} too often", wait)

    async def _while_let_in(self, work: Awaitable[Any], caller: Any) -> Any:
        """What the work comes to; it is ended once the caller is revoked, however long it would have lasted.

        Raises:
            what the work and `admit` raise.
        """
        working = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait((working,), timeout=LOOK_AGAIN))[0]:
                await self.admit(caller)
            return working.result()
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)


def _exhausted(what: str, wait: float) -> errors.Exhausted:
    return errors.Exhausted(what, hint=f"try again in {max(wait, 0.1):.1f} s")


def failure_of(error: errors.SmcError | store.StoreError, unreachable_for: float) -> Failure:
    """How an error is told. `unreachable_for`: for how many seconds the store has not answered."""
    lasted = f" (for {unreachable_for:.0f} s now)" if unreachable_for > 0 else ""
    match error:
        case InvalidManifest():
            findings = tuple(
                pb.Finding(file=f.file, line=f.line, column=f.column, field=f.field, message=f.reason, hint=f.hint)
                for f in error.findings
            )
            return Failure("Invalid", error.message, error.hint, findings)
        case errors.Unavailable() if isinstance(error.__cause__, store.StoreError):
            return Failure("Unavailable", f"{error.message}{lasted}", error.hint)
        case errors.SmcError():
            return Failure(kind_of(error), error.message, error.hint)
        case store.Ambiguous():
            return Failure(
                "Ambiguous",
                "etcd's answer was lost: it may or may not have been written",
                "look with smc get, then apply again; applying twice does no harm",
            )
        case store.Refused():
            return Failure("Invalid", f"etcd refuses: {error}")
        case _:
            return Failure(
                "Unavailable",
                f"etcd cannot be reached{lasted}, so nothing was read or written: {error}",
                "try again once it answers; proxies go on with what they have",
            )
