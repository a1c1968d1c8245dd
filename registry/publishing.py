"""Publish: bytes first, row second.  A version exists when its row is committed, and only then.

intent row with a lease -> signature (where a key is set) and files under an immutable, content-named prefix, the
manifest last -> one transaction: fence, head, version, scores, alias, event, job.  A crash anywhere leaves at most an
intent, which the sweep in `uploads.py` clears.  Publishers of one process that come to a database at the same time
share its transactions (`together.py`).
"""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from weakref import WeakKeyDictionary

from sqlalchemy.engine import Engine

from registry import together, uploads
from registry.errors import LeaseLost, ObjectDiffers, RegistryError
from registry.group_commit import GroupCommit
from registry.jobs import ClaimedJob, check_fence
from registry.keys import MANIFEST
from registry.names import JobId, check_file
from registry.parcels import Finished, Parcel, Published, addressed, place, prefix_of, row_of
from registry.session import transaction
from registry.signing import SIGNATURE, Signer
from registry.store import ObjectStore
from registry.together import Outcome

__all__ = [
    "Finished", "Outcome", "Published", "declare", "place", "publish", "publish_together", "signed", "upload",
]  # fmt: skip

_MOST = 64  # publishers in one transaction
_UPLOADERS = 4  # threads: a store is waited for


@dataclass(frozen=True)
class _Lines:
    """Where the publishers of one database meet."""

    declaring: GroupCommit[Parcel, Outcome | None] = field(default_factory=lambda: GroupCommit(_MOST))
    settling: GroupCommit[Parcel, Outcome] = field(default_factory=lambda: GroupCommit(_MOST))


_LINES: WeakKeyDictionary[Engine, _Lines] = WeakKeyDictionary()
_LINES_LOCK = threading.Lock()


def publish(
    engine: Engine, store: ObjectStore, job: ClaimedJob, finished: Finished, now: datetime, signer: Signer | None = None
) -> Published:
    """Make a job's files a version, once: the job is the idempotency key, and the manifest says which files.

    Raises LeaseLost when somebody else has the job, ContentDiffers when it published other files before.
    """
    lines, parcel = _lines(engine), addressed(job, finished, now)
    outcome = lines.declaring.join(parcel, partial(together.declare, engine))
    if outcome is None:
        outcome = lines.settling.join(_send(store, signer, parcel), partial(together.settle, engine))
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def publish_together(
    engine: Engine,
    store: ObjectStore,
    work: Sequence[tuple[ClaimedJob, Finished]],
    now: datetime,
    signer: Signer | None = None,
) -> dict[JobId, Outcome]:
    """Make the files of many jobs versions, each once, and tell of each what became of it.

    One whose job went to another worker, or whose files the store does not take, does not hold up the others.  Raises
    DatabaseUnavailable, with nobody published or everybody.
    """
    parcels = [addressed(job, finished, now) for job, finished in work]
    declared = together.declare(engine, parcels)
    found = {parcel.job.id: one for parcel, one in zip(parcels, declared, strict=True) if one}

    def send(parcel: Parcel) -> Parcel | RegistryError:
        try:
            return _send(store, signer, parcel)
        except RegistryError as error:
            return error

    fresh = [parcel for parcel in parcels if parcel.job.id not in found]
    with ThreadPoolExecutor(_UPLOADERS, "upload") as threads:
        sent = list(threads.map(send, fresh))
    found |= {parcel.job.id: one for parcel, one in zip(fresh, sent, strict=True) if isinstance(one, Exception)}
    uploaded = [one for one in sent if isinstance(one, Parcel)]
    committed = together.settle(engine, uploaded)
    return found | {parcel.job.id: one for parcel, one in zip(uploaded, committed, strict=True)}


def declare(engine: Engine, job: ClaimedJob, digest: str, now: datetime) -> str:
    """Write down the intent to upload; returns the prefix.

    Raises LeaseLost when the job is not ours any more, and once the sweeper has begun on the upload.
    """
    prefix = prefix_of(job, digest)
    with transaction(engine) as session:
        check_fence(session, job)  # nothing of a user who is forgotten meanwhile may come into the store
        if not uploads.declare(session, job.tenant_id, prefix, now, job.id):
            raise LeaseLost(str(job.id), job.fence)
    return prefix


def _lines(engine: Engine) -> _Lines:
    with _LINES_LOCK:
        return _LINES.setdefault(engine, _Lines())


def _send(store: ObjectStore, signer: Signer | None, parcel: Parcel) -> Parcel:
    """Sign and upload; returns what there is to commit."""
    if signer:
        files = signed(store, parcel.prefix, parcel.finished.files, signer)
        parcel = replace(parcel, finished=replace(parcel.finished, files=files))
    upload(store, parcel.prefix, parcel.finished.files)
    return replace(parcel, row=row_of(parcel))


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
