"""Publish: bytes first, row second.  A version exists when its row is committed, and only then.

intent row with a lease -> signature (where a key is set) and files under an immutable, content-named prefix, the
manifest last -> one transaction: fence, head, version, scores, alias, event, job.  A crash anywhere leaves at most an
intent, which the sweep in `uploads.py` clears.
"""

import hashlib
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from sqlalchemy import Insert, Update, insert, select, update
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from registry import aliases, uploads
from registry.errors import ContentDiffers, LeaseLost, ObjectDiffers
from registry.jobs import ClaimedJob, check_fence, close
from registry.keys import MANIFEST, version_prefix
from registry.models import Adapter, AdapterVersion, Evaluation, Facts, Job
from registry.names import LATEST, RunId, VersionId, check_file
from registry.protection import is_protected
from registry.queries import noted
from registry.session import at_once, reading, transaction
from registry.signing import SIGNATURE, Signer
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


def publish(
    engine: Engine, store: ObjectStore, job: ClaimedJob, finished: Finished, now: datetime, signer: Signer | None = None
) -> Published:
    """Make a job's files a version, once: the job is the idempotency key, and the manifest says which files.

    Raises LeaseLost when somebody else has the job, ContentDiffers when it published other files before.
    """
    digest, prefix = place(job, finished)
    with transaction(engine) as session:
        if done := _already(session, job, digest):
            return done
        _declare(session, job, prefix, now)
    if signer:
        finished = replace(finished, files=signed(store, prefix, finished.files, signer))
    upload(store, prefix, finished.files)
    try:
        with transaction(engine) as session:
            return _commit(session, job, finished, digest, prefix, now)
    except LeaseLost:  # perhaps since it was published meanwhile, by a call whose answer was lost
        with reading(engine) as session:
            if done := _already(session, job, digest):
                return done
        raise


def declare(engine: Engine, job: ClaimedJob, digest: str, now: datetime) -> str:
    """Write down the intent to upload; returns the prefix.

    Raises LeaseLost when the job is not ours any more, and once the sweeper has begun on the upload.
    """
    prefix = _prefix(job, digest)
    with transaction(engine) as session:
        _declare(session, job, prefix, now)
    return prefix


def _declare(session: Session, job: ClaimedJob, prefix: str, now: datetime) -> None:
    check_fence(session, job)  # nothing of a user who is forgotten meanwhile may come into the store
    if not uploads.declare(session, job.tenant_id, prefix, now, job.id):
        raise LeaseLost(str(job.id), job.fence)


def place(job: ClaimedJob, finished: Finished) -> tuple[str, str]:
    """The digest that names what a job came to, and the prefix under which it goes."""
    digest = hashlib.sha256(finished.files[MANIFEST]).hexdigest()
    return digest, _prefix(job, digest)


def upload(store: ObjectStore, prefix: str, files: Mapping[str, bytes]) -> None:
    """Every file under its immutable key, the manifest last: a prefix with a manifest is whole."""
    for name in sorted(files, key=lambda name: (name == MANIFEST, name)):
        store.put_new(f"{prefix}/{check_file(name)}", files[name])


def signed(store: ObjectStore, prefix: str, files: Mapping[str, bytes], signer: Signer) -> Mapping[str, bytes]:
    """The files with their signature, which is under its key already: an earlier try of this attempt keeps its own.

    No two signatures of equal files are equal bytes, so no digest that names anything covers them; the row names them.
    """
    name, key = prefix.rpartition("/")[2], f"{prefix}/{SIGNATURE}"
    whole = {**files, SIGNATURE: signer.sign(name, files)}
    try:
        store.put_new(key, whole[SIGNATURE])
    except ObjectDiffers:
        whole[SIGNATURE] = store.get(key)
        signer.check(name, whole)
    return whole


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
    """The one transaction that makes the version exist.

    The adapter's row lock makes its publishers wait in line, so that numbers have no gaps; what can be done before it
    is taken comes before, and what needs it in as few steps as the database can take.
    """
    asked_at = close(session, job, "published" if finished.accepted else "refused", now)
    if not uploads.settle(session, job.tenant_id, prefix):
        raise LeaseLost(str(job.id), job.fence)
    moves = finished.accepted and not is_protected(session, job.tenant_id, LATEST)
    head = update(Adapter).where(Adapter.tenant_id == job.tenant_id, Adapter.id == job.adapter_id)
    bumped = head.values(head=Adapter.head + 1).returning(Adapter.head)
    number = session.connection().scalars(bumped).one()
    version = version_row(job, finished, digest, prefix, number, now)
    writes: list[Insert | Update] = [_insert(version), *_scores(version, finished)]
    if moves:
        live = session.connection().scalar(aliases.locked(job.tenant_id, job.adapter_id, LATEST))
        if live is None or not overtaken(session, job, live, asked_at):
            writes += aliases.move_to(version, live, LATEST, actor="gate", reason=finished.reason, now=now)
    body = told(number, finished, now - asked_at)
    at_once(session, [*writes, noted(job.tenant_id, "version published", version.id, body, now)])
    return as_published(version)


def _scores(version: AdapterVersion, finished: Finished) -> list[Insert]:
    return [
        insert(Evaluation).values(
            id=uuid.uuid4(), tenant_id=version.tenant_id, version_id=version.id, subject=subject, metrics=dict(metrics)
        )
        for subject, metrics in finished.scores.items()
    ]


def overtaken(session: Session, job: ClaimedJob, live: VersionId, asked_at: datetime) -> bool:
    """Whether the live version was asked for later: an older request that took longer leaves `latest` to it."""
    mine = (Job.tenant_id == job.tenant_id, AdapterVersion.id == live)
    asked = select(Job.created_at).where(*mine).join(AdapterVersion, AdapterVersion.job_id == Job.id)
    return session.connection().scalars(asked).one() > asked_at


def told(number: int, finished: Finished, took: timedelta) -> Facts:
    """What the event of a version says, which took so long from being asked for."""
    return {
        "number": number, "accepted": finished.accepted, "reason": finished.reason, "tokens": finished.tokens,
        "device_seconds": finished.device_seconds, "seconds": took.total_seconds(),
    }  # fmt: skip


def version_row(
    job: ClaimedJob, finished: Finished, digest: str, prefix: str, number: int, now: datetime
) -> AdapterVersion:
    """The row of a version to be."""
    loss, base = (_loss(finished.scores.get(subject)) for subject in ("candidate", "base"))
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
        loss=loss, gain=None if loss is None or base is None else base - loss,
        base_id=job.base_id, dataset_id=job.dataset_id, job_id=job.id, run_id=finished.run_id, created_at=now,
        tokens=finished.tokens, device_seconds=finished.device_seconds,
    )  # fmt: skip


def _loss(scores: Facts | None) -> float | None:
    """A loss that can be sorted by; None where there is none, or one that is no number."""
    value = scores.get("loss") if scores else None
    return value if isinstance(value, float | int) and math.isfinite(value) else None


def _insert(version: AdapterVersion) -> Insert:
    """A version's row as a statement."""
    columns = AdapterVersion.__mapper__.columns
    return insert(AdapterVersion).values({column.key: getattr(version, column.key) for column in columns})


def as_published(version: AdapterVersion) -> Published:
    """A row as others see it."""
    return Published(
        version.id, version.number, version.state == "accepted", version.served_name, version.prefix,
        version.sha256, version.size,
    )  # fmt: skip
