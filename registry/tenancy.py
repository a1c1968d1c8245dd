"""Whose rows a transaction may see: one tenant's, or those of one kind of work that spans tenants.

PostgreSQL holds to it by itself (row-level security, migrations 0003 and 0004), whatever a query forgets.  On SQLite
these calls do nothing: it is for one trusted machine, where the filters of the queries alone keep tenants apart.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

from sqlalchemy import bindparam, func, select
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from registry.names import TenantId

ENTER = "SELECT set_config('lora.tenant', %s, true)"  # as `enter`, for who speaks to psycopg
# Made once: every transaction begins with it.
_SET_LOCAL = select(func.set_config(bindparam("name"), bindparam("value"), True))


class Across(StrEnum):
    """Work that spans tenants: each kind has policies of its own, no wider than it needs."""

    CLAIM = "claim"  # hand waiting jobs out to workers
    TICK = "tick"  # fire the schedules that are due
    SWEEP = "sweep"  # find the uploads that nobody finished
    OVERVIEW = "overview"  # the operator's lists of tenants, jobs and schedules: reads only
    UPKEEP = "upkeep"  # find the tenants where something is to be collected or forgotten: reads only


def enter(session: Session, tenant: TenantId) -> None:
    """From here on the transaction sees and writes this tenant's rows only."""
    _set(session, "lora.tenant", str(tenant))


def enter_named(session: Session, tenant: str) -> None:
    """From here on the one tenant that can be seen or made is the one of that name, and none of anybody's rows."""
    _set(session, "lora.tenant_name", tenant)
    _set(session, "lora.tenant", "")


@contextmanager
def across(session: Session, work: Across) -> Iterator[None]:
    """In this block the transaction sees every tenant's rows, as far as this work needs them."""
    _set(session, "lora.across", work)
    yield
    _set(session, "lora.across", "")  # one that raised is rolled back, and takes the setting with it


def unbound(engine: Engine) -> str | None:
    """Why nothing but the queries' filters keeps tenants apart on this connection; None when the database does."""
    if engine.dialect.name != "postgresql":
        return "SQLite is for one trusted machine"
    with engine.connect() as connection:
        role, exempt = connection.exec_driver_sql(
            "SELECT current_user, rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = current_user"
        ).one()
    return f"role {role} is exempt from row-level security" if exempt else None


def _set(session: Session, name: str, value: str) -> None:
    """SET LOCAL, once what is pending has been written under the settings it was made under."""
    if session.get_bind().dialect.name == "postgresql":
        session.flush()
        session.connection().execute(_SET_LOCAL, {"name": name, "value": value})
