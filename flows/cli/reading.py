"""`lora list`, `latest`, `history`, `show`: questions to the registry, without torch or Prefect."""

from typing import Annotated

import typer

from flows.cli.printing import AsJson, OwnReference, VersionReference, answer, answer_one, remark, say, size
from flows.seen import price_of
from registry import queries, retention
from registry.client import Client
from registry.models import AdapterVersion, Facts
from registry.names import Reference
from registry.queries import Listed
from registry.session import reading
from registry.settings import RegistrySettings


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("list")(list_)
    for command in (latest, history, show):
        app.command()(command)


def list_(
    tenant: Annotated[str | None, typer.Argument(help="One tenant; all of them when left out.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="Adapters shown of each tenant.")] = 1000,
    as_json: AsJson = False,
) -> None:
    """Every adapter, with its latest version and what that gained.

    lora list acme
    """
    with reading(Client.from_environment().engine) as session:
        names = [tenant] if tenant else [one.name for one in queries.tenants(session)]
        # Each is entered by its name: on PostgreSQL nothing else shows its rows.
        found = [(name, queries.listing(session, queries.tenant_id(session, name), limit + 1)) for name in names]
    rows = [_listed(name, one, as_json) for name, some in found for one in some[:limit]]
    answer(rows, as_json, "no adapters yet; train one: lora train TENANT/USER --data FILE --base BASE")
    if any(len(some) > limit for _, some in found):
        remark("... and more; raise --limit")


def latest(reference: OwnReference, as_json: AsJson = False) -> None:
    """The newest accepted version of a user's adapter, as an inference host would load it.

    lora latest acme/alice --json
    """
    found = Client.from_environment().resolve(Reference.parse_adapter(reference))
    facts = {"reference": f"{found.reference.label}:{found.number}", "served name": found.served_name}
    answer_one({**facts, "prefix": found.prefix, "manifest sha256": found.sha256}, as_json)


def history(reference: OwnReference, as_json: AsJson = False) -> None:
    """Every version of an adapter, the newest first, and where its aliases have pointed.

    lora history acme/alice
    """
    wanted = Reference.parse_adapter(reference)
    with reading(Client.from_environment().engine) as session:
        tenant = queries.tenant_id(session, wanted.tenant)
        adapter = queries.holder(session, tenant, wanted.user, wanted.adapter).adapter.id
        pointed = queries.aliases(session, tenant, adapter)
        moves = queries.alias_moves(session, tenant, adapter)
        found = queries.versions(session, tenant, adapter)  # after the moves: on PostgreSQL more may come between
        removed = retention.gone(session, tenant, adapter)
    numbers = {version.id: version.number for version in found}
    rows = [
        {
            "version": version.number,
            "aliases": ", ".join(name for name, number in pointed.items() if number == version.number) or None,
            "state": "removed" if version.id in removed else version.state,
            "made": version.created_at,
            "why": version.reason,
        }
        for version in found
    ]
    answer(rows, as_json, "no versions yet")
    if not as_json:
        for move in moves:
            came = f" (from {numbers[move.from_id]})" if move.from_id else ""
            what = f"{move.name} -> {numbers[move.to_id]}{came}, {move.kind} by {move.actor}: {move.reason}"
            say(f"{move.at:%Y-%m-%d %H:%M}  {what}")


def show(reference: VersionReference, as_json: AsJson = False) -> None:
    """One version: its files, scores and what it was made from.

    lora show acme/alice:3
    """
    wanted = Reference.parse(reference)
    with reading(Client.from_environment().engine) as session:
        tenant = queries.tenant_id(session, wanted.tenant)
        version = queries.version(session, tenant, wanted)
        dataset, base, job = queries.lineage(session, tenant, version)
        scores = queries.scores(session, tenant, version)
        removed = retention.gone(session, tenant, version.adapter_id).get(version.id)
    facts = _version_facts(wanted, version, as_json) | _cost(version) | ({"removed": removed} if removed else {})
    made_from = {
        "base": f"{base.name} ({', '.join(filter(None, (base.quantised, base.digest[:12])))})",
        "dataset": f"{dataset.digest[:12]}, {dataset.examples} examples",
        "job": job.id,
        "run": version.run_id,
        "code": version.code_version,
    }
    answer_one({**facts, **made_from, "recipe": version.recipe, "scores": scores}, as_json)


def _listed(tenant: str, one: Listed, as_json: bool) -> dict[str, object]:
    return {
        "adapter": Reference(tenant, one.user, one.adapter).label,
        "latest": one.latest.number if one.latest else None,
        "versions": one.head,
        "base loss": _figure(one.base, "loss"),
        "loss": _figure(one.candidate, "loss"),
        "size": one.latest and _size(one.latest, as_json),
        "made": one.latest.created_at if one.latest else None,
    }


def _version_facts(wanted: Reference, version: AdapterVersion, as_json: bool) -> dict[str, object]:
    return {
        "reference": f"{wanted.label}:{version.number}",
        "state": version.state,
        "why": version.reason,
        "made": version.created_at,
        "served name": version.served_name,
        "prefix": version.prefix,
        "manifest sha256": version.sha256,
        "size": _size(version, as_json),
        "trained parameters": version.parameters,
    }


def _size(version: AdapterVersion, as_json: bool) -> int | str:
    """Programs are told bytes."""
    return version.size if as_json else size(version.size)


def _cost(version: AdapterVersion) -> dict[str, object]:
    """What it took, where it was measured, and what that costs, where a price is set."""
    cost = price_of(version.device_seconds, RegistrySettings.read().gpu_hour_cost)
    facts: dict[str, object] = {"tokens": version.tokens, "device seconds": version.device_seconds}
    return facts if cost is None else {**facts, "cost": cost}


def _figure(scores: Facts | None, name: str) -> float | None:
    return scores.get(name) if scores else None
