"""The tables and their releases: bring them up to date, say how they stand, take them back to an earlier release."""

from importlib.resources import files

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, inspect
from sqlalchemy.engine import Connection

from registry.errors import SchemaUnknown
from registry.models import Base
from registry.session import known_faults, shown

_FOR_GOOD = ("adapter_versions", "alias_moves", "events")  # tables whose rows are added, and never rewritten


def migrate(engine: Engine, revision: str = "head", application: str | None = None) -> None:
    """Bring the tables to a release (Alembic); safe to run again, and by several at once on PostgreSQL.

    To an earlier one, what only the later ones hold is lost: whoever may need it makes a backup first.  With the engine
    of the tables' owner, `application` is the role that works with them and owns nothing.  Raises SchemaUnknown when a
    newer release has made them, and leaves them as they are.
    """
    config = _config()
    with known_faults(engine), engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(5045017)")
            # A migration that would rewrite only the rows that a policy shows fails instead.
            connection.exec_driver_sql("SET LOCAL row_security = off")
        config.attributes["connection"] = connection
        back = _is_older(engine, revision, _revision(connection))
        (command.downgrade if back else command.upgrade)(config, revision)
        if application and engine.dialect.name == "postgresql":
            _grant(connection, application)


def wanted() -> str:
    """The revision that this release works with."""
    return str(ScriptDirectory.from_config(_config()).get_current_head())


def present(engine: Engine) -> str:
    """The revision that the tables have; empty when there are none.  Raises SchemaUnknown."""
    with known_faults(engine), engine.connect() as connection:
        found = _revision(connection)
    _is_older(engine, "head", found)
    return found


def _revision(connection: Connection) -> str:
    return MigrationContext.configure(connection).get_current_revision() or ""


def _is_older(engine: Engine, revision: str, found: str) -> bool:
    """Whether a revision comes before the one that was found.  Raises SchemaUnknown."""
    scripts = ScriptDirectory.from_config(_config())
    order = ["", *(one.revision for one in reversed(list(scripts.walk_revisions())))]
    if found not in order:
        fix = f"use the release that made them, or go back with it: lora setup --revision {order[-1]}"
        raise SchemaUnknown(found, f"of the tables in {shown(engine)}", fix)
    if revision not in (*order, "head"):
        raise SchemaUnknown(ascii(revision), "which was asked for", f"use one of {', '.join(order[1:])}")
    return revision != "head" and order.index(revision) < order.index(found)


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(files("registry") / "migrations"))
    return config


def _grant(connection: Connection, application: str) -> None:
    """Let a role read and write rows, and nothing else; what is written for good it cannot rewrite."""
    role = connection.dialect.identifier_preparer.quote(application)
    there = set(inspect(connection).get_table_names())  # an earlier release has fewer
    for name, table in Base.metadata.tables.items():
        if name not in there:
            continue
        rights = "SELECT, INSERT, DELETE" if name in _FOR_GOOD else "SELECT, INSERT, UPDATE, DELETE"
        connection.exec_driver_sql(f"GRANT {rights} ON {name} TO {role}")
        if table.autoincrement_column is not None:
            connection.exec_driver_sql(
                f"GRANT USAGE ON SEQUENCE {name}_{table.autoincrement_column.name}_seq TO {role}"
            )
    connection.exec_driver_sql(f"GRANT SELECT ON alembic_version TO {role}")
