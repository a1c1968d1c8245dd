"""Who is due, when, and only once."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.engine import Engine

from registry import queries, schedules
from registry.datasets import Content, add_dataset
from registry.errors import NotFound, ScheduleRefused
from registry.names import Reference
from registry.session import reading, transaction
from registry.store import FolderStore
from registry.tenancy import enter
from registry.timing import Quiet, Timing
from tests.registry.conftest import NOW


def put(engine: Engine, reference: str, timing: Timing) -> None:
    """Give a user a schedule at NOW."""
    with transaction(engine) as session:
        holder = queries.ensure_adapter(session, Reference.parse(reference), NOW)
        schedules.put(session, holder.tenant_id, holder, timing, "base", {"rank": 8}, NOW)


def add(engine: Engine, store: FolderStore, text: str, moment: datetime) -> None:
    """Add data for alice."""
    content = Content(hashlib.sha256(text.encode()).hexdigest(), text.encode(), 1)
    add_dataset(engine, store, Reference.parse("acme/alice"), content, moment)


def fire(engine: Engine, moment: datetime) -> list[str]:
    """Whose schedules fire at a moment."""
    with transaction(engine) as session:
        return [due.reference.label for due in schedules.fire(session, moment)]


@pytest.mark.parametrize("there", [False, True])
def test_of_two_who_set_a_schedule_at_once_the_later_sets_all_of_it(engine: Engine, there: bool) -> None:
    """Whether there was one before or not: two runs of a file of schedules may overlap."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    with transaction(engine) as session:
        holder = queries.ensure_adapter(session, Reference.parse("acme/alice"), NOW)
    if there:
        put(engine, "acme/alice", Timing.on_data())
    with ThreadPoolExecutor(1) as pool:
        with transaction(engine) as session:
            enter(session, holder.tenant_id)
            terms = schedules.Terms(quiet=Quiet("22:00-06:00"), priority=7)
            schedules.put(session, holder.tenant_id, holder, Timing.every("1h"), "base", {}, NOW, terms)
            later = pool.submit(put, engine, "acme/alice", Timing.on_data())
            with suppress(TimeoutError):
                later.result(0.3)
        later.result(30)

    with reading(engine) as session:
        ((_, found),) = schedules.schedules(session, queries.tenant_id(session, "acme"))
    assert (found.timing, found.quiet, found.priority, found.recipe) == ("data", None, 0, {"rank": 8})


def test_a_schedule_fires_when_it_is_due_and_not_before(engine: Engine) -> None:
    """And then waits for its next moment."""
    put(engine, "acme/alice", Timing.every("1h"))

    assert fire(engine, NOW + timedelta(minutes=59)) == []
    assert fire(engine, NOW + timedelta(minutes=60)) == ["acme/alice"]
    assert fire(engine, NOW + timedelta(minutes=61)) == []


def test_one_that_was_missed_while_everything_was_down_fires_once(engine: Engine) -> None:
    """A weekend off does not mean sixty trainings on Monday."""
    put(engine, "acme/alice", Timing.every("1h"))

    assert fire(engine, NOW + timedelta(hours=60)) == ["acme/alice"]
    assert fire(engine, NOW + timedelta(hours=60, minutes=1)) == []


def test_many_ticks_at_once_fire_it_once(engine: Engine) -> None:
    """Two schedulers are as good as one."""
    for number in range(20):
        put(engine, f"acme/user{number}", Timing.every("1h"))

    with ThreadPoolExecutor(8) as pool:
        fired = [label for got in pool.map(lambda _: fire(engine, NOW + timedelta(hours=1)), range(8)) for label in got]

    assert sorted(fired) == sorted(f"acme/user{number}" for number in range(20))


def test_a_paused_schedule_is_silent_and_resumes_from_now(engine: Engine) -> None:
    """What was missed during the pause stays missed."""
    put(engine, "acme/alice", Timing.every("1h"))
    with transaction(engine) as session:
        tenant = queries.tenant_id(session, "acme")
        alice = queries.holder(session, tenant, "alice", "default")
        schedules.pause(session, tenant, alice, True, NOW)
    assert fire(engine, NOW + timedelta(hours=5)) == []

    with transaction(engine) as session:
        queries.tenant_id(session, "acme")
        schedules.pause(session, tenant, alice, False, NOW + timedelta(hours=5))

    assert fire(engine, NOW + timedelta(hours=5, minutes=30)) == []
    assert fire(engine, NOW + timedelta(hours=6)) == ["acme/alice"]


def test_data_that_a_user_had_before_wakes_a_schedule_too(engine: Engine, store: FolderStore) -> None:
    """Content that comes back is the newest again, and was perhaps never trained on."""
    add(engine, store, "one", NOW)
    add(engine, store, "two", NOW + timedelta(minutes=1))
    put(engine, "acme/alice", Timing.on_data())
    assert fire(engine, NOW + timedelta(minutes=2)) == ["acme/alice"]
    assert fire(engine, NOW + timedelta(days=1)) == []

    add(engine, store, "one", NOW + timedelta(days=1))

    assert fire(engine, NOW + timedelta(days=1)) == ["acme/alice"]


def test_who_adds_data_often_loses_no_turn_by_it(engine: Engine, store: FolderStore) -> None:
    """A schedule that is due keeps its place before those that came later."""
    add(engine, store, "one", NOW)
    put(engine, "acme/alice", Timing.on_data())
    put(engine, "acme/bob", Timing.every("1h"))

    add(engine, store, "two", NOW + timedelta(hours=2))

    with transaction(engine) as session:
        (first,) = schedules.fire(session, NOW + timedelta(hours=2), limit=1)
    assert first.reference.label == "acme/alice"


def test_data_that_comes_while_a_tick_looks_wakes_its_schedule(engine: Engine, store: FolderStore) -> None:
    """The tick has seen the old data, and puts the schedule to sleep when it commits."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time: the data comes before the tick or after it")
    add(engine, store, "one", NOW)
    put(engine, "acme/alice", Timing.on_data())
    with ThreadPoolExecutor(1) as pool:
        with transaction(engine) as session:
            (due,) = schedules.fire(session, NOW + timedelta(minutes=1))
            adding = pool.submit(add, engine, store, "two", NOW + timedelta(minutes=2))
            with suppress(TimeoutError):
                adding.result(0.5)
        adding.result(30)

    assert due.next_due_at is None
    assert fire(engine, NOW + timedelta(minutes=3)) == ["acme/alice"]


def test_a_removed_schedule_is_gone_and_removing_again_says_so(engine: Engine) -> None:
    """With the command that would set one."""
    put(engine, "acme/alice", Timing.every("1h"))
    with transaction(engine) as session:
        tenant = queries.tenant_id(session, "acme")
        schedules.remove(session, tenant, queries.holder(session, tenant, "alice", "default"), NOW)

    assert fire(engine, NOW + timedelta(days=1)) == []
    with pytest.raises(NotFound, match="schedule set"), transaction(engine) as session:
        tenant = queries.tenant_id(session, "acme")
        schedules.remove(session, tenant, queries.holder(session, tenant, "alice", "default"), NOW)


def test_the_list_shows_one_tenants_schedules(engine: Engine) -> None:
    """In order of user."""
    for reference in ("acme/bob", "acme/alice", "globex/eve"):
        put(engine, reference, Timing.every("1d"))

    with reading(engine) as session:
        found = schedules.schedules(session, queries.tenant_id(session, "acme"))

    assert [reference.label for reference, _ in found] == ["acme/alice", "acme/bob"]


def test_cron_is_read_in_the_users_own_time_zone() -> None:
    """Three in the morning in Berlin, in winter and in summer."""
    timing = Timing.cron("0 3 * * *", "Europe/Berlin")

    assert timing.after(datetime(2026, 1, 10, 12, tzinfo=UTC)) == datetime(2026, 1, 11, 2, tzinfo=UTC)
    assert timing.after(datetime(2026, 7, 10, 12, tzinfo=UTC)) == datetime(2026, 7, 11, 1, tzinfo=UTC)


@given(st.datetimes(datetime(2025, 1, 1), datetime(2028, 1, 1), timezones=st.just(UTC)))
def test_the_next_moment_is_always_later(moment: datetime) -> None:
    """Also when clocks change: a schedule that is due at its own moment would fire for ever."""
    for zone in ("Europe/Berlin", "America/New_York", "Australia/Lord_Howe"):
        following = Timing.cron("30 2 * * *", zone).after(moment)

        assert moment < following <= moment + timedelta(hours=50)


@pytest.mark.parametrize(
    ("expression", "zone", "hours"),
    [
        ("30 2 * * *", "Europe/Berlin", [23, 24, 25]),  # 02:30 is missing in March and comes twice in October
        ("30 1 * * *", "America/New_York", [23, 24, 25]),
        ("45 1 * * *", "Australia/Lord_Howe", [23.5, 24, 24.5]),  # its clocks move by half an hour
        ("15 * * * *", "Europe/Berlin", [1]),
    ],
)
def test_where_clocks_change_a_schedule_fires_as_often_as_it_says(
    expression: str, zone: str, hours: list[float]
) -> None:
    """Once a day, or once an hour, all through the year."""
    timing, gaps = Timing.cron(expression, zone), set()
    moment = timing.after(datetime(2026, 1, 1, tzinfo=UTC))
    while moment < datetime(2027, 1, 1, tzinfo=UTC):
        following = timing.after(moment)
        gaps.add((following - moment) / timedelta(hours=1))
        moment = following

    assert sorted(gaps) == hours


@pytest.mark.parametrize(
    "expression",
    ["", "* * * *", "* * * * * *", "61 * * * *", "0 0 30 2 *", "@daily", "DROP TABLE", "0 3 * * *\n* * * * *",
     "R R * * *", "R(0-30) 3 * * *", "H 3 * * *", "0 3 1W * *", "0 3 ? * *",
     f"{','.join(map(str, range(60)))} * * * *"],
)  # fmt: skip
def test_a_cron_expression_that_is_none_is_refused(expression: str) -> None:
    """When it is set, not at night."""
    with pytest.raises(ScheduleRefused):
        Timing.cron(expression)


@pytest.mark.parametrize("expression", ["*/5 0-6,22 1,15 * *", "0 3 l * *", "0 3 * JAN,jul mon-fri", "0 3 * * sat#2"])
def test_what_cron_knows_is_accepted(expression: str) -> None:
    """Names in any case, steps, ranges, the last day, the second Saturday; and it comes when it comes."""
    timing = Timing.cron(expression)

    assert timing.after(NOW) == timing.after(NOW) > NOW


@pytest.mark.parametrize(
    "interval", ["", "5", "0h", "59s", "-1h", "1w", "1.5h", "99999999d", "9999999d", "3651d", "9999999999s", "h", "٣h"]
)
def test_an_interval_that_is_none_is_refused(interval: str) -> None:
    """With an example of one that is."""
    with pytest.raises(ScheduleRefused, match="6h"):
        Timing.every(interval)


@pytest.mark.parametrize("zone", ["", "Mars/Olympus", "../../etc/passwd", "UTC+1\0"])
def test_a_time_zone_that_is_none_is_refused(zone: str) -> None:
    """Names are IANA's."""
    with pytest.raises(ScheduleRefused, match="IANA"):
        Timing.cron("0 3 * * *", zone)
