"""What all tables share: moments with a zone, names of constraints, the types of ids."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Integer,
    MetaData,
    TypeDecorator,
    Uuid,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase

from registry.names import AdapterId, DatasetId, JobId, RunId, TenantId, UserId, VersionId

Facts = dict[str, Any]  # JSON whose shape another module owns: a recipe, scores, the body of an event

COUNTER = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts by itself only in its INTEGER


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
