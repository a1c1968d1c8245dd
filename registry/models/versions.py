"""Versions, which are added and never rewritten, and what points to them."""

import uuid
from datetime import datetime

from sqlalchemy import (
    BigInteger,
    Float,
    ForeignKey,
    Index,
    PrimaryKeyConstraint,
    String,
    UniqueConstraint,
    event,
    text,
)
from sqlalchemy.orm import Mapped, Mapper, mapped_column

from registry.models.base import COUNTER, Base, Facts
from registry.names import AdapterId, DatasetId, JobId, RunId, TenantId, VersionId

_OF_FLEETS = text("fleet_id IS NOT NULL")


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
    """A movable pointer to a version, with a copy of what the versions at an alias are sorted and searched by.

    Versions are immutable: a copy can only be wrong if a move forgets it.
    """

    __tablename__ = "aliases"
    __table_args__ = (
        PrimaryKeyConstraint("adapter_id", "name", postgresql_include=["tenant_id", "version_id"]),
        Index(None, "tenant_id", "name", "created_at", "version_id", "base_id"),
        Index(None, "tenant_id", "name", "gain", "version_id", "base_id"),
        Index(None, "tenant_id", "name", "loss", "version_id", "base_id"),
    )

    adapter_id: Mapped[AdapterId] = mapped_column(ForeignKey("adapters.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"))
    version_id: Mapped[VersionId] = mapped_column(ForeignKey("adapter_versions.id"), index=True)
    base_id: Mapped[uuid.UUID | None]  # this and what follows: the version's
    created_at: Mapped[datetime | None]
    gain: Mapped[float | None]
    loss: Mapped[float | None]


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

    id: Mapped[int] = mapped_column(COUNTER, primary_key=True, autoincrement=True)
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


class Evaluation(Base):
    """How well base, previous version or candidate did on a version's held-out examples."""

    __tablename__ = "evaluations"
    __table_args__ = (UniqueConstraint("version_id", "subject"),)

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"), index=True)
    version_id: Mapped[VersionId] = mapped_column(ForeignKey("adapter_versions.id"))
    subject: Mapped[str] = mapped_column(String(16))  # base, previous, candidate
    metrics: Mapped[Facts]


@event.listens_for(AdapterVersion, "before_update")
def _versions_are_immutable(mapper: Mapper[AdapterVersion], connection: object, version: AdapterVersion) -> None:
    raise RuntimeError(f"version {version.served_name} is immutable; publish a new one")
