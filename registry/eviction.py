"""What machines keep of what is gone: the pull cache made to follow the registry, and whose saves are still needed."""

from collections.abc import Iterable
from pathlib import Path

from sqlalchemy import exists, select
from sqlalchemy.engine import Engine

from registry import known
from registry.cache import KNOWN, Cache
from registry.jobs import BUSY
from registry.models import Adapter, AdapterVersion, Facts, Job, Tenant, Tombstone, User
from registry.names import Reference
from registry.queries import tenants
from registry.session import reading
from registry.tenancy import Across, across, enter

_CHUNK = 1000  # names in one question


def evict_gone(engine: Engine, cache: Path) -> list[str]:
    """Drop cached versions that no tenant has any more, removed or forgotten; returns their served names.

    A pull under way is left alone.  Safe beside pulls: whoever still needs what is dropped pulls it again.
    """
    cached = sorted({entry.served_name for entry in Cache(cache).entries()})
    living: set[str] = set()
    with reading(engine) as session:
        for tenant in tenants(session) if cached else []:
            enter(session, tenant.id)
            for start in range(0, len(cached), _CHUNK):
                names = cached[start : start + _CHUNK]
                buried = exists().where(
                    Tombstone.tenant_id == AdapterVersion.tenant_id, Tombstone.version_id == AdapterVersion.id
                )
                mine = (AdapterVersion.tenant_id == tenant.id, AdapterVersion.served_name.in_(names))
                living |= set(session.scalars(select(AdapterVersion.served_name).where(*mine, ~buried)))
    gone = [name for name in cached if name not in living]
    evict(cache, gone)
    return gone


def evict(cache: Path, served_names: Iterable[str]) -> int:
    """Drop versions from a cache, also those that a killed pull has left half-way; how many there were."""
    kept, names, count = Cache(cache), set(served_names), 0
    for entry in kept.entries():
        if entry.served_name in names:
            kept.remove(entry.folder)
            count += 1
    count += sum(kept.drop_half(name) for name in names)
    if count:
        known.tidy(cache / KNOWN, older_than=0)  # which are under digests: whose they are cannot be told
    return count


def open_jobs(engine: Engine) -> list[tuple[Reference, Facts]]:
    """Whose jobs wait or are in work, of all tenants, with their recipes."""
    with reading(engine) as session, across(session, Across.OVERVIEW):
        rows = (
            select(Tenant.name, User.name, Adapter.name, Job.recipe)
            .join(User, User.tenant_id == Tenant.id)
            .join(Adapter, Adapter.user_id == User.id)
            .join(Job, Job.adapter_id == Adapter.id)
            .where(Job.state.in_(BUSY))
        )
        return [(Reference(tenant, user, adapter), recipe) for tenant, user, adapter, recipe in session.execute(rows)]
