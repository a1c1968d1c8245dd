"""A registry with one adapter, and jobs on it in a worker's hands."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import or_, select
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from registry import forgetting, jobs, orders, queries
from registry.aliases import COPIED
from registry.forgetting import Receipt, Wish
from registry.jobs import ClaimedJob
from registry.models import AdapterVersion, Alias
from registry.names import Reference
from registry.orders import Order
from registry.publishing import Finished
from registry.session import reading, transaction
from registry.store import FolderStore, ObjectStore
from registry.tenancy import enter
from tests.conftest import as_application
from tests.servers import new_database

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
LEASE = timedelta(minutes=5)

Claim = Callable[..., list[ClaimedJob]]


@pytest.fixture
def engine(engine: Engine) -> Iterator[Engine]:
    """A registry on each kind of database; when a test is over, every alias holds a true copy of its version."""
    yield engine
    assert miscopied(engine) == []


@pytest.fixture
def claim(engine: Engine) -> Claim:
    """Enqueue `count` jobs with different data for a reference, and claim them."""

    def enqueue_and_claim(count: int = 1, reference: str = "acme/alice", worker: str = "worker") -> list[ClaimedJob]:
        with transaction(engine) as session:
            asked = enqueue(session, reference, count)
        with transaction(engine) as session:  # one by one: a claim takes one job of an adapter
            return [jobs.claim(session, worker, LEASE, 1, NOW, [one.job_id])[0] for one in asked]

    return enqueue_and_claim


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    """An empty folder store."""
    made = FolderStore(tmp_path / "store")
    made.set_up()
    return made


@pytest.fixture(scope="session")
def furnished(postgres_server: str, postgres_tables: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A database and a folder store, to be copied: two tenants alike in users, versions, aliases, schedules, jobs."""
    from tests.registry.twins import OURS, THEIRS, furnish  # it takes from here what it enqueues

    url, folder = new_database(postgres_server, postgres_tables), tmp_path_factory.mktemp("furnished") / "store"
    made, engine = FolderStore(folder), as_application(url)
    made.set_up()
    for tenant in (THEIRS, OURS):
        furnish(engine, made, tenant)
    engine.dispose()
    return str(engine.url.database), folder


@pytest.fixture
def twins(postgres_server: str, furnished: tuple[str, Path], store: FolderStore) -> Iterator[Engine]:
    """Two tenants alike, and the application's engine."""
    database, folder = furnished
    shutil.copytree(folder, store.root, dirs_exist_ok=True)
    engine = as_application(new_database(postgres_server, database))
    yield engine
    engine.dispose()


def enqueue(
    session: Session,
    reference: str,
    count: int,
    group: str = "g",
    now: datetime = NOW,
    priority: int = 0,
    first: int = 0,
) -> list[orders.Enqueued]:
    """`count` jobs, each on its own data, the last of which is the newest; without the `first` of them."""
    holder = queries.ensure_adapter(session, Reference.parse(reference), NOW)
    base = queries.ensure_base(session, name="tiny", revision="main", digest="b" * 64, parameters=7, now=NOW)
    made = []
    for number in range(first, count):
        digest = hashlib.sha256(f"{reference} {number}".encode()).hexdigest()
        dataset = queries.ensure_dataset(
            session, holder.tenant_id, holder, digest=digest, key=f"t/d/{digest}", examples=3, size=9,
            now=NOW + timedelta(microseconds=number),
        )  # fmt: skip
        order = Order(dataset, base, {"rank": 8}, "r" * 64, group)
        made.append(orders.enqueue(session, holder.tenant_id, holder, order, now, priority))
    return made


def finished(content: str = "weights", accepted: bool = True) -> Finished:
    """What a trained job comes to."""
    data = content.encode()
    facts = {"weights.bin": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}}
    files = {"weights.bin": data, "manifest.json": json.dumps({"files": facts}).encode()}
    scores = {"base": {"loss": 2.0}, "candidate": {"loss": 1.0}}
    return Finished(files, accepted, "because", 40, scores, None, "0.1", 1200, 3.5)


def forget(engine: Engine, store: ObjectStore, user: str, now: datetime = NOW) -> Receipt:
    """Forget a user of acme's; nothing of theirs is on this machine."""
    return forgetting.forget(engine, store, Wish("acme", user, "", "me", "request"), lambda _: {}, now)


def miscopied(engine: Engine) -> list[str]:
    """The aliases that say something else of the version that they point to than it does itself."""
    with reading(engine) as session:
        tenants = [tenant.id for tenant in queries.tenants(session)]
    wrong = [getattr(Alias, name).is_distinct_from(getattr(AdapterVersion, name)) for name in COPIED]
    found: list[str] = []
    for tenant in tenants:
        with reading(engine) as session:
            enter(session, tenant)
            pointing = select(Alias.name).join(AdapterVersion, AdapterVersion.id == Alias.version_id)
            found += session.scalars(pointing.where(Alias.tenant_id == tenant, or_(*wrong))).all()
    return found


def versions(engine: Engine) -> list[AdapterVersion]:
    """Alice's versions, the newest first."""
    with reading(engine) as session:
        tenant = queries.tenant_id(session, "acme")
        return queries.versions(session, tenant, queries.holder(session, tenant, "alice", "default").adapter.id)
