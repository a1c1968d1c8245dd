"""Who is to be trained, when, by whom, and what is on its way into the store."""

import uuid
from datetime import datetime

from sqlalchemy import (
    BigInteger,
    ForeignKey,
    Index,
    String,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import Mapped, mapped_column

from registry.models.base import Base, Facts
from registry.names import AdapterId, DatasetId, JobId, RunId, TenantId

_UNFINISHED = text("finished_at IS NULL")


class Job(Base):
    """One request to train: (adapter, dataset, base, recipe), with a state and a lease.

    A claim reads the two indexes of unfinished jobs only: they stay as small as the queue is.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("adapter_id", "fingerprint"),
        Index(
            "ix_jobs_line", "tenant_id", "in_line_since", "id", postgresql_where=_UNFINISHED, sqlite_where=_UNFINISHED
        ),
        Index(
            "ix_jobs_line_of_group", "tenant_id", "cohort_group", "in_line_since", "id",
            postgresql_where=_UNFINISHED, sqlite_where=_UNFINISHED,
        ),
        Index(None, "tenant_id", "finished_at"),
        Index(None, "state", "finished_at"),
    )  # fmt: skip

    id: Mapped[JobId] = mapped_column(primary_key=True, default=uuid.uuid4)
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"))
    adapter_id: Mapped[AdapterId] = mapped_column(ForeignKey("adapters.id"))
    dataset_id: Mapped[DatasetId] = mapped_column(ForeignKey("datasets.id"), index=True)
    base_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("bases.id"))
    recipe: Mapped[Facts]
    recipe_digest: Mapped[str] = mapped_column(String(64))
    fingerprint: Mapped[str] = mapped_column(String(64))  # of dataset, base and recipe: equal work is one job
    cohort_group: Mapped[str] = mapped_column(String(64))  # jobs of equal group can share a cohort
    state: Mapped[str] = mapped_column(String(16))  # queued, running, published, refused, failed, cancelled
    priority: Mapped[int] = mapped_column(default=0, server_default="0")
    in_line_since: Mapped[datetime]  # created_at, and an hour earlier for each step of priority: the earliest is next
    attempts: Mapped[int] = mapped_column(default=0)  # claims that were not put back
    errors: Mapped[int] = mapped_column(default=0, server_default="0")  # attempts that ended in one; the others died
    fence: Mapped[int] = mapped_column(default=0)  # grows with every claim: an earlier holder's commit fails
    worker: Mapped[str | None] = mapped_column(String(128))
    lease_until: Mapped[datetime | None]  # of a queued job: until when it was put off
    error: Mapped[str | None]
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]


class Share(Base):
    """What a tenant may have of the factory, and what it had: by this its turn comes."""

    __tablename__ = "shares"

    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    weight: Mapped[float] = mapped_column(default=1.0)  # of two tenants who wait, one with 2 gets twice as many slots
    max_running: Mapped[int | None]  # jobs
    max_waiting: Mapped[int | None]  # jobs
    max_versions: Mapped[int | None]  # in any 24 hours
    served: Mapped[float] = mapped_column(default=0.0)  # jobs handed out, each divided by the weight of its time

    @property
    def limited(self) -> bool:
        """Whether what it has now decides if it may have more."""
        return self.max_running is not None or self.max_versions is not None


class Run(Base):
    """One cohort trained: where, how long, with what result."""

    __tablename__ = "runs"

    id: Mapped[RunId] = mapped_column(primary_key=True, default=uuid.uuid4)
    worker: Mapped[str] = mapped_column(String(128))
    device: Mapped[str] = mapped_column(String(128))
    slots: Mapped[int]
    row_tokens: Mapped[int]
    started_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    facts: Mapped[Facts]  # users by outcome, device seconds


class Worker(Base):
    """A process that trains, or waits to, as it last said: a view for people.  Leases and fences decide."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    device: Mapped[str] = mapped_column(String(128))
    slots: Mapped[int]
    started_at: Mapped[datetime]
    seen_at: Mapped[datetime] = mapped_column(index=True)
    facts: Mapped[Facts]  # numbers of what it does: phase, users, tokens a second, seconds left


class Schedule(Base):
    """When one adapter is to be trained again, and how."""

    __tablename__ = "schedules"

    adapter_id: Mapped[AdapterId] = mapped_column(ForeignKey("adapters.id"), primary_key=True)
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"), index=True)
    timing: Mapped[str] = mapped_column(String(128))  # "cron 0 3 * * *", "every 6h" or "data"
    time_zone: Mapped[str] = mapped_column(String(64))
    paused: Mapped[bool] = mapped_column(default=False)
    base: Mapped[str] = mapped_column(String(512))  # name of the base, as its owner gave it
    recipe: Mapped[Facts]
    next_due_at: Mapped[datetime | None] = mapped_column(index=True)  # None: when new data comes
    last_fired_at: Mapped[datetime | None]
    quiet: Mapped[str | None] = mapped_column(String(11))  # "22:00-06:30" in the time zone: nothing starts then
    priority: Mapped[int] = mapped_column(default=0, server_default="0")  # of its jobs
    min_examples: Mapped[int | None]  # new ones since the last training, or nothing is trained
    min_bytes: Mapped[int | None] = mapped_column(BigInteger)  # the same, in bytes of new examples
    max_versions: Mapped[int | None]  # in any 24 hours
    held: Mapped[str | None]  # why it made no job when it was last due


class Upload(Base):
    """An intent to upload: the sweeper leaves its keys alone while the lease lasts."""

    __tablename__ = "uploads"

    prefix: Mapped[str] = mapped_column(String(1024), primary_key=True)
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"), index=True)
    job_id: Mapped[JobId | None] = mapped_column(ForeignKey("jobs.id"))  # none for a dataset
    sweeping: Mapped[bool] = mapped_column(default=False)  # once set, its owner can no longer commit
    lease_until: Mapped[datetime] = mapped_column(index=True)
