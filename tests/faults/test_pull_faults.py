"""Pulls from a real S3 server while answers are damaged, broken off or counted, and pullers are killed."""

import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import Engine

from registry.client import Client
from registry.errors import ObjectDiffers, StoreUnavailable
from registry.jobs import ClaimedJob
from registry.publishing import Published, publish
from registry.s3_store import S3Store
from registry.session import open_database
from tests.faults.proxy import Proxy, proxy_before
from tests.registry.conftest import NOW, Claim, finished
from tests.registry.crowd import release, start_crowd
from tests.servers import S3Server


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the S3 server, in boto3's environment instead of it."""
    with proxy_before(s3_server.url) as made:
        for name, value in (s3_server.environment() | {"AWS_ENDPOINT_URL_S3": made.url}).items():
            monkeypatch.setenv(name, value)
        yield made


@pytest.fixture
def store(proxy: Proxy) -> S3Store:
    """An empty bucket behind the proxy."""
    made = S3Store(f"test-{uuid.uuid4().hex[:16]}")
    made.set_up()
    return made


@pytest.fixture
def engine(home: Path) -> Iterator[Engine]:
    """A registry that other processes can open too."""
    opened = open_database(f"sqlite:///{home / 'registry.db'}")
    yield opened
    opened.dispose()


@pytest.fixture
def published(engine: Engine, store: S3Store, claim: Claim) -> Published:
    """Alice's version 1, of two files."""
    (job,) = claim()
    return publish(engine, store, job, finished("weights" * 1000), NOW)


@pytest.fixture
def client(engine: Engine, store: S3Store, tmp_path: Path) -> Client:
    """A client with an empty cache."""
    return Client(engine, store, tmp_path / "cache")


def crowd(client: Client, store: S3Store, pulls: int) -> Any:  # a process
    """Another process of this machine, about to pull."""
    return start_crowd(
        client.engine.url.render_as_string(), f"s3://{store.bucket}", client.cache.root, "acme/alice", pulls
    )


def test_200_pulls_in_two_processes_are_one_download(
    client: Client, store: S3Store, proxy: Proxy, published: Published
) -> None:
    """Two files, two GETs, however many want them at once."""
    crowds = [crowd(client, store, 100) for _ in range(2)]
    before = proxy.seen["GET"]

    given = release(crowds)

    assert [Path(one).name for one in given] == [published.served_name] * 2
    assert proxy.seen["GET"] - before == 2


def test_a_puller_that_is_killed_leaves_its_place_to_the_next(
    client: Client, store: S3Store, proxy: Proxy, published: Published
) -> None:
    """In the middle of its download, while others wait for it."""
    under_way, go_on = threading.Event(), threading.Event()

    def hold(method: str, key: str) -> str:
        if "weights.bin" in key:
            under_way.set()
            go_on.wait(60)
        return ""

    proxy.plan = hold
    leader, followers = crowd(client, store, 1), crowd(client, store, 8)
    assert leader.stdin
    leader.stdin.write("\n")
    leader.stdin.flush()
    assert under_way.wait(60)

    followers.stdin.write("\n")
    followers.stdin.flush()
    leader.kill()
    leader.wait()
    go_on.set()
    given = followers.communicate()[0].splitlines()

    assert [Path(one).name for one in given] == [published.served_name]
    assert list((client.cache.root / ".pulling").iterdir()) == []
    assert client.pull("acme/alice", verify=True) == Path(given[0])
    assert leader.communicate()[0] == ""


@pytest.mark.parametrize("file", ["weights.bin", "manifest.json"])
def test_a_bit_that_changed_on_the_way_is_refused(
    client: Client, proxy: Proxy, published: Published, file: str
) -> None:
    """Nothing of the version can be seen in the cache; the next pull is clean."""
    proxy.plan = lambda method, key: "flipped" if file in key else ""
    with pytest.raises(ObjectDiffers, match=file):
        client.pull("acme/alice")

    assert client.cache.entries() == []
    proxy.plan = lambda method, key: ""
    assert (client.pull("acme/alice") / "weights.bin").read_text() == "weights" * 1000


def test_a_download_that_breaks_off_goes_on_where_it_was(client: Client, proxy: Proxy, published: Published) -> None:
    """Twice in a row; what cannot be had for good is told."""
    cuts = 2

    def cut(method: str, key: str) -> str:
        nonlocal cuts
        if "weights.bin" not in key or not cuts:
            return ""
        cuts -= 1
        return "cut"

    proxy.plan = cut
    assert (client.pull("acme/alice") / "weights.bin").read_text() == "weights" * 1000

    cuts = 10**6
    client.cache.clear()
    with pytest.raises(StoreUnavailable, match="broke off"):
        client.pull("acme/alice")
    assert client.cache.entries() == []


def test_connections_are_kept_between_pulls(
    client: Client, engine: Engine, store: S3Store, proxy: Proxy, claim: Claim
) -> None:
    """40 versions of two files by 32 threads: no thread connects anew for each file."""
    jobs: list[ClaimedJob] = [claim(1, f"acme/user{number}")[0] for number in range(40)]
    for number, job in enumerate(jobs):
        publish(engine, store, job, finished(f"weights {number}"), NOW)
    before, gets = proxy.connections, proxy.seen["GET"]

    outcomes = list(client.pull_all("acme"))

    assert [one.error for one in outcomes] == [None] * 40
    assert proxy.seen["GET"] - gets == 80
    assert proxy.connections - before <= 32
