"""A gRPC program that is told by xDS itself: it serves quotes, or asks for them at a steady rate. There is no Envoy.

    GRPC_XDS_BOOTSTRAP=… python -m e2e.kit.grpc_program serve 127.0.10.3:50051 v1
    GRPC_XDS_BOOTSTRAP=… python -m e2e.kit.grpc_program ask xds:///quotes.shop:50051 /shop.Quotes/Get --rate 50

`ask` writes one JSON object for each call to standard output, in the order of the answers, and never calls again.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from concurrent import futures
from typing import Any

import grpc


def serve(address: str, version: str) -> None:
    """Answer every call with who was asked and who asks."""

    class Quotes(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            def answer(_request: bytes, context: Any) -> bytes:
                names = context.auth_context().get("x509_subject_alternative_name", [])
                caller = names[0].decode() if names else ""
                return json.dumps({"version": version, "method": details.method, "caller": caller}).encode()

            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(futures.ThreadPoolExecutor(8), xds=True, handlers=[Quotes()])
    # What is there without xDS is nothing: a program that is not told whom to trust trusts nobody.
    fallback = grpc.ssl_server_credentials([(b"", b"")])
    server.add_secure_port(address, grpc.xds_server_credentials(fallback))
    server.start()
    server.wait_for_termination()


def ask(target: str, method: str, rate: float) -> None:
    channel = grpc.secure_channel(target, grpc.xds_channel_credentials(grpc.local_channel_credentials()))
    call = channel.unary_unary(method)
    lock = threading.Lock()

    def tell(answer: Any) -> None:
        code = answer.code()
        said = json.loads(answer.result()) if code is grpc.StatusCode.OK else {"error": answer.details()}
        with lock:
            sys.stdout.write(json.dumps({"status": code.name, **said}) + "\n")
            sys.stdout.flush()

    start = time.monotonic()
    sent = 0
    while True:
        early = start + sent / rate - time.monotonic()
        if early > 0:
            time.sleep(early)
        call.future(b"", timeout=10, wait_for_ready=False).add_done_callback(tell)
        sent += 1


def main() -> None:
    parser = argparse.ArgumentParser()
    does = parser.add_subparsers(dest="does", required=True)
    serving = does.add_parser("serve")
    serving.add_argument("address")
    serving.add_argument("version")
    asking = does.add_parser("ask")
    asking.add_argument("target")
    asking.add_argument("method")
    asking.add_argument("--rate", type=float, default=50.0)
    given = vars(parser.parse_args())
    {"serve": serve, "ask": ask}[given.pop("does")](**given)


if __name__ == "__main__":
    main()
