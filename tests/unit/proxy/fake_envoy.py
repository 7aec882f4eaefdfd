"""Stands in for Envoy: an admin interface with /ready and /config_dump, and a life that the test decides.

Usage: fake_envoy.py --config-path <bootstrap> … In the folder where it lies the file `die` makes it exit with 3
at start, `deaf` makes it ignore SIGTERM, `identity` is there once it has its certificate. It writes each start and each
signal to `events`, its pid to `pid`, and `asked` once it was asked for its secrets.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

BOOTSTRAP = json.loads(Path(sys.argv[sys.argv.index("--config-path") + 1]).read_text())
ADMIN = BOOTSTRAP["admin"]["address"]["socket_address"]
FOLDER = Path(__file__).parent


def event(text: str) -> None:
    with (FOLDER / "events").open("a") as file:
        file.write(text + "\n")


def on_signal(number: int, _frame: object) -> None:
    event(signal.Signals(number).name)
    if number == signal.SIGTERM and not (FOLDER / "deaf").exists():
        os._exit(0)


class Admin(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/ready":
            body = b"LIVE\n"
        else:
            (FOLDER / "asked").touch()
            names = [{"name": "identity"}] if (FOLDER / "identity").exists() else [{"name": "credential"}]
            body = json.dumps({"configs": names}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, on_signal)
    (FOLDER / "pid").write_text(str(os.getpid()))
    event("start " + " ".join(sys.argv[3:]))
    if (FOLDER / "die").exists():
        sys.exit(3)
    HTTPServer.allow_reuse_address = True
    HTTPServer((ADMIN["address"], ADMIN["port_value"]), Admin).serve_forever()
