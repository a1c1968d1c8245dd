"""The factory at one moment, as `lora status` shows it and programs read it: gathered here, laid out elsewhere."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from flows.reasons import Reason, grouped
from registry import overview, queries, workers
from registry.models import Worker
from registry.names import TenantId
from registry.overview import Holding, Waiting


@dataclass(frozen=True)
class AtWork:
    """One worker: what it said last, and whose jobs it holds.  One that has said nothing lately has no facts."""

    name: str
    device: str | None
    slots: int | None
    facts: dict[str, Any]  # a look's numbers (pulse.py)
    holds: dict[str, int]  # jobs by tenant
    lease_until: datetime | None

    @property
    def silent(self) -> bool:
        """Whether it holds jobs and has not been heard of: its jobs come back when their leases are over."""
        return self.device is None


@dataclass(frozen=True)
class Seen:
    """What is running, who waits, who failed and why, what came out."""

    at: datetime
    since: datetime  # of what failed and came out
    jobs: dict[str, int]  # by state, of all times
    workers: list[AtWork]
    waiting: list[Waiting]
    failed: list[Reason]
    ended: dict[str, int]  # jobs by end
    device_seconds: float
    price: float | None = field(default=None)  # of a device's hour

    @property
    def cost(self) -> float | None:
        """What the device time costs, where a price is set."""
        return price_of(self.device_seconds, self.price)

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return (
            asdict(self)
            | {"workers": [asdict(one) | {"silent": one.silent} for one in self.workers]}
            | {"cost": self.cost}
        )


def look(
    session: Session, now: datetime, since: datetime, tenant: TenantId | None = None, price: float | None = None
) -> Seen:
    """Everything at once, of one tenant or of all.

    A tenant sees which workers hold its own jobs; who else is on them, and who idles, is the operator's business.
    """
    held = overview.holdings(session, now, tenant)
    holders = {one.worker for one in held}
    present = [one for one in workers.present(session, now) if tenant is None or one.name in holders]
    spent = (
        overview.device_seconds(session, since)
        if tenant is None
        else sum(cost.device_seconds or 0 for cost in overview.costs(session, tenant, since))
    )
    return Seen(
        now, since, queries.job_counts(session, tenant), _at_work(present, held),
        overview.waiting(session, now, tenant), grouped(overview.failures(session, since, tenant)),
        overview.ended(session, since, tenant), spent, price,
    )  # fmt: skip


def price_of(device_seconds: float | None, price: float | None) -> float | None:
    """What device time costs by LORA_GPU_HOUR_COST; None where either is unknown."""
    return None if device_seconds is None or price is None else device_seconds / 3600 * price


def _at_work(present: Iterable[Worker], held: Sequence[Holding]) -> list[AtWork]:
    """Who holds jobs and is not heard of, then who is present, the busy first."""
    holds: dict[str, dict[str, int]] = {}
    leases: dict[str, datetime] = {}
    for one in held:
        holds.setdefault(one.worker, {})[one.tenant] = one.jobs
        leases[one.worker] = min(one.lease_until, leases.get(one.worker, one.lease_until))
    told = {worker.name: worker for worker in present}
    found = [
        AtWork(one.name, one.device, one.slots, one.facts, holds.get(one.name, {}), leases.get(one.name))
        for one in told.values()
    ]
    silent = [AtWork(name, None, None, {}, holds[name], leases[name]) for name in holds if name not in told]
    return silent + sorted(found, key=lambda one: (one.facts.get("phase") == "idle", one.name))
