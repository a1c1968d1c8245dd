"""Adding a user's data: bytes first, row second, as in publishing."""

import secrets
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Engine

from registry import freshness, schedules, uploads
from registry.errors import UploadSwept
from registry.keys import dataset_prefix
from registry.names import Reference
from registry.queries import dataset_key, ensure_adapter, ensure_dataset, still_there
from registry.session import transaction
from registry.store import ObjectStore
from registry.tenancy import enter

EXAMPLES = "examples.jsonl"


@dataclass(frozen=True)
class Content:
    """A snapshot's bytes, the digest that names them, and how many examples they are."""

    digest: str
    data: bytes
    examples: int


def add_dataset(engine: Engine, store: ObjectStore, reference: Reference, content: Content, now: datetime) -> None:
    """Store a snapshot and make it its user's newest, for which schedules may wait; safe to do again.

    Every attempt has a prefix of its own: two that add equal content at once do not meet, and the sweeper never takes
    what another attempt is about to commit.  Raises UploadSwept when it took longer than an upload's lease.
    """
    facts: Any = {
        "digest": content.digest,
        "examples": content.examples,
        "size": len(content.data),
    }  # keywords of unlike types
    with transaction(engine) as session:
        holder = ensure_adapter(session, reference, now)
        freshness.in_turn(session, holder.user.id)  # as who makes an adapter, before the locks of data and schedules
        # Asked for after what is there, also where this machine's clock is behind; before what comes while it uploads.
        facts["now"] = freshness.added_last(session, holder.tenant_id, holder.user.id, content.digest, now)
        key = dataset_key(session, holder.tenant_id, holder, content.digest)
        if key is not None:
            # Heals a store that has lost it, under the locks of user and row: nobody removes them meanwhile.
            store.put_new(key, content.data)
            schedules.wake(session, holder.tenant_id, holder.user.id, now)
            ensure_dataset(session, holder.tenant_id, holder, key=key, **facts)
            return
        prefix = dataset_prefix(reference.tenant, holder.user.opaque, content.digest, secrets.token_hex(8))
        key = f"{prefix}/{EXAMPLES}"
        uploads.declare(session, holder.tenant_id, prefix, now)
    store.put_new(key, content.data)
    with transaction(engine) as session:
        enter(session, holder.tenant_id)
        if not still_there(session, holder.tenant_id, holder):
            raise UploadSwept(prefix)
        freshness.in_turn(session, holder.user.id)
        schedules.wake(session, holder.tenant_id, holder.user.id, now)
        row = ensure_dataset(session, holder.tenant_id, holder, key=key, **facts)
        # Where another attempt was sooner, this one's bytes are the sweeper's.
        if row.key == key and not uploads.settle(session, holder.tenant_id, prefix):
            raise UploadSwept(prefix)
