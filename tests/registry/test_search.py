"""Questions about many adapters: the right rows, each once over all pages, by an index on PostgreSQL."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Select, event
from sqlalchemy.engine import Engine

from benchmarks.registry_seed import seed
from registry import aliases, fleet, jobs, queries
from registry.client import Client
from registry.errors import CursorRefused, NameRefused, NotFound
from registry.glance import glance
from registry.names import Reference, TenantId
from registry.pages import Page
from registry.publishing import Finished, publish
from registry.search import ORDERS, Found, Search
from registry.session import transaction
from registry.store import FolderStore
from tests.conftest import new_registry
from tests.registry.conftest import LEASE, NOW, enqueue, finished

WHO: Any = {"actor": "me", "reason": "because", "now": NOW}  # keywords of unlike types
USERS = 3000  # so many that PostgreSQL would rather read the table than a worse index


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """What `furnish` makes, on each kind of database, once for all: they only ask."""
    folder = tmp_path_factory.mktemp("asked")
    store = FolderStore(folder / "store")
    store.set_up()
    with new_registry(request, folder) as engine:
        yield furnish(engine, store, folder)


def furnish(engine: Engine, store: FolderStore, folder: Path) -> Client:
    """Three users with three versions each, that gained 0.1, 0.2 ... 0.9; alice's second is a canary."""
    with transaction(engine) as session:
        asked = {user: enqueue(session, f"acme/{user}", 3) for user in ("alice", "bob", "carol")}
    for number in range(3):
        for place, some in enumerate(asked.values()):
            with transaction(engine) as session:
                (job,) = jobs.claim(session, "w", LEASE, 1, NOW, [some[number].job_id])
            publish(engine, store, job, gained(3 * number + place + 1), NOW + timedelta(hours=number))
    with transaction(engine) as session:
        tenant = queries.tenant_id(session, "acme")
        aliases.promote(session, tenant, Reference.parse("acme/alice:2"), "canary", **WHO)
    return Client(engine, store, folder / "cache")


def gained(tenths: int) -> Finished:
    """What a job comes to whose candidate is so much better than the base."""
    made = finished(f"weights {tenths}")
    scores = {"base": {"loss": 2.0}, "candidate": {"loss": 2.0 - tenths / 10}}
    return Finished(made.files, True, "because", 40, scores, None, "0.1")


def every(client: Client, wanted: Search, limit: int) -> list[Found]:
    """All pages."""
    found: list[Found] = []
    after: str | None = ""
    while after is not None:
        page: Page[Found] = client.search("acme", wanted, after=after, limit=limit)
        assert len(page.rows) <= limit
        found, after = [*found, *page.rows], page.cursor
    return found


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("limit", [1, 4, 100])
def test_each_is_found_once_in_order_whatever_the_pages(client: Client, order: str, limit: int) -> None:
    """Equal times among them."""
    found = every(client, Search.parse([], order), limit)

    assert len({(one.user, one.number) for one in found}) == len(found) == 9
    column = order.partition("-")[2] or "created_at"
    figures = [getattr(one, column) for one in found]
    assert figures == sorted(figures, reverse=order in ("newest", "most-gain", "most-loss"))


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (["alias=canary"], {("alice", 2)}),
        (["alias=latest"], {("alice", 3), ("bob", 3), ("carol", 3)}),
        (["alias=nowhere"], set()),
        (["gain>=0.75"], {("bob", 3), ("carol", 3)}),
        (["gain>=0.5", "loss>=1.5"], {("bob", 2)}),
        (["gain<=0.5", "gain>0.45"], {("bob", 2)}),
        (["gain>0.5", "loss>=1.5"], set()),
        (["gain<0.35", "user=a*"], {("alice", 1)}),
        (["loss<1.25", "loss>1.15"], {("bob", 3)}),
        (["user=bob", "until=2026-03-01T13:00:00+00:00"], {("bob", 1)}),
        (["base=bbb", "since=2026-03-01T14:00:00+00:00"], {("alice", 3), ("bob", 3), ("carol", 3)}),
        (["base=ccc"], set()),
        (["state=refused"], set()),
    ],
)
def test_every_condition_must_hold(client: Client, conditions: list[str], expected: set[tuple[str, int]]) -> None:
    """Of a version, its user, its base, and what points to it."""
    assert {(one.user, one.number) for one in every(client, Search.parse(conditions), 2)} == expected


@pytest.mark.parametrize(
    "text",
    ["gain", "gain>", "gain>nan", "gain>1e999", "loss>'", "alias=", "alias=A", "state=good", "x=1", "user=", "=", ""],
)
def test_odd_conditions_are_refused_in_words(text: str) -> None:
    """What is allowed is said."""
    with pytest.raises(NameRefused, match="allowed are"):
        Search.parse([text])


def test_a_cursor_is_of_its_own_question(client: Client) -> None:
    """With other conditions its place means nothing."""
    cursor = client.search("acme", Search.parse(), limit=1).cursor or ""

    with pytest.raises(CursorRefused, match="another question"):
        client.search("acme", Search.parse(["user=bob"]), after=cursor)
    with pytest.raises(NameRefused, match="order"):
        Search.parse([], "best")


@pytest.mark.parametrize("part", [1, 2, 2500])
def test_where_many_users_are_is_what_each_is_told_alone(
    client: Client, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has none is left out, doubles are one; in however many parts they are asked for."""
    monkeypatch.setattr("registry.lookups._PART", part)
    found = client.current("acme", ["alice", "nobody", "bob", "bob"], alias="latest")

    assert set(found) == {"alice", "bob"}
    for user, one in found.items():
        alone = client.resolve(f"acme/{user}")
        assert (one.number, one.state, one.served_name, one.prefix, one.sha256) == (
            alone.number, alone.state, alone.served_name, alone.prefix, alone.sha256,
        )  # fmt: skip
    assert set(client.current("acme", ["alice", "bob"], alias="canary")) == {"alice"}
    assert client.current("acme", []) == {}
    for bad in (["é"], ["a/b"], ["' OR 1=1"]):
        with pytest.raises(NameRefused):
            client.current("acme", bad)


def test_a_reference_by_number_and_a_tenant_that_is_not_there(client: Client) -> None:
    """The tenant's id is remembered: that must not make one up."""
    assert client.resolve("acme/alice:2").number == 2
    for missing in ("acme/alice:9", "acme/alice@nowhere", "acme/nobody", "globex/alice"):
        with pytest.raises(NotFound):
            client.resolve(missing)


def why(client: Client, **asked: str) -> dict[str, str]:
    """Who is outdated, and why: over pages of one."""
    found: dict[str, str] = {}
    after: str | None = ""
    while after is not None:
        page = client.outdated("acme", after=after, limit=1, **asked)
        assert not found.keys() & {one.user for one in page.rows}
        found |= {one.user: one.why for one in page.rows}
        after = page.cursor
    return found


def test_who_is_outdated_follows_data_and_latest(engine: Engine, store: FolderStore, tmp_path: Path) -> None:
    """New data, old data again, `latest` moved by hand and back by a fleet, another base or recipe."""
    client = furnish(engine, store, tmp_path)
    assert why(client) == {}
    with transaction(engine) as session:
        enqueue(session, "acme/dora", 1)
        enqueue(session, "acme/bob", 4)  # the last of them is new
        tenant = queries.tenant_id(session, "acme")
        aliases.promote(session, tenant, Reference.parse("acme/carol:1"), "latest", **WHO)
    expected = {"bob": "newer data", "carol": "newer data", "dora": "never accepted"}
    assert why(client) == expected
    assert why(client, base="b" * 64, recipe="r") == expected
    assert why(client, base="cc") == {**expected, "alice": "other base or recipe"}
    assert why(client, recipe="x") == {**expected, "alice": "other base or recipe"}

    with transaction(engine) as session:
        fleet.promote_all(session, queries.tenant_id(session, "acme"), "latest", "canary", fleet.Where(), **WHO)
    assert why(client) == {**expected, "alice": "newer data"}
    (alice,) = [one for one in client.outdated("acme").rows if one.user == "alice"]
    assert alice.job == "published"


seeded_once = pytest.mark.xdist_group("seeded")  # by one of the suite's processes, for all who read it


@pytest.fixture(scope="module")
def seeded(postgres_server: str) -> Iterator[Engine]:
    """Thousands of users, on PostgreSQL as the role that owns nothing."""
    from tests.servers import new_database

    engine = seed(new_database(postgres_server), USERS, 4)
    yield engine
    engine.dispose()


QUESTIONS: dict[str, Any] = {  # what each asks of a client
    "one": lambda client: client.resolve("acme/user-77"),
    "one by number": lambda client: client.resolve("acme/user-77:2"),
    "many": lambda client: client.current("acme", [f"user-{n}" for n in range(1, 200)]),
    "outdated": lambda client: client.outdated("acme", limit=5),
    "changes": lambda client: client.changes("acme", limit=20),
    **{
        " ".join([order, *conditions]): lambda client, asked=(conditions, order): client.search(
            "acme", Search.parse(*asked), limit=20
        )
        for order, conditions in [
            ("newest", []), ("oldest", []), ("least-gain", []), ("most-loss", []), ("newest", ["alias=canary"]),
            ("least-gain", ["gain<0.1"]), ("newest", ["until=2026-01-03"]), ("newest", ["base=edb"]),
            ("newest", ["alias=production"]), ("least-gain", ["alias=latest"]),
            ("newest", ["alias=production", "base=edb"]),
        ]
    },
}  # fmt: skip


FEW = ("many", "outdated", "newest alias=production base=edb")  # of thousands; the last finds so few that it sorts them
IN_ORDER = [name for name in QUESTIONS if name not in ("one", "one by number", "many", "changes", FEW[-1])]


@seeded_once
@pytest.mark.parametrize("name", QUESTIONS)
def test_no_question_reads_a_table_from_end_to_end(
    seeded: Engine, store: FolderStore, tmp_path: Path, name: str
) -> None:
    """Every plan on a table with thousands of rows goes by an index, and every question finds something."""
    found, plans = explained(Client(seeded, store, tmp_path), name)

    assert getattr(found, "rows", found)
    assert any("adapter_versions" in line or "freshness" in line or "events" in line for line in plans)
    # The last two are empty here; receipts are looked at for a name that somebody being forgotten may have.
    small = [f"Seq Scan on {table}" for table in ("bases", "tenants", "tombstones", "forgettings")]
    assert [line for line in plans if "Seq Scan" in line and not any(one in line for one in small)] == []


@seeded_once
@pytest.mark.parametrize("name", IN_ORDER)
def test_a_page_is_read_along_an_index_in_its_order(
    seeded: Engine, store: FolderStore, tmp_path: Path, name: str
) -> None:
    """However many come after it: nothing is sorted but one adapter's jobs, nothing hashed, no helper waited for."""
    _, plans = explained(Client(seeded, store, tmp_path), name)

    sorted_by = [line for line in plans if "Sort Key" in line]
    assert [line for line in sorted_by if "jobs" not in line] == []
    assert not any("Gather" in line or "Hash Join" in line for line in plans)


@seeded_once
@pytest.mark.parametrize("name", ["one", "many"])
def test_a_lookup_fetches_one_row_of_four(seeded: Engine, store: FolderStore, tmp_path: Path, name: str) -> None:
    """The keys of user, adapter and alias hold all that is read of them."""
    _, plans = explained(Client(seeded, store, tmp_path), name)

    for key in ("uq_users_tenant_id_name", "uq_adapters_user_id_name", "pk_aliases"):
        assert any(f"Index Only Scan using {key}" in line for line in plans)


def explained(client: Client, name: str) -> tuple[Any, list[str]]:
    """What a question finds, and the lines of its statements' plans."""
    asked: list[tuple[str, Any]] = []

    def glancing(engine: Engine, tenant: TenantId, statement: Select[Any], values: Any) -> Any:  # as `glance`
        asked.append((str(statement.compile(dialect=engine.dialect)), values))
        return glance(engine, tenant, statement, values)

    event.listen(client.engine, "before_cursor_execute", ask := lambda *given: asked.append(given[2:4]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("registry.lookups.glance", glancing)
        found, plans = QUESTIONS[name](client), []
    event.remove(client.engine, "before_cursor_execute", ask)
    with transaction(client.engine) as session:
        queries.tenant_id(session, "acme")
        if name in FEW:  # thousands of rows are read sooner than some are looked up, a million are not
            session.connection().exec_driver_sql("SET LOCAL enable_seqscan = off")
        for statement, parameters in asked:
            if statement.startswith(("SELECT", "WITH")):
                explain = "" if "set_config" in statement else "EXPLAIN "
                rows = session.connection().exec_driver_sql(f"{explain}{statement}", parameters)
                plans += [str(row[0]) for row in rows]
    return found, plans
