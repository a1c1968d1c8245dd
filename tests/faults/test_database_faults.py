"""Publishing while the database restarts, and while the disk is full."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event

from registry import jobs
from registry.errors import DatabaseUnavailable, RegistryError
from registry.jobs import ClaimedJob
from registry.names import Reference
from registry.publishing import publish
from registry.schema import migrate
from registry.session import open_database, transaction
from registry.store import FolderStore
from registry.uploads import UPLOAD_LEASE, sweep
from tests.conftest import set_up
from tests.faults.invariants import (
    check_no_intent_is_left,
    check_nothing_is_left,
    check_readers_see_whole_versions,
)
from tests.registry.conftest import LEASE, NOW, enqueue, finished
from tests.servers import new_database, restart_postgres, running_postgres

ALICE = Reference.parse("acme/alice")
Restart = Callable[[], None]


@pytest.fixture(scope="module")
def own_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Restart]]:
    """A PostgreSQL of this file's own, and how to restart it."""
    folder = tmp_path_factory.mktemp("own-postgres")
    with running_postgres(folder) as url:
        yield url, lambda: restart_postgres(folder)


@pytest.fixture
def engine(own_postgres: tuple[str, Restart]) -> Iterator[Engine]:
    """A registry on it."""
    opened = set_up(new_database(own_postgres[0]))
    yield opened
    opened.dispose()


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    """An empty folder store."""
    made = FolderStore(tmp_path / "store")
    made.set_up()
    return made


def check_all(engine: Engine, store: FolderStore) -> None:
    """Whole versions without gaps, and after two sweeps nothing else."""
    sweep(engine, store, NOW + 3 * UPLOAD_LEASE)
    check_nothing_is_left(engine, store)
    sweep(engine, store, NOW + 6 * UPLOAD_LEASE)
    check_no_intent_is_left(engine)
    check_readers_see_whole_versions(engine, store, ALICE)


def test_a_restart_between_transactions_is_not_noticed(
    engine: Engine, store: FolderStore, job: ClaimedJob, own_postgres: tuple[str, Restart]
) -> None:
    """The pool finds out that its connections are dead before it gives one out."""

    class Restarting(FolderStore):
        """The database restarts while files are uploaded."""

        def put_new(self, key: str, data: bytes) -> bool:
            own_postgres[1]()
            return super().put_new(key, data)

    assert publish(engine, Restarting(store.root), job, finished(), NOW).number == 1

    check_all(engine, store)


@pytest.mark.parametrize("statement", ["INSERT INTO uploads", "UPDATE adapters", "INSERT INTO aliases"])
def test_a_restart_inside_a_transaction_is_told_and_makes_no_version(
    engine: Engine, store: FolderStore, job: ClaimedJob, own_postgres: tuple[str, Restart], statement: str
) -> None:
    """In words and as an error of the registry, so that the job costs no attempt; tried again, it is version 1."""
    left = [own_postgres[1]]

    @event.listens_for(engine, "before_cursor_execute")
    def restart(_: Any, __: Any, text: str, *___: Any) -> None:  # SQLAlchemy's own
        if text.startswith(statement) and left:
            left.pop()()

    with pytest.raises(DatabaseUnavailable):
        publish(engine, store, job, finished(), NOW)
    check_readers_see_whole_versions(engine, store, ALICE)

    assert publish(engine, store, job, finished(), NOW).number == 1

    check_all(engine, store)


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    """A real file system of so many kilobytes in a folder; only root can have one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def free(folder: Path, pages: int) -> None:
    """Fill the disk but for so many pages."""
    ballast = folder / "ballast"
    ballast.unlink(missing_ok=True)
    space = os.statvfs(folder)
    ballast.write_bytes(bytes((space.f_bavail - pages) * space.f_bsize))


def test_a_full_disk_is_told_and_makes_no_version_however_much_room_is_left(tmp_path: Path) -> None:
    """Registry and store share it; page by page more room, until it is enough."""
    disk = tmp_path / "disk"
    with small_disk(disk, 4096):
        engine, store = open_database(f"sqlite:///{disk}/registry.db"), FolderStore(disk / "store")
        migrate(engine)
        store.set_up()
        with transaction(engine) as session:
            (asked,) = enqueue(session, "acme/alice", 1)
            (job,) = jobs.claim(session, "worker", LEASE, 1, NOW, [asked.job_id])
        store.put_new(job.dataset_key, b"data")
        said = list[str]()
        for pages in range(200):
            free(disk, pages)
            try:
                publish(engine, store, job, finished(), NOW)
                break
            except RegistryError as error:
                said.append(str(error))
                check_readers_see_whole_versions(engine, store, ALICE)

        assert len(said) > 2
        assert all("full" in words or "space" in words for words in said), said
        (disk / "ballast").unlink()
        check_all(engine, store)
        engine.dispose()
