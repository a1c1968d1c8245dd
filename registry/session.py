"""Connections and transactions: the only place in the registry that commits."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from select import POLLIN, poll
from typing import Any

from sqlalchemy import Dialect, Engine, create_engine, event, make_url
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, ExceptionContext
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InvalidatePoolError,
    NoSuchModuleError,
    OperationalError,
    ProgrammingError,
    TimeoutError,
)
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from registry.errors import DatabaseUnavailable, RegistryInUse
from registry.models import Base

_WAIT_SECONDS = 60  # for a turn: to write on SQLite, for one of the process's connections on PostgreSQL
_FROZEN_SECONDS = 300  # a worker that stands still inside a transaction loses it: its locks hold up others
# In libpq's words, where the URL says nothing else.  A server that takes a connection and is silent, or whose machine
# is gone without a word, is away: without these a connection waits for it for hours, and is not tried again.
_REACH = {
    "connect_timeout": 30, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3,
    "tcp_user_timeout": 60_000,  # milliseconds
}  # fmt: skip
_ONLY_READS = "25006"  # PostgreSQL's number of that error
_IDLE_SECONDS = 1  # a connection that was used more lately is taken to be alive unless it has closed
_FILES = {  # what SQLite says of a file: what that means, and what to do
    "not a database": ("the file is something else than a database", "name another file in LORA_DATABASE_URL"),
    "disk image is malformed": (
        "the file is damaged",
        "put a backup in its place, or what `sqlite3 FILE .recover` saves",
    ),
}
_ROOM = "make room on its disk, or see what is wrong with it"
_FIXES = {  # what a database says of itself, and what to do
    "no such table": "run `lora setup`",
    "is full": _ROOM,
    "disk I/O error": _ROOM,  # SQLite's, where it cannot make the files beside its own
    "No space left on device": _ROOM,  # PostgreSQL's
    "database is locked": f"somebody has been writing to it for {_WAIT_SECONDS} s: try again when they are done",
    "deadlock detected": "this and another transaction waited for each other, and this one was given up: try again",
    "readonly database": "check the rights to its file and folder",
    "read-only transaction": (
        "another server is taking over from it: try again; if it stays, name the one that may be written to"
    ),
}
_FORMS = "use sqlite:///file or postgresql+psycopg://user@host/name (pip install 'lora-factory[postgres]')"


def open_database(url: str) -> Engine:
    """An engine for `sqlite:///file` or `postgresql+psycopg://...`.  Raises DatabaseUnavailable for a bad URL."""
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            engine = create_engine(parsed, hide_parameters=True, connect_args={"timeout": _WAIT_SECONDS})
            event.listen(engine, "connect", _set_up_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
            return engine
        engine = create_engine(
            parsed, hide_parameters=True, pool_size=10, max_overflow=20, pool_timeout=_WAIT_SECONDS,
            connect_args={name: value for name, value in _REACH.items() if name not in parsed.query},
        )  # fmt: skip
        event.listen(engine, "connect", _set_up_postgres)
        event.listen(engine, "checkin", _note_the_time)
        event.listen(engine, "checkout", partial(_check_alive, engine.dialect))
        event.listen(engine, "handle_error", _leave_who_only_reads)
        return engine
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise DatabaseUnavailable(_without_password(url), str(error).splitlines()[0], _FORMS) from None
    except ValueError:  # its words show what stands for the port, which may be the rest of a password
        raise DatabaseUnavailable(_without_password(url), "its port is not a number", _FORMS) from None


def shown(engine: Engine) -> str:
    """Where a database is, without a password: the URL's query may hold one too."""
    return engine.url.set(query={}).render_as_string(hide_password=True)


@contextmanager
def transaction(engine: Engine) -> Iterator[Session]:
    """One unit of work: committed whole when the block ends, rolled back whole when it raises."""
    with known_faults(engine), Session(engine, expire_on_commit=False) as session, session.begin():
        yield session


@contextmanager
def rehearsal(engine: Engine) -> Iterator[Session]:
    """A unit of work that is taken back when the block ends: to see what it would do."""
    with transaction(engine) as session:
        yield session
        session.rollback()


@contextmanager
def reading(engine: Engine) -> Iterator[Session]:
    """A look that waits for no writer: a consistent one on SQLite; on PostgreSQL each statement is one."""
    reader = engine.execution_options(lora_reads=True)
    with known_faults(engine), Session(reader, expire_on_commit=False) as session:
        yield session


def adding(session: Session, table: type[Base]) -> postgresql.Insert | sqlite.Insert:
    """An insert that may say what to do on a conflict, in the words of the session's database."""
    return postgresql.insert(table) if session.get_bind().dialect.name == "postgresql" else sqlite.insert(table)


def compact(engine: Engine) -> None:
    """Leave no byte of deleted rows in a SQLite file and its log; PostgreSQL does it by itself, in time (VACUUM).

    Raises RegistryInUse while somebody reads, since the log cannot be emptied then.
    """
    if engine.dialect.name != "sqlite":
        return
    with known_faults(engine), closing(engine.raw_connection()) as connection:
        cursor = connection.cursor()
        cursor.execute("VACUUM")
        if cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            raise RegistryInUse(shown(engine))


@contextmanager
def known_faults(engine: Engine) -> Iterator[None]:
    """The database's everyday faults in plain words; anything else is passed on."""
    try:
        yield
    except TimeoutError as error:
        why = f"no connection of this process was free for {_WAIT_SECONDS} s"
        raise DatabaseUnavailable(shown(engine), why, "ask from fewer threads, or see what holds them up") from error
    except DBAPIError as error:
        why = (str(error.orig).strip() or type(error.orig).__name__).splitlines()[0]
        if isinstance(error, OperationalError) or error.connection_invalidated:
            raise DatabaseUnavailable(shown(engine), why, _what_to_do(engine, why)) from error
        if isinstance(error, ProgrammingError) and (told := _rights(why)):
            raise DatabaseUnavailable(shown(engine), *told) from error
        if told := next((told for words, told in _FILES.items() if words in why), None):
            raise DatabaseUnavailable(shown(engine), *told) from error
        raise


def _rights(why: str) -> tuple[str, str] | None:
    """What is wrong with tables and roles, and what to do; None for a fault of the code."""
    if why.startswith(("permission denied", "must be owner")):
        return f"its role may not do this ({why})", "run `lora setup` with the owner's URL in LORA_DATABASE_OWNER_URL"
    if why.startswith("role "):
        return why, "make it: CREATE ROLE ... LOGIN PASSWORD '...'"
    return ("its tables are missing or older", "run `lora setup`") if "does not exist" in why else None


def _what_to_do(engine: Engine, why: str) -> str:
    if fix := next((fix for words, fix in _FIXES.items() if words in why), None):
        return fix
    if "unable to open" not in why:
        return "check LORA_DATABASE_URL and that it is running"
    folder = Path(str(engine.url.database)).absolute().parent
    if folder.is_dir():
        return "check LORA_DATABASE_URL and the rights to its folder"
    return f"its folder {folder} is missing: make it, or for that of LORA_HOME run `lora setup`"


def _set_up_sqlite(connection: sqlite3.Connection, _: Any) -> None:  # SQLAlchemy's connection record
    connection.isolation_level = None  # we say BEGIN ourselves
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute("PRAGMA case_sensitive_like=ON")  # as on PostgreSQL: Anna's name does not begin with an a


def _set_up_postgres(connection: Any, _: Any) -> None:  # psycopg's connection, SQLAlchemy's record of it
    connection.autocommit = True
    connection.execute(f"SET idle_in_transaction_session_timeout = '{_FROZEN_SECONDS}s'")
    # To compile a statement takes a second, and what `line.keep_to_indexes` forbids looks dear enough for it.
    connection.execute("SET jit = off")
    connection.autocommit = False


def _note_the_time(_: Any, record: ConnectionPoolEntry) -> None:  # psycopg's connection
    record.info["used"] = time.monotonic()


def _check_alive(dialect: Dialect, connection: Any, record: ConnectionPoolEntry, _: Any) -> None:  # psycopg's
    """Before a connection is used again, ping it if it was idle for a while or if something has come in on it.

    A server that ends a connection closes it, which comes in; to ask each time (pool_pre_ping) costs a round trip.
    """
    if "used" not in record.info:
        return  # it is new
    try:
        if time.monotonic() - record.info["used"] > _IDLE_SECONDS or _heard(connection):
            dialect.do_ping(connection)
    except dialect.loaded_dbapi.Error as error:
        raise InvalidatePoolError from error  # a new one, and none of the others that are as old


def _leave_who_only_reads(context: ExceptionContext) -> None:
    """Take a server that only reads for one that is away: who asks anew is led to the one that took over from it."""
    if getattr(context.original_exception, "sqlstate", None) == _ONLY_READS:
        context.is_disconnect = True  # none of the pool's connections to it is used again


def _heard(connection: Any) -> bool:  # psycopg's connection
    """Whether anything came in, if only its end."""
    socket = poll()
    socket.register(connection.fileno(), POLLIN)
    return bool(socket.poll(0))


def _begin_sqlite(connection: Connection) -> None:
    reads = connection.get_execution_options().get("lora_reads")
    # IMMEDIATE: a writer waits for its turn at the start, so none fails half-way with "database is locked".
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _without_password(url: str) -> str:
    """A URL that cannot be read, so that nobody knows where in it a password is."""
    return f"{url.partition(':')[0]}:..." if "@" in url or "?" in url else url
