"""What questions at a million users need: figures of versions by index, freshness, and events in the order of commits.

Revision 0005, after 0004.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

MINE = "tenant_id = NULLIF(current_setting('lora.tenant', true), '')::uuid"
# Rows that this migration reads or rewrites: FORCE hides them from their owner too.
READ = ("adapters", "adapter_versions", "aliases", "datasets", "evaluations", "events")
NEWER_DATA = {"postgresql": "newest_id IS DISTINCT FROM dataset_id", "sqlite": "newest_id IS NOT dataset_id"}
SAME_DATA = "newest_id = dataset_id"
BY_VERSION = (("created_at", "id"), ("base_id", "created_at", "id"), ("gain", "id"), ("loss", "id"))
FLEETS = ("tenant_id", "name", "fleet_id")
FIGURE = {"postgresql": "(metrics ->> 'loss')::double precision", "sqlite": "json_extract(metrics, '$.loss')"}
FILL_LOSS = """UPDATE adapter_versions SET loss = (SELECT {figure} FROM evaluations
    WHERE version_id = adapter_versions.id AND subject = 'candidate')"""
FILL_GAIN = """UPDATE adapter_versions SET gain = (SELECT {figure} FROM evaluations
    WHERE version_id = adapter_versions.id AND subject = 'base') - loss"""
FILL_FRESHNESS = """INSERT INTO freshness (adapter_id, tenant_id, newest_id, dataset_id, base_id, recipe_digest)
    SELECT a.id, a.tenant_id,
        (SELECT d.id FROM datasets d WHERE d.user_id = a.user_id ORDER BY d.added_at DESC, d.digest LIMIT 1),
        v.dataset_id, v.base_id, v.recipe_digest
    FROM adapters a LEFT JOIN aliases l ON l.adapter_id = a.id AND l.name = 'latest'
    LEFT JOIN adapter_versions v ON v.id = l.version_id"""


def upgrade() -> None:
    dialect = op.get_bind().dialect.name
    _force(False)
    op.create_table(
        "freshness",
        sa.Column("adapter_id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("newest_id", sa.Uuid(), nullable=True),
        sa.Column("dataset_id", sa.Uuid(), nullable=True),
        sa.Column("base_id", sa.Uuid(), nullable=True),
        sa.Column("recipe_digest", sa.String(length=64), nullable=True),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.id"], name=op.f("fk_freshness_adapter_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_freshness_tenant_id")),
        sa.PrimaryKeyConstraint("adapter_id", name=op.f("pk_freshness")),
    )
    op.add_column("adapter_versions", sa.Column("loss", sa.Float(), nullable=True))
    op.add_column("adapter_versions", sa.Column("gain", sa.Float(), nullable=True))
    # What PostgreSQL adds to the rows that are there is this migration's number: they stay in the order of their ids.
    number = {"postgresql": "(pg_current_xact_id()::text::bigint)", "sqlite": "0"}[dialect]
    op.add_column("events", sa.Column("txid", sa.BigInteger(), nullable=False, server_default=sa.text(number)))
    for statement in (FILL_LOSS, FILL_GAIN):
        op.execute(statement.format(figure=FIGURE[dialect]))
    op.execute(FILL_FRESHNESS)
    _index()
    _force(True)


def _index() -> None:
    """After the rows: an index is quicker made than kept."""
    newer, same = sa.text(NEWER_DATA[op.get_bind().dialect.name]), sa.text(SAME_DATA)
    op.create_index(
        op.f("ix_freshness_tenant_id_adapter_id"), "freshness", ["tenant_id", "adapter_id"],
        postgresql_where=newer, sqlite_where=newer,
    )  # fmt: skip
    op.create_index(
        op.f("ix_freshness_tenant_id_base_id_recipe_digest_adapter_id"), "freshness",
        ["tenant_id", "base_id", "recipe_digest", "adapter_id"], postgresql_where=same, sqlite_where=same,
    )  # fmt: skip
    for columns in BY_VERSION:
        _add("adapter_versions", ("tenant_id", *columns))
    _drop("adapter_versions", ("tenant_id",))
    _add("aliases", ("tenant_id", "name", "adapter_id"))
    _drop("aliases", ("tenant_id",))
    _add("events", ("tenant_id", "txid", "id"))
    _drop("events", ("tenant_id", "id"))
    _drop("alias_moves", FLEETS)
    _add("alias_moves", (*FLEETS, "id"), "fleet_id IS NOT NULL")


def _add(table: str, columns: tuple[str, ...], where: str = "") -> None:
    rows = sa.text(where) if where else None
    name = op.f(f"ix_{table}_{'_'.join(columns)}")
    op.create_index(name, table, list(columns), postgresql_where=rows, sqlite_where=rows)


def _drop(table: str, columns: tuple[str, ...]) -> None:
    op.drop_index(op.f(f"ix_{table}_{'_'.join(columns)}"), table)


def _force(again: bool) -> None:
    """Let the tables' owner see all rows, or bind it again; the new table is bound at the end."""
    if op.get_bind().dialect.name != "postgresql":
        return
    for table in READ:
        op.execute(f"ALTER TABLE {table} {'' if again else 'NO '}FORCE ROW LEVEL SECURITY")
    if again:
        op.execute("ALTER TABLE freshness ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY own ON freshness USING ({MINE}) WITH CHECK ({MINE})")


def downgrade() -> None:
    _add("alias_moves", FLEETS, "fleet_id IS NOT NULL")
    _drop("alias_moves", (*FLEETS, "id"))
    _add("events", ("tenant_id", "id"))
    _drop("events", ("tenant_id", "txid", "id"))
    _add("aliases", ("tenant_id",))
    _drop("aliases", ("tenant_id", "name", "adapter_id"))
    _add("adapter_versions", ("tenant_id",))
    for columns in BY_VERSION:
        _drop("adapter_versions", ("tenant_id", *columns))
    for table, column in (("events", "txid"), ("adapter_versions", "gain"), ("adapter_versions", "loss")):
        op.drop_column(table, column)
    op.drop_table("freshness")
