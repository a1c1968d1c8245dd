"""A seeded hand that kills a service every few seconds and starts it again, until it is told to stop."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from benchmarks.storms.servers import Site
from benchmarks.storms.watching import Watch

AWAY_SECONDS = (0.0, 8.0)  # until what was killed is started again


@dataclass
class Chaos:
    """Who was killed when, and for how long it was away."""

    site: Site
    watch: Watch
    rng: random.Random
    pause_seconds: float  # between kills, on average; 0: nothing is killed
    marks: list[dict[str, object]] = field(default_factory=list)
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    def go(self, over: threading.Event) -> None:
        """Kill and restart; what ends by itself is started again, as a supervisor would."""
        while not over.is_set():
            if self.pause_seconds:
                over.wait(self.rng.uniform(0.4, 1.6) * self.pause_seconds)
                self._kill_one(over)
            with self._one_at_a_time:
                for name in list(self.site.services):
                    if self.site.services[name].dead:
                        self._restart(name, "ended", self.watch.seconds)
            over.wait(1)

    def _kill_one(self, over: threading.Event) -> None:
        """Workers as often as all servers together."""
        servers = [name for name in self.site.services if name not in self.site.workers]
        name = self.rng.choice(self.site.workers if self.rng.random() < 0.5 else servers)
        if not over.is_set():
            self.kill(name, self.rng.uniform(*AWAY_SECONDS))

    def kill(self, name: str, away_seconds: float) -> None:
        """SIGKILL a service, and start it again after so long."""
        with self._one_at_a_time:
            at = self.watch.seconds
            self.site.services[name].kill()
            time.sleep(away_seconds)
            self._restart(name, "killed", at)

    def _restart(self, name: str, how: str, at: float) -> None:
        self.site.services[name].start()
        away = round(self.watch.seconds - at, 1)
        self.marks.append({"at": round(at, 1), "service": name, "how": how, "away": away})


@contextmanager
def supervised(site: Site, watch: Watch, seed: int, pause_seconds: float) -> Iterator[Chaos]:
    """Services that end are started again; with a pause, they are made to end so far apart."""
    chaos, over = Chaos(site, watch, random.Random(seed), pause_seconds), threading.Event()
    thread = threading.Thread(target=chaos.go, args=(over,), name="chaos", daemon=True)
    thread.start()
    try:
        yield chaos
    finally:
        over.set()
        thread.join()
