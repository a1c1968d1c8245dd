"""The clock: a process that stays, and ticks once a minute; a process for every tick would mostly load libraries."""

import logging
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge

from flows.factory import Factory, now
from flows.logs import event


class Ticks:
    """How the ticks of this process went, for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        words = "Ticks of this process, by whether they went well."
        self._ticks = Counter("lora_clock_ticks", words, ["result"], registry=self.registry)
        for result in ("done", "failed"):
            self._ticks.labels(result)
        words = "When a tick last went well, or when the clock began."
        self._last = Gauge("lora_clock_last_tick_timestamp_seconds", words, registry=self.registry)
        self._last.set(now().timestamp())

    def count(self, result: str) -> None:
        """One more, over now."""
        self._ticks.labels(result).inc()
        if result == "done":
            self._last.set(now().timestamp())


def keep_time(factory: Factory, tick: Callable[[], object], ticks: Ticks, every: float) -> None:
    """Tick at once, and then whenever the time of day is a whole number of so many seconds; it ends by an exception.

    A tick that takes longer than that is followed by the next one in time; what it missed is still due.
    """
    while True:
        try:
            tick()
        except Exception as error:  # whatever is wrong with Prefect, database or store: what is due stays due
            ticks.count("failed")
            event("tick failed", level=logging.ERROR, why=f"{type(error).__name__}: {error}")
        else:
            ticks.count("done")
        pause = every - time.time() % every
        factory.pulse.rest(pause)
        time.sleep(pause)
