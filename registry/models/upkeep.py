"""What happened, what is kept, and who is forgotten."""

import uuid
from datetime import datetime

from sqlalchemy import (
    BigInteger,
    FetchedValue,
    ForeignKey,
    Index,
    String,
)
from sqlalchemy.orm import Mapped, mapped_column

from registry.models.base import COUNTER, Base, Facts
from registry.names import TenantId, UserId, VersionId


class Event(Base):
    """What happened, when, to whom: added and never changed."""

    __tablename__ = "events"
    __table_args__ = (Index(None, "tenant_id", "txid", "id"),)

    id: Mapped[int] = mapped_column(COUNTER, primary_key=True, autoincrement=True)
    # PostgreSQL's number of its transaction, 0 on SQLite: by it a reader knows that none is to come in front of it
    txid: Mapped[int] = mapped_column(BigInteger, server_default=FetchedValue())
    tenant_id: Mapped[TenantId] = mapped_column(ForeignKey("tenants.id"))
    kind: Mapped[str] = mapped_column(String(32))
    subject: Mapped[str] = mapped_column(String(64))  # an id
    body: Mapped[Facts]
    at: Mapped[datetime]


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
