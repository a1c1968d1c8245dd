"""Every released schema goes up with data in place, on both databases, and down again where nothing is lost by it."""

from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, inspect, text

import registry
from registry import aliases, queries
from registry.client import Client
from registry.models import Base
from registry.names import Reference
from registry.session import open_database, reading, transaction, upgrade
from registry.store import FolderStore
from tests.conftest import set_up
from tests.registry.conftest import NOW

RELEASED = Path(__file__).parent / "released"  # what stood in a database of each schema, as SQL
SCRIPTS = Config()
SCRIPTS.set_main_option("script_location", str(Path(str(registry.__file__)).parent / "migrations"))
REVISIONS = [script.revision for script in ScriptDirectory.from_config(SCRIPTS).walk_revisions()][::-1]


def test_every_schema_has_its_data() -> None:
    """A new migration needs the rows of the schema that it leaves behind: copy the newest file and add to it."""
    assert [path.stem for path in sorted(RELEASED.glob("*.sql"))] == REVISIONS


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_released_schema_goes_up_with_its_data(database_url: str, revision: str, tmp_path: Path) -> None:
    """And what was there is found, moved and rolled back by today's code."""
    before = fill(database_url, revision)
    engine = set_up(database_url)

    assert {name: count for name, count in counted(database_url).items() if name in before} == before
    client = Client(engine, FolderStore(tmp_path), tmp_path / "cache")
    found = client.resolve("acme/alice")
    assert (found.number, found.served_name, client.resolve("globex/alice").number) == (2, "default-a2", 1)
    with transaction(engine) as session:
        tenant, alice = queries.tenant_id(session, "acme"), Reference.parse("acme/alice")
        assert aliases.rollback(session, tenant, alice, "latest", actor="me", reason="test", now=NOW).number == 1
        holder = queries.holder(session, tenant, "alice", "default")
        assert queries.newest_dataset(session, tenant, holder).examples == 9
    with reading(engine) as session:
        assert [one.user for one in queries.listing(session, queries.tenant_id(session, "globex"))] == ["alice"]
    engine.dispose()


@pytest.mark.parametrize("revision", REVISIONS)
def test_the_newest_schema_is_what_the_models_mean_wherever_one_came_from(database_url: str, revision: str) -> None:
    """Tables, columns, types, constraints and indexes."""
    fill(database_url, revision)
    engine = open_database(database_url)
    upgrade(engine)

    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def fill(url: str, revision: str) -> dict[str, int]:
    """Make a database of that schema with its data; returns the rows of each table."""
    engine = open_database(url)
    upgrade(engine, revision)
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql("SET LOCAL TIME ZONE 'UTC'")
        for statement in (RELEASED / f"{revision}.sql").read_text().split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement)
    engine.dispose()
    return counted(url)


def counted(url: str) -> dict[str, int]:
    """How many rows each table has."""
    engine: Engine = open_database(url)
    with engine.connect() as connection:
        names = [name for name in inspect(engine).get_table_names() if name != "alembic_version"]
        counts = {name: int(connection.scalar(text(f"SELECT count(*) FROM {name}")) or 0) for name in names}
    engine.dispose()
    return counts
