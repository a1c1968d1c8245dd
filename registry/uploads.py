"""Intents to upload: what is on its way into the store under a lease, and the sweep of what never came to a row.

declare -> objects below the prefix -> settle, in the transaction that adds the row which names them.  A crash anywhere
leaves at most an intent and some objects, which the sweep clears.  What a row names, it never touches, but for data
that retention has removed; that waits while its user is under hold.
"""

from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from functools import partial

from sqlalchemy import delete, select
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from registry.errors import RegistryError
from registry.holds import held, keep_holds
from registry.models import AdapterVersion, Dataset, Job, Upload, User
from registry.names import JobId, TenantId
from registry.session import adding, transaction
from registry.store import ObjectStore
from registry.tenancy import Across, across, enter

UPLOAD_LEASE = timedelta(minutes=15)


def declare(session: Session, tenant: TenantId, prefix: str, now: datetime, job: JobId | None = None) -> bool:
    """Write down the intent to upload below a prefix, or renew it; False once the sweeper has begun on it."""
    return not declare_many(session, tenant, {prefix: job}, now)


def declare_many(session: Session, tenant: TenantId, intents: Mapping[str, JobId | None], now: datetime) -> set[str]:
    """The same for many, each for its job; returns those that the sweeper has begun on."""
    if not intents:
        return set()
    until = now + UPLOAD_LEASE
    made = adding(session, Upload)
    kept = made.on_conflict_do_update(index_elements=["prefix"], set_={"lease_until": until})
    rows = [
        {"prefix": prefix, "tenant_id": tenant, "job_id": job, "sweeping": False, "lease_until": until}
        for prefix, job in sorted(intents.items())
    ]  # fmt: skip
    found = session.connection().execute(kept.returning(Upload.prefix, Upload.sweeping), rows).tuples()
    return {prefix for prefix, sweeping in found if sweeping}


def settle(session: Session, tenant: TenantId, prefix: str) -> bool:
    """End an intent in the transaction that adds the row which names its objects; False once it has been swept."""
    return prefix in settle_many(session, tenant, [prefix])


def settle_many(session: Session, tenant: TenantId, prefixes: Collection[str]) -> set[str]:
    """The same for many; returns those that have not been swept."""
    mine = (Upload.tenant_id == tenant, Upload.prefix.in_(prefixes), Upload.sweeping.is_(False))
    return set(session.connection().scalars(delete(Upload).where(*mine).returning(Upload.prefix)))


def sweep(engine: Engine, store: ObjectStore, now: datetime) -> list[str]:
    """Clear the uploads whose lease has run out and that never came to a row; returns their prefixes.

    An intent is marked first: from then on its owner, however slow, can no longer commit.  The mark stays until a
    later sweep, a lease on, finds nothing more: what a slow owner still uploads is cleared too.  A prefix that cannot
    be cleared does not hold up the others; the trouble is raised at the end.
    """
    with transaction(engine) as session, across(session, Across.SWEEP):
        over = select(Upload).where(Upload.lease_until < now).with_for_update(skip_locked=True).order_by(Upload.prefix)
        intents = session.scalars(over).all()
        found = {intent.prefix: intent.sweeping for intent in intents if not _is_progress(intent)}
        progress = [intent.prefix for intent in intents if _is_progress(intent)]
        for intent in intents:  # one by one: a statement takes only so many parameters
            intent.sweeping = intent.sweeping or intent.prefix in found
    cleared, trouble = [], None
    due = [partial(clear, prefix=prefix, marked_before=marked_before) for prefix, marked_before in found.items()]
    due += [partial(_clear_progress, prefix=prefix) for prefix in progress]
    for one in due:
        try:
            if one(engine, store, now=now):
                cleared.append(one.keywords["prefix"])
        except RegistryError as error:
            trouble = error
    if trouble:
        raise trouble
    return cleared


def clear(engine: Engine, store: ObjectStore, prefix: str, marked_before: bool, now: datetime) -> bool:
    """Clear one marked prefix under its row's lock, so that no second sweeper is at it; whether there was anything.

    What is under hold is looked at again a lease later.
    """
    with transaction(engine) as session, across(session, Across.SWEEP):
        due = (Upload.prefix == prefix, Upload.sweeping, Upload.lease_until <= now)
        intent = session.scalar(select(Upload).where(*due).with_for_update(skip_locked=True))
        if intent is None:
            return False
        enter(session, intent.tenant_id)
        # An intent that was declared again while its commit was under way (its answer was lost) outlives the commit.
        named = _is_a_version(session, intent)
        if not named and _is_held(session, intent):
            intent.lease_until = now + UPLOAD_LEASE
            return False
        cleared = 0 if named else store.clear(prefix)
        if named or (marked_before and not cleared):
            session.delete(intent)
        else:
            intent.lease_until = now + UPLOAD_LEASE
    return bool(cleared)


def _clear_progress(engine: Engine, store: ObjectStore, prefix: str, now: datetime) -> bool:
    """Clear the progress of a job that is over; of one that is not, it is left for who takes the job next."""
    with transaction(engine) as session:
        with across(session, Across.SWEEP):
            due = (Upload.prefix == prefix, Upload.lease_until < now)
            intent = session.scalar(select(Upload).where(*due).with_for_update(skip_locked=True))
        if intent is None:
            return False
        enter(session, intent.tenant_id)
        state = session.scalar(select(Job.state).where(Job.tenant_id == intent.tenant_id, Job.id == intent.job_id))
        if state in ("queued", "running"):
            intent.lease_until = now + UPLOAD_LEASE
            return False
        store.clear(prefix)
        session.delete(intent)
    return True


def _is_progress(intent: Upload) -> bool:
    return intent.prefix.endswith(f"/progress/{intent.job_id}")


def _is_a_version(session: Session, intent: Upload) -> bool:
    name = intent.prefix.rpartition("/")[2]
    rows = select(AdapterVersion.id).where(
        AdapterVersion.tenant_id == intent.tenant_id,
        AdapterVersion.served_name == name,
        AdapterVersion.prefix == intent.prefix,
    )
    return session.scalar(rows) is not None


def _is_held(session: Session, intent: Upload) -> bool:
    """Whether it is data that retention has removed and whose user is under hold since.

    No hold is put on them before the transaction ends.
    """
    if intent.job_id is not None:
        return False
    keep_holds(session, intent.tenant_id)
    below = Dataset.key.startswith(f"{intent.prefix}/", autoescape=True)
    theirs = User.opaque.in_(intent.prefix.split("/"))  # one part of it stands for the user
    rows = select(Dataset.id).join(User, User.id == Dataset.user_id).where(Dataset.tenant_id == intent.tenant_id)
    return session.scalar(rows.where(theirs, below, held())) is not None
