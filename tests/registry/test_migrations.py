"""Every released schema goes up with data in place, on both databases, and down again where nothing is lost by it."""

from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, inspect, text

import registry
from registry import aliases, queries, schema
from registry.client import Client
from registry.errors import SchemaUnknown
from registry.models import Base
from registry.names import Reference
from registry.schema import migrate
from registry.session import open_database, reading, transaction
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
    migrate(engine)

    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def fill(url: str, revision: str) -> dict[str, int]:
    """Make a database of that schema with its data; returns the rows of each table."""
    engine = open_database(url)
    migrate(engine, revision)
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


@pytest.mark.parametrize("revision", REVISIONS[:-1])
def test_a_release_can_be_gone_back_to_and_left_again(database_url: str, revision: str) -> None:
    """The tables are as they were at that release, with the rows that it knows."""
    before = fill(database_url, revision)
    engine = open_database(database_url)
    columns = shape(engine)

    migrate(engine)
    assert schema.present(engine) == schema.wanted() == REVISIONS[-1]
    migrate(engine, revision)

    assert (schema.present(engine), shape(engine), counted(database_url)) == (revision, columns, before)
    migrate(engine)
    assert schema.present(engine) == REVISIONS[-1]
    engine.dispose()


@pytest.mark.parametrize("revision", REVISIONS[REVISIONS.index("0003") : -1])
def test_a_release_takes_nothing_away_from_who_reads_by_the_one_before(postgres_url: str, revision: str) -> None:
    """Pull clients need not stop for an upgrade: what they name is there; and what others leave out has a default."""
    engine = open_database(postgres_url)
    migrate(engine, revision)
    old = shape(engine)
    migrate(engine, REVISIONS[REVISIONS.index(revision) + 1])

    for table, columns in shape(engine).items():
        if table not in old:
            continue
        assert not old[table].keys() - columns.keys(), f"{table} has lost columns"
        for name in columns.keys() - old[table].keys():
            assert columns[name], f"{table}.{name} must be given, and the release before does not know it"
    engine.dispose()


def test_tables_of_a_release_that_is_not_known_are_left_alone(database_url: str) -> None:
    """As a release meets them that was gone back to without taking the tables along."""
    engine = open_database(database_url)
    migrate(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")

    for meet in (lambda: migrate(engine), lambda: schema.present(engine)):
        with pytest.raises(SchemaUnknown, match="revision 9999, of the tables in .* use the release that made them"):
            meet()
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "9999"
    engine.dispose()


def shape(engine: Engine) -> dict[str, dict[str, bool]]:
    """The columns of each table, and whether an INSERT may leave them out."""
    look = inspect(engine)
    return {
        table: {one["name"]: one["nullable"] or one["default"] is not None for one in look.get_columns(table)}
        for table in look.get_table_names()
    }
