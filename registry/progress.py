"""How far unfinished trainings are, in the store: kept while their job is not over, for whichever worker takes it next.

An intent to upload stands for each job's prefix; the sweep in `uploads.py` leaves it alone until the job is over.
"""

from datetime import datetime

from sqlalchemy.engine import Engine

from registry import uploads
from registry.errors import ObjectDiffers
from registry.jobs import ClaimedJob, check_fence
from registry.keys import progress_prefix
from registry.session import transaction
from registry.store import ObjectStore
from registry.tenancy import enter


def keep(engine: Engine, store: ObjectStore, job: ClaimedJob, name: str, data: bytes, now: datetime) -> None:
    """Put a job's progress into the store.  What is there under the name already is as good.

    Raises LeaseLost when the job is not ours any more: nothing of a user who is forgotten meanwhile comes there.
    """
    prefix = _prefix(job)
    with transaction(engine) as session:
        check_fence(session, job)
        uploads.declare(session, job.tenant_id, prefix, now, job.id)
    try:
        store.put_new(f"{prefix}/{name}", data)
    except ObjectDiffers:  # the same numbers: files of weights do not order their metadata
        return


def kept(store: ObjectStore, job: ClaimedJob) -> list[str]:
    """The names of what is there of a job, whoever kept it."""
    return [key.rpartition("/")[2] for key in store.keys(_prefix(job))]


def take(store: ObjectStore, job: ClaimedJob, name: str) -> bytes:
    """One of them.  Raises ObjectMissing."""
    return store.get(f"{_prefix(job)}/{name}")


def forget(store: ObjectStore, job: ClaimedJob, name: str) -> None:
    """Remove one of them: there is a newer one."""
    store.delete(f"{_prefix(job)}/{name}")


def clear(engine: Engine, store: ObjectStore, job: ClaimedJob) -> None:
    """Remove all of them: the job is over."""
    store.clear(_prefix(job))
    with transaction(engine) as session:
        enter(session, job.tenant_id)
        uploads.settle(session, job.tenant_id, _prefix(job))


def _prefix(job: ClaimedJob) -> str:
    return progress_prefix(job.reference.tenant, job.opaque, str(job.id))
