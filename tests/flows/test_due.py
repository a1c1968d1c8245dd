"""The tick: who is due, who is held back and why, and everybody once however many ticks there are."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Select, select
from sqlalchemy.engine import Engine

from flows import due
from flows import factory as clock
from flows.cli.scheduling import put_all
from flows.due import Ticked, fire_due
from flows.factory import Factory, Wanted, add_data, pin_base, request_all
from flows.settings import FactorySettings
from flows.wishes import Wish
from lora_core.recipe import Recipe
from registry import jobs, orders, queries, schedules, shares
from registry.models import Adapter, Dataset, Job, Schedule, User
from registry.names import Reference
from registry.schedules import Filter, Terms
from registry.session import reading, transaction
from registry.tenancy import enter
from registry.timing import Quiet, Timing
from tests.conftest import looking, tampering

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
Set = Callable[..., None]


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.moment = START

    def __call__(self) -> datetime:
        """What it says."""
        return self.moment


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The flows' one clock, in the test's hands."""
    made = Clock()
    for module in (clock, due):
        monkeypatch.setattr(module, "now", made)
    return made


@pytest.fixture
def factory(base_folder: Path, engine: Engine) -> Factory:
    """A factory on each kind of database in turn."""
    made = Factory(
        FactorySettings(base=str(base_folder), database_url=engine.url.render_as_string(hide_password=False))
    )
    made.store.set_up()
    return made


@pytest.fixture
def set_(factory: Factory, time: Clock) -> Set:
    """Give a user a schedule."""
    base = pin_base(factory).name

    def set_schedule(user: str, timing: Timing, recipe: dict[str, object] | None = None, **terms: object) -> None:
        with transaction(factory.engine) as session:
            holder = queries.ensure_adapter(session, Reference.parse(user), time())
            given = Terms(**terms)  # type: ignore[arg-type]  # keywords of unlike types
            schedules.put(session, holder.tenant_id, holder, timing, base, recipe or {}, time(), given)

    return set_schedule


def give(factory: Factory, folder: Path, user: str, count: int, first: int = 0) -> None:
    """Data of a user: examples number `first` to `first + count`."""
    rows = [{"prompt": f"say {number}", "completion": "the quick brown fox"} for number in range(first, first + count)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    add_data(factory, Reference.parse(user), [str(path)])


def results(found: list[Ticked]) -> dict[str, str]:
    """What became of each."""
    return {one.label: one.result for one in found}


def held(factory: Factory, user: str) -> Schedule:
    """The one schedule of a user."""
    with reading(factory.engine) as session:
        ((_, one),) = schedules.schedules(session, queries.tenant_id(session, "acme"), Filter(user))
        return one


def end_jobs(factory: Factory, moment: datetime) -> None:
    """Everybody who waits is trained."""
    with transaction(factory.engine) as session:
        for job in jobs.claim(session, "w", timedelta(hours=1), 64, moment):
            jobs.close(session, job, "published", moment)


def test_new_data_makes_a_schedule_due_once_there_is_enough_of_it(
    factory: Factory, set_: Set, time: Clock, tmp_path: Path
) -> None:
    """Enough is counted against what was trained on last, example by example: moved ones are not new."""
    set_("acme/alice", Timing.on_data(), min_examples=5)
    give(factory, tmp_path, "acme/alice", 20)
    assert results(fire_due(factory)) == {"acme/alice": "queued"}
    end_jobs(factory, time())
    assert fire_due(factory) == []

    time.moment += timedelta(minutes=1)
    give(factory, tmp_path, "acme/alice", 20, first=4)  # 4 new ones, and 4 old ones are gone
    (short,) = fire_due(factory)
    assert (short.result, short.why) == ("held", "4 of 5 new examples")
    assert fire_due(factory) == []
    assert held(factory, "alice").next_due_at is None

    time.moment += timedelta(minutes=1)
    give(factory, tmp_path, "acme/alice", 20, first=5)
    assert results(fire_due(factory)) == {"acme/alice": "queued"}


def test_where_retention_has_removed_what_was_trained_on_last_all_data_is_new(
    factory: Factory, set_: Set, time: Clock, tmp_path: Path
) -> None:
    """As where two jobs were published in another order than asked for: else the schedule would never fire again."""
    set_("acme/alice", Timing.on_data(), min_examples=5)
    give(factory, tmp_path, "acme/alice", 20)
    fire_due(factory)
    end_jobs(factory, time())
    with tampering(factory.engine) as session:
        trained = session.scalars(select(Dataset)).one()
        trained.removed_at = time()
    factory.store.clear(trained.key.rpartition("/")[0])

    time.moment += timedelta(minutes=1)
    give(factory, tmp_path, "acme/alice", 4)
    assert results(fire_due(factory)) == {"acme/alice": "held"}
    assert held(factory, "alice").held == "4 of 5 new examples"
    time.moment += timedelta(minutes=1)
    give(factory, tmp_path, "acme/alice", 5)
    assert results(fire_due(factory)) == {"acme/alice": "queued"}


def test_bytes_of_new_examples_are_enough_too(factory: Factory, set_: Set, tmp_path: Path) -> None:
    """Either condition, also beside a clock."""
    give(factory, tmp_path, "acme/alice", 3)
    set_("acme/alice", Timing.on_data(), min_examples=50, min_bytes=100)
    give(factory, tmp_path, "acme/bob", 3)
    set_("acme/bob", Timing.on_data(), min_bytes=100_000)

    assert results(fire_due(factory)) == {"acme/alice": "queued", "acme/bob": "held"}
    assert "of 100000 new bytes" in str(held(factory, "bob").held)


def test_work_that_is_due_in_quiet_hours_waits_to_their_end(
    factory: Factory, set_: Set, time: Clock, tmp_path: Path
) -> None:
    """Noon in UTC is in a window of Tokyo's evening; it fires once, when that is over."""
    give(factory, tmp_path, "acme/alice", 3)
    set_("acme/alice", Timing.every("1h", "Asia/Tokyo"), quiet=Quiet.parse("20:00-06:30"))
    time.moment += timedelta(hours=1)

    assert results(fire_due(factory)) == {"acme/alice": "held"}
    assert "2026-03-01 21:30 UTC" in str(held(factory, "alice").held)
    time.moment = datetime(2026, 3, 1, 21, 29, tzinfo=UTC)
    assert fire_due(factory) == []
    time.moment += timedelta(minutes=1)
    assert results(fire_due(factory)) == {"acme/alice": "queued"}
    assert fire_due(factory) == []
    assert held(factory, "alice").held is None


def test_a_cap_of_versions_holds_for_any_day_and_loses_no_data(
    factory: Factory, set_: Set, time: Clock, tmp_path: Path
) -> None:
    """The schedule is due again when the first of them is a day old."""
    set_("acme/alice", Timing.on_data(), max_versions=1)
    give(factory, tmp_path, "acme/alice", 3)
    assert results(fire_due(factory)) == {"acme/alice": "queued"}
    end_jobs(factory, time())

    time.moment += timedelta(hours=1)
    give(factory, tmp_path, "acme/alice", 4)
    assert results(fire_due(factory)) == {"acme/alice": "held"}
    time.moment = START + timedelta(hours=24)
    assert results(fire_due(factory)) == {"acme/alice": "queued"}


def test_a_full_queue_holds_schedules_back_and_forgets_none(
    factory: Factory, set_: Set, time: Clock, tmp_path: Path
) -> None:
    """They are looked at again soon, not at their next moment."""
    for user in ("alice", "bob"):
        give(factory, tmp_path, f"acme/{user}", 3)
        set_(f"acme/{user}", Timing.every("1d"))
    with transaction(factory.engine) as session:
        shares.set_quota(session, queries.tenant_id(session, "acme"), {"max_waiting": 1}, time())
    time.moment += timedelta(days=1)

    assert sorted(results(fire_due(factory)).values()) == ["held", "queued"]
    end_jobs(factory, time())
    time.moment += due.AGAIN
    assert list(results(fire_due(factory)).values()) == ["queued"]


def test_the_priority_of_a_schedule_is_that_of_its_job(
    factory: Factory, set_: Set, time: Clock, tmp_path: Path
) -> None:
    """A step is worth an hour in line."""
    give(factory, tmp_path, "acme/alice", 3)
    set_("acme/alice", Timing.on_data(), priority=3)
    fire_due(factory)

    with looking(factory.engine) as session:
        (job,) = session.query(Job).all()
        assert (job.priority, job.in_line_since) == (3, time() - 3 * orders.STEP)


def test_many_ticks_at_once_make_one_job_for_each_in_small_transactions(
    factory: Factory, set_: Set, time: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of three, four ticks, and one user whose base is gone: nobody twice, nobody forgotten."""
    monkeypatch.setattr(due, "BATCH", 3)
    for number in range(10):
        give(factory, tmp_path, f"acme/user{number}", 3)
        set_(f"acme/user{number}", Timing.every("1h"))
    set_("acme/nodata", Timing.every("1h"))
    time.moment += timedelta(hours=30)  # missed many times over

    with ThreadPoolExecutor(4) as pool:
        ticked = [one for found in pool.map(lambda _: fire_due(factory), range(4)) for one in found]

    assert sorted(one.label for one in ticked) == sorted(["acme/nodata", *(f"acme/user{n}" for n in range(10))])
    with looking(factory.engine) as session:
        assert session.query(Job).count() == 10
    table, words = due.table(ticked)
    assert words == "1 not queued, 10 queued"
    assert table[0] == {"user": "acme/nodata", "result": "not queued", "job": "-"}
    assert "no dataset" in str(held(factory, "nodata").held)


@pytest.mark.parametrize(("users", "times"), [(2, 0), (4, 1), (7, 1)])
def test_workers_are_asked_for_once_a_first_batch_waits(
    users: int, times: int, factory: Factory, set_: Set, time: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine thousand others may still have to be queued."""
    monkeypatch.setattr(due, "BATCH", 3)
    for number in range(users):
        give(factory, tmp_path, f"acme/user{number}", 3)
        set_(f"acme/user{number}", Timing.every("1h"))
    time.moment += timedelta(hours=2)
    waiting = []

    def begun() -> None:
        with looking(factory.engine) as session:
            waiting.append(session.query(Job).count())

    fire_due(factory, begun)

    assert waiting == [3] * times


def free_while_waiting(engine: Engine, rows: Select[Any], act: Callable[[], object]) -> int:
    """How many rows others may still lock while somebody who writes to all of them waits for the first."""
    with ThreadPoolExecutor(1) as pool:
        with transaction(engine) as other:
            enter(other, queries.tenant_id(other, "acme"))
            other.execute(rows.limit(1).with_for_update()).one()
            acting = pool.submit(act)
            with suppress(TimeoutError):
                acting.result(0.5)
            free = len(other.execute(rows.with_for_update(nowait=True)).all())
        acting.result(30)
    return free


def test_who_asks_for_many_holds_nothing_that_others_need_whom_it_waits_for(
    factory: Factory, set_: Set, time: Clock, tmp_path: Path
) -> None:
    """A tick, a heartbeat, a publisher and a file of schedules lock many, too: in two orders all would be stuck."""
    if factory.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    base = pin_base(factory)
    for number in range(6):
        give(factory, tmp_path, f"acme/user{number}", 3)
        set_(f"acme/user{number}", Timing.every("1h"))
    fire_due(factory)
    time.moment += timedelta(hours=2)
    fire_due(factory)
    jobs_there, scheduled = select(Job.adapter_id).order_by(Job.id), select(Schedule.adapter_id)
    scheduled = scheduled.order_by(Schedule.adapter_id)
    with looking(factory.engine) as session:
        names = dict(
            session.execute(select(Adapter.id, User.name).join(User, User.id == Adapter.user_id)).tuples().all()
        )
        last_first = [
            [Reference("acme", names[one]) for one in reversed(session.scalars(rows).all())]
            for rows in (jobs_there, scheduled)
        ]

    def ask() -> None:
        with transaction(factory.engine) as session:
            request_all(session, [Wanted(one, base, Recipe()) for one in last_first[0]])

    def load() -> None:
        wishes = [
            Wish(line, one, Timing.every("2h"), Terms(), None, Recipe()) for line, one in enumerate(last_first[1])
        ]
        put_all(factory, wishes, {None: base.name})

    assert free_while_waiting(factory.engine, jobs_there, ask) == 6
    assert free_while_waiting(factory.engine, scheduled, load) == 6


def test_new_data_of_a_user_with_many_schedules_holds_none_while_it_waits_for_another(
    factory: Factory, set_: Set, tmp_path: Path
) -> None:
    """Which a file of schedules may need next."""
    if factory.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    for number in range(6):
        set_(f"acme/alice/a{number}", Timing.on_data())
    scheduled = select(Schedule.adapter_id).order_by(Schedule.adapter_id)

    assert free_while_waiting(factory.engine, scheduled, lambda: give(factory, tmp_path, "acme/alice/a0", 3)) == 6
