"""What workers say of themselves, for people and alarms.  Whose job is whose is decided by leases, not here."""

from datetime import datetime, timedelta

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from registry.models import Facts, Worker

SILENT = timedelta(seconds=30)  # a worker that has said nothing for so long is not counted any more
FORGOTTEN = timedelta(days=1)  # nor is it listed


def tell(session: Session, name: str, device: str, slots: int, facts: Facts, now: datetime) -> None:
    """Say what a worker is doing: one row a worker, written over."""
    worker = session.get(Worker, name)
    if worker is None:
        session.add(Worker(name=name, device=device, slots=slots, started_at=now, seen_at=now, facts=facts))
        session.execute(delete(Worker).where(Worker.seen_at < now - FORGOTTEN))
    else:
        worker.device, worker.slots, worker.seen_at, worker.facts = device, slots, now, facts


def leave(session: Session, name: str) -> None:
    """A worker that ends in order is not listed any more."""
    session.execute(delete(Worker).where(Worker.name == name))


def present(session: Session, now: datetime) -> list[Worker]:
    """The workers that have said something lately, by name."""
    return list(session.scalars(select(Worker).where(Worker.seen_at >= now - SILENT).order_by(Worker.name)))
