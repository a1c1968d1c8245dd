"""`latest` follows what is published: to each accepted version, unless it is at one that was asked for later."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.aliases import COPIED, MOVED
from registry.models import AdapterVersion, Alias, AliasMove, Facts, Freshness, Job
from registry.names import LATEST, AdapterId, TenantId, VersionId
from registry.writes import Rows

GATE = "gate"  # who moves it


@dataclass(frozen=True)
class Move:
    """One move of `latest`: to the version of that row, from where."""

    row: Facts
    earlier: VersionId | None


Moves = dict[VersionId, Move]  # in turn


def follow(session: Session, tenant: TenantId, accepted: Sequence[tuple[Facts, datetime]]) -> Moves:
    """The moves to accepted versions, one after the other; each with when it was asked for.

    An older request that took longer leaves `latest` where it is.  For one who holds the adapters' locks; whoever else
    moves their `latest` waits from here on.
    """
    if not accepted:
        return {}
    adapters = {row["adapter_id"] for row, _ in accepted}
    pointed = select(Alias.adapter_id, Alias.version_id).where(
        Alias.tenant_id == tenant, Alias.adapter_id.in_(adapters), Alias.name == LATEST
    )
    rows = session.execute(pointed.order_by(Alias.adapter_id).with_for_update()).tuples()
    live: dict[AdapterId, VersionId] = dict(rows.all())
    asked_at = _asked_at(session, tenant, list(live.values())) if live else {}
    moves: Moves = {}
    for row, at in accepted:
        earlier = live.get(row["adapter_id"])
        if earlier is None or asked_at[earlier] <= at:
            moves[row["id"]] = Move(row, earlier)
            live[row["adapter_id"]] = row["id"]
            asked_at[row["id"]] = at
    return moves


def _asked_at(session: Session, tenant: TenantId, versions: Sequence[VersionId]) -> dict[VersionId, datetime]:
    asked = select(AdapterVersion.id, Job.created_at).where(Job.tenant_id == tenant, AdapterVersion.id.in_(versions))
    return dict(session.execute(asked.join(AdapterVersion, AdapterVersion.job_id == Job.id)).tuples().all())


def moved(moves: Moves) -> list[Rows]:
    """What the moves write: where `latest` is at their end, each of them, and what it was trained from."""
    last = {move.row["adapter_id"]: move.row for move in moves.values()}
    new = {move.row["adapter_id"] for move in moves.values() if move.earlier is None}
    pointed = {
        adapter: {"tenant_id": row["tenant_id"], "adapter_id": adapter, "name": LATEST, "version_id": row["id"]}
        | {name: row[name] for name in COPIED}
        for adapter, row in last.items()
    }
    fresh = [
        {name: row[name] for name in ("tenant_id", "adapter_id", "dataset_id", "base_id", "recipe_digest")}
        for _, row in sorted(last.items())
    ]
    return [
        Rows(Alias, [row for adapter, row in pointed.items() if adapter in new]),
        Rows(
            Alias, [row for adapter, row in pointed.items() if adapter not in new], ("tenant_id", "adapter_id", "name")
        ),
        Rows(AliasMove, [_written_down(move) for move in moves.values()]),
        Rows(Freshness, fresh, ("tenant_id", "adapter_id")),
    ]


def _written_down(move: Move) -> Facts:
    row = move.row
    return {
        "tenant_id": row["tenant_id"], "adapter_id": row["adapter_id"], "name": LATEST, "kind": MOVED,
        "from_id": move.earlier, "to_id": row["id"], "actor": GATE, "reason": row["reason"], "at": row["created_at"],
    }  # fmt: skip
