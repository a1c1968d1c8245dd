"""`lora retain`, `pin`, `hold`, `gc`, `tidy`, `forget`, `forgotten`: how long things are kept, and how they go."""

from dataclasses import asdict
from typing import Annotated

import typer

from flows.cli.printing import AsJson, answer, answer_one, say, size
from flows.cli.typed import standard_input
from flows.errors import Unready
from flows.factory import Factory, now, who
from flows.upkeep import clean_home
from flows.upkeep import forget as forget_user
from registry import collection, forgetting, holds, queries, retention
from registry.client import Client
from registry.errors import NameRefused
from registry.forgetting import Receipt, Wish
from registry.names import Reference, check_plain, check_user
from registry.session import reading, transaction

Tenant = Annotated[str, typer.Argument(metavar="TENANT", help="Whose, for example acme.")]
Whom = Annotated[str, typer.Argument(metavar="TENANT[/USER]", help="A user such as acme/alice, or a whole tenant.")]
Reason = Annotated[str, typer.Option("--reason", help="Kept beside it.")]
Off = Annotated[bool, typer.Option("--off", help="Lift it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (retain, pin, hold, gc, tidy, forget, forgotten):
        app.command()(command)


def retain(
    tenant: Tenant,
    newest: Annotated[int | None, typer.Option("--newest", min=1, help="Keep so many versions of an adapter.")] = None,
    days: Annotated[int | None, typer.Option("--days", min=1, help="Keep versions that are younger.")] = None,
    everything: Annotated[bool, typer.Option("--everything", help="Keep all of them again.")] = False,
    reason: Reason = "by hand",
    as_json: AsJson = False,
) -> None:
    """Say how long a tenant's versions are kept, or show it; `lora gc` and upkeep hold to it.

    A version stays if any rule keeps it, if it is pinned, if an alias points to it, and while it is the newest.

    lora retain acme --newest 5 --days 90
    """
    if everything and (newest or days):
        raise typer.BadParameter("--everything goes without --newest and --days")
    with transaction(Client.from_environment().engine) as session:
        id_ = queries.tenant_id(session, tenant)
        if everything or newest or days:
            retention.set_policy(session, id_, newest, days, actor=who(), reason=reason, now=now())
        found = retention.policy(session, id_)
    row: dict[str, object] = {"tenant": tenant, "kept": retention.rule(found) if found else "everything"}
    if found:
        row |= {"by": found.actor, "why": found.reason, "since": found.at, "collected": found.collected_at}
    answer_one(row, as_json)


def pin(
    reference: Annotated[
        str, typer.Argument(metavar="REFERENCE", help="A version such as acme/alice:3; TENANT: list.")
    ],
    off: Off = False,
    reason: Reason = "by hand",
    as_json: AsJson = False,
) -> None:
    """Keep a version whatever the policy says, or list what is kept so.

    lora pin acme/alice:3 --reason "compared in the audit"

    lora pin acme
    """
    engine, wanted = Client.from_environment().engine, Reference.parse(reference) if "/" in reference else None
    tenant = wanted.tenant if wanted else reference
    if wanted:
        with transaction(engine) as session:
            act = retention.unpin if off else retention.pin
            act(session, queries.tenant_id(session, tenant), wanted, actor=who(), reason=reason, now=now())
    elif off:
        raise typer.BadParameter("--off goes with a version, such as acme/alice:3")
    with reading(engine) as session:
        found = retention.pins(session, queries.tenant_id(session, tenant))
    rows = [
        {"version": f"{Reference(tenant, user, adapter).label}:{number}", "by": one.actor, "why": one.reason,
         "since": one.at}
        for one, user, adapter, number in found
    ]  # fmt: skip
    answer(rows, as_json, "no version is pinned")


def hold(
    whom: Whom,
    reason: Annotated[str | None, typer.Option("--reason", help="Why; without it, list the tenant's holds.")] = None,
    off: Off = False,
    as_json: AsJson = False,
) -> None:
    """Put a user or a tenant under legal hold: nothing of theirs is collected or forgotten.  Or list the holds.

    lora hold acme/alice --reason "case 17"

    lora hold acme/alice --off --reason "case 17 is closed"
    """
    tenant, user = _whom(whom)
    engine = Client.from_environment().engine
    if off and reason is None:
        raise typer.BadParameter("--off wants a --reason: it is kept")
    if reason is not None:
        with transaction(engine) as session:
            act = holds.unhold if off else holds.hold
            act(session, queries.tenant_id(session, tenant), user, actor=who(), reason=reason, now=now())
    with reading(engine) as session:
        found = holds.holds(session, queries.tenant_id(session, tenant))
    rows = [
        {"whom": f"{tenant}/{name}" if name else tenant, "by": one.actor, "why": one.reason, "since": one.at}
        for one, name in found
    ]
    answer(rows, as_json, "nobody is under hold")


def gc(
    tenant: Annotated[str | None, typer.Argument(help="One tenant; all of them when left out.")] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Remove the bytes that no policy keeps: versions, and the datasets that only they needed.  Rows stay.

    lora gc --dry-run

    lora gc acme
    """
    factory = Factory.from_environment()
    with reading(factory.engine) as session:
        names = [tenant] if tenant else [one.name for one in queries.tenants(session)]
        ids = [queries.tenant_id(session, name) for name in names]
    rows: list[dict[str, object]] = []
    for name, id_ in zip(names, ids, strict=True):
        if dry_run:
            found = collection.plan(factory.engine, id_, now())
        else:
            found = collection.collect(factory.engine, factory.store, id_, now())
        for kind, some in (("version", found.versions), ("dataset", found.datasets)):
            rows += [{"what": kind, "whose": f"{name}/{one.label}", "bytes": one.size} for one in some]
    answer(rows, as_json, "everything is kept")
    if rows and not as_json:
        total = sum(int(str(row["bytes"])) for row in rows)
        say(f"{size(total)} {'would go' if dry_run else 'are gone'}")


def tidy(as_json: AsJson = False) -> None:
    """Remove from this machine what is of nobody any more: pulled copies of versions that are gone, saves, states.

    For cron on every machine that pulls or trains; `forget` does it where it runs.

    lora tidy
    """
    found = clean_home(Factory.from_environment())
    answer([{"what": kind, **facts} for kind, facts in found.items()], as_json, "nothing to remove")


def forget(
    whom: Annotated[str, typer.Argument(metavar="TENANT/USER", help="Who, for example acme/alice.")],
    reason: Annotated[str, typer.Option("--reason", help="Kept in the receipt; not to name the user.")] = "asked to",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete everything of a user, for good, and print the receipt; interrupted, it goes on when run again.

    Datasets, weights, scores, jobs, schedules, history, and what this machine keeps; other machines: `lora tidy`.

    lora forget acme/alice --reason "request 4711" --yes
    """
    tenant, user = _whom(whom)
    if user is None:
        raise NameRefused("user", whom, "TENANT/USER, for example acme/alice")
    if not yes and not _is_sure(f"Delete everything of {tenant}/{user}?  It cannot be taken back."):
        raise Unready("nothing was deleted", "confirm, or pass --yes")
    factory = Factory.from_environment()
    wish = Wish(tenant, user, factory.settings.receipt_secret, who(), reason)
    answer_one(_shown(forget_user(factory, wish)), as_json=True)


def forgotten(whom: Whom, as_json: AsJson = False) -> None:
    """Whether a user was forgotten, and the receipts; exit code 3 if not.  Of a tenant: every receipt.

    Receipts hold no name: who asks has to know it, and needs the LORA_RECEIPT_SECRET that there was then.

    lora forgotten acme/alice
    """
    tenant, user = _whom(whom)
    factory = Factory.from_environment()
    with reading(factory.engine) as session:
        id_ = queries.tenant_id(session, tenant)
        if user is None:
            found = forgetting.receipts(session, id_)
        else:
            found = forgetting.receipts_of(session, id_, user, factory.settings.receipt_secret)
    answer([_shown(one) for one in found], as_json, "nobody was forgotten" if user is None else "not forgotten")
    if user is not None and not found:
        raise typer.Exit(3)


def _is_sure(question: str) -> bool:
    """Whether who typed the command says yes.  Raises Unready where nobody can be asked."""
    standard_input("pass --yes, and nobody is asked")
    return typer.confirm(question)


def _whom(text: str) -> tuple[str, str | None]:
    """Tenant, and user if one is named.  Raises NameRefused."""
    tenant, slash, user = text.partition("/")
    return check_plain("tenant", tenant), check_user(user) if slash else None


def _shown(receipt: Receipt) -> dict[str, object]:
    facts = asdict(receipt)
    names = {"id": "receipt", "actor": "by", "reason": "why", "begun_at": "begun", "finished_at": "finished"}
    return {names.get(name, name): value for name, value in facts.items()}
