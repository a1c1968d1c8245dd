"""Publish: bytes first, row second.  A version exists when its row is committed, and only then.

intent row with a lease -> files under an immutable, content-named prefix, the manifest last -> one transaction: fence,
head, version, scores, alias, event, job.  A crash anywhere leaves at most an intent, which the sweep in `uploads.py`
clears.
"""

import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import select, update
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session, aliased

from registry import aliases, uploads
from registry.errors import ContentDiffers, LeaseLost
from registry.jobs import ClaimedJob, close
from registry.keys import MANIFEST, version_prefix
from registry.models import Adapter, AdapterVersion, Alias, Evaluation, Facts, Job
from registry.names import LATEST, RunId, VersionId, check_file
from registry.protection import is_protected
from registry.queries import note
from registry.session import reading, transaction
from registry.store import ObjectStore
from registry.tenancy import enter


@dataclass(frozen=True)
class Finished:
    """What a job came to: files with the manifest among them, the gate's verdict, scores by subject."""

    files: Mapping[str, bytes]
    accepted: bool
    reason: str
    parameters: int
    scores: Mapping[str, Facts]
    run_id: RunId | None
    code_version: str
    tokens: int | None = None  # read for it
    device_seconds: float | None = None  # its share of what the cohort took


@dataclass(frozen=True)
class Published:
    """A version as it stands in the registry."""

    id: VersionId
    number: int
    accepted: bool
    served_name: str
    prefix: str
    sha256: str
    size: int


def publish(engine: Engine, store: ObjectStore, job: ClaimedJob, finished: Finished, now: datetime) -> Published:
    """Make a job's files a version, once: the job is the idempotency key.

    Raises LeaseLost when somebody else has the job, ContentDiffers when it published other files before.
    """
    digest, _ = place(job, finished)
    with reading(engine) as session:
        done = _already(session, job, digest)
    if done:
        return done
    prefix = declare(engine, job, digest, now)
    upload(store, prefix, finished.files)
    with transaction(engine) as session:
        return _already(session, job, digest) or _commit(session, job, finished, digest, prefix, now)


def declare(engine: Engine, job: ClaimedJob, digest: str, now: datetime) -> str:
    """Write down the intent to upload; returns the prefix.  Raises LeaseLost once the sweeper has begun on it."""
    prefix = _prefix(job, digest)
    with transaction(engine) as session:
        enter(session, job.tenant_id)
        if not uploads.declare(session, job.tenant_id, prefix, now, job.id):
            raise LeaseLost(str(job.id), job.fence)
    return prefix


def place(job: ClaimedJob, finished: Finished) -> tuple[str, str]:
    """The digest that names what a job came to, and the prefix under which it goes."""
    digest = hashlib.sha256(finished.files[MANIFEST]).hexdigest()
    return digest, _prefix(job, digest)


def upload(store: ObjectStore, prefix: str, files: Mapping[str, bytes]) -> None:
    """Every file under its immutable key, the manifest last: a prefix with a manifest is whole."""
    for name in sorted(files, key=lambda name: (name == MANIFEST, name)):
        store.put_new(f"{prefix}/{check_file(name)}", files[name])


def served_name(job: ClaimedJob, digest: str) -> str:
    """The name an engine serves the version under: never used twice, since engines cache by name.

    The fence is part of it, so that a second attempt's upload has nothing to do with what the first one left.
    """
    nonce = hashlib.sha256(f"{job.id}/{job.fence}/{digest}".encode()).hexdigest()
    return f"{job.reference.adapter}-{nonce[:20]}"


def _prefix(job: ClaimedJob, digest: str) -> str:
    return version_prefix(job.reference.tenant, job.opaque, job.reference.adapter, served_name(job, digest))


def _already(session: Session, job: ClaimedJob, digest: str) -> Published | None:
    """The version this job published before, if it did.

    Raises ContentDiffers for other files, LeaseLost where another worker's were sooner.
    """
    enter(session, job.tenant_id)
    mine = (AdapterVersion.tenant_id == job.tenant_id, AdapterVersion.job_id == job.id)
    version = session.scalar(select(AdapterVersion).where(*mine))
    if version and version.sha256 != digest:
        if session.scalar(select(Job.fence).where(Job.tenant_id == job.tenant_id, Job.id == job.id)) != job.fence:
            raise LeaseLost(str(job.id), job.fence)
        raise ContentDiffers(str(job.id), version.number)
    return as_published(version) if version else None


def _commit(
    session: Session, job: ClaimedJob, finished: Finished, digest: str, prefix: str, now: datetime
) -> Published:
    """The one transaction that makes the version exist."""
    close(session, job, "published" if finished.accepted else "refused", now)
    if not uploads.settle(session, job.tenant_id, prefix):
        raise LeaseLost(str(job.id), job.fence)
    # The row lock that this takes makes publishers of one adapter wait in line: numbers have no gaps.
    head = update(Adapter).where(Adapter.tenant_id == job.tenant_id, Adapter.id == job.adapter_id)
    number = session.scalars(head.values(head=Adapter.head + 1).returning(Adapter.head)).one()
    version = version_row(job, finished, digest, prefix, number, now)
    session.add(version)
    session.flush()
    for subject, metrics in finished.scores.items():
        session.add(Evaluation(tenant_id=job.tenant_id, version_id=version.id, subject=subject, metrics=dict(metrics)))
    if finished.accepted and not overtaken(session, job) and not is_protected(session, job.tenant_id, LATEST):
        aliases.move(session, job.tenant_id, version, LATEST, actor="gate", reason=finished.reason, now=now)
    asked_at = session.scalars(select(Job.created_at).where(Job.tenant_id == job.tenant_id, Job.id == job.id)).one()
    note(session, job.tenant_id, "version published", version.id, told(number, finished, now - asked_at), now)
    return as_published(version)


def told(number: int, finished: Finished, took: timedelta) -> Facts:
    """What the event of a version says, which took so long from being asked for."""
    return {
        "number": number, "accepted": finished.accepted, "reason": finished.reason, "tokens": finished.tokens,
        "device_seconds": finished.device_seconds, "seconds": took.total_seconds(),
    }  # fmt: skip


def overtaken(session: Session, job: ClaimedJob) -> bool:
    """Whether `latest` points to a version that was asked for later: an older request that took longer leaves it."""
    live, mine = aliased(Job), aliased(Job)
    later = (
        select(live.id)
        .join(AdapterVersion, AdapterVersion.job_id == live.id)
        .join(Alias, Alias.version_id == AdapterVersion.id)
        .join(mine, mine.id == job.id)
        .where(Alias.tenant_id == job.tenant_id, Alias.adapter_id == job.adapter_id, Alias.name == LATEST)
        .where(live.created_at > mine.created_at)
    )
    return session.scalar(later) is not None


def version_row(
    job: ClaimedJob, finished: Finished, digest: str, prefix: str, number: int, now: datetime
) -> AdapterVersion:
    """The row of a version to be."""
    files = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        for name, data in sorted(finished.files.items())
    }
    return AdapterVersion(
        id=VersionId(uuid.uuid4()), tenant_id=job.tenant_id, adapter_id=job.adapter_id, number=number,
        state="accepted" if finished.accepted else "refused", reason=finished.reason,
        served_name=prefix.rpartition("/")[2], prefix=prefix, sha256=digest, files=files,
        size=sum(len(data) for data in finished.files.values()), parameters=finished.parameters,
        recipe=job.recipe, recipe_digest=job.recipe_digest, code_version=finished.code_version,
        base_id=job.base_id, dataset_id=job.dataset_id, job_id=job.id, run_id=finished.run_id, created_at=now,
        tokens=finished.tokens, device_seconds=finished.device_seconds,
    )  # fmt: skip


def as_published(version: AdapterVersion) -> Published:
    """A row as others see it."""
    return Published(
        version.id, version.number, version.state == "accepted", version.served_name, version.prefix,
        version.sha256, version.size,
    )  # fmt: skip
