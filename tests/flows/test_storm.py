"""A small storm on real servers, each of which is killed once in the middle of it: everybody is served exactly once."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.storms.chaos import supervised
from benchmarks.storms.counts import count
from benchmarks.storms.crowd import add_everybody, make_crowd
from benchmarks.storms.servers import postgres_programs, running_site, start_workers
from benchmarks.storms.watching import Watch, watching
from registry.session import open_database
from registry.store import open_store

USERS, WORKERS = 24, 2
KILLED = ("worker-1", "postgres", "store", "worker-2")
PATIENCE_SECONDS = 240  # not how long it takes: after so long something hangs

pytestmark = [
    pytest.mark.long,
    pytest.mark.slow,
    pytest.mark.xdist_group("stack"),  # one set of servers at a time
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not (shutil.which("radosgw") and postgres_programs()),
        reason="needs Ceph RGW and the system's PostgreSQL; run infra/install-test-servers",
    ),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Everything's; PostgreSQL runs as another user where the tests run as root, and must get there."""
    with tempfile.TemporaryDirectory(prefix="storm-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_workers_database_and_store_are_killed_and_everybody_is_served_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One version each, whole, and nothing left over; with Prefect, and at scale: `benchmarks/storm.py --kill`."""
    crowd = make_crowd(USERS, 0, folder)
    settings = {"LORA_SLOTS": "8", "LORA_DEVICE": "cpu", "LORA_BASE": str(crowd.base), "LORA_LEASE_SECONDS": "5"}
    with running_site(folder, on_disk=True, settings=settings, prefect=False) as site:
        for name, value in site.environment.items():
            monkeypatch.setenv(name, value)
        add_everybody(crowd, site.environment)
        engine = open_database(site.environment["LORA_DATABASE_URL"])
        watch = Watch(site, engine)
        start_workers(site, WORKERS)
        with watching(watch), supervised(site, watch, seed=0, pause_seconds=0) as chaos:
            for number, name in enumerate(KILLED):
                _until(watch, 4 * number + 1)
                chaos.kill(name, away_seconds=1)
            _until(watch, USERS)
        counted = count(engine, open_store(site.environment["LORA_STORE_URL"]), USERS)
        engine.dispose()

    assert counted.wrong == ()
    assert counted.versions == USERS
    assert tuple(mark["service"] for mark in chaos.marks if mark["how"] == "killed") == KILLED


def _until(watch: Watch, users: int) -> None:
    """Wait until so many jobs are over."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not watch.samples or watch.samples[-1]["over"] + watch.samples[-1]["failed"] < users:
        assert time.monotonic() < until, f"it hangs: {watch.samples[-1:]}"
        time.sleep(0.2)
