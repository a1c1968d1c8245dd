"""Saves in the object store: a training that stopped on one machine goes on, on another, to the same bytes."""

import os
import re
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path

from flows.factory import Factory, now
from flows.side_threads import side_threads
from registry import progress
from registry.errors import RegistryError
from registry.jobs import ClaimedJob
from registry.names import JobId

UPLOADS_AT_ONCE = 4
_NAME = re.compile(r"([0-9a-f]{32})-([0-9]{12})\.safetensors")


class StoreShelf:
    """The shelf of one cohort.  `job_of` gives the job that a learner is trained for.

    The store being away costs progress and nothing else, so its troubles are not raised.
    """

    def __init__(self, factory: Factory, job_of: Callable[[str], ClaimedJob]) -> None:
        self.factory, self.job_of = factory, job_of
        self._threads = side_threads(UPLOADS_AT_ONCE, "saves")
        self._under_way: dict[str, Future[None]] = {}  # by learner
        self._there: dict[JobId, list[str]] = {}  # names in the store, of jobs that were looked at

    def put(self, name: str, of: str, lessons: int, path: Path, last: bool) -> None:
        """Upload a save in the background: the last one always, others where settings say so and none is under way."""
        earlier = self._under_way.get(name)
        if not last and (self.factory.settings.save_to == "home" or (earlier and not earlier.done())):
            return
        job = self.job_of(name)
        self._under_way[name] = self._threads.submit(self._upload, job, _named(of, lessons), path, earlier)

    def newest(self, name: str, of: str) -> int | None:
        """How many lessons the furthest save has been through; of a job that nobody had before there is none."""
        found = [match for one in self._of(self.job_of(name)) if (match := _NAME.fullmatch(one))]
        return max((int(match[2]) for match in found if match[1] == of[:32]), default=None)

    def fetch(self, name: str, of: str, lessons: int, path: Path) -> None:
        """Copy a save to a path; where that fails the path stays as it was."""
        with suppress(RegistryError):
            beside = path.with_suffix(f".{os.getpid()}")
            beside.write_bytes(progress.take(self.factory.store, self.job_of(name), _named(of, lessons)))
            beside.replace(path)

    def flush(self) -> None:
        """Wait until everything is uploaded that is under way."""
        wait(self._under_way.values())

    def clear(self, job: ClaimedJob) -> None:
        """Remove what is there of a job that is over; whatever is missed, the sweep finds."""
        if self._of(job):
            with suppress(RegistryError):
                progress.clear(self.factory.engine, self.factory.store, job)

    def close(self) -> None:
        """End the threads, once nothing is under way."""
        self._threads.shutdown()

    def _of(self, job: ClaimedJob) -> list[str]:
        if job.id not in self._there:
            self._there[job.id] = []
            with suppress(RegistryError):
                self._there[job.id] = progress.kept(self.factory.store, job) if job.fence > 1 else []
        return self._there[job.id]

    def _upload(self, job: ClaimedJob, name: str, path: Path, earlier: Future[None] | None) -> None:
        if earlier:
            wait([earlier])
        there = self._of(job)
        with suppress(RegistryError, OSError):  # the file is gone once its training is over
            progress.keep(self.factory.engine, self.factory.store, job, name, path.read_bytes(), now())
            older = [one for one in there if one < name and one[:32] == name[:32]]
            there.append(name)
            for one in older:
                progress.forget(self.factory.store, job, one)
                there.remove(one)


def _named(of: str, lessons: int) -> str:
    return f"{of[:32]}-{lessons:012d}.safetensors"
