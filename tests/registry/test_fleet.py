"""An alias of many users moved at once, and taken back; protected aliases."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, true
from sqlalchemy.engine import Engine

from registry import aliases, fleet, lookups, queries
from registry.errors import AliasProtected, NameRefused, NotFound, PromotionRefused
from registry.fleet import FleetMove, Where
from registry.glance import glance
from registry.models import Alias, Freshness
from registry.names import Reference
from registry.protection import protect, protected, unprotect
from registry.publishing import publish
from registry.session import reading, transaction
from registry.store import FolderStore
from registry.tenancy import enter
from tests.registry.conftest import NOW, Claim, finished

WHO: Any = {"actor": "me", "reason": "new release"}  # keywords of unlike types
Move = Callable[..., FleetMove]


@pytest.fixture
def users(engine: Engine, store: FolderStore, claim: Claim) -> None:
    """Four users of acme and one of globex, each with two versions, `production` at the first."""
    for reference in ("acme/ada", "acme/alice", "acme/bob", "acme/cleo/notes", "globex/alice"):
        for number, job in enumerate(claim(2, reference)):
            publish(engine, store, job, finished(f"{reference} {number}"), NOW + timedelta(days=number))
        promote(engine, f"{reference}:1")


def promote(engine: Engine, reference: str, alias: str = "production") -> None:
    """One user alone."""
    wanted = Reference.parse(reference)
    with transaction(engine) as session:
        tenant = queries.tenant_id(session, wanted.tenant)
        aliases.promote(session, tenant, wanted, alias, now=NOW, **WHO)


@pytest.fixture
def move(engine: Engine) -> Move:
    """Move acme's fleet."""

    def moved(*where: str, alias: str = "production", source: str = "latest", **more: Any) -> FleetMove:
        with transaction(engine) as session:
            tenant = queries.tenant_id(session, "acme")
            return fleet.promote_all(session, tenant, alias, source, Where.parse(where), now=NOW, **WHO, **more)

    return moved


@pytest.fixture
def back(engine: Engine) -> Move:
    """Take acme's last fleet move back."""

    def taken_back(fleet_id: int | None = None, **more: Any) -> FleetMove:
        with transaction(engine) as session:
            tenant = queries.tenant_id(session, "acme")
            return fleet.roll_back_all(session, tenant, "production", fleet_id, now=NOW, **WHO, **more)

    return taken_back


def production(engine: Engine, tenant: str = "acme") -> dict[str, int]:
    """Which version each user's `production` is."""
    with reading(engine) as session:
        id_ = queries.tenant_id(session, tenant)
        rows = [(one.user, one.adapter) for one in queries.listing(session, id_)]
        found = dict[str, int]()
        for user, adapter in rows:
            holder = queries.holder(session, id_, user, adapter)
            aliases = queries.aliases(session, id_, holder.adapter.id)
            found |= {user: aliases["production"]} if "production" in aliases else {}
        return found


@pytest.mark.usefixtures("users")
def test_everybody_moves_and_everybody_goes_back(engine: Engine, move: Move, back: Move) -> None:
    """With a move for each user in the history, and nobody of another tenant."""
    there = move()
    assert (there.count, set(production(engine).values())) == (4, {2})

    again = back()

    assert (again.count, set(production(engine).values())) == (4, {1})
    assert set(production(engine, "globex").values()) == {1}
    with reading(engine) as session:
        tenant = queries.tenant_id(session, "acme")
        adapter = queries.holder(session, tenant, "alice", "default").adapter.id
        last, before, *_ = queries.alias_moves(session, tenant, adapter)
    assert (last.kind, last.fleet_id, before.kind, before.fleet_id) == (
        "rolled back", again.fleet_id, "moved", there.fleet_id,
    )  # fmt: skip
    assert (before.actor, before.reason) == ("me", "new release")


def test_names_that_differ_by_case_are_different_beginnings(
    engine: Engine, store: FolderStore, claim: Claim, move: Move
) -> None:
    """On SQLite too, whose LIKE takes a for A unless it is told."""
    for user in ("alice", "Anna"):
        publish(engine, store, claim(1, f"acme/{user}")[0], finished(user), NOW)

    assert move("user=a*").count == 1
    assert set(production(engine)) == {"alice"}


@pytest.mark.usefixtures("users")
@pytest.mark.parametrize("table", [Alias, Freshness])
def test_a_fleet_that_waits_holds_nothing_that_a_publisher_or_new_data_needs(
    engine: Engine, move: Move, table: type[Alias] | type[Freshness]
) -> None:
    """All lock what `latest` of many is in one order, so that neither waits for the other for ever."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    with reading(engine) as session:
        tenant = queries.tenant_id(session, "acme")
    only = Alias.name == "latest" if table is Alias else true()
    latest = select(table).where(table.tenant_id == tenant, only).order_by(table.adapter_id)
    with ThreadPoolExecutor(1) as pool:
        with transaction(engine) as other:
            enter(other, tenant)
            other.scalars(latest.limit(1).with_for_update()).one()
            moving = pool.submit(move, alias="latest", source="production")
            with suppress(TimeoutError):
                moving.result(0.5)

            assert len(other.scalars(latest.with_for_update(nowait=True)).all()) == 4
        assert moving.result(30).count == 4


@pytest.mark.usefixtures("users")
@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (("user=a*",), {"ada", "alice"}),
        (("user=alice",), {"alice"}),
        (("user=*", "adapter=notes"), {"cleo"}),
        (("base=bbbb", "since=2026-03-02T00:00:00+00:00"), {"ada", "alice", "bob", "cleo"}),
        (("user=a*", "until=2027-01-01"), {"ada", "alice"}),
    ],
)
def test_only_those_move_for_whom_every_condition_holds(
    engine: Engine, move: Move, where: tuple[str, ...], expected: set[str]
) -> None:
    """The others stay where they are."""
    assert move(*where).count == len(expected)

    assert {user for user, number in production(engine).items() if number == 2} == expected


@pytest.mark.usefixtures("users")
def test_whoever_was_moved_again_is_not_taken_back(engine: Engine, move: Move, back: Move) -> None:
    """What somebody decided since stands."""
    there = move()
    promote(engine, "acme/bob:1")

    assert back(there.fleet_id).count == 3
    with pytest.raises(PromotionRefused, match="can be taken back: .* or has moved since"):
        back(there.fleet_id)


@pytest.mark.usefixtures("users")
def test_a_fleet_that_would_not_move_is_told(move: Move) -> None:
    """Rather than a success of nothing."""
    move()

    with pytest.raises(PromotionRefused, match="no adapter's alias would move"):
        move()
    with pytest.raises(PromotionRefused, match="would move"):
        move("user=nobody")


@pytest.mark.usefixtures("users")
def test_going_back_without_having_gone_is_told(back: Move) -> None:
    """With nothing changed, and what to name: `promote` moves another alias by default than `rollback`."""
    with pytest.raises(PromotionRefused, match="not moved: no fleet was moved; if it was another alias, pass --alias"):
        back()


@pytest.mark.usefixtures("users")
def test_an_alias_that_is_new_is_made_for_everybody(engine: Engine, move: Move) -> None:
    """And what the gate refused is left out unless forced."""
    assert move(alias="canary", source="production").count == 4
    assert move("user=a*", alias="canary").count == 2


@pytest.mark.usefixtures("users")
def test_somebody_who_moves_one_of_them_meanwhile_stops_the_fleet(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All or nobody: the fleet's move is a compare-and-set of every alias."""
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time: there is no meanwhile")
    written = fleet._carry_out

    def late(*arguments: object) -> FleetMove:
        promote(engine, "acme/bob:2")
        return written(*arguments)  # type: ignore[arg-type]  # the same ones as given

    monkeypatch.setattr(fleet, "_carry_out", late)
    with pytest.raises(PromotionRefused, match="meanwhile"), transaction(engine) as session:
        tenant = queries.tenant_id(session, "acme")
        fleet.promote_all(session, tenant, "production", "latest", Where(), now=NOW, **WHO)

    assert production(engine) == {"ada": 1, "alice": 1, "bob": 2, "cleo": 1}


NO_CONDITIONS = [
    "", "user", "user=", "users=a", "user=a*b", "user=../x", "since=soon", "base=%", "adapter=A", "user=a\x00",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_CONDITIONS)
def test_a_condition_that_is_none_is_told_with_those_there_are(text: str) -> None:
    """Before anything moves."""
    with pytest.raises(NameRefused):
        Where.parse([text])


@pytest.mark.usefixtures("users")
def test_a_protected_alias_moves_only_for_whoever_means_it(engine: Engine, move: Move, back: Move) -> None:
    """Alone or as a fleet, there or back."""
    with transaction(engine) as session:
        protect(session, queries.tenant_id(session, "acme"), "production", actor="ops", reason="audit", now=NOW)

    with pytest.raises(AliasProtected, match=r"protected by ops \(audit\); pass --override"):
        promote(engine, "acme/bob:2")
    with pytest.raises(AliasProtected):
        move()
    assert move(override=True).count == 4
    with pytest.raises(AliasProtected):
        back()
    assert back(override=True).count == 4
    promote(engine, "globex/alice:2")  # another tenant's is its own

    with transaction(engine) as session:
        unprotect(session, queries.tenant_id(session, "acme"), "production", actor="ops", reason="done", now=NOW)
    promote(engine, "acme/bob:2")
    with pytest.raises(NotFound, match="lora protect"), transaction(engine) as session:
        unprotect(session, queries.tenant_id(session, "acme"), "production", actor="ops", reason="done", now=NOW)


def test_the_gate_moves_no_protected_latest(engine: Engine, store: FolderStore, claim: Claim) -> None:
    """The version is there; what users get stays what it was."""
    first, second = claim(2)
    publish(engine, store, first, finished("one"), NOW)
    with transaction(engine) as session:
        tenant = queries.tenant_id(session, "acme")
        protect(session, tenant, "latest", actor="ops", reason="freeze", now=NOW)
        assert [one.name for one in protected(session, tenant)] == ["latest"]

    assert publish(engine, store, second, finished("two"), NOW).number == 2

    with reading(engine) as session:
        tenant = queries.tenant_id(session, "acme")
        assert queries.version(session, tenant, Reference.parse("acme/alice")).number == 1


def test_a_reader_sees_everybody_old_or_everybody_new(postgres_url: str) -> None:
    """The benchmark's own measurement, small: another connection counts while a fleet goes there and back."""
    from benchmarks.fleet_move import measure, seed

    engine = seed(postgres_url, 400)
    result = measure(engine, 400, 3)
    engine.dispose()

    assert result["looks"]


def test_who_looks_up_thousands_while_a_fleet_moves_sees_all_of_it(
    engine: Engine, users: None, move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are asked for in parts, each of which is a look of its own: some were old and others new."""
    monkeypatch.setattr(lookups, "_PART", 1)
    monkeypatch.setattr(lookups, "_AT_ONCE", 1)
    wanted, answered = ["ada", "alice", "bob"], list[Any]()

    def glancing(*asked: Any) -> Any:  # as `glance`; behind the first part of the answer a fleet moves
        rows = glance(*asked)
        answered.append(rows)
        if len(answered) == 2:
            move()
        return rows

    monkeypatch.setattr(lookups, "glance", glancing)
    with reading(engine) as session:
        tenant = queries.tenant_id(session, "acme")

    found = lookups.find_many(engine, tenant, wanted, "default", "production")

    assert {user: one.number for user, one in found.items()} == dict.fromkeys(wanted, 2)
