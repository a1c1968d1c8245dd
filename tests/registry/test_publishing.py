"""Bytes first, row second: exactly one version, whatever dies when."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy.engine import Engine

from registry import jobs, queries, together
from registry.errors import ContentDiffers, LeaseLost
from registry.models import Upload
from registry.names import Reference
from registry.publishing import publish
from registry.session import reading, transaction
from registry.store import FolderStore
from registry.uploads import UPLOAD_LEASE, sweep
from tests.conftest import looking, set_up
from tests.registry.conftest import LEASE, NOW, Claim, enqueue, finished, versions

ALICE = Reference.parse("acme/alice")


def latest(engine: Engine) -> int | None:
    """What `latest` points to."""
    with reading(engine) as session:
        tenant = queries.tenant_id(session, "acme")
        adapter = queries.holder(session, tenant, "alice", "default").adapter.id
        return queries.aliases(session, tenant, adapter).get("latest")


def test_an_accepted_version_is_there_whole_and_latest(engine: Engine, store: FolderStore, claim: Claim) -> None:
    """Row, files, alias, scores, event and closed job come together."""
    (job,) = claim()

    done = publish(engine, store, job, finished(), NOW)

    assert (done.number, done.accepted, latest(engine)) == (1, True, 1)
    assert sorted(store.keys("")) == [f"{done.prefix}/manifest.json", f"{done.prefix}/weights.bin"]
    with reading(engine) as session:
        tenant = queries.tenant_id(session, "acme")
        version = queries.version(session, tenant, ALICE)
        assert queries.scores(session, tenant, version) == {"base": {"loss": 2.0}, "candidate": {"loss": 1.0}}
        dataset, base, made_by = queries.lineage(session, tenant, version)
        assert (dataset.digest, base.digest, made_by.state) == (job.dataset_digest, "b" * 64, "published")


def test_a_refused_version_is_kept_and_latest_does_not_move(engine: Engine, store: FolderStore, claim: Claim) -> None:
    """The gate's no is a fact with bytes, not a gap."""
    first, second = claim(2)
    publish(engine, store, first, finished("good"), NOW)

    done = publish(engine, store, second, finished("worse", accepted=False), NOW)

    assert (done.number, latest(engine)) == (2, 1)
    assert [version.state for version in versions(engine)] == ["refused", "accepted"]


@pytest.mark.parametrize("figure", [float("nan"), float("inf"), float("-inf")])
def test_a_figure_that_is_no_number_is_recorded_as_none(
    engine: Engine, store: FolderStore, claim: Claim, figure: float
) -> None:
    """The perplexity of a bad adapter may be infinite; JSON knows no such thing."""
    scores = {"base": {"loss": 2.0, "perplexity": figure}, "candidate": {"loss": figure}}

    publish(engine, store, claim()[0], replace(finished(accepted=False), scores=scores), NOW)

    (version,) = versions(engine)
    assert (version.loss, version.gain) == (None, None)
    with reading(engine) as session:
        recorded = queries.scores(session, queries.tenant_id(session, "acme"), version)
    assert recorded == {"base": {"loss": 2.0, "perplexity": None}, "candidate": {"loss": None}}


def test_publishing_again_returns_the_same_version(engine: Engine, store: FolderStore, claim: Claim) -> None:
    """The answer of the first call may have been lost."""
    (job,) = claim()

    first = publish(engine, store, job, finished(), NOW)

    assert publish(engine, store, job, finished(), NOW) == first
    assert len(versions(engine)) == 1


def test_the_same_job_with_other_content_is_an_error(engine: Engine, store: FolderStore, claim: Claim) -> None:
    """An idempotency key that means two things would hide a bug for ever."""
    (job,) = claim()
    publish(engine, store, job, finished("one"), NOW)

    with pytest.raises(ContentDiffers, match="version 1"):
        publish(engine, store, job, finished("two"), NOW)

    assert len(versions(engine)) == 1


def test_a_worker_that_lost_its_lease_publishes_nothing(engine: Engine, store: FolderStore, claim: Claim) -> None:
    """Slow is not dead: its fence is old, so the database says no."""
    (slow,) = claim(worker="slow")
    with transaction(engine) as session:
        (fast,) = jobs.claim(session, "fast", LEASE, 1, NOW + 2 * LEASE)

    with pytest.raises(LeaseLost):
        publish(engine, store, slow, finished("slow"), NOW)
    done = publish(engine, store, fast, finished("fast"), NOW)

    assert [version.sha256 for version in versions(engine)] == [done.sha256]
    with pytest.raises(LeaseLost):  # its other bytes are no bug of its own
        publish(engine, store, slow, finished("slow"), NOW)


def test_latest_does_not_move_back_to_what_was_asked_for_earlier(
    engine: Engine, store: FolderStore, claim: Claim
) -> None:
    """The older data's training may take longer than the newer's."""
    (older,) = claim()
    with transaction(engine) as session:
        *_, asked = enqueue(session, "acme/alice", 2, now=NOW + timedelta(seconds=1))
        (newer,) = jobs.claim(session, "w", LEASE, 1, NOW, [asked.job_id])

    publish(engine, store, newer, finished("new"), NOW)
    late = publish(engine, store, older, finished("old"), NOW)

    assert (late.number, late.accepted, latest(engine)) == (2, True, 1)


def test_versions_have_no_gaps_with_64_publishers_at_once(engine: Engine, store: FolderStore, claim: Claim) -> None:
    """1 to 64, and nobody meets an error, on both databases."""
    claimed = claim(64)

    with ThreadPoolExecutor(64) as pool:
        done = list(pool.map(lambda job: publish(engine, store, job, finished(str(job.id)), NOW), claimed))

    assert sorted(one.number for one in done) == list(range(1, 65))
    assert sorted(version.number for version in versions(engine)) == list(range(1, 65))


@pytest.mark.slow
def test_256_publishers_of_one_adapter_meet_no_error_and_leave_no_gap(
    postgres_url: str, store: FolderStore
) -> None:  # fmt: skip
    """More than there are connections: whoever waits gets its turn."""
    opened = set_up(postgres_url)
    with transaction(opened) as session:
        asked = enqueue(session, "acme/alice", 256)
    with transaction(opened) as session:
        claimed = [jobs.claim(session, "worker", LEASE, 1, NOW, [one.job_id])[0] for one in asked]

    with ThreadPoolExecutor(256) as pool:
        done = list(pool.map(lambda job: publish(opened, store, job, finished(str(job.id)), NOW), claimed))

    assert sorted(one.number for one in done) == list(range(1, 257))
    assert sorted(version.number for version in versions(opened)) == list(range(1, 257))
    opened.dispose()


def test_a_served_name_is_never_used_twice(engine: Engine, store: FolderStore, claim: Claim) -> None:
    """Engines cache by name; equal weights of two jobs still are two names."""
    done = [publish(engine, store, job, finished("equal"), NOW) for job in claim(3)]

    assert len({one.served_name for one in done}) == 3
    assert all(len(one.served_name) <= 63 for one in done)


def test_versions_cannot_be_rewritten(engine: Engine, store: FolderStore, claim: Claim) -> None:
    """Rows are added and marked, never rewritten."""
    publish(engine, store, claim()[0], finished(), NOW)

    with pytest.raises(RuntimeError, match="immutable"), transaction(engine) as session:
        queries.version(session, queries.tenant_id(session, "acme"), ALICE).sha256 = "0" * 64


class DyingStore(FolderStore):
    """A store whose process dies after a number of writes."""

    def __init__(self, root: Path, writes: int) -> None:
        super().__init__(root)
        self.left = writes

    def put_new(self, key: str, data: bytes) -> bool:
        """Write, or die instead."""
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().put_new(key, data)


@pytest.mark.parametrize("writes", [0, 1])
def test_a_death_between_uploads_leaves_nothing_visible_and_the_sweep_clears_it(
    engine: Engine, store: FolderStore, claim: Claim, writes: int
) -> None:
    """Then the next holder publishes version 1, and no orphan byte is left."""
    (job,) = claim()
    with pytest.raises(KeyboardInterrupt):
        publish(engine, DyingStore(store.root, writes), job, finished(), NOW)
    assert versions(engine) == []
    later = NOW + UPLOAD_LEASE + timedelta(seconds=1)
    with transaction(engine) as session:
        (again,) = jobs.claim(session, "next", LEASE, 1, later)

    done = publish(engine, store, again, finished(), later)
    swept = sweep(engine, store, later)
    sweep(engine, store, later + 2 * UPLOAD_LEASE)

    assert len(swept) == writes
    assert done.number == 1
    assert sorted(store.keys("")) == [f"{done.prefix}/manifest.json", f"{done.prefix}/weights.bin"]
    with looking(engine) as session:
        assert session.query(Upload).count() == 0


def test_a_retry_after_a_death_between_upload_and_commit_finds_its_bytes(
    engine: Engine, store: FolderStore, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same worker may simply try again: nothing is uploaded twice."""
    (job,) = claim()
    with monkeypatch.context() as patched:
        patched.setattr(together, "settle", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            publish(engine, store, job, finished(), NOW)

    done = publish(engine, store, job, finished(), NOW)

    assert done.number == 1
    assert len(list(store.keys(""))) == 2


KILLED = """
import os, signal, sys, uuid
from pathlib import Path
from registry import jobs, publishing, together
from registry.session import open_database, transaction
from registry.store import FolderStore
from registry.uploads import UPLOAD_LEASE, sweep
from tests.registry.conftest import LEASE, NOW, finished

url, root, where = sys.argv[1:]
engine = open_database(url)
with transaction(engine) as session:
    (job,) = jobs.claim(session, "doomed", LEASE, 1, NOW)
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
class Doomed(FolderStore):
    def put_new(self, key, data):
        if where == "manifest" and key.endswith("manifest.json"):
            die()
        wrote = super().put_new(key, data)
        if where == "uploaded" and key.endswith("manifest.json"):
            die()
        return wrote
if where == "commit":
    write = together.write
    together.write = lambda *given: (write(*given), die())
publishing.publish(engine, Doomed(Path(root)), job, finished(), NOW)
if where == "after":
    die()
"""


@pytest.mark.parametrize("where", ["manifest", "uploaded", "commit", "after"])
def test_a_kill_during_publish_gives_one_version_when_run_again(engine: Engine, store: FolderStore, where: str) -> None:
    """SIGKILL in another process: nothing is caught, nothing is cleaned up, and still exactly one version."""
    with transaction(engine) as session:
        enqueue(session, "acme/alice", 1)

    url = engine.url.render_as_string(hide_password=False)
    dead = subprocess.run([sys.executable, "-c", KILLED, url, store.root, where], cwd=Path(__file__).parents[2])
    assert dead.returncode == -signal.SIGKILL
    later = NOW + UPLOAD_LEASE + LEASE
    with transaction(engine) as session:
        again = jobs.claim(session, "next", LEASE, 1, later)
    for job in again:
        publish(engine, store, job, finished(), later)
    sweep(engine, store, later + 2 * UPLOAD_LEASE)

    assert bool(again) == (where != "after")
    (version,) = versions(engine)
    assert sorted(store.keys("")) == sorted(f"{version.prefix}/{name}" for name in version.files)


def test_files_name_their_digests_in_the_registry(engine: Engine, store: FolderStore, claim: Claim) -> None:
    """What is in the row is what the client checks against."""
    done = publish(engine, store, claim()[0], finished(), NOW)

    (version,) = versions(engine)

    assert version.files["manifest.json"]["sha256"] == done.sha256
    assert version.size == sum(facts["size"] for facts in version.files.values())


def test_a_job_of_another_fence_is_told_apart(engine: Engine, store: FolderStore, claim: Claim) -> None:
    """A made-up fence is no way in."""
    (job,) = claim()

    with pytest.raises(LeaseLost, match="fence 99"):
        publish(engine, store, replace(job, fence=99), finished(), NOW)
