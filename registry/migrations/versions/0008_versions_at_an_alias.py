"""Aliases with a copy of what their versions are searched by, and keys that hold what a lookup reads.

Revision 0008, after 0007.
"""

import sqlalchemy as sa
from alembic import op

from registry.models import UtcTime

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

COPIED = ("base_id", "created_at", "gain", "loss")
FILL = f"""UPDATE aliases SET ({", ".join(COPIED)}) =
    (SELECT {", ".join(COPIED)} FROM adapter_versions WHERE id = aliases.version_id)"""
OF_ALL, BY_ALIAS = "ix_aliases_tenant_id_name_adapter_id", ("created_at", "gain", "loss")
# Tables that this migration reads or rewrites: FORCE hides their rows from their owner too.
READ = ("aliases", "adapter_versions")
# What a lookup reads of each, beside the key: it need not go to the table's row.
COVERED = {
    "users": ("UNIQUE", "uq_users_tenant_id_name", "tenant_id, name", "id"),
    "adapters": ("UNIQUE", "uq_adapters_user_id_name", "user_id, name", "id, tenant_id"),
    "aliases": ("PRIMARY KEY", "pk_aliases", "adapter_id, name", "tenant_id, version_id"),
}


def upgrade() -> None:
    _force(False)
    for column, kind in (("base_id", sa.Uuid()), ("created_at", UtcTime()), ("gain", sa.Float()), ("loss", sa.Float())):
        op.add_column("aliases", sa.Column(column, kind, nullable=True))
    op.drop_index(op.f(OF_ALL), "aliases")  # before the rows: an index is quicker made than kept
    op.execute(FILL)
    for figure in BY_ALIAS:
        columns = ["tenant_id", "name", figure, "version_id", "base_id"]
        op.create_index(op.f(f"ix_aliases_{'_'.join(columns)}"), "aliases", columns)
    _cover(True)
    _force(True)


def downgrade() -> None:
    _cover(False)
    for figure in BY_ALIAS:
        op.drop_index(op.f(f"ix_aliases_tenant_id_name_{figure}_version_id_base_id"), "aliases")
    for column in COPIED:
        op.drop_column("aliases", column)
    op.create_index(op.f(OF_ALL), "aliases", ["tenant_id", "name", "adapter_id"])


def _cover(more: bool) -> None:
    """Make the keys again, with or without what is only read; SQLite's hold no more than the key."""
    if op.get_bind().dialect.name != "postgresql":
        return
    for table, (kind, name, key, read) in COVERED.items():
        made = f"{kind} ({key}){f' INCLUDE ({read})' if more else ''}"
        op.execute(f"ALTER TABLE {table} DROP CONSTRAINT {name}, ADD CONSTRAINT {name} {made}")


def _force(again: bool) -> None:
    """Let the tables' owner see all rows, or bind it again."""
    if op.get_bind().dialect.name == "postgresql":
        for table in READ:
            op.execute(f"ALTER TABLE {table} {'' if again else 'NO '}FORCE ROW LEVEL SECURITY")
