"""What is seen of a storm while it lasts: how many wait, are in work and are done, and which service takes the CPU."""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import psutil
from sqlalchemy import Engine, func, select
from sqlalchemy.exc import SQLAlchemyError

from benchmarks.storms.servers import Site
from registry.errors import RegistryError
from registry.jobs import OVER
from registry.models import Job, Schedule
from tests.conftest import looking

_Lived = tuple[str, int, float]  # service, process id, when that process began


@dataclass
class Watch:
    """Samples a second apart, from the moment it began; seconds of CPU by service."""

    site: Site
    engine: Engine
    began: float = field(default_factory=time.time)
    samples: list[dict[str, float]] = field(default_factory=list)
    _cpu: dict[_Lived, float] = field(default_factory=dict)
    _before: dict[_Lived, float] = field(default_factory=dict)  # what it had taken when the storm began

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.time() - self.began

    @property
    def cpu_seconds(self) -> dict[str, float]:
        """What every service and its children took since it began, as far as they lived to be seen."""
        total: defaultdict[str, float] = defaultdict(float)
        for lived, seconds in self._cpu.items():
            total[lived[0]] += seconds - self._before.get(lived, 0.0)
        return {name: round(seconds, 1) for name, seconds in sorted(total.items())}

    def look(self) -> dict[str, float] | None:
        """One sample; None while the database is away."""
        self._measure()
        with suppress(RegistryError, SQLAlchemyError), looking(self.engine) as session:
            due = select(func.count()).where(Schedule.last_fired_at.is_(None))
            states = Counter(dict(session.execute(select(Job.state, func.count()).group_by(Job.state)).tuples().all()))
            found = {
                "at": round(self.seconds, 1), "due": session.scalar(due) or 0, "queued": states["queued"],
                "running": states["running"], "over": sum(states[state] for state in OVER), "failed": states["failed"],
            }  # fmt: skip
            self.samples.append(found)
            return found
        return None

    def _measure(self) -> None:
        for name, service in list(self.site.services.items()):
            for pid in service.pids:
                with suppress(psutil.NoSuchProcess):
                    one = psutil.Process(pid)
                    times = one.cpu_times()
                    self._cpu[name, pid, one.create_time()] = times.user + times.system

    def settle(self) -> "Watch":
        """Begin now: what was taken before does not count."""
        self._measure()
        self._before, self.began = dict(self._cpu), time.time()
        return self


@contextmanager
def watching(watch: Watch) -> Iterator[Watch]:
    """Look once a second from a thread."""
    over = threading.Event()

    def go() -> None:
        while not over.wait(1):
            watch.look()

    thread = threading.Thread(target=go, name="watch", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()
