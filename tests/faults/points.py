"""Numbered points at the two boundaries of the registry, where a process is killed, stopped or failed.

Every SQL statement, every COMMIT, every call of the store, every HTTP request to S3 and every file operation of a
folder store is a point before it and a point after it.  The product knows nothing of them.
"""

import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Engine, event

from registry.errors import StoreUnavailable
from registry.store import FolderStore, ObjectStore, S3Store

_TABLE = re.compile(r"^(?:WITH write_0 AS\s+\()?(SELECT\b.*?\bFROM|INSERT INTO|UPDATE|DELETE FROM)\s+(\w+)", re.DOTALL)
_FILE_CALLS = {"open", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.scandir"}


@dataclass(frozen=True)
class Fault:
    """What happens at the Nth point, or at the Nth whose stage and name are the ones named.

    `error` before a call: it is not made and fails.  `error` after it: it is done, and its answer is lost.
    """

    number: int
    how: Literal["kill", "stop", "error"]
    where: str = ""


class Points:
    """Counts the points that a process passes; at the fault's number it happens."""

    def __init__(self, fault: Fault | None, tell: Callable[[str], None]) -> None:
        self.fault, self.tell, self.stage = fault, tell, ""
        self.passed = self.met = 0  # all points; those that the fault means

    @contextmanager
    def around(self, call: str, error: Callable[[], Exception]) -> Iterator[None]:
        """A point before a call and one after it."""
        self.at(f"before {call}", error)
        yield
        self.at(f"after {call}", error)

    def at(self, name: str, error: Callable[[], Exception]) -> None:
        """One point."""
        self.passed += 1
        where = f"{self.stage}: {name}"
        self.met += self.fault is not None and self.fault.where in ("", where)
        if self.fault is None or self.met != self.fault.number:
            return
        self.met += 1  # it happens once
        self.tell(where)
        if self.fault.how == "error":
            raise error()
        os.kill(os.getpid(), signal.SIGKILL if self.fault.how == "kill" else signal.SIGSTOP)


def watch_database(engine: Engine, points: Points) -> None:
    """Points around every statement and every COMMIT; their error is the driver's own, with the connection gone."""
    dialect = engine.dialect
    commit = dialect.do_commit

    def lose(connection: Any) -> Callable[[], Exception]:  # the driver's connection
        def lost() -> Exception:
            if engine.dialect.name == "postgresql":
                connection.close()
            error: Exception = engine.dialect.loaded_dbapi.OperationalError("the connection was lost")
            return error

        return lost

    @event.listens_for(engine, "do_execute")
    def execute(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:  # the driver's and SQLAlchemy's
        with points.around(_short(statement), lose(cursor.connection)):
            dialect.do_execute(cursor, statement, parameters, context)
        return True

    @event.listens_for(engine, "do_executemany")
    def execute_many(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:  # as above
        with points.around(_short(statement), lose(cursor.connection)):
            dialect.do_executemany(cursor, statement, parameters, context)
        return True

    def do_commit(connection: Any) -> None:  # SQLAlchemy's pooled connection
        with points.around("COMMIT", lose(connection.dbapi_connection)):
            commit(connection)

    dialect.do_commit = do_commit  # type: ignore[method-assign, assignment]  # it has no event


def watch_store(store: ObjectStore, points: Points) -> ObjectStore:
    """The store with points around its calls, and below them."""
    if isinstance(store, S3Store):
        _watch_http(store, points)
    elif isinstance(store, FolderStore):
        _watch_files(store.root, points)
    return WatchedStore(store, points)


class WatchedStore:
    """Points around every call of a store that changes something or reads."""

    def __init__(self, store: ObjectStore, points: Points) -> None:
        self._store, self._points = store, points

    def __getattr__(self, name: str) -> Any:  # whatever the store has
        return getattr(self._store, name)

    def put_new(self, key: str, data: bytes) -> bool:
        """As the store's."""
        with self._points.around(f"put {_last(key)}", self._lost):
            return self._store.put_new(key, data)

    def get(self, key: str) -> bytes:
        """As the store's."""
        with self._points.around(f"get {_last(key)}", self._lost):
            return self._store.get(key)

    def clear(self, prefix: str) -> int:
        """As the store's."""
        with self._points.around("clear", self._lost):
            return self._store.clear(prefix)

    def _lost(self) -> Exception:
        return StoreUnavailable("the store", "the connection was lost", "try again")


def _watch_http(store: S3Store, points: Points) -> None:
    """Points around every request to the server; their errors are those that boto3 tries again after."""
    from botocore.exceptions import ReadTimeoutError
    from botocore.httpsession import URLLib3Session

    wire = URLLib3Session(timeout=10)

    def send(request: Any, **_: object) -> Any:  # botocore's request and response
        with points.around(
            f"{request.method} {_last(request.url.partition('?')[0])}",
            lambda: ReadTimeoutError(endpoint_url=request.url),
        ):
            return wire.send(request)

    store.client.meta.events.register("before-send.s3", send)


def _watch_files(root: Path, points: Points) -> None:
    """A point before every file operation below a folder (Python's audit events), which then fails as a bad disk."""

    def hook(name: str, arguments: tuple[Any, ...]) -> None:  # an audit event's own
        if name not in _FILE_CALLS or not isinstance(arguments[0], str | os.PathLike):
            return
        path = Path(arguments[0])
        if path.is_relative_to(root):
            points.at(f"before {name} {_last(str(path))}", lambda: OSError(errno.EIO, os.strerror(errno.EIO)))

    sys.addaudithook(hook)


def _short(statement: str) -> str:
    found = _TABLE.match(statement)
    return f"{found[1].split()[0]} {found[2]}" if found else " ".join(statement.split()[:2])


def _last(path: str) -> str:
    """The last part of a path or key, without what is different every time."""
    name = path.rstrip("/").rpartition("/")[2]
    return re.sub(r"[0-9a-f]{16,}", "*", name)
