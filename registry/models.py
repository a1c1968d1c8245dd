"""The registry's tables.  Every row that belongs to a tenant says so; versions are added and never rewritten."""

import uuid
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    FetchedValue,
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
_UNFINISHED = text("finished_at IS NULL")
_NEWER_DATA, _SAME_DATA = text("newest_id IS DISTINCT FROM dataset_id"), text("newest_id = dataset_id")


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
    removed_at: Mapped[datetime | None]  # since when its bytes are gone, or going: nothing living needs them


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


class Freshness(Base):
    """What an adapter's `latest` was trained from, and its user's newest data: a copy, so that one question is quick.

    Each row is in one of the two indexes: with newer data, or by base and recipe; none without any data.
    """

    __tablename__ = "freshness"
    __table_args__ = (
        Index(
            None,
            "tenant_id",
            "adapter_id",
            postgresql_where=_NEWER_DATA,
            sqlite_where=text("newest_id IS NOT dataset_id"),
        ),
        Index(
            None,
            "tenant_id",
            "base_id",
            "recipe_digest",
            "adapter_id",
            postgresql_where=_SAME_DATA,
            sqlite_where=_SAME_DATA,
        ),
    )

    adapter_id: Mapped[AdapterId] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True)
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"))
    newest_id: Mapped[DatasetId | None]  # the dataset that was added last
    dataset_id: Mapped[DatasetId | None]  # of `latest`, as the next two; none before the first accepted version
    base_id: Mapped[uuid.UUID | None]
    recipe_digest: Mapped[str | None] = mapped_column(String(64))


class AdapterVersion(Base):
    """One immutable set of weights: rows are added, never rewritten."""

    __tablename__ = "adapter_versions"
    __table_args__ = (
        UniqueConstraint("adapter_id", "number"),
        Index(None, "tenant_id", "created_at", "id"),
        Index(None, "tenant_id", "base_id", "created_at", "id"),
        Index(None, "tenant_id", "gain", "id"),
        Index(None, "tenant_id", "loss", "id"),
    )

    id: Mapped[VersionId] = mapped_column(primary_key=True, default=uuid.uuid4)
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"))
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
    loss: Mapped[float | None]  # on the user's held-out examples; scores as a whole are evaluations
    gain: Mapped[float | None]  # how far that is below the base's on the same examples
    base_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("bases.id"))
    dataset_id: Mapped[DatasetId] = mapped_column(ForeignKey("datasets.id"), index=True)
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
    __table_args__ = (Index(None, "tenant_id", "name", "adapter_id"),)

    adapter_id: Mapped[AdapterId] = mapped_column(ForeignKey("adapters.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"))
    version_id: Mapped[VersionId] = mapped_column(ForeignKey("adapter_versions.id"), index=True)


class AliasMove(Base):
    """One move of an alias: from where, to where, who and why.

    One foreign key says all: the version moved to belongs to the adapter and the tenant, and where the alias was is an
    earlier move's.  Four would be two thirds of the time that a fleet's move takes.
    """

    __tablename__ = "alias_moves"
    __table_args__ = (
        Index(None, "adapter_id", "name", "id"),
        Index(None, "tenant_id", "name", "fleet_id", "id", postgresql_where=_OF_FLEETS, sqlite_where=_OF_FLEETS),
    )

    id: Mapped[int] = mapped_column(_COUNTER, primary_key=True, autoincrement=True)
    tenant_id: Mapped[TenantId]
    adapter_id: Mapped[AdapterId]
    name: Mapped[str] = mapped_column(String(63))
    kind: Mapped[str] = mapped_column(String(16))  # moved or rolled back
    from_id: Mapped[VersionId | None]
    to_id: Mapped[VersionId] = mapped_column(ForeignKey("adapter_versions.id"), index=True)
    actor: Mapped[str] = mapped_column(String(128))
    reason: Mapped[str]
    at: Mapped[datetime]
    fleet_id: Mapped[int | None] = mapped_column(BigInteger)  # the event of the fleet's move that it was part of


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
    attempts: Mapped[int] = mapped_column(default=0)
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
    __table_args__ = (Index(None, "tenant_id", "txid", "id"),)

    id: Mapped[int] = mapped_column(_COUNTER, primary_key=True, autoincrement=True)
    # PostgreSQL's number of its transaction, 0 on SQLite: by it a reader knows that none is to come in front of it
    txid: Mapped[int] = mapped_column(BigInteger, server_default=FetchedValue())
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


class RetentionPolicy(Base):
    """What a tenant keeps of each adapter; a tenant without one keeps everything."""

    __tablename__ = "retention_policies"

    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    newest: Mapped[int | None]  # so many versions of the highest numbers
    days: Mapped[int | None]  # and those that are younger
    actor: Mapped[str] = mapped_column(String(128))
    reason: Mapped[str]
    at: Mapped[datetime]
    collected_at: Mapped[datetime | None]  # when upkeep last looked


class Pin(Base):
    """A version that retention keeps, whatever the policy says."""

    __tablename__ = "pins"

    version_id: Mapped[VersionId] = mapped_column(ForeignKey("adapter_versions.id"), primary_key=True)
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"), index=True)
    actor: Mapped[str] = mapped_column(String(128))
    reason: Mapped[str]
    at: Mapped[datetime]


class Hold(Base):
    """A legal hold on one user, or (no user) on a whole tenant: nothing of theirs is collected or forgotten."""

    __tablename__ = "holds"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"), index=True)
    user_id: Mapped[UserId | None] = mapped_column(ForeignKey("users.id"))
    actor: Mapped[str] = mapped_column(String(128))
    reason: Mapped[str]
    at: Mapped[datetime]


class Tombstone(Base):
    """A version whose bytes retention has removed: its row stays, so that numbers have no gaps."""

    __tablename__ = "tombstones"

    version_id: Mapped[VersionId] = mapped_column(ForeignKey("adapter_versions.id"), primary_key=True)
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"), index=True)
    reason: Mapped[str]  # the rule that it fell under
    at: Mapped[datetime]
    cleared_at: Mapped[datetime | None]  # none while there may be bytes


class Forgetting(Base):
    """A user who is to be forgotten, and once that is done the receipt: then it holds nothing of theirs.

    `person` is a keyed digest of the user's name: it answers whether somebody was forgotten, and tells no name.
    """

    __tablename__ = "forgettings"
    __table_args__ = (Index(None, "tenant_id", "person"),)

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"))
    person: Mapped[str] = mapped_column(String(64))
    user_id: Mapped[UserId | None]  # while it is under way
    prefix: Mapped[str | None] = mapped_column(String(1024))  # of the user's objects, while it is under way
    actor: Mapped[str] = mapped_column(String(128))
    reason: Mapped[str]
    begun_at: Mapped[datetime]
    deleted: Mapped[Facts]  # by kind: how many, and bytes where there are any
    finished_at: Mapped[datetime | None]


@event.listens_for(AdapterVersion, "before_update")
def _versions_are_immutable(mapper: Mapper[AdapterVersion], connection: object, version: AdapterVersion) -> None:
    raise RuntimeError(f"version {version.served_name} is immutable; publish a new one")
