"""The jobs in this worker's hands: their leases are renewed until each is over, put back, or lost to another worker."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

from flows.errors import OrchestratorAway
from flows.factory import Factory, now
from flows.logs import event
from registry import jobs
from registry.errors import RegistryError
from registry.jobs import ClaimedJob
from registry.names import JobId
from registry.session import transaction

BRIEF = 300  # characters of what a library says


class Hands:
    """Claimed jobs that are not over.  Several threads take and let go."""

    def __init__(self, factory: Factory, claimed: Sequence[ClaimedJob]) -> None:
        self.factory = factory
        self.lease = timedelta(seconds=factory.settings.lease_seconds)
        self._lock = threading.Lock()
        self._held = {job.id: job for job in claimed}
        self._lost: set[JobId] = set()

    def take(self, claimed: Sequence[ClaimedJob]) -> None:
        """More jobs, claimed a moment ago."""
        with self._lock:
            self._held.update({job.id: job for job in claimed})

    def let_go(self, job: ClaimedJob) -> None:
        """A job that is over."""
        with self._lock:
            self._held.pop(job.id, None)
            self._lost.discard(job.id)

    @property
    def lost(self) -> frozenset[JobId]:
        """Jobs that somebody else has, or has called off: whatever becomes of them here does not count."""
        with self._lock:
            return frozenset(self._lost)

    def renew(self) -> None:
        """Extend the leases, and find out which are lost."""
        with self._lock:
            held = list(self._held.values())
        with transaction(self.factory.engine) as session:
            kept = set(jobs.renew(session, held, self.lease, now()))
        with self._lock:  # what was let go meanwhile is not lost, nor what was then taken anew
            self._lost.update(job.id for job in held if job.id not in kept and self._held.get(job.id) == job)

    def put_back(self, job: ClaimedJob, error: str | None = None) -> None:
        """Let others have a job; no attempt is counted but for an error of its own."""
        self.let_go(job)
        # Over already, or in other hands; and without a database the lease runs out by itself.
        with suppress(RegistryError):
            with transaction(self.factory.engine) as session:
                jobs.release(session, job, now(), error)
            event("job put back", job, logging.WARNING if error else logging.INFO, reason=error)

    def put_all_back(self, error: str | None) -> None:
        """Let others have whatever is still here."""
        with self._lock:
            held = list(self._held.values())
        for job in held:
            self.put_back(job, error)


@contextmanager
def in_hand(factory: Factory, claimed: Sequence[ClaimedJob]) -> Iterator[Hands]:
    """Renew the jobs' leases from a thread while the block works; when it breaks, put back what is still held.

    An interruption and a fault of database, store or orchestrator cost no attempt; any other error does.
    """
    hands, done = Hands(factory, claimed), threading.Event()

    def beat() -> None:
        while not done.wait(hands.lease.total_seconds() / 3):
            # Whatever is wrong with the database now, the next beat comes before the lease is over.
            with suppress(Exception):
                hands.renew()

    thread = threading.Thread(target=beat, name="leases", daemon=True)
    thread.start()
    try:
        yield hands
    except BaseException as error:
        blamed = isinstance(error, Exception) and not isinstance(error, RegistryError | OrchestratorAway)
        hands.put_all_back(brief(error) if blamed else None)
        raise
    finally:
        done.set()
        thread.join()


def brief(error: BaseException) -> str:
    """An error as it is written down with a job: its kind where that says more, and no more than a line.

    What a library says at length may hold what belongs to other users of the cohort.
    """
    if isinstance(error, RegistryError):
        return str(error)
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first[:BRIEF]}"
