"""What is seen of a storm while it lasts: how many wait, are in work and are done, and which service takes the CPU."""

import itertools
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
from registry.models import Job, Schedule
from registry.session import open_database, reading
from registry.shares import MADE

_Root = tuple[str, int]  # service and process id
_MEASURE_EVERY = 5  # looks: walking through all processes is no small work


@dataclass
class Watch:
    """Samples a second apart, from the moment it began; seconds of CPU by service."""

    site: Site
    engine: Engine
    began: float = field(default_factory=time.time)
    samples: list[dict[str, float]] = field(default_factory=list)
    _cpu: dict[_Root, float] = field(default_factory=dict)
    _before: dict[_Root, float] = field(default_factory=dict)  # what it had taken when the storm began

    def __post_init__(self) -> None:
        owner = self.engine.url.set(username="postgres")  # whom no policy binds
        self._owner = open_database(owner.render_as_string(hide_password=False))

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.time() - self.began

    @property
    def cpu_seconds(self) -> dict[str, float]:
        """What every service and its children took since it began, as far as they lived to be seen."""
        total: defaultdict[str, float] = defaultdict(float)
        for root, seconds in self._cpu.items():
            total[root[0]] += seconds - self._before.get(root, 0.0)
        return {name: round(seconds, 1) for name, seconds in sorted(total.items())}

    def look(self, measured: bool = False) -> dict[str, float] | None:
        """One sample; None while the database is away."""
        if measured:
            self._measure()
        with suppress(RegistryError, SQLAlchemyError), reading(self._owner) as session:
            due = select(func.count()).where(Schedule.last_fired_at.is_(None))
            states = Counter(dict(session.execute(select(Job.state, func.count()).group_by(Job.state)).tuples().all()))
            found = {
                "at": round(self.seconds, 1), "due": session.scalar(due) or 0, "queued": states["queued"],
                "running": states["running"], "over": sum(states[state] for state in MADE), "failed": states["failed"],
            }  # fmt: skip
            self.samples.append(found)
            return found
        return None

    def _measure(self) -> None:
        """Every service's first process and all below it, with what those took who have ended and were waited for."""
        for name, service in list(self.site.services.items()):
            for root, pids in service.trees.items():
                taken = sum(_taken(pid) for pid in pids)  # less than before once it is killed
                self._cpu[name, root] = max(taken, self._cpu.get((name, root), 0.0))

    def settle(self) -> "Watch":
        """Begin now: what was taken before does not count."""
        self._measure()
        self._before, self.began = dict(self._cpu), time.time()
        return self


def _taken(pid: int) -> float:
    """Seconds of CPU of a process and of its children that have ended."""
    with suppress(psutil.NoSuchProcess):
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system + times.children_user + times.children_system)
    return 0.0


@contextmanager
def watching(watch: Watch) -> Iterator[Watch]:
    """Look once a second from a thread."""
    over = threading.Event()

    def go() -> None:
        for number in itertools.count():
            if over.wait(1):
                return
            watch.look(measured=number % _MEASURE_EVERY == 0)

    thread = threading.Thread(target=go, name="watch", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()
