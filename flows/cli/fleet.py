"""`lora promote --all`, `rollback --all` and `protect`: an alias of a whole tenant."""

from collections.abc import Sequence
from typing import Annotated

import typer

from flows.cli.printing import AsJson, answer, say
from flows.factory import now, who
from registry import fleet, protection, queries
from registry.client import Client
from registry.fleet import Where
from registry.session import reading, transaction

All = Annotated[bool, typer.Option("--all", help="Of every adapter of a tenant: name the tenant alone.")]
Conditions = Annotated[
    list[str] | None,
    typer.Option("--where", metavar="KEY=VALUE", help="With --all: user=a*, adapter=, base=, since=, until="),
]
Source = Annotated[str, typer.Option("--from", help="With --all: the alias that says where to.")]
Number = Annotated[
    int | None, typer.Option("--move", min=1, max=2**63 - 1, help="With --all: which move, if not the last.")
]
Override = Annotated[bool, typer.Option("--override", help="Also a protected alias.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(protect)


def promote_all(
    tenant: str, alias: str, source: str, where: Sequence[str], reason: str, *, force: bool, override: bool
) -> None:
    """Point an alias of every adapter that is meant at what another points to, in one transaction."""
    meant = Where.parse(where)
    with transaction(Client.from_environment().engine) as session:
        id_ = queries.tenant_id(session, tenant)
        done = fleet.promote_all(
            session, id_, alias, source, meant, actor=who(), reason=reason, now=now(), force=force, override=override
        )
    new = f", {done.made} of them new, with nothing to go back to" if done.made else ""
    back = f"; back: {_back(tenant, alias, done.fleet_id)}" if done.count > done.made else ""
    say(f"{tenant}: {alias} of {done.count} adapters is now at {source}{new}{back}")


def roll_back_all(tenant: str, alias: str, number: int | None, reason: str, *, override: bool) -> None:
    """Take a fleet's move back, in one transaction."""
    with transaction(Client.from_environment().engine) as session:
        id_ = queries.tenant_id(session, tenant)
        done = fleet.roll_back_all(
            session, id_, alias, number, actor=who(), reason=reason, now=now(), override=override
        )
    say(f"{tenant}: {alias} of {done.count} adapters is back where it was")


def protect(
    tenant: Annotated[str, typer.Argument(help="Whose aliases.")],
    alias: Annotated[str | None, typer.Argument(help="Which one; none: list those that are protected.")] = None,
    off: Annotated[bool, typer.Option("--off", help="Let it move freely again.")] = False,
    reason: Annotated[str, typer.Option("--reason", help="Shown to whoever is refused.")] = "by hand",
    as_json: AsJson = False,
) -> None:
    """Let an alias move only with --override: on every adapter of a tenant; `latest` stays whatever the gate says.

    lora protect acme production --reason "audit until Friday"

    lora protect acme production --off
    """
    engine = Client.from_environment().engine
    if alias is not None:
        with transaction(engine) as session:
            act = protection.unprotect if off else protection.protect
            act(session, queries.tenant_id(session, tenant), alias, actor=who(), reason=reason, now=now())
    with reading(engine) as session:
        found = protection.protected(session, queries.tenant_id(session, tenant))
    rows = [{"alias": one.name, "by": one.actor, "why": one.reason, "since": one.at} for one in found]
    answer(rows, as_json, "no alias is protected")


def _back(tenant: str, alias: str, number: int) -> str:
    return f"lora rollback {tenant} --all --alias {alias} --move {number}"
