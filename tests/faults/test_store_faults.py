"""Publishing while the store fails: 500, 503, 409, slow, broken off, or done and the answer lost."""

import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from sqlalchemy.engine import Engine

from registry import s3_store
from registry.errors import ObjectDiffers, StoreUnavailable
from registry.jobs import ClaimedJob
from registry.names import Reference
from registry.publishing import publish
from registry.s3_store import S3Store, s3_client
from registry.session import open_database
from registry.uploads import UPLOAD_LEASE, sweep
from tests.faults.invariants import (
    check_no_intent_is_left,
    check_nothing_is_left,
    check_readers_see_whole_versions,
)
from tests.faults.proxy import Proxy, proxy_before
from tests.registry.conftest import NOW, finished
from tests.servers import S3Server

ALICE = Reference.parse("acme/alice")
KEY = "t/acme/x"


@pytest.fixture
def proxy(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the S3 server, in boto3's environment instead of it."""
    with proxy_before(s3_server.url) as made:
        for name, value in (s3_server.environment() | {"AWS_ENDPOINT_URL_S3": made.url}).items():
            monkeypatch.setenv(name, value)
        yield made


@pytest.fixture
def store(proxy: Proxy) -> S3Store:
    """An empty bucket behind the proxy, by a client that does not wait for long."""
    quick = Config(read_timeout=0.7, retries={"mode": "standard", "max_attempts": 3})
    config = s3_client().meta.config.merge(quick)
    client = boto3.Session().client("s3", config=config, region_name="us-east-1")
    made = S3Store(f"test-{uuid.uuid4().hex[:16]}", client=client)
    made.set_up()
    return made


def check_all(engine: Engine, store: S3Store) -> None:
    """Whole versions without gaps, and after two sweeps nothing else."""
    sweep(engine, store, NOW + 3 * UPLOAD_LEASE)
    check_nothing_is_left(engine, store)
    sweep(engine, store, NOW + 6 * UPLOAD_LEASE)
    check_no_intent_is_left(engine)
    check_readers_see_whole_versions(engine, store, ALICE)


class ForAWhile:
    """A plan that goes wrong for a number of calls of a method."""

    def __init__(self, fault: str, calls: int, method: str = "PUT") -> None:
        self.fault, self.left, self.method = fault, calls, method

    def __call__(self, method: str, key: str) -> str:
        """The fault while any is left."""
        if method != self.method or not self.left:
            return ""
        self.left -= 1
        return self.fault


@pytest.fixture
def engine(home: Path) -> Iterator[Engine]:
    """A registry on SQLite: the faults are the store's."""
    opened = open_database(f"sqlite:///{home / 'registry.db'}")
    yield opened
    opened.dispose()


@pytest.mark.parametrize("fault", ["500", "503", "reset", "lost", "slow"])
def test_a_fault_that_passes_is_not_noticed(
    engine: Engine, store: S3Store, proxy: Proxy, job: ClaimedJob, fault: str
) -> None:
    """Each PUT goes through at the second try, also where the first one had been done."""
    proxy.plan = ForAWhile(fault, 1)

    done = publish(engine, store, job, finished(), NOW)

    assert (done.number, proxy.seen["PUT"] > 4) == (1, True)  # bucket, data, two files, and one again
    check_all(engine, store)


@pytest.mark.parametrize("fault", ["500", "503", "reset", "lost", "slow"])
def test_a_fault_that_stays_is_told_and_makes_no_version(
    engine: Engine, store: S3Store, proxy: Proxy, job: ClaimedJob, fault: str
) -> None:
    """Once it is over, the same job publishes version 1."""
    proxy.plan = lambda method, key: fault if method == "PUT" else ""
    with pytest.raises(StoreUnavailable):
        publish(engine, store, job, finished(), NOW)
    check_readers_see_whole_versions(engine, store, ALICE)
    proxy.plan = lambda method, key: ""

    assert publish(engine, store, job, finished(), NOW).number == 1

    check_all(engine, store)


@pytest.mark.parametrize("fault", ["500", "reset"])
def test_a_sweep_that_fails_half_way_is_done_by_the_next(
    engine: Engine, store: S3Store, proxy: Proxy, job: ClaimedJob, fault: str
) -> None:
    """No orphan stays because the store was away at the wrong moment."""
    proxy.plan = lambda method, key: fault if "manifest" in key else ""
    with pytest.raises(StoreUnavailable):
        publish(engine, store, job, finished(), NOW)
    proxy.plan = lambda method, key: fault if method in ("DELETE", "POST") else ""
    late = NOW + 2 * UPLOAD_LEASE
    with pytest.raises(StoreUnavailable):
        sweep(engine, store, late)
    proxy.plan = lambda method, key: ""

    assert len(sweep(engine, store, late + timedelta(seconds=1))) == 1
    assert list(store.keys("")) == [job.dataset_key]


def test_a_409_is_tried_again_until_the_other_write_is_over(store: S3Store, proxy: Proxy) -> None:
    """Somebody is writing: what is there can be read only afterwards, and if that write fails it is ours."""
    proxy.plan = ForAWhile("409", 2)

    assert store.put_new(KEY, b"1") is True
    assert store.get(KEY) == b"1"


@pytest.mark.parametrize(("theirs", "same"), [(b"1", True), (b"2", False)])
def test_after_a_409_the_others_bytes_are_compared(store: S3Store, proxy: Proxy, theirs: bytes, same: bool) -> None:
    """Equal ones are as good as ours; others are an error."""
    others = S3Store(store.bucket, client=store.client)

    def plan(method: str, key: str) -> str:
        if method != "PUT":
            return ""
        proxy.plan = lambda *_: ""
        others.put_new(KEY, theirs)  # the other write ends while ours is refused
        return "409"

    proxy.plan = plan
    if same:
        assert store.put_new(KEY, b"1") is False
        return
    with pytest.raises(ObjectDiffers):
        store.put_new(KEY, b"1")


def test_a_409_that_stays_is_told(store: S3Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as a missing object, which would blame the sweeper."""
    monkeypatch.setattr(s3_store, "_PAUSES", (0.01, 0.01))
    proxy.plan = lambda method, key: "409" if method == "PUT" else ""

    with pytest.raises(StoreUnavailable, match="being written elsewhere"):
        store.put_new(KEY, b"1")
