"""What workers say they do, what a version cost, and the events that an overview counts.

Revision 0007, after 0006.
"""

import sqlalchemy as sa
from alembic import op

from registry.models import UtcTime

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

# What `lora metrics` counts: moves of jobs and versions, with numbers in their bodies.  No dataset, alias or schedule.
COUNTED = "'job claimed', 'job released', 'job put off', 'job failed', 'version published'"


def upgrade() -> None:
    op.create_table(
        "workers",
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("device", sa.String(length=128), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column("started_at", UtcTime(), nullable=False),
        sa.Column("seen_at", UtcTime(), nullable=False),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_workers")),
    )
    op.create_index(op.f("ix_workers_seen_at"), "workers", ["seen_at"])
    op.create_index(op.f("ix_jobs_state_finished_at"), "jobs", ["state", "finished_at"])
    op.add_column("adapter_versions", sa.Column("tokens", sa.BigInteger(), nullable=True))
    op.add_column("adapter_versions", sa.Column("device_seconds", sa.Float(), nullable=True))
    if op.get_bind().dialect.name == "postgresql":
        asked = f"current_setting('lora.across', true) = 'overview' AND kind IN ({COUNTED})"
        op.execute(f"CREATE POLICY overview_select ON events FOR SELECT USING ({asked})")


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP POLICY overview_select ON events")
    op.drop_column("adapter_versions", "device_seconds")
    op.drop_column("adapter_versions", "tokens")
    op.drop_index(op.f("ix_jobs_state_finished_at"), "jobs")
    op.drop_table("workers")
