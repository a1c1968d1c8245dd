"""What must be true of a registry and its store, whatever was killed when."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Engine, Select, select

from registry import queries
from registry.keys import user_prefix
from registry.models import Adapter, AdapterVersion, Alias, AliasMove, Dataset, Job, Tenant, Upload, User
from registry.names import LATEST, AdapterId, Reference
from registry.shares import MADE
from registry.store import FolderStore, ObjectStore
from tests.conftest import looking

Row = TypeVar("Row", AdapterVersion, Alias, AliasMove, Job)


def check_readers_see_whole_versions(engine: Engine, store: ObjectStore, reference: Reference, newest: int = 2) -> None:
    """Every version that a reader can find has all its bytes; numbers have no gap; a job is over with its version."""
    with looking(engine) as session:
        adapter = session.scalar(_adapter(reference))
        if adapter is None:
            return
        own = adapter.id
        versions = session.scalars(_of(AdapterVersion, own).order_by(AdapterVersion.number.desc())).all()
        over = {job.id: job.created_at for job in session.scalars(_of(Job, own).where(Job.state.in_(MADE)))}
        aliases = {alias.name: alias.version_id for alias in session.scalars(_of(Alias, own))}
        moves = {move.name: move.to_id for move in session.scalars(_of(AliasMove, own).order_by(AliasMove.id))}
    assert [version.number for version in versions] == list(range(adapter.head, 0, -1)), "a gap, or a number twice"
    assert Counter(version.job_id for version in versions) == Counter(over.keys()), "a version lost, or one twice"
    for version in versions[:newest]:
        _check_whole(store, version)
    last = max(versions, key=lambda version: (over[version.job_id], version.number), default=None)
    assert aliases.get(LATEST) == (last.id if last else None), "latest is not the one that was asked for last"
    assert aliases == moves, "an alias that its history does not explain"


def check_nothing_is_left(engine: Engine, store: ObjectStore, reference: Reference | None = None) -> None:
    """Every byte below a user (or anywhere) is named by a row, and every row's bytes are there."""
    with looking(engine) as session:
        below = ""
        if reference:
            tenant = queries.tenant_id(session, reference.tenant)
            user = queries.holder(session, tenant, reference.user, reference.adapter).user
            below = user_prefix(reference.tenant, user.opaque)
        rows = session.execute(select(AdapterVersion.prefix, AdapterVersion.files)).tuples()
        named = {f"{prefix}/{name}" for prefix, files in rows for name in files if prefix.startswith(below)}
        named |= {key for key in session.scalars(select(Dataset.key)) if key.startswith(below)}
    assert set(store.keys(below)) == named, "an orphan, or a row without its bytes"
    if isinstance(store, FolderStore):
        _check_no_debris(store.root / below)


def check_no_intent_is_left(engine: Engine) -> None:
    """Two sweeps, a lease apart, end every intent."""
    with looking(engine) as session:
        assert session.scalars(select(Upload.prefix)).all() == []


def _adapter(reference: Reference) -> Select[tuple[Adapter]]:
    owned = select(Adapter).join(User, User.id == Adapter.user_id).join(Tenant, Tenant.id == User.tenant_id)
    return owned.where(
        Tenant.name == reference.tenant, User.name == reference.user, Adapter.name == reference.adapter
    )  # fmt: skip


def _of(table: type[Row], adapter: AdapterId) -> Select[tuple[Row]]:
    return select(table).where(table.adapter_id == adapter)


def _check_whole(store: ObjectStore, version: AdapterVersion) -> None:
    for name, facts in version.files.items():
        data = store.get(f"{version.prefix}/{name}")
        assert hashlib.sha256(data).hexdigest() == facts["sha256"], f"{name} of version {version.number} is not whole"


def _check_no_debris(root: Path) -> None:
    """No file of a killed writer, and no empty folder."""
    for path in root.rglob("*"):
        assert not path.name.startswith("."), f"{path} is left"
        assert path.is_file() or any(path.iterdir()), f"{path} is empty"
