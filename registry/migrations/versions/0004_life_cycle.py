"""Retention, legal holds, and users who are forgotten.

Revision 0004, after 0003.
"""

import sqlalchemy as sa
from alembic import op

from registry.models import UtcTime

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

OWNED = ("retention_policies", "pins", "holds", "tombstones", "forgettings")
MINE = "tenant_id = NULLIF(current_setting('lora.tenant', true), '')::uuid"
# What points to rows that can now be deleted: without an index each deletion would read these tables whole.
POINTING = {"adapter_versions": "dataset_id", "jobs": "dataset_id", "aliases": "version_id", "alias_moves": "to_id"}
# Upkeep finds the tenants that it then enters, each by itself.
SPANNED = ("retention_policies", "tombstones", "forgettings")


def upgrade() -> None:
    op.add_column("datasets", sa.Column("removed_at", UtcTime(), nullable=True))
    _make_rules()
    _make_records()
    for table, column in POINTING.items():
        op.create_index(op.f(f"ix_{table}_{column}"), table, [column])
    for table in ("pins", "holds", "tombstones"):
        op.create_index(op.f(f"ix_{table}_tenant_id"), table, ["tenant_id"])
    op.create_index(op.f("ix_forgettings_tenant_id_person"), "forgettings", ["tenant_id", "person"])
    if op.get_bind().dialect.name == "postgresql":
        _keep_apart()


def _make_rules() -> None:
    """What is kept: by policy, by pin, under hold."""
    op.create_table(
        "retention_policies", _tenant(),
        sa.Column("newest", sa.Integer(), nullable=True),
        sa.Column("days", sa.Integer(), nullable=True),
        *_said(),
        sa.Column("collected_at", UtcTime(), nullable=True),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_retention_policies_tenant_id")),
        sa.PrimaryKeyConstraint("tenant_id", name=op.f("pk_retention_policies")),
    )  # fmt: skip
    op.create_table(
        "pins", sa.Column("version_id", sa.Uuid(), nullable=False), _tenant(), *_said(),
        sa.ForeignKeyConstraint(["version_id"], ["adapter_versions.id"], name=op.f("fk_pins_version_id")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_pins_tenant_id")),
        sa.PrimaryKeyConstraint("version_id", name=op.f("pk_pins")),
    )  # fmt: skip
    op.create_table(
        "holds", sa.Column("id", sa.Uuid(), nullable=False), _tenant(),
        sa.Column("user_id", sa.Uuid(), nullable=True), *_said(),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_holds_tenant_id")),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_holds_user_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_holds")),
    )  # fmt: skip


def _make_records() -> None:
    """What is gone: versions, and people."""
    op.create_table(
        "tombstones", sa.Column("version_id", sa.Uuid(), nullable=False), _tenant(),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("at", UtcTime(), nullable=False),
        sa.Column("cleared_at", UtcTime(), nullable=True),
        sa.ForeignKeyConstraint(["version_id"], ["adapter_versions.id"], name=op.f("fk_tombstones_version_id")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_tombstones_tenant_id")),
        sa.PrimaryKeyConstraint("version_id", name=op.f("pk_tombstones")),
    )  # fmt: skip
    op.create_table(
        "forgettings", sa.Column("id", sa.Uuid(), nullable=False), _tenant(),
        sa.Column("person", sa.String(length=64), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=True),
        sa.Column("prefix", sa.String(length=1024), nullable=True),
        sa.Column("actor", sa.String(length=128), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("begun_at", UtcTime(), nullable=False),
        sa.Column("deleted", sa.JSON(), nullable=False),
        sa.Column("finished_at", UtcTime(), nullable=True),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_forgettings_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_forgettings")),
    )  # fmt: skip


def _tenant() -> "sa.Column[object]":
    return sa.Column("tenant_id", sa.Uuid(), nullable=False)


def _said() -> "list[sa.Column[object]]":
    """Who, why and when."""
    return [
        sa.Column("actor", sa.String(length=128), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("at", UtcTime(), nullable=False),
    ]


def _keep_apart() -> None:
    for table in OWNED:
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY own ON {table} USING ({MINE}) WITH CHECK ({MINE})")
    for table in SPANNED:
        asked = "current_setting('lora.across', true) = 'upkeep'"
        op.execute(f"CREATE POLICY upkeep_select ON {table} FOR SELECT USING ({asked})")


def downgrade() -> None:
    for table in reversed(OWNED):
        op.drop_table(table)  # and its policies with it
    for table, column in POINTING.items():
        op.drop_index(op.f(f"ix_{table}_{column}"), table)
    op.drop_column("datasets", "removed_at")  # in place: SQLite cannot rebuild a table that others refer to
