"""Whether everybody was served exactly once, read straight from database and store."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from flows.factory import now
from registry.models import Adapter, AdapterVersion, Alias, AliasMove, Event, Job, Schedule
from registry.names import LATEST, AdapterId
from registry.store import ObjectStore
from registry.uploads import UPLOAD_LEASE, sweep
from tests.conftest import looking
from tests.faults.invariants import check_no_intent_is_left, check_nothing_is_left

_READERS = 8


@dataclass(frozen=True)
class Counted:
    """What there is after a storm; `wrong` says in words what should not be."""

    users: int
    versions: int
    accepted: int
    claims: int  # as many as users when no worker was lost
    swept: int  # uploads that came to nothing
    objects: int
    wrong: tuple[str, ...]


def count(engine: Engine, store: ObjectStore, users: int) -> Counted:
    """Sweep once (and once more, a lease later, to end the intents), then look at everything."""
    swept = [len(sweep(engine, store, now() + UPLOAD_LEASE * leases)) for leases in (2, 4)]
    with looking(engine) as session:
        versions = session.scalars(select(AdapterVersion)).all()
        wrong = [*_once(session, versions, users), *_pointed_at(session, versions)]
        claims = len(session.scalars(select(Event.id).where(Event.kind == "job claimed")).all())
    wrong += _not_whole(store, versions)
    wrong += _refused_by(lambda: check_nothing_is_left(engine, store), lambda: check_no_intent_is_left(engine))
    accepted = sum(version.state == "accepted" for version in versions)
    return Counted(
        users, len(versions), accepted, claims, sum(swept), sum(len(version.files) for version in versions),
        tuple(wrong),
    )  # fmt: skip


def _once(session: Session, versions: Sequence[AdapterVersion], users: int) -> list[str]:
    """Every adapter has one version, number 1, of its one job; every schedule has fired."""
    adapters = dict(session.execute(select(Adapter.id, Adapter.head)).tuples().all())
    jobs = session.scalars(select(Job)).all()
    held = Counter(version.adapter_id for version in versions)
    found = {
        f"{users - len(adapters)} of {users} users have no adapter": len(adapters) != users,
        f"{sum(held[one] == 0 for one in adapters)} adapters without a version": set(held) != set(adapters),
        f"{sum(many > 1 for many in held.values())} adapters with several": any(many > 1 for many in held.values()),
        "numbers other than 1": {version.number for version in versions} != {1} or set(adapters.values()) != {1},
        f"{len(jobs)} jobs for {users} users": Counter(job.adapter_id for job in jobs) != Counter(list(adapters)),
        "a job that is over without its version, or a version without its job": {
            job.id: "accepted" if job.state == "published" else job.state for job in jobs
        }
        != {version.job_id: version.state for version in versions},
        "a schedule that did not fire": None in set(session.scalars(select(Schedule.last_fired_at))),
    }
    reasons = sorted({str(job.error) for job in jobs if job.state == "failed"})
    return [what for what, so in found.items() if so] + reasons[:5]


def _pointed_at(session: Session, versions: Sequence[AdapterVersion]) -> list[str]:
    """`latest` points to everybody's accepted version, moved there once."""
    latest = select(Alias.adapter_id, Alias.version_id).where(Alias.name == LATEST)
    aliases: Mapping[AdapterId, Any] = dict(session.execute(latest).tuples().all())  # ids of versions
    accepted = {version.adapter_id: version.id for version in versions if version.state == "accepted"}
    moves = Counter(session.scalars(select(AliasMove.to_id).where(AliasMove.name == LATEST)))
    wrong = [] if aliases == accepted else ["latest is not set to everybody's accepted version"]
    return wrong + ([] if moves == Counter(accepted.values()) else ["latest moved more than once, or never"])


def _not_whole(store: ObjectStore, versions: Sequence[AdapterVersion]) -> list[str]:
    """Every file of every version is read and hashed."""

    def check(version: AdapterVersion) -> list[str]:
        return [
            f"{version.prefix}/{name} is not what its row says"
            for name, facts in version.files.items()
            if hashlib.sha256(store.get(f"{version.prefix}/{name}")).hexdigest() != facts["sha256"]
        ]

    with ThreadPoolExecutor(_READERS) as pool:
        return [line for lines in pool.map(check, versions) for line in lines]


def _refused_by(*checks: Any) -> list[str]:  # callables that raise AssertionError
    found = []
    for check in checks:
        try:
            check()
        except AssertionError as error:
            found.append(str(error))
    return found
