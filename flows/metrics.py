"""Prometheus metrics of the whole factory, read from the registry: what `lora metrics` serves.

Gauges are asked for at each scrape.  Counters and histograms count events since this process began; Prometheus
takes a restart for what it is.  Labels are tenants (the first few hundred; the rest together), states and kinds of
failure, never users, jobs or workers.  What one worker does from step to step is in `worker_metrics.py`.
"""

import threading
from collections.abc import Callable
from datetime import datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from sqlalchemy.engine import Engine

from flows.logs import event
from flows.reasons import ALL_KINDS, kind_of
from registry import jobs, overview, queries, workers
from registry.errors import RegistryError
from registry.overview import Happened, Tail
from registry.session import reading

OUTCOMES = ("accepted", "refused")
TENANTS = 200  # that have labels of their own; the rest are "other"
WAITS = (1, 5, 15, 60, 300, 900, 1800, 3600, 7200, 14400, 28800, 86400)  # seconds


class FactoryMetrics:
    """Queue, workers, versions and failures of all tenants."""

    def __init__(self, engine: Engine, clock: Callable[[], datetime]) -> None:
        self.registry = CollectorRegistry()
        disable_created_metrics()  # type: ignore[no-untyped-call]  # theirs; a series a counter that nobody reads
        self._engine, self._clock, self._tail = engine, clock, Tail()
        self._happened: list[Happened] = []  # read, and not counted yet
        self._lock, self._tenants = threading.Lock(), set[str]()
        self._gauges()
        self._counters()

    def _gauges(self) -> None:
        registry, tenant = self.registry, ["tenant"]
        self.up = Gauge("lora_registry_up", "Whether the registry's database answered.", registry=registry)
        self.waiting = Gauge("lora_queue_jobs", "Jobs that wait for a worker.", tenant, registry=registry)
        self.put_off = Gauge("lora_queue_put_off_jobs", "Waiting, and put off by a worker.", tenant, registry=registry)
        self.ready = Gauge(
            "lora_queue_ready_jobs", "Waiting, not put off, and within their tenants' quotas.", registry=registry
        )
        self.oldest = Gauge("lora_queue_oldest_seconds", "Age of the oldest waiting job.", tenant, registry=registry)
        self.running = Gauge("lora_jobs_running", "Jobs under leases that last.", tenant, registry=registry)
        self.workers = Gauge("lora_workers", "Workers heard of lately.", registry=registry)
        self.slots = Gauge("lora_slots", "Slots of these workers.", registry=registry)
        self.used = Gauge("lora_slots_used", "Slots that train somebody.", registry=registry)
        self.speed = Gauge("lora_tokens_per_second", "Tokens that these workers read.", registry=registry)

    def _counters(self) -> None:
        registry, tenant = self.registry, ["tenant"]
        self.claimed = Counter("lora_jobs_claimed", "Jobs given to workers.", tenant, registry=registry)
        self.released = Counter("lora_jobs_released", "Jobs that workers put back.", tenant, registry=registry)
        self.failed = Counter("lora_jobs_failed", "Jobs given up.", ["tenant", "reason"], registry=registry)
        self.published = Counter("lora_versions_published", "Versions.", ["tenant", "outcome"], registry=registry)
        self.tokens = Counter("lora_tokens", "Tokens read for published versions.", tenant, registry=registry)
        self.device = Counter("lora_device_seconds", "Device time of these versions.", tenant, registry=registry)
        self.wait = Histogram(
            "lora_queue_wait_seconds", "From asking to the first claim.", buckets=WAITS, registry=registry
        )
        self.publish = Histogram(
            "lora_time_to_publish_seconds", "From asking to the version.", buckets=WAITS, registry=registry
        )

    def refresh(self) -> None:
        """Look at the registry once more.  One that does not answer is told by `lora_registry_up`."""
        with self._lock:
            try:
                self._look()
            except RegistryError as error:
                self.up.set(0)
                event("registry does not answer", reason=str(error))
            else:
                self.up.set(1)

    def _look(self) -> None:
        now = self._clock()
        with reading(self._engine) as session:
            self._happened += self._tail.read(session, now)  # kept should the database go away in what follows
            waiting, holdings = overview.waiting(session, now), overview.holdings(session, now)
            ready = jobs.waiting(session, now)
            present, names = workers.present(session, now), [tenant.name for tenant in queries.tenants(session)]
        for tenant in map(self._tenant, names):
            self._begin(tenant)
        for gauge in (self.waiting, self.put_off, self.oldest, self.running):
            gauge.clear()
        for one in reversed(waiting):  # the longest waiting last, so that its age stands
            tenant = self._tenant(one.tenant)
            self.waiting.labels(tenant).inc(one.jobs)
            self.put_off.labels(tenant).inc(one.put_off)
            self.oldest.labels(tenant).set((now - one.oldest).total_seconds())
        for holding in holdings:
            self.running.labels(self._tenant(holding.tenant)).inc(holding.jobs)
        self.ready.set(sum(ready.values()))
        self.workers.set(len(present))
        self.slots.set(sum(one.slots for one in present))
        self.used.set(sum(one.facts.get("training", 0) for one in present))
        self.speed.set(sum(one.facts.get("tokens_per_second", 0) for one in present))
        happened, self._happened = self._happened, []
        for one_event in happened:
            self._count(one_event)

    def _begin(self, tenant: str) -> None:
        """A tenant's counters at 0: one that begins at 1 has not grown, as Prometheus sees it."""
        for outcome in OUTCOMES:
            self.published.labels(tenant, outcome)
        for kind in ALL_KINDS:
            self.failed.labels(tenant, kind)
        for counter in (self.claimed, self.released, self.tokens, self.device):
            counter.labels(tenant)

    def _count(self, happened: Happened) -> None:
        tenant, body = self._tenant(happened.tenant), happened.body
        match happened.kind:
            case "job claimed":
                self.claimed.labels(tenant).inc()
                if body.get("waited") is not None:
                    self.wait.observe(body["waited"])
            case "job released":
                self.released.labels(tenant).inc()
            case "job failed":
                self.failed.labels(tenant, kind_of(str(body.get("reason")))).inc()
            case "version published":
                self.published.labels(tenant, OUTCOMES[not body["accepted"]]).inc()
                self.tokens.labels(tenant).inc(body.get("tokens") or 0)
                self.device.labels(tenant).inc(body.get("device_seconds") or 0)
                if "seconds" in body:
                    self.publish.observe(body["seconds"])

    def _tenant(self, name: str) -> str:
        if len(self._tenants) < TENANTS:
            self._tenants.add(name)
        return name if name in self._tenants else "other"
