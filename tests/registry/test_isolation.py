"""Two tenants alike in every name: what PostgreSQL keeps apart, whatever the code forgets."""

import uuid
from datetime import timedelta

import pytest
from sqlalchemy import create_engine, delete, insert, select, text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError

from registry import publishing, queries, schedules
from registry.models import Alias, Base, Tenant, User
from registry.session import reading, transaction
from registry.store import FolderStore
from registry.tenancy import Across, across, unbound
from tests.conftest import looking
from tests.registry.conftest import NOW
from tests.registry.twins import OURS, TABLES, THEIRS, busy, tenant_of
from tests.servers import APPLICATION


def test_the_policies_cover_every_table_of_tenants_for_its_owner_too(twins: Engine) -> None:
    """A new table without a policy fails here."""
    with looking(twins) as session:
        forced = "SELECT relname FROM pg_class WHERE relrowsecurity AND relforcerowsecurity"
        assert set(session.scalars(text(forced))) == {*TABLES, "tenants"}
        owned = "SELECT count(*) FROM pg_shdepend d JOIN pg_roles r ON r.oid = d.refobjid WHERE d.deptype = 'o'"
        assert session.scalar(text(f"{owned} AND r.rolname = '{APPLICATION}'")) == 0
    assert unbound(twins) is None
    assert unbound(create_engine(twins.url.set(username="postgres")))


def test_who_has_not_said_for_whom_sees_nothing(twins: Engine) -> None:
    """Forgetting to enter shows too little, never too much."""
    with reading(twins) as session:
        assert all(session.execute(select(table)).all() == [] for table in (*TABLES.values(), Tenant.__table__))


def test_the_setting_is_over_with_its_transaction(twins: Engine) -> None:
    """The next user of a pooled connection begins with nothing."""
    single = create_engine(twins.url, pool_size=1, max_overflow=0)
    with transaction(single) as session:
        queries.tenant_id(session, OURS)
        assert session.scalars(select(User)).all()
    with transaction(single) as session:
        assert not session.scalars(select(User)).all()
    single.dispose()


def test_one_tenants_rows_are_all_that_its_transaction_reads_and_writes(twins: Engine) -> None:
    """With no filter at all: raw reads, raw deletes, a row in another's name."""
    theirs = tenant_of(twins, THEIRS)
    with transaction(twins) as session:
        mine = queries.tenant_id(session, OURS)
        for table in TABLES.values():
            assert set(session.scalars(select(table.c.tenant_id))) <= {mine}
        assert session.scalars(select(Tenant.name)).all() == [OURS]
        session.execute(delete(Alias))
    with looking(twins) as session:
        assert set(session.scalars(select(Alias.tenant_id))) == {theirs}
    with pytest.raises(DBAPIError, match="row-level security"), transaction(twins) as session:
        queries.tenant_id(session, OURS)
        row = {"id": uuid.uuid4(), "tenant_id": theirs, "name": "eve", "opaque": "0" * 32, "created_at": NOW}
        session.execute(insert(User).values(row))


FORBIDDEN = [
    "UPDATE adapter_versions SET number = 9",
    "UPDATE alias_moves SET actor = ''",
    "UPDATE events SET kind = ''",
    "DROP TABLE users",
    "ALTER TABLE users NO FORCE ROW LEVEL SECURITY",
    "DROP POLICY own ON users",
    "TRUNCATE events",
    "CREATE TABLE mine (id int)",
]


@pytest.mark.parametrize("statement", FORBIDDEN)
def test_what_the_application_has_no_business_with_is_refused_by_the_database(twins: Engine, statement: str) -> None:
    """What is written for good stays, and the shape of things is the owner's."""
    with twins.connect() as connection, pytest.raises(DBAPIError, match="permission denied|must be owner"):
        connection.execute(text(statement))


SPANS = {
    Across.CLAIM: {"jobs", "users", "adapters", "datasets", "events", "shares"},
    Across.TICK: {"schedules", "users", "adapters", "events"},
    Across.SWEEP: {"uploads"},
    Across.OVERVIEW: {"users", "adapters", "jobs", "schedules", "events"},
    Across.UPKEEP: {"retention_policies", "tombstones", "forgettings"},
}


@pytest.mark.parametrize("work", Across)
def test_work_that_spans_tenants_sees_no_more_than_it_needs(twins: Engine, store: FolderStore, work: Across) -> None:
    """The table of decision 11."""
    for name in (THEIRS, OURS):
        with transaction(twins) as session:
            schedules.fire(session, NOW + timedelta(hours=1))
        publishing.declare(twins, busy(twins, name), "d" * 64, NOW)

    with transaction(twins) as session, across(session, work):
        seen = {name for name, table in TABLES.items() if session.execute(select(table)).first()}
        kinds = set(session.scalars(select(Base.metadata.tables["events"].c.kind)))

    assert seen == SPANS[work]
    counted = {"job claimed", "version published"}  # of those there are: no dataset, alias or schedule
    expected = {Across.CLAIM: {"job claimed"}, Across.TICK: {"schedule fired"}, Across.OVERVIEW: counted}
    assert kinds == expected.get(work, set())
