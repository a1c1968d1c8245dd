"""How much of a user's newest data is new since it was trained on: what schedules with conditions ask for."""

from collections import Counter
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from registry.models import Adapter, Dataset, Job
from registry.names import AdapterId, TenantId
from registry.orders import GIVEN_UP
from registry.session import reading
from registry.store import ObjectStore
from registry.tenancy import enter


@dataclass(frozen=True)
class Growth:
    """What the newest dataset has that the one asked for last has not."""

    pair: tuple[str, str]  # digests of both; empty where there is none
    examples: int
    size: int  # bytes


def pair_of(session: Session, tenant: TenantId, adapter: AdapterId) -> tuple[Dataset | None, Dataset | None]:
    """A user's newest dataset, and the one that the adapter's last job was made for, unless it was given up."""
    enter(session, tenant)
    newest = (
        select(Dataset)
        .join(Adapter, Adapter.user_id == Dataset.user_id)
        .where(Dataset.tenant_id == tenant, Adapter.id == adapter)
        .order_by(Dataset.added_at.desc(), Dataset.digest)
    )
    trained = (
        select(Dataset)
        .join(Job, Job.dataset_id == Dataset.id)
        .where(Job.tenant_id == tenant, Job.adapter_id == adapter, Job.state.not_in(GIVEN_UP))
        .order_by(Job.created_at.desc(), Job.id)
    )
    return session.scalar(newest.limit(1)), session.scalar(trained.limit(1))


def digests(pair: tuple[Dataset | None, Dataset | None]) -> tuple[str, str]:
    """What names a pair: as long as it is the same, so is the growth."""
    newest, trained = pair
    return newest.digest if newest else "", trained.digest if trained else ""


def growth(engine: Engine, store: ObjectStore, tenant: TenantId, adapter: AdapterId) -> Growth:
    """Compare a user's newest data with what was trained on last, example by example.  Raises StoreError.

    Examples are lines of canonical JSON, so equal ones are equal bytes; one that moved is not new.  Beside data that
    retention has removed every one is.
    """
    with reading(engine) as session:
        newest, trained = pair = pair_of(session, tenant, adapter)
    if newest is None or digests(pair)[0] == digests(pair)[1]:
        return Growth(digests(pair), 0, 0)
    new = Counter(store.get(newest.key).splitlines())
    if trained and trained.removed_at is None:
        new -= Counter(store.get(trained.key).splitlines())
    return Growth(digests(pair), new.total(), sum(len(line) * count for line, count in new.items()))
