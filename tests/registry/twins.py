"""Two tenants alike in every name, on PostgreSQL as the role that owns nothing."""

from typing import Any

from sqlalchemy import select
from sqlalchemy.engine import Engine

from registry import aliases, forgetting, holds, jobs, protection, queries, retention, schedules
from registry.forgetting import Wish
from registry.jobs import ClaimedJob
from registry.models import Base, Job, Tombstone
from registry.names import Reference, TenantId
from registry.publishing import publish
from registry.session import reading, transaction
from registry.store import FolderStore
from registry.tenancy import Across, across
from registry.timing import Timing
from tests.registry.conftest import LEASE, NOW, enqueue, finished

OURS, THEIRS = "globex", "acme"
TABLES = {name: table for name, table in Base.metadata.tables.items() if "tenant_id" in table.c}


def furnish(engine: Engine, store: FolderStore, tenant: str) -> None:
    """Give a tenant two versions, aliases with a past, a schedule and a job that somebody works on."""
    with transaction(engine) as session:
        asked = enqueue(session, f"{tenant}/alice", 3)
    for one in asked[:2]:
        with transaction(engine) as session:
            (job,) = jobs.claim(session, f"worker of {tenant}", LEASE, 1, NOW, [one.job_id])
        publish(engine, store, job, finished(f"weights of {tenant} {one.job_id}"), NOW)
    with transaction(engine) as session:
        owner, alice = queries.tenant_id(session, tenant), Reference.parse(f"{tenant}/alice:1")
        protection.protect(session, owner, "frozen", actor="me", reason=f"secret of {tenant}", now=NOW)
        for alias in ("production", "canary"):
            aliases.promote(session, owner, alice, alias, actor="me", reason=f"secret of {tenant}", now=NOW)
        holder = queries.holder(session, owner, "alice", "default")
        schedules.put(session, owner, holder, Timing.every("1h"), f"base of {tenant}", {}, NOW)
    with transaction(engine) as session:
        jobs.claim(session, f"worker of {tenant}", LEASE, 1, NOW, [asked[2].job_id])
    bury(engine, store, tenant)


def bury(engine: Engine, store: FolderStore, tenant: str) -> None:
    """Give a tenant a policy, a pin, a hold, a version that was removed, and a user who is being forgotten."""
    with transaction(engine) as session:
        (asked,) = enqueue(session, f"{tenant}/bert", 1)
        queries.ensure_adapter(session, Reference(tenant, "carl"), NOW)
    with transaction(engine) as session:
        (job,) = jobs.claim(session, f"worker of {tenant}", LEASE, 1, NOW, [asked.job_id])
    version = publish(engine, store, job, finished(f"weights of {tenant}'s bert"), NOW).id
    said: Any = {"actor": "me", "reason": f"secret of {tenant}", "now": NOW}  # keywords of unlike types
    with transaction(engine) as session:
        owner = queries.tenant_id(session, tenant)
        session.add(Tombstone(version_id=version, tenant_id=owner, reason=f"secret of {tenant}", at=NOW))
        retention.set_policy(session, owner, 5, None, **said)
        retention.pin(session, owner, Reference.parse(f"{tenant}/alice:1"), **said)
        holds.hold(session, owner, "alice", **said)
        forgetting._begin(session, owner, Wish(tenant, "carl", "", "me", f"secret of {tenant}"), NOW)


def busy(engine: Engine, tenant: str) -> ClaimedJob:
    """The tenant's running job, as its worker has it."""
    with reading(engine) as session:
        mine = (Job.tenant_id == queries.tenant_id(session, tenant), Job.state == "running")
        wanted = session.scalars(select(Job.id).where(*mine)).one()
        with across(session, Across.CLAIM):
            (claimed,) = jobs._claimed(session, [wanted])
        return claimed


def tenant_of(engine: Engine, name: str) -> TenantId:
    """A tenant's id."""
    with reading(engine) as session:
        return queries.tenant_id(session, name)
