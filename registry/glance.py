"""One statement for one tenant in one round trip: what is asked so often that a transaction costs more than the answer.

A transaction of `session.reading` goes to PostgreSQL and back four times: to begin, enter the tenant, ask, and end.
At a glance, the tenant's setting and the statement go together (psycopg's pipeline mode).  Up to the mark at their end
(Sync, in the protocol's words) they are a transaction of their own, and the setting is gone with it.  No rollback
follows, after which psycopg would forget what it has prepared, so PostgreSQL need not plan the statement each time.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

from sqlalchemy import Dialect, Engine, Select

from registry.names import TenantId
from registry.session import known_faults, reading
from registry.tenancy import ENTER, enter

Row = Sequence[Any]  # the columns of a statement


def glance(engine: Engine, tenant: TenantId, statement: Select[Any], asked: Mapping[str, object]) -> Sequence[Row]:
    """The rows of a statement as the tenant sees them now.  Raises DatabaseUnavailable."""
    with known_faults(engine):
        if engine.dialect.name == "postgresql":
            # A connection that has just died is no reason to fail, and of anything else a transaction says what it is.
            with suppress(engine.dialect.loaded_dbapi.Error):
                return _at_once(engine, tenant, _text(statement, engine.dialect), asked)
        with reading(engine) as session:
            enter(session, tenant)
            return session.connection().execute(statement, asked).all()


def _at_once(engine: Engine, tenant: TenantId, statement: str, asked: Mapping[str, object]) -> Sequence[Row]:
    with _outside_transactions(engine) as connection:
        with connection.pipeline():
            connection.execute(ENTER, (str(tenant),))
            answer = connection.execute(statement, asked)
        rows: Sequence[Row] = answer.fetchall()
        return rows


@contextmanager
def _outside_transactions(engine: Engine) -> Iterator[Any]:  # psycopg's connection
    """A connection of the pool's that begins none by itself; one that something went wrong with is not used again."""
    pooled = engine.raw_connection()
    try:
        connection: Any = pooled.dbapi_connection
        connection.autocommit = True
        yield connection
        connection.autocommit = False
    except BaseException:
        pooled.invalidate()
        raise
    pooled.close()


@lru_cache
def _text(statement: Select[Any], dialect: Dialect) -> str:
    return str(statement.compile(dialect=dialect))
