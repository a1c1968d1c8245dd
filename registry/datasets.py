"""Adding a user's data: bytes first, row second, as in publishing."""

import secrets
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.engine import Engine

from registry import schedules, uploads
from registry.errors import UploadSwept
from registry.keys import dataset_prefix
from registry.names import Reference
from registry.queries import dataset_key, ensure_adapter, ensure_dataset
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
    with transaction(engine) as session:
        holder = ensure_adapter(session, reference, now)
        key, prefix = dataset_key(session, holder.tenant_id, holder, content.digest), None
        if key is None:
            attempt = secrets.token_hex(8)
            prefix = dataset_prefix(reference.tenant, holder.user.opaque, content.digest, attempt)
            key = f"{prefix}/{EXAMPLES}"
            uploads.declare(session, holder.tenant_id, prefix, now)
    store.put_new(key, content.data)
    with transaction(engine) as session:
        enter(session, holder.tenant_id)
        row = ensure_dataset(
            session, holder.tenant_id, holder, digest=content.digest, key=key, examples=content.examples,
            size=len(content.data), now=now,
        )  # fmt: skip
        # Where another attempt was sooner, this one's bytes are the sweeper's.
        if prefix and row.key == key and not uploads.settle(session, holder.tenant_id, prefix):
            raise UploadSwept(prefix)
        schedules.wake(session, holder.tenant_id, holder.user.id, now)
