"""The registry's tables.  Every row that belongs to a tenant says so; versions are added and never rewritten."""

import uuid
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    TypeDecorator,
    UniqueConstraint,
    Uuid,
    event,
    text,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, Mapper, mapped_column

from registry.names import AdapterId, DatasetId, JobId, RunId, TenantId, UserId, VersionId

Facts = dict[str, Any]  # JSON whose shape another module owns: a recipe, scores, the body of an event

_COUNTER = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts by itself only in its INTEGER
_OF_FLEETS = text("fleet_id IS NOT NULL")


class UtcTime(TypeDecorator[datetime]):
    """A moment, always with its zone: UTC in, UTC out, on SQLite too."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse a moment without a zone: it would mean another one on another machine."""
        if value is not None and value.tzinfo is None:
            raise ValueError(f"{value!r} has no time zone")
        return value and value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Give the zone back that SQLite forgets."""
        return value and (value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC))


class Base(DeclarativeBase):
    """All tables, with constraint names that migrations can rely on."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012  SQLAlchemy's own way to say it
        datetime: UtcTime,
        Facts: JSON,
        TenantId: Uuid(), UserId: Uuid(), AdapterId: Uuid(), DatasetId: Uuid(),
        VersionId: Uuid(), JobId: Uuid(), RunId: Uuid(),
    }  # fmt: skip


class Tenant(Base):
    """An organisation: the isolation boundary."""

    __tablename__ = "tenants"

    id: Mapped[TenantId] = mapped_column(primary_key=True, default=uuid.uuid4)
    name: Mapped[str] = mapped_column(String(63), unique=True)
    created_at: Mapped[datetime]


class User(Base):
    """A person inside a tenant, named by the tenant's own id."""

    __tablename__ = "users"
    __table_args__ = (UniqueConstraint("tenant_id", "name"),)

    id: Mapped[UserId] = mapped_column(primary_key=True, default=uuid.uuid4)
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[str] = mapped_column(String(128))
    opaque: Mapped[str] = mapped_column(String(32), unique=True)  # stands for the user in keys: no personal data there
    created_at: Mapped[datetime]


class SharedBase(Base):
    """A frozen model that adapters were trained on, pinned by the digest of its files and how they are quantised."""

    __tablename__ = "bases"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    name: Mapped[str] = mapped_column(String(512))
    revision: Mapped[str] = mapped_column(String(128))
    quantised: Mapped[str] = mapped_column(String(8))  # 8bit, 4bit, or empty: part of what the digest pins
    parameters: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime]


class Dataset(Base):
    """An immutable snapshot of one user's examples, named by content digest."""

    __tablename__ = "datasets"
    __table_args__ = (UniqueConstraint("user_id", "digest"),)

    id: Mapped[DatasetId] = mapped_column(primary_key=True, default=uuid.uuid4)
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"), index=True)
    user_id: Mapped[UserId] = mapped_column(ForeignKey("users.id"))
    digest: Mapped[str] = mapped_column(String(64))
    key: Mapped[str] = mapped_column(String(1024))  # in the object store
    examples: Mapped[int]
    size: Mapped[int] = mapped_column(BigInteger)  # bytes
    added_at: Mapped[datetime]  # moves when the same content is added again: the newest dataset is what is trained


class Adapter(Base):
    """A named, versioned personalisation for one user."""

    __tablename__ = "adapters"
    __table_args__ = (UniqueConstraint("user_id", "name"), Index(None, "tenant_id", "user_id"))

    id: Mapped[AdapterId] = mapped_column(primary_key=True, default=uuid.uuid4)
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"))
    user_id: Mapped[UserId] = mapped_column(ForeignKey("users.id"))
    name: Mapped[str] = mapped_column(String(40))
    head: Mapped[int] = mapped_column(default=0)  # the highest version number given out
    created_at: Mapped[datetime]


class AdapterVersion(Base):
    """One immutable set of weights: rows are added, never rewritten."""

    __tablename__ = "adapter_versions"
    __table_args__ = (UniqueConstraint("adapter_id", "number"),)

    id: Mapped[VersionId] = mapped_column(primary_key=True, default=uuid.uuid4)
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"), index=True)
    adapter_id: Mapped[AdapterId] = mapped_column(ForeignKey("adapters.id"))
    number: Mapped[int]
    state: Mapped[str] = mapped_column(String(16))  # accepted or refused, by the gate
    reason: Mapped[str]  # the gate's words
    served_name: Mapped[str] = mapped_column(String(63), unique=True)
    prefix: Mapped[str] = mapped_column(String(1024))  # of the files' keys
    sha256: Mapped[str] = mapped_column(String(64))  # of the manifest, which names every file
    files: Mapped[Facts]  # file name to {"sha256", "size"}, the manifest included
    size: Mapped[int] = mapped_column(BigInteger)  # bytes, all files
    parameters: Mapped[int] = mapped_column(BigInteger)  # trained ones
    recipe: Mapped[Facts]
    recipe_digest: Mapped[str] = mapped_column(String(64))
    code_version: Mapped[str] = mapped_column(String(64))
    base_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("bases.id"))
    dataset_id: Mapped[DatasetId] = mapped_column(ForeignKey("datasets.id"))
    job_id: Mapped[JobId] = mapped_column(ForeignKey("jobs.id"), unique=True)  # the idempotency key
    run_id: Mapped[RunId | None] = mapped_column(ForeignKey("runs.id"))
    tokens: Mapped[int | None] = mapped_column(BigInteger)  # read for it: lessons, examinations, judging
    device_seconds: Mapped[float | None] = mapped_column(Float)  # its share of the cohort's, by tokens
    created_at: Mapped[datetime]


class ProtectedAlias(Base):
    """An alias that moves only when whoever moves it says so: for every adapter of a tenant."""

    __tablename__ = "protected_aliases"

    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    actor: Mapped[str] = mapped_column(String(128))
    reason: Mapped[str]
    at: Mapped[datetime]


class Alias(Base):
    """A movable pointer to a version."""

    __tablename__ = "aliases"

    adapter_id: Mapped[AdapterId] = mapped_column(ForeignKey("adapters.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"), index=True)
    version_id: Mapped[VersionId] = mapped_column(ForeignKey("adapter_versions.id"))


class AliasMove(Base):
    """One move of an alias: from where, to where, who and why.

    One foreign key says all: the version moved to belongs to the adapter and the tenant, and where the alias was is an
    earlier move's.  Four would be two thirds of the time that a fleet's move takes.
    """

    __tablename__ = "alias_moves"
    __table_args__ = (
        Index(None, "adapter_id", "name", "id"),
        Index(None, "tenant_id", "name", "fleet_id", postgresql_where=_OF_FLEETS, sqlite_where=_OF_FLEETS),
    )

    id: Mapped[int] = mapped_column(_COUNTER, primary_key=True, autoincrement=True)
    tenant_id: Mapped[TenantId]
    adapter_id: Mapped[AdapterId]
    name: Mapped[str] = mapped_column(String(63))
    kind: Mapped[str] = mapped_column(String(16))  # moved or rolled back
    from_id: Mapped[VersionId | None]
    to_id: Mapped[VersionId] = mapped_column(ForeignKey("adapter_versions.id"))
    actor: Mapped[str] = mapped_column(String(128))
    reason: Mapped[str]
    at: Mapped[datetime]
    fleet_id: Mapped[int | None] = mapped_column(BigInteger)  # the event of the fleet's move that it was part of


class Job(Base):
    """One request to train: (adapter, dataset, base, recipe), with a state and a lease."""

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("adapter_id", "fingerprint"),
        Index(None, "state", "cohort_group", "created_at"),
        Index(None, "state", "finished_at"),
    )

    id: Mapped[JobId] = mapped_column(primary_key=True, default=uuid.uuid4)
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"), index=True)
    adapter_id: Mapped[AdapterId] = mapped_column(ForeignKey("adapters.id"))
    dataset_id: Mapped[DatasetId] = mapped_column(ForeignKey("datasets.id"))
    base_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("bases.id"))
    recipe: Mapped[Facts]
    recipe_digest: Mapped[str] = mapped_column(String(64))
    fingerprint: Mapped[str] = mapped_column(String(64))  # of dataset, base and recipe: equal work is one job
    cohort_group: Mapped[str] = mapped_column(String(64))  # jobs of equal group can share a cohort
    state: Mapped[str] = mapped_column(String(16))  # queued, running, published, refused, failed
    attempts: Mapped[int] = mapped_column(default=0)
    fence: Mapped[int] = mapped_column(default=0)  # grows with every claim: an earlier holder's commit fails
    worker: Mapped[str | None] = mapped_column(String(128))
    lease_until: Mapped[datetime | None]  # of a queued job: until when it was put off
    error: Mapped[str | None]
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]


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


class Evaluation(Base):
    """How well base, previous version or candidate did on a version's held-out examples."""

    __tablename__ = "evaluations"
    __table_args__ = (UniqueConstraint("version_id", "subject"),)

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"), index=True)
    version_id: Mapped[VersionId] = mapped_column(ForeignKey("adapter_versions.id"))
    subject: Mapped[str] = mapped_column(String(16))  # base, previous, candidate
    metrics: Mapped[Facts]


class Event(Base):
    """What happened, when, to whom: added and never changed."""

    __tablename__ = "events"
    __table_args__ = (Index(None, "tenant_id", "id"),)

    id: Mapped[int] = mapped_column(_COUNTER, primary_key=True, autoincrement=True)
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"))
    kind: Mapped[str] = mapped_column(String(32))
    subject: Mapped[str] = mapped_column(String(64))  # an id
    body: Mapped[Facts]
    at: Mapped[datetime]


class Schedule(Base):
    """When one adapter is to be trained again, and how."""

    __tablename__ = "schedules"

    adapter_id: Mapped[AdapterId] = mapped_column(ForeignKey("adapters.id"), primary_key=True)
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"), index=True)
    timing: Mapped[str] = mapped_column(String(128))  # "cron 0 3 * * *" or "every 3600"
    time_zone: Mapped[str] = mapped_column(String(64))
    paused: Mapped[bool] = mapped_column(default=False)
    base: Mapped[str] = mapped_column(String(512))  # name of the base, as its owner gave it
    recipe: Mapped[Facts]
    next_due_at: Mapped[datetime] = mapped_column(index=True)
    last_fired_at: Mapped[datetime | None]


class Upload(Base):
    """An intent to upload: the sweeper leaves its keys alone while the lease lasts."""

    __tablename__ = "uploads"

    prefix: Mapped[str] = mapped_column(String(1024), primary_key=True)
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"), index=True)
    job_id: Mapped[JobId | None] = mapped_column(ForeignKey("jobs.id"))  # none for a dataset
    sweeping: Mapped[bool] = mapped_column(default=False)  # once set, its owner can no longer commit
    lease_until: Mapped[datetime] = mapped_column(index=True)


@event.listens_for(AdapterVersion, "before_update")
def _versions_are_immutable(mapper: Mapper[AdapterVersion], connection: object, version: AdapterVersion) -> None:
    raise RuntimeError(f"version {version.served_name} is immutable; publish a new one")
