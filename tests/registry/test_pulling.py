"""Pulls of many versions, and many pulls of one: fetched once, one bad one alone, warm without any network."""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from registry import known, pulling
from registry.client import Client
from registry.errors import (
    ManifestRefused,
    NotFound,
    ObjectDiffers,
    PullFailed,
    RegistryError,
    StoreUnavailable,
)
from registry.names import Reference
from registry.publishing import publish
from registry.schema import migrate
from registry.session import open_database
from registry.store import FolderStore
from tests.registry.conftest import NOW, Claim, finished

BOTH = ["acme/alice:1", "acme/alice:2"]


class Watched(FolderStore):
    """A store that keeps what it was asked for, and fails as often as it is told to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: list[str] = []
        self.failures = 0
        self.before_failing: Callable[[], None] = lambda: None

    def stream(self, key: str) -> Iterator[bytes]:
        """An object, or a store that is away."""
        self.asked.append(key)
        if self.failures:
            self.failures -= 1
            self.before_failing()
            raise StoreUnavailable("far", "is away", "try again")
        yield from super().stream(key)


@pytest.fixture
def engine(home: Path) -> Iterator[Engine]:
    """A registry; what asks it is tried on each kind of database elsewhere."""
    opened = open_database(f"sqlite:///{home / 'registry.db'}")
    yield opened
    opened.dispose()


@pytest.fixture
def store(tmp_path: Path) -> Watched:
    """An empty one."""
    made = Watched(tmp_path / "store")
    made.set_up()
    return made


@pytest.fixture
def client(engine: Engine, store: Watched, tmp_path: Path) -> Client:
    """A client with an empty cache."""
    return Client(engine, store, tmp_path / "cache")


@pytest.fixture
def published(engine: Engine, store: Watched, claim: Claim) -> None:
    """Two versions for alice."""
    for job in claim(2):
        publish(engine, store, job, finished(f"alice {job.dataset_digest}"), NOW)


def test_a_store_that_is_away_ends_it(
    client: Client, published: None, store: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,000 versions must not wait for it one after another."""
    monkeypatch.setattr(pulling, "_GIVE_UP", 3)
    store.failures = 10**6
    seen = []

    with pytest.raises(StoreUnavailable):
        for done in client.pull_many(BOTH * 3):
            seen.append(done)

    assert sum(isinstance(one.error, StoreUnavailable) for one in seen) == 3  # one may have waited for two of them


def test_who_stops_reading_leaves_nothing_running(client: Client, published: None) -> None:
    """A loop over the outcomes may break."""
    before = threading.active_count()
    outcomes = client.pull_many(BOTH * 100)
    next(outcomes)
    outcomes.close()  # type: ignore[attr-defined]  # what a `for` that breaks does to a generator

    assert threading.active_count() == before
    assert list((client.cache.root / ".pulling").iterdir()) == []


def test_many_pulls_of_one_version_fetch_it_once(client: Client, published: None, store: Watched) -> None:
    """100 threads, two files, two objects asked for."""
    with ThreadPoolExecutor(100) as pool:
        folders = set(pool.map(lambda _: client.pull("acme/alice"), range(100)))

    assert len(folders) == 1
    assert len(store.asked) == 2


def test_one_failed_leader_fails_nobody_else(client: Client, published: None, store: Watched) -> None:
    """The next in line tries again."""
    store.failures = 1
    found = client.resolve("acme/alice")
    store.asked.clear()

    outcomes = at_once(16, lambda: client.fetch(found))

    assert sorted(type(one).__name__ for one in outcomes) == ["PosixPath"] * 15 + ["StoreUnavailable"]


def test_a_store_that_is_away_is_not_asked_by_each_in_line(client: Client, published: None, store: Watched) -> None:
    """Who waited while two others failed is told how, instead of finding out in its turn."""
    found, arrived = client.resolve("acme/alice"), threading.Barrier(16)
    store.failures, store.before_failing = 10**6, lambda: time.sleep(0.5)  # until all the others are in line
    store.asked.clear()

    def pull() -> Path:
        arrived.wait()
        return client.fetch(found)

    outcomes = at_once(16, pull)

    assert {type(one) for one in outcomes} == {StoreUnavailable, PullFailed}
    assert len(store.asked) <= 2 * 8  # files of a version, by half of them at the most
    assert "is away" in str(next(one for one in outcomes if isinstance(one, PullFailed)))

    store.failures = 0
    assert client.fetch(found).is_dir()


def at_once(count: int, pull: Callable[[], object]) -> list[object]:
    """What each of many threads was given, or raised."""

    def attempt(_: int) -> object:
        try:
            return pull()
        except RegistryError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(attempt, range(count)))


def test_a_warm_pull_of_a_pinned_version_needs_no_network(client: Client, published: None, store: Watched) -> None:
    """Neither store nor registry; by alias, which moves, the registry is asked."""
    folder = client.pull("acme/alice:2")
    store.asked.clear()
    connections: list[object] = []
    event.listen(client.engine, "checkout", lambda *given: connections.append(given[0]))

    assert client.pull("acme/alice:2") == folder
    assert connections == []
    assert client.pull("acme/alice") == folder
    assert connections != []
    assert store.asked == []


def test_what_a_pinned_version_was_is_asked_again_after_a_day(
    client: Client, published: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number may have been given out anew since: the user was forgotten and came back."""
    client.pull("acme/alice:2")
    wanted = Reference.parse("acme/alice:2")

    assert client.known.recall(wanted) is not None
    monkeypatch.setattr(known, "TRUSTED_SECONDS", 0)
    assert client.known.recall(wanted) is None


def test_what_is_being_used_is_not_evicted(client: Client, published: None) -> None:
    """An engine that reads a folder now and then says so."""
    with client.using("acme/alice") as folder:
        assert client.cache.clear() == []
        assert (folder / "weights.bin").exists()

    assert [one.folder for one in client.cache.clear()] == [folder]


def test_what_one_registry_said_counts_for_no_other(
    client: Client, published: None, store: Watched, tmp_path: Path
) -> None:
    """Two factories may share a home."""
    client.pull("acme/alice:1")
    other = open_database(f"sqlite:///{tmp_path / 'other.db'}")
    migrate(other)

    with pytest.raises(NotFound):
        Client(other, store, tmp_path / "cache").pull("acme/alice:1")
    other.dispose()


def test_the_cache_holds_no_users_name(client: Client, published: None, tmp_path: Path) -> None:
    """What is pinned is kept under digests."""
    client.pull("acme/alice:1")

    cached = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != "weights.bin"]
    assert len(cached) == 2
    assert not any("alice" in str(path.relative_to(tmp_path)) or b"alice" in path.read_bytes() for path in cached)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"number": 1}', b"\xff"])
def test_a_record_that_cannot_be_read_is_asked_for_again(client: Client, published: None, damage: bytes) -> None:
    """As after a power cut."""
    folder = client.pull("acme/alice:1")
    (record,) = (client.cache.root / ".known").iterdir()
    record.write_bytes(damage)

    assert client.pull("acme/alice:1") == folder
    assert client.known.recall(Reference.parse("acme/alice:1")) is not None


def test_a_cached_version_that_was_cut_short_is_fetched_again(client: Client, published: None, store: Watched) -> None:
    """Sizes are looked at on every pull, bytes with `verify`."""
    folder = client.pull("acme/alice")
    (folder / "weights.bin").write_text("")

    assert (client.pull("acme/alice") / "weights.bin").read_text().startswith("alice")


@pytest.mark.parametrize("asked_for", [0.0, time.time() + 10**6], ids=["before the start", "in the future"])
def test_a_version_that_was_not_seen_since_the_machine_was_started_is_hashed(
    client: Client, published: None, store: Watched, asked_for: float
) -> None:
    """A power cut may have kept a file's length and lost its bytes; after that, once, sizes are enough again."""
    folder = client.pull("acme/alice")
    good = (folder / "weights.bin").read_text()
    (folder / "weights.bin").write_text("\0" * len(good))
    os.utime(folder, (asked_for, asked_for))

    assert (client.pull("acme/alice") / "weights.bin").read_text() == good
    store.asked.clear()
    os.utime(folder, (asked_for, asked_for))
    assert client.pull("acme/alice") == folder
    assert store.asked == []


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"files": {"weights.bin": 3}}', "nonsense", "[" * 10**5])
def test_a_manifest_that_says_nothing_is_refused(
    engine: Engine, client: Client, store: Watched, claim: Claim, manifest: str
) -> None:
    """In one line, and nothing of it is kept."""
    done = finished()
    publish(engine, store, claim()[0], replace(done, files={**done.files, "manifest.json": manifest.encode()}), NOW)

    with pytest.raises(ManifestRefused, match="does not name its files|is not JSON"):
        client.pull("acme/alice")

    assert client.cache.entries() == []


def test_a_manifest_that_contradicts_the_registry_is_refused(
    engine: Engine, client: Client, store: Watched, claim: Claim
) -> None:
    """What it names, and what came, must be one."""
    other = finished("other weights").files["manifest.json"]
    done = finished("weights")
    publish(engine, store, claim()[0], replace(done, files={**done.files, "manifest.json": other}), NOW)

    with pytest.raises(ObjectDiffers, match="weights.bin"):
        client.pull("acme/alice")

    assert client.cache.entries() == []


def test_a_file_that_the_manifest_does_not_name_is_refused(
    client: Client, published: None, store: Watched, tmp_path: Path
) -> None:
    """A forged ticket would leave it in the folder that every later pull of the version gives."""
    found = client.resolve("acme/alice")
    store.put_new(f"{found.prefix}/tokenizer.json", b"evil")
    evil: dict[str, int | str] = {"sha256": hashlib.sha256(b"evil").hexdigest(), "size": 4}

    with pytest.raises(ManifestRefused, match=r"does not name 'tokenizer\.json'"):
        client.fetch(replace(found, files={**found.files, "tokenizer.json": evil}))

    assert client.cache.entries() == []
    assert sorted(path.name for path in client.pull("acme/alice").iterdir()) == ["manifest.json", "weights.bin"]
