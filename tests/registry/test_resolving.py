"""Many references at once: each comes to what it would have come to alone, in few statements."""

from pathlib import Path

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from registry import aliases, queries, resolving
from registry.client import Client
from registry.errors import NameRefused, NotFound, ObjectDiffers
from registry.fleet import Where
from registry.names import Reference
from registry.publishing import publish
from registry.resolved import Pulled
from registry.session import transaction
from registry.store import FolderStore
from tests.registry.conftest import NOW, Claim, finished

USERS = ("ada", "alice", "bob", "carol", "dave")


@pytest.fixture
def client(engine: Engine, store: FolderStore, tmp_path: Path, claim: Claim) -> Client:
    """A client with an empty cache, and two versions for each user of acme; the weights say whose and which."""
    for user in USERS:
        for job in claim(2, f"acme/{user}"):
            publish(engine, store, job, finished(f"{user} {job.dataset_digest}"), NOW)
    return Client(engine, store, tmp_path / "cache")


def owners(outcomes: list[Pulled]) -> list[str]:
    """Whose weights were pulled."""
    return [(one.folder / "weights.bin").read_text().split()[0] for one in outcomes if one.folder]


def test_many_come_in_their_order_each_with_its_own_bytes(client: Client) -> None:
    """By number, alias and name, one twice: as if they had been pulled one by one."""
    with transaction(client.engine) as session:
        acme = queries.tenant_id(session, "acme")
        first = Reference.parse("acme/bob:1")
        aliases.promote(session, acme, first, "production", actor="me", reason="x", now=NOW)
    asked = ["acme/dave:1", "acme/ada", "acme/bob@production", "acme/dave:2", "acme/ada", "acme/carol@latest"]

    outcomes = list(client.pull_many(asked))

    assert [one.error for one in outcomes] == [None] * 6
    assert [str(one.reference) for one in outcomes[:2]] == ["acme/dave:1", "acme/ada@latest"]
    assert [one.number for one in outcomes] == [1, 2, 1, 2, 2, 2]
    assert [one.folder for one in outcomes] == [client.pull(reference) for reference in asked]
    assert owners(outcomes) == ["dave", "ada", "bob", "dave", "ada", "carol"]


def test_each_bad_one_is_told_and_stops_no_other(client: Client, tmp_path: Path) -> None:
    """A damaged object, a user, a tenant and a version that are not there, and no reference at all."""
    damaged = tmp_path / "store" / client.resolve("acme/bob").prefix / "weights.bin"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    asked = ["acme/ada", "acme/bob", "acme/eve", "globex/ada", "acme/ada:9", "no reference", "acme/carol"]

    outcomes = list(client.pull_many(asked))

    kinds = [type(one.error) for one in outcomes]
    nothing = type(None)
    assert kinds == [nothing, ObjectDiffers, NotFound, NotFound, NotFound, NameRefused, nothing]
    assert owners(outcomes) == ["ada", "carol"]
    assert len(client.cache.entries()) == 2


def test_a_whole_tenant_is_pulled_page_by_page(
    client: Client, claim: Claim, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every adapter once, in order, whatever the page; conditions leave others out; another tenant has none of it."""
    monkeypatch.setattr(resolving, "PAGE", 2)
    for other in ("globex/ada", "acme/alice/notes"):
        publish(client.engine, store, claim(1, other)[0], finished(f"other {other}"), NOW)

    found = [one.reference for one in client.pull_all("acme")]
    chosen = [one.reference for one in client.pull_all("acme", where=Where.parse(["user=a*", "adapter=default"]))]

    assert [one.label for one in found if isinstance(one, Reference)] == [
        "acme/ada", "acme/alice", "acme/alice/notes", "acme/bob", "acme/carol", "acme/dave"
    ]  # fmt: skip
    assert [one.label for one in chosen if isinstance(one, Reference)] == ["acme/ada", "acme/alice"]
    assert list(client.pull_all("acme", "production")) == []
    with pytest.raises(NotFound, match="tenant"):
        list(client.pull_all("initech"))


def test_many_are_resolved_in_few_statements(client: Client) -> None:
    """However many there are on a page; by number and by alias are one each."""
    statements: list[str] = []
    event.listen(client.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))

    list(client.pull_many([f"acme/{user}{version}" for user in USERS for version in ("", ":1", ":2", "@latest")]))

    assert sum("adapter_versions" in one for one in statements) == 2
    assert len(statements) < 10
