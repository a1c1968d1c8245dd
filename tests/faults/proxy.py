"""A proxy before a real S3 server that answers some requests wrongly, late or not at all."""

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

Plan = Callable[[str, str], str]  # method and key to a word of `Proxy`; empty passes the request on
SLOW_SECONDS = 1.5
_HOP_BY_HOP = {"connection", "expect", "transfer-encoding", "keep-alive"}


class Proxy(ThreadingHTTPServer):
    """Passes requests on unless the plan says otherwise.

    `reset` breaks the connection before the request is done, `lost` once it is done; `slow` answers late; a number is
    the status of an answer that the server never gave.  `cut` breaks the connection in the middle of the answer's body,
    `flipped` changes a bit of it.
    """

    daemon_threads = True

    def __init__(self, server: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.server = server
        self.plan: Plan = lambda method, key: ""
        self.seen: Counter[str] = Counter()  # methods
        self.connections = 0

    @property
    def url(self) -> str:
        """Where clients reach it."""
        return f"http://127.0.0.1:{self.server_port}"

    def process_request(self, request: Any, client_address: Any) -> None:  # the base class's own
        """Count a connection."""
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:  # the base class's own
        """A client that gave up waiting is part of the game."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def handle_one_request(self) -> None:
        """One request, by the plan."""
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen[self.command] += 1
        planned = self.server.plan(self.command, self.path)
        if planned == "reset":
            self._break_off()
        elif planned.isdigit():
            self._answer(int(planned), {}, b"<Error><Code>%s</Code></Error>" % planned.encode())
        else:
            status, headers, content = self._pass_on(body)
            if planned == "slow":
                time.sleep(SLOW_SECONDS)
            if planned == "flipped":
                content = content[:-1] + bytes([content[-1] ^ 1])
            self._break_off() if planned == "lost" else self._answer(status, headers, content, planned == "cut")

    def _pass_on(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        parts = urlsplit(self.server.server)
        onward = HTTPConnection(parts.hostname or "", parts.port, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        onward.request(self.command, self.path, body, headers)
        response = onward.getresponse()
        content = response.read()
        onward.close()
        return response.status, dict(response.getheaders()), content

    def _answer(self, status: int, headers: dict[str, str], content: bytes, cut: bool = False) -> None:
        self.send_response(status)
        length = headers.get("Content-Length", str(len(content))) if self.command == "HEAD" else str(len(content))
        for name, value in headers.items():
            if name.lower() not in _HOP_BY_HOP | {"content-length", "date", "server"}:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self._break_off()

    def _break_off(self) -> None:
        self.close_connection = True
        self.connection.close()

    def log_message(self, format: str, *arguments: Any) -> None:  # the base class's own
        """Say nothing."""


@contextmanager
def proxy_before(server: str) -> Iterator[Proxy]:
    """A proxy that answers as long as the block lasts."""
    proxy = Proxy(server)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
