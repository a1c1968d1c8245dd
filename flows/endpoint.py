"""One small HTTP server for Prometheus and for whoever restarts processes: /metrics, /healthz and /readyz.

/healthz says 503 once the process has stood still for longer than it may: restart it.  /readyz says 503, and why, while
the database or the store cannot be reached: send it nothing, and wait.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from flows.errors import Unready
from flows.factory import Factory, now
from registry import workers
from registry.errors import RegistryError
from registry.session import reading

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

Check = Callable[[], Mapping[str, str]]  # what is wrong, by what is affected; empty when all is well
CLIENT_SECONDS = 30.0  # for which a client that says nothing, or hears nothing, keeps a thread
READY_SECONDS = 5.0  # for which an answer to /readyz is kept: probes come from several sides


class Endpoint:
    """The three paths as a WSGI application."""

    def __init__(
        self, registry: CollectorRegistry, live: Check, ready: Check, refresh: Callable[[], None] = lambda: None
    ) -> None:
        self._metrics: WSGIApplication = make_wsgi_app(registry)
        self._refresh = refresh
        self._checks = {"/healthz": live, "/readyz": kept(ready, READY_SECONDS)}

    def __call__(self, environment: "WSGIEnvironment", start: "StartResponse") -> Iterable[bytes]:
        """Answer one request."""
        path = environment["PATH_INFO"]
        if path == "/metrics":
            self._refresh()
            return self._metrics(environment, start)
        if path not in self._checks:
            return _answer(start, "404 Not Found", {"paths": "/metrics /healthz /readyz"})
        wrong = self._checks[path]()
        return _answer(start, "503 Service Unavailable" if wrong else "200 OK", wrong or {"status": "ok"})


@contextmanager
def served(endpoint: Endpoint, port: int, host: str = "") -> Iterator[int]:
    """Serve while the block runs; the port (of one's own choice where 0 was asked for).  Raises Unready."""
    try:
        server = make_server(host, port, endpoint, ThreadingWSGIServer, handler_class=_Quiet)
    except (OSError, TypeError, UnicodeError) as error:  # the latter two for what can be no host's name
        where, fix = (f"{host}:{port}", "address or port") if host else (f"port {port}", "port")
        why = getattr(error, "strerror", None) or error
        raise Unready(f"{where} cannot be listened on ({why})", f"choose another {fix}") from None
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def moving(factory: Factory) -> Check:
    """Whether anything has happened in this process lately, as LORA_STALL_SECONDS says."""

    def check() -> Mapping[str, str]:
        idle, limit = factory.pulse.idle_for(), factory.settings.stall_seconds
        return {"loop": f"nothing has moved for {idle:.0f} s in {factory.pulse.look.phase}"} if idle > limit else {}

    return check


def reachable(factory: Factory) -> Check:
    """Whether registry and store answer."""

    def registry() -> None:
        with reading(factory.engine) as session:
            workers.present(session, now())  # which asks for the tables, too

    def store() -> None:
        factory.store.check()

    def check() -> Mapping[str, str]:
        wrong = {}
        for what, ask in (("registry", registry), ("store", store)):
            try:
                ask()
            except RegistryError as error:
                wrong[what] = str(error)
        return wrong

    return check


def kept(check: Check, seconds: float, clock: Callable[[], float] = time.monotonic) -> Check:
    """A check whose answer is kept for a while; whoever asks meanwhile does not wait for the database."""
    lock = threading.Lock()
    asked: tuple[float, Mapping[str, str]] | None = None

    def lately() -> Mapping[str, str]:
        nonlocal asked
        with lock:
            if asked is None or clock() - asked[0] > seconds:
                asked = clock(), check()
            return asked[1]

    return lately


def _answer(start: "StartResponse", status: str, body: Mapping[str, str]) -> list[bytes]:
    data = json.dumps(body).encode() + b"\n"
    start(status, [("Content-Type", "application/json"), ("Content-Length", str(len(data)))])
    return [data]


class _Quiet(WSGIRequestHandler):
    """Requests are not logged: probes come every few seconds, and some only knock and are gone."""

    timeout = CLIENT_SECONDS

    def handle(self) -> None:
        """Answer one request, unless whoever asked has gone or never says what."""
        with suppress(ConnectionError, TimeoutError):
            super().handle()

    def log_message(self, *_: object) -> None:
        """Nothing."""
