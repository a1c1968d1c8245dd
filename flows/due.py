"""The tick: who is due becomes a job, unless a condition of the schedule holds it back; what is left is swept.

Schedules are taken in batches, a transaction each: two ticks at once, or one that dies, fire nobody twice and forget
nobody, and no transaction grows with the fleet.  What needs a disk or the store, bases and new data, is read before it.
Nothing here needs torch: a tick a minute in a process of its own must cost little.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby

from sqlalchemy.orm import Session

from flows.errors import FlowError
from flows.factory import Factory, Pinned, Wanted, now, pin_base, request_many
from lora_core.errors import LoraError
from lora_core.recipe import make_recipe
from registry import jobs, schedules
from registry.errors import QuotaReached, RegistryError, StoreError
from registry.growth import Growth, digests, growth, pair_of
from registry.names import AdapterId
from registry.orders import Enqueued
from registry.schedules import Due
from registry.session import reading, transaction
from registry.shares import full_until
from registry.tenancy import enter

MOST_RUNS = 16  # cohort runs asked for in one tick: more would only wait in line
MOST_SHOWN = 500  # rows of a tick's table: Prefect's page is for looking, not for keeping
BATCH = 200  # schedules a transaction
AGAIN = timedelta(minutes=5)  # until a schedule is looked at again that something in the way held back
Bases = Mapping[str, Pinned | str]  # each base by its name, or why it cannot be read
Growths = Mapping[AdapterId, Growth | str]


@dataclass(frozen=True)
class Ticked:
    """What became of one schedule that was due: ids and references only, for it is shown in Prefect."""

    label: str
    result: str  # queued, unchanged, held or not queued
    why: str = ""
    job: str = ""


def fire_due(factory: Factory, begun: Callable[[], object] | None = None) -> list[Ticked]:
    """Turn everybody who is due at this moment into jobs; returns what became of each.

    `begun` is called once a first full batch waits: more may follow, and so many need not wait for the last of them.
    """
    moment = now()  # one for all batches: who is due again before the last of them waits for the next tick
    with reading(factory.engine) as session:
        bases = {name: _pinned(factory, name) for name in schedules.due_bases(session, moment)}
    ticked: list[Ticked] = []
    while True:
        growths = _growths(factory, moment)
        with transaction(factory.engine) as session:
            batch = schedules.fire(session, moment, BATCH)
            ticked += _tick(session, batch, bases, growths)
        if not batch:
            return ticked
        if begun and len(ticked) == BATCH:
            begun()


def table(found: Sequence[Ticked]) -> tuple[list[dict[str, str]], str]:
    """What a tick made of who was due, the odd ones first, and how many of each; references and ids only."""
    counts = Counter(one.result for one in found)
    odd = sorted(found, key=lambda one: (one.result == "queued", one.result == "unchanged", one.label))
    rows = [{"user": one.label, "result": one.result, "job": one.job or "-"} for one in odd[:MOST_SHOWN]]
    words = ", ".join(f"{count} {result}" for result, count in sorted(counts.items()))
    return rows, words + (f"; the first {MOST_SHOWN} are shown" if len(found) > MOST_SHOWN else "")


def _tick(session: Session, batch: Sequence[Due], bases: Bases, growths: Growths) -> list[Ticked]:
    """Schedules become jobs, each tenant's together, or are held back with the reason."""
    ticked: dict[AdapterId, Ticked] = {}
    for tenant, own in groupby(batch, key=lambda due: due.tenant_id):
        enter(session, tenant)
        wanted: list[tuple[Due, Wanted]] = []
        for due in own:
            found = _wanted(session, due, bases, growths)
            if isinstance(found, Ticked):
                ticked[due.adapter_id] = found
            else:
                wanted.append((due, found))
        outcomes = request_many(session, tenant, [one for _, one in wanted])
        for (due, _), outcome in zip(wanted, outcomes, strict=True):
            ticked[due.adapter_id] = _became(session, due, outcome)
    return [ticked[due.adapter_id] for due in batch]


def _wanted(session: Session, due: Due, bases: Bases, growths: Growths) -> Wanted | Ticked:
    """What a schedule asks for, or why it asks for nothing now."""
    held = due if due.held else _held(session, due, growths)
    if held:
        return Ticked(due.reference.label, "held", str(held.held))
    base = bases.get(due.base)
    if base is None:  # set since this tick began
        schedules.hold(session, due, "its base was not read yet", now())
        return Ticked(due.reference.label, "held", "its base was not read yet")
    if isinstance(base, str):
        return _refused(session, due, base)
    try:
        return Wanted(due.reference, base, make_recipe(due.recipe), due.terms.priority)
    except LoraError as error:
        return _refused(session, due, str(error))


def _became(session: Session, due: Due, outcome: Enqueued | RegistryError) -> Ticked:
    """What came of a schedule that asked."""
    if isinstance(outcome, QuotaReached):
        schedules.hold(session, due, str(outcome), now() + AGAIN)
        return Ticked(due.reference.label, "held", str(outcome))
    if isinstance(outcome, RegistryError):
        return _refused(session, due, str(outcome))
    return Ticked(due.reference.label, "unchanged" if outcome.unchanged else "queued", job=str(outcome.job_id))


def _refused(session: Session, due: Due, why: str) -> Ticked:
    schedules.hold(session, due, why, due.next_due_at or now() + AGAIN)
    return Ticked(due.reference.label, "not queued", why)


def _held(session: Session, due: Due, growths: Growths) -> Due | None:
    """A schedule whose conditions are not met, with why; None where it may go on."""
    if due.terms.min_examples or due.terms.min_bytes:
        known = growths.get(due.adapter_id, "its data was not compared yet")
        if isinstance(known, str):
            return schedules.hold(session, due, known, now() + AGAIN)
        if known.pair != digests(pair_of(session, due.tenant_id, due.adapter_id)):
            return schedules.hold(session, due, "its data is just changing", now())
        if short := _short(due, known):
            return schedules.hold(session, due, short, due.next_due_at)
    if due.terms.max_versions:
        most = due.terms.max_versions
        if until := full_until(session, due.tenant_id, due.adapter_id, most, now()):
            why = f"{most} of {most} versions of 24 hours are made or on their way"
            return schedules.hold(session, due, why, until)
    return None


def _short(due: Due, known: Growth) -> str | None:
    """How much new data is missing; None where there is enough of either kind."""
    asked = [
        (have, need, what)
        for have, need, what in (
            (known.examples, due.terms.min_examples, "examples"),
            (known.size, due.terms.min_bytes, "bytes"),
        )
        if need
    ]
    if any(have >= need for have, need, _ in asked):
        return None
    return "; ".join(f"{have} of {need} new {what}" for have, need, what in asked)


def _pinned(factory: Factory, name: str) -> Pinned | str:
    """A base, or why it cannot be read: one tenant's missing base must not stop another's schedule."""
    try:
        return pin_base(factory, name)
    except (LoraError, FlowError) as error:
        return str(error)


def _growths(factory: Factory, moment: datetime) -> dict[AdapterId, Growth | str]:
    """How much is new for those of the next batch who ask, or why that is not known."""
    with reading(factory.engine) as session:
        asking = schedules.due_on_growth(session, moment, BATCH)
    found: dict[AdapterId, Growth | str] = {}
    for tenant, adapter in asking:
        try:
            found[adapter] = growth(factory.engine, factory.store, tenant, adapter)
        except StoreError as error:
            found[adapter] = str(error)
    return found


def runs_wanted(factory: Factory) -> int:
    """How many cohort runs the waiting jobs need, at most a few at a time."""
    with reading(factory.engine) as session:
        groups = jobs.waiting(session, now())
    return min(MOST_RUNS, sum(math.ceil(count / factory.settings.slots) for count in groups.values()))
