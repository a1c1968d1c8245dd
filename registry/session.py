"""Connections and transactions: the only place in the registry that commits."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, create_engine, event, make_url
from sqlalchemy.engine import Connection
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError, ProgrammingError
from sqlalchemy.orm import Session

from registry.errors import DatabaseUnavailable

_SQLITE_WAIT_SECONDS = 60  # how long a writer waits for its turn; one writes at a time


def open_database(url: str) -> Engine:
    """An engine for `sqlite:///file` or `postgresql+psycopg://...`.  Raises DatabaseUnavailable for a bad URL."""
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            engine = create_engine(parsed, connect_args={"timeout": _SQLITE_WAIT_SECONDS})
            event.listen(engine, "connect", _set_up_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
            return engine
        return create_engine(parsed, pool_pre_ping=True, pool_size=10, max_overflow=20)
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        why = str(error).splitlines()[0]
        fix = "use sqlite:///file or postgresql+psycopg://user@host/name (pip install 'lora-factory[postgres]')"
        raise DatabaseUnavailable(_without_password(url), why, fix) from None


@contextmanager
def transaction(engine: Engine) -> Iterator[Session]:
    """One unit of work: committed whole when the block ends, rolled back whole when it raises."""
    with _known_faults(engine), Session(engine, expire_on_commit=False) as session, session.begin():
        yield session


@contextmanager
def reading(engine: Engine) -> Iterator[Session]:
    """A consistent look; on SQLite it waits for no writer."""
    reader = engine.execution_options(lora_reads=True)
    with _known_faults(engine), Session(reader, expire_on_commit=False) as session:
        yield session


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Bring the tables up to date (Alembic); safe to run again, and by several at once on PostgreSQL."""
    config = Config()
    config.set_main_option("script_location", str(files("registry") / "migrations"))
    with _known_faults(engine), engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(5045017)")
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


@contextmanager
def _known_faults(engine: Engine) -> Iterator[None]:
    """The database's two everyday faults in plain words; anything else is passed on."""
    where = engine.url.render_as_string(hide_password=True)
    try:
        yield
    except OperationalError as error:
        why = str(error.orig).strip().splitlines()[0]
        unmade = "no such table" in why or "unable to open" in why
        fix = "run `lora setup`" if unmade else "check LORA_DATABASE_URL and that it is running"
        raise DatabaseUnavailable(where, why, fix) from error
    except ProgrammingError as error:
        if "does not exist" not in str(error.orig):
            raise
        raise DatabaseUnavailable(where, "its tables are missing or older", "run `lora setup`") from error


def _set_up_sqlite(connection: sqlite3.Connection, _: Any) -> None:  # SQLAlchemy's connection record
    connection.isolation_level = None  # we say BEGIN ourselves
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _begin_sqlite(connection: Connection) -> None:
    reads = connection.get_execution_options().get("lora_reads")
    # IMMEDIATE: a writer waits for its turn at the start, so none fails half-way with "database is locked".
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _without_password(url: str) -> str:
    head, at, tail = url.rpartition("@")
    return f"{head.split(':')[0]}:...@{tail}" if at else url
