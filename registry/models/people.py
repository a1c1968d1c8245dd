"""Whose adapters there are, of which base, and from which data."""

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

from registry.models.base import Base
from registry.names import AdapterId, DatasetId, TenantId, UserId

_NEWER_DATA, _SAME_DATA = text("newest_id IS DISTINCT FROM dataset_id"), text("newest_id = dataset_id")


class Tenant(Base):
    """An organisation: the isolation boundary."""

    __tablename__ = "tenants"

    id: Mapped[TenantId] = mapped_column(primary_key=True, default=uuid.uuid4)
    name: Mapped[str] = mapped_column(String(63), unique=True)
    created_at: Mapped[datetime]


class User(Base):
    """A person inside a tenant, named by the tenant's own id."""

    __tablename__ = "users"
    __table_args__ = (UniqueConstraint("tenant_id", "name", postgresql_include=["id"]),)

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
    __table_args__ = (
        UniqueConstraint("user_id", "name", postgresql_include=["id", "tenant_id"]),
        Index(None, "tenant_id", "user_id"),
    )

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
