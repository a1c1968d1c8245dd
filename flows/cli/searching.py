"""`lora search`, `outdated` and `changes`: questions about all of a tenant's adapters, a page at a time."""

import json
import sys
import time
from dataclasses import asdict
from typing import Annotated

import typer

from flows.cli.printing import AsJson, answer, remark, say
from registry.client import Client
from registry.feed import Change
from registry.freshness import Outdated
from registry.names import Reference
from registry.search import ORDERS, Found, Search

_POLL_SECONDS = 1.0

Tenant = Annotated[str, typer.Argument(help="Whose adapters.")]
After = Annotated[str, typer.Option("--after", metavar="CURSOR", help="Go on where an earlier answer ended.")]
Limit = Annotated[int, typer.Option(min=1, max=10_000, help="Rows a page.")]
Conditions = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="CONDITION",
        help="user=a*, adapter=, alias=, base=, state=, since=, until=, gain<0.1, gain>=, loss>, loss<=; all of them.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (search, outdated, changes):
        app.command()(command)


def search(
    tenant: Tenant,
    where: Conditions = None,
    order: Annotated[str, typer.Option(help=", ".join(ORDERS))] = "newest",
    limit: Limit = 50,
    after: After = "",
    as_json: AsJson = False,
) -> None:
    """Versions by alias, score, base, time and user.

    lora search acme --where alias=production --where "gain<0.05" --order least-gain
    """
    page = Client.from_environment().search(tenant, Search.parse(where or [], order), after=after, limit=limit)
    answer([_version(tenant, one) for one in page.rows], as_json, "no such versions")
    _go_on(page.cursor)


def outdated(
    tenant: Tenant,
    base: Annotated[str, typer.Option(help="Digest of the base to train on now, or its beginning.")] = "",
    recipe: Annotated[str, typer.Option(help="Digest of the recipe to train by now, or its beginning.")] = "",
    limit: Limit = 1000,
    after: After = "",
    as_json: AsJson = False,
) -> None:
    """Who needs training again: newer data than `latest` was trained on, or another base or recipe than these.

    lora outdated acme --base 3f2a91
    """
    page = Client.from_environment().outdated(tenant, base=base, recipe=recipe, after=after, limit=limit)
    answer([_outdated(tenant, one) for one in page.rows], as_json, "everybody is up to date")
    _go_on(page.cursor)


def changes(
    tenant: Tenant,
    after: Annotated[
        str, typer.Option("--after", metavar="CURSOR", help="Go on behind a row; `now`: only what is to come.")
    ] = "",
    follow: Annotated[bool, typer.Option("--follow", help="Wait for more, until you stop it.")] = False,
    limit: Limit = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a line, for programs.")] = False,
) -> None:
    """What moved, what is new and what is gone since a cursor: each once, in an order that loses nothing.

    lora changes acme --after now --follow
    """
    client = Client.from_environment()
    cursor = client.changes_from_now(tenant) if after == "now" else after
    while True:
        page = client.changes(tenant, after=cursor, limit=limit)
        for one in page.rows:
            _tell(tenant, one, as_json)
        cursor = page.cursor or cursor
        if not follow:
            break
        if len(page.rows) < limit:
            sys.stdout.flush()
            time.sleep(_POLL_SECONDS)
    _go_on(cursor)


def _version(tenant: str, one: Found) -> dict[str, object]:
    return {
        "version": f"{Reference(tenant, one.user, one.adapter).label}:{one.number}", "state": one.state,
        "gain": one.gain, "loss": one.loss, "base": one.base[:12], "made": one.created_at,
        "served name": one.served_name,
    }  # fmt: skip


def _outdated(tenant: str, one: Outdated) -> dict[str, object]:
    label = Reference(tenant, one.user, one.adapter).label
    return {"adapter": label, "why": one.why, "newest data": one.newest[:12], "added": one.added_at, "asked": one.job}


def _tell(tenant: str, one: Change, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(asdict(one), default=str) + "\n")
        return
    whose = Reference(tenant, one.user, one.adapter or "").label if one.user else "somebody forgotten"
    what = f"{one.alias} -> {one.number}" if one.kind == "alias moved" else f"{one.kind}: {one.number}"
    say(f"{one.at:%Y-%m-%d %H:%M:%S}  {whose}  {what}  {one.served_name or ''}".rstrip())


def _go_on(cursor: str | None) -> None:
    if cursor:
        remark(f"go on with: --after {cursor}")
