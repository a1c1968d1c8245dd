"""What goes on its way to become a version: a job's files, the name they go under, and the row that they will have."""

import hashlib
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from registry.jobs import ClaimedJob
from registry.keys import MANIFEST, version_prefix
from registry.models import Facts
from registry.names import RunId, VersionId


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


@dataclass(frozen=True, eq=False)
class Parcel:
    """One publisher's job on its way.  Two of one job are two: each is told what became of it."""

    job: ClaimedJob
    finished: Finished
    digest: str  # of the manifest
    prefix: str
    now: datetime
    row: Facts = field(default_factory=dict)  # all of the version's but its number, once the files are in the store


def addressed(job: ClaimedJob, finished: Finished, now: datetime) -> Parcel:
    """A job's files with the place they go to."""
    return Parcel(job, finished, *place(job, finished), now)


def place(job: ClaimedJob, finished: Finished) -> tuple[str, str]:
    """The digest that names what a job came to, and the prefix under which it goes."""
    digest = hashlib.sha256(finished.files[MANIFEST]).hexdigest()
    return digest, prefix_of(job, digest)


def prefix_of(job: ClaimedJob, digest: str) -> str:
    """Where the files of that manifest go, if they are this attempt's."""
    return version_prefix(job.reference.tenant, job.opaque, job.reference.adapter, served_name(job, digest))


def served_name(job: ClaimedJob, digest: str) -> str:
    """The name an engine serves the version under: never used twice, since engines cache by name.

    The fence is part of it, so that a second attempt's upload has nothing to do with what the first one left.
    """
    nonce = hashlib.sha256(f"{job.id}/{job.fence}/{digest}".encode()).hexdigest()
    return f"{job.reference.adapter}-{nonce[:20]}"


def row_of(parcel: Parcel) -> Facts:
    """The row of a version to be, without its number.  It reads every byte: before anything is locked."""
    job, finished = parcel.job, parcel.finished
    loss, base = (_loss(finished.scores.get(subject)) for subject in ("candidate", "base"))
    files = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        for name, data in sorted(finished.files.items())
    }
    return {
        "id": VersionId(uuid.uuid4()), "tenant_id": job.tenant_id, "adapter_id": job.adapter_id,
        "state": "accepted" if finished.accepted else "refused", "reason": finished.reason,
        "served_name": parcel.prefix.rpartition("/")[2], "prefix": parcel.prefix, "sha256": parcel.digest,
        "files": files, "size": sum(len(data) for data in finished.files.values()),
        "parameters": finished.parameters, "recipe": job.recipe, "recipe_digest": job.recipe_digest,
        "code_version": finished.code_version, "loss": loss,
        "gain": None if loss is None or base is None else base - loss, "base_id": job.base_id,
        "dataset_id": job.dataset_id, "job_id": job.id, "run_id": finished.run_id, "created_at": parcel.now,
        "tokens": finished.tokens, "device_seconds": finished.device_seconds,
    }  # fmt: skip


def _loss(scores: Facts | None) -> float | None:
    """A loss that can be sorted by; None where there is none, or one that is no number."""
    value = scores.get("loss") if scores else None
    return value if isinstance(value, float | int) and math.isfinite(value) else None
