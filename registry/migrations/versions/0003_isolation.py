"""Tenants kept apart by the database itself, protected aliases, and moves of a whole fleet.

Revision 0003, after 0002.

The policies hold for every role, the owner too (FORCE); only superusers and roles with BYPASSRLS are exempt.  A later
migration that rewrites rows lifts FORCE from their table and sets it again, in its own transaction.
"""

import sqlalchemy as sa
from alembic import op

from registry.models import UtcTime

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

OWNED = (
    "users", "datasets", "adapters", "adapter_versions", "aliases", "alias_moves", "jobs", "evaluations", "events",
    "schedules", "uploads", "protected_aliases",
)  # fmt: skip
# Columns of a move that the version moved to implies: checking them again is most of what a fleet's move costs.
LOOSE = {"tenant_id": "tenants", "adapter_id": "adapters", "from_id": "adapter_versions"}
# A setting that was never made, and one whose transaction is over, is NULL or empty: then nobody's rows are seen.
MINE = "tenant_id = NULLIF(current_setting('lora.tenant', true), '')::uuid"
MYSELF = (
    "id = NULLIF(current_setting('lora.tenant', true), '')::uuid"
    " OR name = NULLIF(current_setting('lora.tenant_name', true), '')"
)
# Work that spans tenants, and all that it may do to whose rows (docs/decisions/0011).
ACROSS = {
    "claim": {
        "jobs": ("SELECT", "UPDATE"), "tenants": ("SELECT",), "users": ("SELECT",), "adapters": ("SELECT",),
        "datasets": ("SELECT",), "events": ("SELECT", "INSERT"),
    },
    "tick": {
        "schedules": ("SELECT", "UPDATE"), "tenants": ("SELECT",), "users": ("SELECT",), "adapters": ("SELECT",),
        "events": ("SELECT", "INSERT"),
    },
    "sweep": {"uploads": ("SELECT", "UPDATE", "DELETE")},
    "overview": {
        "tenants": ("SELECT",), "users": ("SELECT",), "adapters": ("SELECT",), "jobs": ("SELECT",),
        "schedules": ("SELECT",),
    },
}  # fmt: skip
# The events that such work may see: those that it writes itself.
EVENTS = {"claim": "kind IN ('job claimed', 'job failed')", "tick": "kind = 'schedule fired'"}


def upgrade() -> None:
    op.create_table(
        "protected_aliases",
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("actor", sa.String(length=128), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("at", UtcTime(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_protected_aliases_tenant_id")),
        sa.PrimaryKeyConstraint("tenant_id", "name", name=op.f("pk_protected_aliases")),
    )
    with op.batch_alter_table("alias_moves", schema=None) as batch_op:
        batch_op.add_column(sa.Column("fleet_id", sa.BigInteger(), nullable=True))
        for column in LOOSE:
            batch_op.drop_constraint(f"fk_alias_moves_{column}", type_="foreignkey")
    of_fleets = sa.text("fleet_id IS NOT NULL")
    op.create_index(
        op.f("ix_alias_moves_tenant_id_name_fleet_id"), "alias_moves", ["tenant_id", "name", "fleet_id"],
        postgresql_where=of_fleets, sqlite_where=of_fleets,
    )  # fmt: skip
    if op.get_bind().dialect.name == "postgresql":
        _keep_apart()


def _keep_apart() -> None:
    for table in (*OWNED, "tenants"):
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
        mine = MYSELF if table == "tenants" else MINE
        op.execute(f"CREATE POLICY own ON {table} USING ({mine}) WITH CHECK ({mine})")
    for work, tables in ACROSS.items():
        for table, commands in tables.items():
            for command in commands:
                _allow(work, table, command)


def _allow(work: str, table: str, command: str) -> None:
    asked = f"current_setting('lora.across', true) = '{work}'"
    rows = f"{asked} AND {EVENTS[work]}" if table == "events" else asked
    clause = {"INSERT": f"WITH CHECK ({rows})", "UPDATE": f"USING ({rows}) WITH CHECK ({rows})"}
    policy = f"{work}_{command.lower()}"
    op.execute(f"CREATE POLICY {policy} ON {table} FOR {command} {clause.get(command, f'USING ({rows})')}")


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for work, tables in ACROSS.items():
            for table, commands in tables.items():
                for command in commands:
                    op.execute(f"DROP POLICY {work}_{command.lower()} ON {table}")
        for table in (*OWNED, "tenants"):
            op.execute(f"DROP POLICY own ON {table}")
            op.execute(f"ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY, DISABLE ROW LEVEL SECURITY")
    op.drop_index(op.f("ix_alias_moves_tenant_id_name_fleet_id"), "alias_moves")
    with op.batch_alter_table("alias_moves", schema=None) as batch_op:
        batch_op.drop_column("fleet_id")
        for column, table in LOOSE.items():
            batch_op.create_foreign_key(op.f(f"fk_alias_moves_{column}"), table, [column], ["id"])
    op.drop_table("protected_aliases")
