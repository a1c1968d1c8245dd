"""`lora queue`: who waits and why, cancel, try again what was given up, and what each tenant may have."""

from typing import Annotated

import typer

from flows.cli.printing import AsJson, Limit, OwnReference, Page, answer, answer_one, remark, say
from flows.factory import now, who
from registry import queries, queue, shares
from registry.client import Client
from registry.errors import NotFound
from registry.models import Facts, Job
from registry.names import Reference, check_words
from registry.orders import GIVEN_UP
from registry.queue import STATES, Wanted
from registry.session import reading, transaction

app = typer.Typer(no_args_is_help=True, help="Look at the queue, cancel, try again, and share it among tenants.")

Tenant = Annotated[str | None, typer.Argument(help="One tenant; all of them when left out.")]
Reason = Annotated[str | None, typer.Option(help="Only jobs whose reason has these words.")]


@app.command("list")
def list_(
    tenant: Tenant = None,
    state: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(STATES)}. Repeatable.")] = None,
    reason: Reason = None,
    limit: Limit = 50,
    page: Page = 1,
    as_json: AsJson = False,
) -> None:
    """The jobs that run, wait and have failed, in this order; those that wait as they are in line.

    lora queue list acme --state failed --reason memory
    """
    states = tuple(state or Wanted.states)
    if unknown := sorted(set(states) - set(STATES)):
        raise typer.BadParameter(f"there is no state {unknown[0][:40]!r}; there are {', '.join(STATES)}")
    wanted = Wanted(states, reason, limit=limit + 1, offset=(page - 1) * limit)
    with reading(Client.from_environment().engine) as session:
        id_ = queries.tenant_id(session, tenant) if tenant else None
        found = queue.listed(session, id_, wanted)
    rows = [{"adapter": reference.label, **_facts(job)} for reference, job in found[:limit]]
    answer(rows, as_json, "no such jobs")
    if len(found) > limit:
        remark(f"... and more; go on with --page {page + 1}")


@app.command()
def show(reference: OwnReference, as_json: AsJson = False) -> None:
    """Every job of an adapter, the newest first, and why one that waits was not taken yet.

    lora queue show acme/alice
    """
    wanted = Reference.parse_adapter(reference)
    with transaction(Client.from_environment().engine) as session:
        tenant = queries.tenant_id(session, wanted.tenant)
        queries.holder(session, tenant, wanted.user, wanted.adapter)
        found = queue.listed(session, tenant, Wanted(STATES, user=wanted.user, adapter=wanted.adapter, limit=1000))
        rows = [
            {
                "job": job.id,
                **_facts(job),
                "waits": queue.why_waiting(session, tenant, job, now()) if job.state == "queued" else None,
            }
            for _, job in sorted(found, key=lambda row: row[1].created_at, reverse=True)
        ]
    answer(rows, as_json, f"{wanted.label} has no jobs; ask for one: lora train {wanted.label}")


@app.command()
def cancel(
    reference: OwnReference,
    reason: Annotated[str, typer.Option(help="Kept with the job.")] = "by hand",
) -> None:
    """End an adapter's jobs that wait or run; a worker that trains one drops it, and its neighbours go on.

    lora queue cancel acme/alice --reason "wrong data"
    """
    wanted = Reference.parse_adapter(reference)
    with transaction(Client.from_environment().engine) as session:
        tenant = queries.tenant_id(session, wanted.tenant)
        holder = queries.holder(session, tenant, wanted.user, wanted.adapter)
        words = check_words("reason", f"cancelled by {who()}: {reason}")
        states = queue.cancel(session, tenant, holder, words, now())
    if not states:
        raise NotFound("waiting or running job of", wanted.label, f"see `lora queue show {wanted.label}`")
    say(f"{wanted.label}: cancelled {', '.join(f'a {state} job' for state in states)}")


@app.command()
def retry(
    whose: Annotated[str, typer.Argument(metavar="TENANT[/USER[/ADAPTER]]", help="One adapter, or a whole tenant.")],
    reason: Reason = None,
    cancelled: Annotated[bool, typer.Option("--cancelled", help="Those that were cancelled, too.")] = False,
) -> None:
    """Let jobs that have failed wait again, with all their attempts: one user's, or all of a tenant for a reason.

    One whose data retention has removed stays as it is; `lora queue list --state failed` says so.

    lora queue retry acme/alice

    lora queue retry acme --reason "no space"
    """
    states = GIVEN_UP if cancelled else ("failed",)
    wanted = Wanted(states, reason)
    one = Reference.parse_adapter(whose) if "/" in whose else None
    with transaction(Client.from_environment().engine) as session:
        tenant = queries.tenant_id(session, one.tenant if one else whose)
        if one:
            queries.holder(session, tenant, one.user, one.adapter)
            wanted = Wanted(states, reason, one.user, one.adapter)
        count = len(queue.retry(session, tenant, wanted, now()))
    if not count:
        raise NotFound("job to try again of", whose, "see `lora queue list --state failed`")
    say(f"{whose}: {count} jobs wait again")


@app.command()
def quota(
    tenant: Annotated[str, typer.Argument(help="Whose share.")],
    weight: Annotated[float | None, typer.Option(help="With 2, twice as many slots as one who waits with 1.")] = None,
    max_running: Annotated[int | None, typer.Option(help="Jobs at once.")] = None,
    max_waiting: Annotated[int | None, typer.Option(help="Jobs in line; more are refused.")] = None,
    max_versions: Annotated[int | None, typer.Option(help="Versions in any 24 hours.")] = None,
    no_limits: Annotated[bool, typer.Option("--no-limits", help="Lift every limit that is not given.")] = False,
    as_json: AsJson = False,
) -> None:
    """What a tenant may have of the factory; with options, change it.

    lora queue quota acme --weight 2 --max-running 64 --max-versions 5000
    """
    limits = {"max_running": max_running, "max_waiting": max_waiting, "max_versions": max_versions}
    changed: Facts = {name: value for name, value in limits.items() if value is not None or no_limits}
    if weight is not None:
        changed["weight"] = weight
    with transaction(Client.from_environment().engine) as session:
        id_ = queries.tenant_id(session, tenant)
        share = shares.set_quota(session, id_, changed, now()) if changed else shares.share(session, id_)
        facts = {"tenant": tenant, "weight": share.weight, **{name: getattr(share, name) for name in limits}}
        counts = queries.job_counts(session, id_)
    answer_one({**facts, "running": counts.get("running", 0), "waiting": counts.get("queued", 0)}, as_json)


def _facts(job: Job) -> dict[str, object]:
    return {
        "state": job.state,
        "priority": job.priority,
        "attempts": job.attempts,
        "asked": job.created_at,
        "until": job.lease_until,
        "worker": job.worker if job.state == "running" else None,
        "over": job.finished_at,
        "why": job.error,
    }
