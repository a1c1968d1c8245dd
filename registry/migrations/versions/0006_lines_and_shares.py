"""A line for each tenant with priorities, shares and quotas, and schedules with conditions.

Revision 0006, after 0005.
"""

import sqlalchemy as sa
from alembic import op

from registry.models import UtcTime

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

MINE = "tenant_id = NULLIF(current_setting('lora.tenant', true), '')::uuid"
CLAIM = "current_setting('lora.across', true) = 'claim'"
REWRITTEN = ("jobs", "tenants")  # FORCE is lifted from them for this transaction: their owner reads and fills rows


def upgrade() -> None:
    postgresql = op.get_bind().dialect.name == "postgresql"
    if postgresql:
        _force("NO FORCE")
    _add_line()
    _add_shares()
    _add_conditions()
    if postgresql:
        _force("FORCE")
        op.execute("ALTER TABLE shares ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY own ON shares USING ({MINE}) WITH CHECK ({MINE})")
        op.execute(f"CREATE POLICY claim_select ON shares FOR SELECT USING ({CLAIM})")
        op.execute(f"CREATE POLICY claim_update ON shares FOR UPDATE USING ({CLAIM}) WITH CHECK ({CLAIM})")


def _force(clause: str) -> None:
    for table in REWRITTEN:
        op.execute(f"ALTER TABLE {table} {clause} ROW LEVEL SECURITY")


def _add_line() -> None:
    """Column by column: SQLite cannot rebuild a table that versions refer to."""
    op.add_column("jobs", sa.Column("priority", sa.Integer(), server_default="0", nullable=False))
    op.add_column("jobs", sa.Column("in_line_since", UtcTime(), server_default="2000-01-01 00:00:00", nullable=False))
    op.add_column("jobs", sa.Column("errors", sa.Integer(), server_default="0", nullable=False))
    op.execute("UPDATE jobs SET in_line_since = created_at")
    # What ended earlier attempts was not kept: an error, until now, as often as not.
    op.execute(
        "UPDATE jobs SET errors = CASE state WHEN 'running' THEN attempts - 1 ELSE attempts END WHERE attempts > 0"
    )
    if op.get_bind().dialect.name == "postgresql":
        op.alter_column("jobs", "in_line_since", server_default=sa.func.now())
    op.drop_index("ix_jobs_state_cohort_group_created_at", "jobs")
    op.drop_index("ix_jobs_tenant_id", "jobs")
    unfinished = sa.text("finished_at IS NULL")
    lines = {
        "ix_jobs_line": ["tenant_id", "in_line_since", "id"],
        "ix_jobs_line_of_group": ["tenant_id", "cohort_group", "in_line_since", "id"],
    }
    for name, columns in lines.items():
        op.create_index(name, "jobs", columns, postgresql_where=unfinished, sqlite_where=unfinished)
    op.create_index(op.f("ix_jobs_tenant_id_finished_at"), "jobs", ["tenant_id", "finished_at"])


def _add_shares() -> None:
    op.create_table(
        "shares",
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("weight", sa.Float(), nullable=False),
        sa.Column("max_running", sa.Integer(), nullable=True),
        sa.Column("max_waiting", sa.Integer(), nullable=True),
        sa.Column("max_versions", sa.Integer(), nullable=True),
        sa.Column("served", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_shares_tenant_id")),
        sa.PrimaryKeyConstraint("tenant_id", name=op.f("pk_shares")),
    )
    op.execute("INSERT INTO shares (tenant_id, weight, served) SELECT id, 1, 0 FROM tenants")


def _add_conditions() -> None:
    with op.batch_alter_table("schedules", schema=None) as batch_op:
        batch_op.alter_column("next_due_at", existing_type=UtcTime(), nullable=True)
        batch_op.add_column(sa.Column("quiet", sa.String(length=11), nullable=True))
        batch_op.add_column(sa.Column("priority", sa.Integer(), server_default="0", nullable=False))
        batch_op.add_column(sa.Column("min_examples", sa.Integer(), nullable=True))
        batch_op.add_column(sa.Column("min_bytes", sa.BigInteger(), nullable=True))
        batch_op.add_column(sa.Column("max_versions", sa.Integer(), nullable=True))
        batch_op.add_column(sa.Column("held", sa.String(), nullable=True))


def downgrade() -> None:
    postgresql = op.get_bind().dialect.name == "postgresql"
    if postgresql:
        op.execute("ALTER TABLE schedules NO FORCE ROW LEVEL SECURITY")
    op.execute("DELETE FROM schedules WHERE timing = 'data'")  # the code before knows cron and intervals
    op.execute("UPDATE schedules SET next_due_at = CURRENT_TIMESTAMP WHERE next_due_at IS NULL")
    with op.batch_alter_table("schedules", schema=None) as batch_op:
        for column in ("held", "max_versions", "min_bytes", "min_examples", "priority", "quiet"):
            batch_op.drop_column(column)
        batch_op.alter_column("next_due_at", existing_type=UtcTime(), nullable=False)
    if postgresql:
        op.execute("ALTER TABLE schedules FORCE ROW LEVEL SECURITY")
    op.drop_table("shares")
    for name in ("ix_jobs_tenant_id_finished_at", "ix_jobs_line_of_group", "ix_jobs_line"):
        op.drop_index(name, "jobs")
    for column in ("errors", "in_line_since", "priority"):
        op.drop_column("jobs", column)
    op.create_index("ix_jobs_tenant_id", "jobs", ["tenant_id"])
    op.create_index("ix_jobs_state_cohort_group_created_at", "jobs", ["state", "cohort_group", "created_at"])
