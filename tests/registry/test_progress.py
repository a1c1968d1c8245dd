"""Progress in the store: there for whoever takes the job next, gone once the job is over."""

from sqlalchemy.engine import Engine

from registry import jobs, progress
from registry.models import Upload
from registry.session import transaction
from registry.store import FolderStore
from registry.uploads import UPLOAD_LEASE, sweep
from tests.conftest import looking
from tests.registry.conftest import NOW, Claim


def intents(engine: Engine) -> int:
    """How many uploads are under way."""
    with looking(engine) as session:
        return session.query(Upload).count()


def test_the_sweep_leaves_progress_alone_until_the_job_is_over(
    engine: Engine, store: FolderStore, claim: Claim
) -> None:
    """However long the job waits: a fleet may be away for a weekend."""
    (job,) = claim()
    progress.keep(engine, store, job, "a.safetensors", b"far", NOW)
    with transaction(engine) as session:
        jobs.release(session, job, NOW)
    later = NOW + 200 * UPLOAD_LEASE

    assert sweep(engine, store, later) == []
    assert progress.kept(store, job) == ["a.safetensors"]
    assert progress.take(store, job, "a.safetensors") == b"far"

    with transaction(engine) as session:
        (again,) = jobs.claim(session, "next", UPLOAD_LEASE, 1, later)
        jobs.fail(session, again, "bad data", later)
    sweep(engine, store, later + 2 * UPLOAD_LEASE)

    assert progress.kept(store, job) == []
    assert intents(engine) == 0


def test_progress_that_is_there_already_is_as_good(engine: Engine, store: FolderStore, claim: Claim) -> None:
    """Two workers at the same place have the same numbers, though not always the same file."""
    (job,) = claim()
    progress.keep(engine, store, job, "a.safetensors", b"one order", NOW)
    progress.keep(engine, store, job, "a.safetensors", b"another order", NOW)
    progress.keep(engine, store, job, "b.safetensors", b"further", NOW)
    progress.forget(store, job, "a.safetensors")

    assert progress.kept(store, job) == ["b.safetensors"]


def test_clearing_ends_the_intent_too(engine: Engine, store: FolderStore, claim: Claim) -> None:
    """Nothing is left for the sweep, and another user's progress stays."""
    (mine,), (other,) = claim(), claim(reference="globex/bob")
    for job in (mine, other):
        progress.keep(engine, store, job, "a.safetensors", b"far", NOW)

    progress.clear(engine, store, mine)

    assert (progress.kept(store, mine), progress.kept(store, other)) == ([], ["a.safetensors"])
    assert intents(engine) == 1
