"""Look-ups in one round trip: as well kept apart, and as hard to kill, as in a transaction."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
from sqlalchemy import Integer, cast, delete, literal, select, text, update
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DataError
from sqlalchemy.pool import QueuePool

from registry.client import Client
from registry.errors import DatabaseUnavailable, NotFound, RegistryError
from registry.glance import glance
from registry.models import Schedule, Tenant, User
from registry.publishing import publish
from registry.session import reading, transaction
from registry.store import FolderStore
from registry.tenancy import enter
from tests.conftest import tampering
from tests.registry.conftest import NOW, Claim, finished
from tests.registry.twins import OURS, THEIRS, tenant_of
from tests.servers import APPLICATION, execute

SETTINGS = text("SELECT current_setting('lora.tenant', true), current_setting('lora.tenant_name', true)")
REFERENCES = [f"{tenant}/alice{which}" for tenant in (OURS, THEIRS) for which in ("", ":1", ":9", "@canary", "@none")]


@pytest.fixture
def client(twins: Engine, store: FolderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    """A client that knows both tenants, on connections that no slow machine lets grow old."""
    monkeypatch.setattr("registry.session._IDLE_SECONDS", 3600)
    made = Client(twins, store, tmp_path / "cache")
    for tenant in (OURS, THEIRS):
        made.resolve(f"{tenant}/alice")
    return made


QUESTIONS: dict[str, Callable[[Client], object]] = {
    "alias": lambda client: client.resolve("acme/alice@production"),
    "number": lambda client: client.resolve("acme/alice:2"),
    "many": lambda client: client.current("acme", ["alice", "bert", "nobody"]),
}


def test_a_look_up_is_one_round_trip(client: Client, tmp_path: Path) -> None:
    """By what PostgreSQL's protocol says: each time that the server has answered and waits is one."""
    for name, question in QUESTIONS.items():
        trace = tmp_path / name
        with trace.open("w") as file:
            only_connection(client.engine).pgconn.trace(file.fileno())
            for _ in range(10):
                question(client)
            only_connection(client.engine).pgconn.untrace()

        assert trace.read_text().count("ReadyForQuery") == 10, name


def only_connection(engine: Engine) -> Any:  # psycopg's
    """The pool's, which nobody uses."""
    assert isinstance(engine.pool, QueuePool)
    assert engine.pool.checkedin() == 1
    pooled = engine.raw_connection()
    connection = pooled.dbapi_connection
    pooled.close()
    return connection


def test_the_setting_goes_no_further_than_the_look_whatever_comes_of_it(client: Client) -> None:
    """Found, not found, failed half-way: the next transaction there sees nobody's rows, and can be undone."""
    theirs = tenant_of(client.engine, THEIRS)
    broken = select(cast(literal("x"), Integer)).select_from(User)
    for look in (
        lambda: client.resolve(f"{THEIRS}/alice"),
        lambda: client.resolve(f"{THEIRS}/nobody"),
        lambda: glance(client.engine, theirs, broken, {}),
    ):
        with suppress(NotFound, DataError):
            look()

        only_connection(client.engine)
        with transaction(client.engine) as session:
            assert set(session.execute(SETTINGS).one()) <= {"", None}
            assert session.scalars(select(User)).all() == []
        with pytest.raises(KeyError), transaction(client.engine) as session:
            enter(session, theirs)
            session.execute(delete(Schedule))
            raise KeyError
        with reading(client.engine) as session:
            enter(session, theirs)
            assert session.scalars(select(Schedule)).all()


def test_a_look_without_any_filter_shows_one_tenants_rows(twins: Engine) -> None:
    """Row-level security is in force for it."""
    for name in (OURS, THEIRS):
        tenant = tenant_of(twins, name)
        assert {row[0] for row in glance(twins, tenant, select(User.tenant_id), {})} == {tenant}


def test_threads_of_two_tenants_on_the_same_connections_are_told_their_own(client: Client) -> None:
    """Each is told what it is told alone, in any order."""
    alone = {reference: told(client, reference) for reference in REFERENCES}
    asked = Random(3).choices(REFERENCES, k=600)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda one: told(client, one), asked))

    assert answers == [alone[one] for one in asked]
    assert f"t/{OURS}/" in alone[f"{OURS}/alice"]
    assert f"t/{THEIRS}/" in alone[f"{THEIRS}/alice"]


def told(client: Client, reference: str) -> str:
    """What a client says to a reference."""
    try:
        return repr(client.resolve(reference))
    except RegistryError as error:
        return str(error)


@pytest.mark.parametrize("noticed", [True, False], ids=["noticed", "not noticed"])
def test_a_connection_that_the_server_ended_costs_a_look_nothing(
    client: Client, monkeypatch: pytest.MonkeyPatch, noticed: bool
) -> None:
    """Whether its end has come in when the next look begins or, as in a race, not yet."""
    if not noticed:
        monkeypatch.setattr("registry.session._heard", lambda _: False)
    before = client.resolve("acme/alice")

    for _ in range(3):
        end(client.engine)
        assert client.resolve("acme/alice") == before
        end(client.engine)
        assert set(client.current("acme", ["alice"])) == {"alice"}


@pytest.mark.parametrize("idle", [0, 3600], ids=["idle", "just used"])
def test_a_transaction_begins_on_a_living_connection(
    twins: Engine, monkeypatch: pytest.MonkeyPatch, idle: float
) -> None:
    """One that was idle is asked, and one that was not has heard of its end; writers are not told twice."""
    monkeypatch.setattr("registry.session._IDLE_SECONDS", idle)
    if not idle:
        monkeypatch.setattr("registry.session._heard", lambda _: False)
    theirs = tenant_of(twins, THEIRS)

    end(twins)
    with transaction(twins) as session:
        enter(session, theirs)
        session.execute(delete(Schedule))


def end(engine: Engine) -> None:
    """End the pool's only connection, as a restart or an administrator would, and wait until it is over."""
    connection = only_connection(engine)
    owner = engine.url.set(username="postgres").render_as_string(hide_password=False)
    execute(owner, f"SELECT pg_terminate_backend({connection.info.backend_pid}, 10000)")


def test_a_tenant_that_was_made_anew_is_found(engine: Engine, store: FolderStore, claim: Claim, tmp_path: Path) -> None:
    """Under its old name, by a client that remembers the tenant that was there before."""
    publish(engine, store, claim()[0], finished("old"), NOW)
    client = Client(engine, store, tmp_path / "cache")
    old = client.resolve("acme/alice")
    with tampering(engine) as session:
        session.execute(update(Tenant).values(name="acme-before"))
        session.execute(update(User).values(name="alice-before"))

    publish(engine, store, claim(reference="acme/bob")[0], finished("new"), NOW)

    assert set(client.current("acme", ["alice", "bob"])) == {"bob"}
    assert client.resolve("acme/bob").sha256 != old.sha256
    with pytest.raises(NotFound):
        client.resolve("acme/alice")


def test_what_a_look_may_not_do_is_told_with_what_to_do(client: Client) -> None:
    """As in a transaction."""
    owner = client.engine.url.set(username="postgres").render_as_string(hide_password=False)
    execute(owner, f"REVOKE SELECT ON aliases FROM {APPLICATION}")

    with pytest.raises(DatabaseUnavailable, match="permission denied for table aliases.*lora setup"):
        client.resolve("acme/alice")
