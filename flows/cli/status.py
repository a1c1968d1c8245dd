"""`lora status` and `lora cost`: what runs, who waits, who failed and why, what it takes; without torch or Prefect."""

import re
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from rich.live import Live
from rich.text import Text

from flows.cli.printing import AsJson, answer, answer_one, console, say
from flows.cli.screen import lines
from flows.seen import Seen, look, price_of
from registry import overview, queries
from registry.client import Client
from registry.names import Reference
from registry.session import reading
from registry.settings import RegistrySettings

SPANS = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}
FOREVER = datetime(2000, 1, 1, tzinfo=UTC)

Since = Annotated[
    str | None, typer.Option("--since", metavar="TIME", help="A span such as 12h or 7d, or a date such as 2026-03-01.")
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(status)
    app.command()(cost)


def status(
    tenant: Annotated[str | None, typer.Argument(help="One tenant; all of them when left out.")] = None,
    since: Since = "24h",
    jobs: Annotated[int, typer.Option("--jobs", "--limit", min=0, max=1000, help="Also list so many jobs.")] = 0,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Look again and again, until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.2, max=3600, help="Seconds between looks, with --watch.")] = 2.0,
    as_json: AsJson = False,
) -> None:
    """What is running, who waits, who failed and why, on one screen.

    lora status

    lora status acme --since 7d --jobs 20
    """
    if watch and (as_json or jobs):
        raise typer.BadParameter("--watch shows the one screen only; leave out --json and --jobs")
    client, price = Client.from_environment(), RegistrySettings.read().gpu_hour_cost
    begin = moment(since)
    if watch:
        with suppress(KeyboardInterrupt):  # the way to end it
            _watch(client, tenant, since, price, every)
        return
    seen = _look(client, tenant, begin, price)
    listed = _jobs(client, tenant, jobs) if jobs else []
    if as_json:
        answer_one(seen.facts() | ({"listed": listed} if jobs else {}), as_json)
        return
    for line in lines(seen, console.width if console.is_terminal else None):
        say(line)
    if jobs:
        answer(listed, as_json, "no jobs yet")


def cost(
    tenant: Annotated[str | None, typer.Argument(help="One tenant's users; tenants when left out.")] = None,
    since: Since = None,
    limit: Annotated[int, typer.Option(min=1, help="Rows shown, the dearest first.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Device time, tokens and versions by user, or by tenant; money where LORA_GPU_HOUR_COST says what an hour costs.

    lora cost acme --since 30d
    """
    price, begin = RegistrySettings.read().gpu_hour_cost, moment(since)
    with reading(Client.from_environment().engine) as session:
        names = [tenant] if tenant else [one.name for one in queries.tenants(session)]
        # Each is entered by its name: on PostgreSQL nothing else shows its rows.
        found = {name: overview.costs(session, queries.tenant_id(session, name), begin) for name in names}
    if tenant:
        rows = [_cost(f"{tenant}/{one.user}", [one], price) for one in found[tenant]]
    else:
        rows = sorted((_cost(name, some, price) for name, some in found.items()), key=_dearest)
    answer(rows[:limit], as_json, "no versions in that time")
    if len(rows) > limit and not as_json:
        say(f"... and {len(rows) - limit:,} more; raise --limit")


def moment(text: str | None) -> datetime:
    """When a span before now began, or a date or time; the beginning of all where none is given."""
    if text is None:
        return FOREVER
    try:
        if found := re.fullmatch(r"([0-9]{1,6})([mhd])", text):
            return datetime.now(UTC) - int(found[1]) * SPANS[found[2]]
        given = datetime.fromisoformat(text)
        return given.astimezone(UTC) if given.tzinfo else given.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise typer.BadParameter(
            f"{ascii(text)[:40]} is no time; use 30m, 12h, 7d, or a date such as 2026-03-01"
        ) from None


def _look(client: Client, tenant: str | None, since: datetime, price: float | None) -> Seen:
    with reading(client.engine) as session:
        whose = queries.tenant_id(session, tenant) if tenant else None
        return look(session, datetime.now(UTC), since, whose, price)


def _watch(client: Client, tenant: str | None, since: str | None, price: float | None, every: float) -> None:
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while True:
            seen = _look(client, tenant, moment(since), price)
            live.update(Text("\n".join([*lines(seen, console.width), "", "Ctrl-C ends it"])), refresh=True)
            time.sleep(every)


def _jobs(client: Client, tenant: str | None, limit: int) -> list[dict[str, object]]:
    with reading(client.engine) as session:
        whose = queries.tenant_id(session, tenant) if tenant else None
        recent = queries.recent_jobs(session, whose, limit)
    return [
        {
            "adapter": Reference(name, user, adapter).label,
            "state": job.state,
            "worker": job.worker,
            "attempt": job.attempts,
            "since": job.finished_at or job.created_at,
            "why": job.error,
        }
        for job, name, user, adapter in recent
    ]


def _cost(whose: str, some: list[overview.Cost], price: float | None) -> dict[str, object]:
    """A row; versions that nobody measured (made by older code) count as nothing."""
    measured = [one for one in some if one.device_seconds is not None]
    seconds = sum(one.device_seconds or 0 for one in measured) if measured else None
    row = {
        "whose": whose,
        "versions": sum(one.versions for one in some),
        "tokens": sum(one.tokens or 0 for one in measured) if measured else None,
        "device seconds": seconds,
    }
    return row if price is None else row | {"cost": price_of(seconds, price)}


def _dearest(row: dict[str, object]) -> tuple[float, str]:
    seconds = row["device seconds"]
    return (-seconds if isinstance(seconds, float) else 0.0, str(row["whose"]))
