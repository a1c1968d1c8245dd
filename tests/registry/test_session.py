"""Transactions, migrations, and the rules that code must keep."""

import ast
import inspect
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import make_url, select, text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError, OperationalError

import registry
from registry import queries
from registry.errors import DatabaseUnavailable
from registry.models import Base, Tenant
from registry.schema import migrate
from registry.session import open_database, reading, transaction
from registry.tenancy import enter_named
from tests.conftest import looking
from tests.registry.conftest import NOW
from tests.servers import execute

PACKAGE = Path(str(registry.__file__)).parent


def test_what_raises_is_rolled_back(engine: Engine) -> None:
    """A unit of work is whole or nothing."""
    with pytest.raises(KeyError), transaction(engine) as session:
        enter_named(session, "acme")
        session.add(Tenant(name="acme", created_at=NOW))
        session.flush()
        raise KeyError

    with looking(engine) as session:
        assert session.scalars(select(Tenant)).all() == []


@pytest.mark.parametrize("why", ["database or disk is full", "disk I/O error", "No space left on device"])
def test_a_disk_that_is_full_is_told_as_that(tmp_path: Path, why: str) -> None:
    """SQLite says an I/O error where it cannot make the files beside its own."""
    opened = open_database(f"sqlite:///{tmp_path / 'registry.db'}")

    with pytest.raises(DatabaseUnavailable, match=f"{why}; make room on its disk"), reading(opened):
        raise OperationalError("SELECT 1", {}, Exception(why))


def test_migrations_make_the_tables_that_the_code_means(engine: Engine) -> None:
    """On both databases; and running them again changes nothing."""
    migrate(engine)

    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_moments_keep_their_zone(engine: Engine) -> None:
    """SQLite forgets zones; we do not."""
    with transaction(engine) as session:
        enter_named(session, "acme")
        session.add(Tenant(name="acme", created_at=NOW))

    with looking(engine) as session:
        assert session.scalars(select(Tenant)).one().created_at == NOW


def test_a_moment_without_a_zone_is_refused(engine: Engine) -> None:
    """It would mean another moment on another machine."""
    with pytest.raises(Exception, match="no time zone"), transaction(engine) as session:
        session.add(Tenant(name="acme", created_at=NOW.replace(tzinfo=None)))


@pytest.mark.parametrize("url", ["", "nonsense", "mysql://u:secret@h/d", "postgresql+psycopg://u:secret@127.0.0.1:1/d"])
def test_a_database_that_is_not_there_is_told_without_its_password(url: str) -> None:
    """Where, why, what to do."""
    with pytest.raises(DatabaseUnavailable) as caught, reading(open_database(url)) as session:
        session.scalars(select(Tenant)).all()

    assert "secret" not in str(caught.value)


def test_a_server_that_takes_a_connection_and_says_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen server, or a balancer with none behind it, would hold up a worker's renewals for ever."""
    monkeypatch.setitem(registry.session._REACH, "connect_timeout", 2)  # the least that libpq knows
    with socket.create_server(("127.0.0.1", 0)) as silent:
        engine = open_database(f"postgresql+psycopg://u@127.0.0.1:{silent.getsockname()[1]}/d")

        with pytest.raises(DatabaseUnavailable, match="timeout"), reading(engine) as asked:
            asked.execute(text("SELECT 1"))


def test_a_server_whose_machine_is_gone_is_given_up_within_a_minute_unless_its_url_says_otherwise(
    postgres_url: str,
) -> None:
    """Nobody says goodbye when the power goes: TCP asks, and by default after two hours."""
    own = make_url(postgres_url).update_query_dict({"keepalives_idle": "7"}).render_as_string(hide_password=False)
    for url, idle in ((postgres_url, 30), (own, 7)):
        engine = open_database(url)
        with engine.connect() as connection:
            dbapi: Any = connection.connection.dbapi_connection
            given = dbapi.info.get_parameters()
        engine.dispose()

        assert int(given["keepalives_idle"]) == idle
        assert int(given["keepalives_interval"]) * int(given["keepalives_count"]) + 30 <= 60
        assert int(given["tcp_user_timeout"]) == 60_000


def test_tables_that_are_missing_are_told(tmp_path: Path) -> None:
    """With the command that makes them."""
    with (
        pytest.raises(DatabaseUnavailable, match="lora setup"),
        reading(open_database(f"sqlite:///{tmp_path}/x")) as session,
    ):
        session.scalars(select(Tenant)).all()


def test_what_is_wrong_with_a_file_of_sqlites_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to do: of one that may only be read, that somebody else writes to, that is damaged."""
    monkeypatch.setattr("registry.session._WAIT_SECONDS", 0.1)
    file = tmp_path / "registry.db"
    engine = open_database(f"sqlite:///{file}")
    migrate(engine)
    with pytest.raises(DatabaseUnavailable, match="readonly.*check the rights"), transaction(engine) as session:
        session.execute(text("PRAGMA query_only=ON"))
        session.execute(text("DELETE FROM events"))
    engine.dispose()
    with transaction(engine) as writing:
        writing.connection()
        with pytest.raises(DatabaseUnavailable, match="locked; somebody has been writing.*again"):
            migrate(open_database(f"sqlite:///{file}"))
    engine.dispose()
    file.write_bytes(file.read_bytes()[:8192] + b"\xff" * 8192)

    with pytest.raises(DatabaseUnavailable, match="damaged; put a backup"), reading(engine) as session:
        session.execute(text("SELECT * FROM events")).all()


def test_a_worker_that_stands_still_inside_a_transaction_loses_it(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its locks would hold up everybody else; on waking it is told, and nothing of it is committed."""
    monkeypatch.setattr("registry.session._FROZEN_SECONDS", 1)
    engine = open_database(postgres_url)
    migrate(engine)

    with pytest.raises(DatabaseUnavailable), transaction(engine) as session:
        session.add(Tenant(name="acme", created_at=NOW))
        session.flush()
        time.sleep(1.5)

    with reading(engine) as session:
        assert session.scalars(select(Tenant)).all() == []
    engine.dispose()


def test_a_server_that_only_reads_since_another_took_over_is_told_and_left(
    postgres_server: str, postgres_url: str
) -> None:
    """Kept in the pool, its connections would hold a process to it until that is started anew."""
    engine = open_database(postgres_url)
    migrate(engine)
    engine.dispose()
    database = f"ALTER DATABASE {engine.url.database}"
    execute(postgres_server, f"{database} SET default_transaction_read_only = on")
    with pytest.raises(DatabaseUnavailable, match="read-only transaction; another server"):
        add_tenant(engine)
    execute(postgres_server, f"{database} RESET default_transaction_read_only")

    add_tenant(engine)

    engine.dispose()


def add_tenant(engine: Engine) -> None:
    """One row."""
    with transaction(engine) as session:
        session.add(Tenant(name="acme", created_at=NOW))


def test_nothing_is_compiled_just_in_time(postgres_url: str) -> None:
    """A second for each claim, whose plan PostgreSQL takes for dear: what it forbids itself counts as ten billion."""
    engine = open_database(postgres_url)

    with reading(engine) as session:
        assert session.connection().exec_driver_sql("SHOW jit").scalar_one() == "off"
    engine.dispose()


def test_only_one_module_commits() -> None:
    """Sessions are opened by `transaction`; nobody else ends one."""
    assert PACKAGE.is_dir()
    for path in PACKAGE.rglob("*.py"):
        assert path.name == "session.py" or not {"commit", "rollback"} & _method_calls(path), path


def test_every_query_takes_the_session_and_then_the_tenant() -> None:
    """What is for the operator of the whole factory takes none, or says so by `tenant: TenantId | None`."""
    whole_factory = {"tenants", "tenant_id", "ensure_adapter", "ensure_base", "find_or_add"}
    for name, query in inspect.getmembers(queries, inspect.isfunction):
        if query.__module__ == "registry.queries" and not name.startswith("_"):
            parameters = list(inspect.signature(query).parameters)
            assert parameters[0] == "session", name
            assert name in whole_factory or parameters[1] == "tenant", name


def _method_calls(path: Path) -> set[str]:
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return {call.func.attr for call in calls if isinstance(call.func, ast.Attribute)}


def test_an_error_of_a_statement_does_not_show_its_values(engine: Engine) -> None:
    """They name users, and errors are logged."""
    with pytest.raises(DBAPIError) as failed, engine.connect() as connection:
        connection.execute(text("SELECT missing FROM nowhere WHERE name = :name"), {"name": "alice"})

    assert "alice" not in str(failed.value)
