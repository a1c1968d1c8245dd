"""`lora train` and `lora work`: the whole job without a Prefect server, on the same steps."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from flows.cli.printing import AsJson, answer, console, remark, say
from flows.errors import FlowError, Unready
from flows.factory import Factory, add_data, pin_base, request_training
from flows.leaving import Leave, on_signals
from flows.logs import event, set_up_logs
from lora_core.errors import LoraError
from registry import queries
from registry.errors import NotFound, RegistryError
from registry.names import JobId, Reference
from registry.orders import Enqueued
from registry.session import reading, transaction

if TYPE_CHECKING:
    from flows.cohort import Cohort
    from lora_core.train import Pace

BaseOption = Annotated[str | None, typer.Option("--base", help="Folder or Hugging Face id; else LORA_BASE.")]
RecipeOption = Annotated[str | None, typer.Option("--recipe", help="A YAML file; see the README for its keys.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override one key, such as rank=8. Repeatable."),
]

MemoryOption = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="What base and cohort may take, such as 4GiB; else LORA_MEMORY."),
]

GOOD = ("accepted", "unchanged")


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(train)
    app.command()(work)


def train(
    references: Annotated[list[str], typer.Argument(metavar="TENANT/USER[/ADAPTER]...", help="Whose adapters.")],
    data: Annotated[list[str] | None, typer.Option("--data", help="Add these files first (one user only).")] = None,
    base: BaseOption = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    memory: MemoryOption = None,
    as_json: AsJson = False,
) -> None:
    """Train, judge and publish users' newest data now, packed together.

    lora train acme/alice --base ./base --set rank=8

    lora train acme/alice --data chats.jsonl --base ./base

    lora train acme/alice acme/bob globex/eve --recipe recipe.yaml --memory 4GiB
    """
    from flows.presence import at_work
    from lora_core.recipe import load_recipe

    factory = Factory.from_environment(memory=memory)
    if factory.settings.log:  # else its table and its exit code say all
        set_up_logs(factory.settings)
    factory.set_up()
    wanted = [Reference.parse_adapter(reference) for reference in references]
    if data and len(wanted) > 1:
        raise typer.BadParameter("--data adds files for one user; use `lora data add` for several")
    settled, pinned = load_recipe(recipe, set_ or []), pin_base(factory, base)
    if data:
        add_data(factory, wanted[0], data)
    with transaction(factory.engine) as session:
        jobs = {one.label: request_training(session, one, pinned, settled) for one in wanted}
    with at_work(factory):
        rows = drain(factory, [job.job_id for job in jobs.values() if not job.unchanged], quiet=as_json)
    for label in jobs.keys() - {row["user"] for row in rows}:
        rows.append(not_trained(factory, label, jobs[label]))
    finish(sorted(rows, key=lambda row: row["user"]), as_json)


def work(
    once: Annotated[bool, typer.Option("--once", help="Stop when nobody waits; else go on for ever.")] = False,
    memory: MemoryOption = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks when nobody waits.")] = 5.0,
    grace: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="From SIGTERM or Ctrl-C to the end, such as 30s; else LORA_GRACE."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="The GPU to train on, such as cuda:1, or cpu; else LORA_DEVICE.")
    ] = None,
    pool: Annotated[
        str | None, typer.Option(metavar="NAME", help="Take runs of this Prefect work pool; needs a Prefect server.")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Serve metrics and health; else LORA_METRICS_PORT.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Do what is due: fire schedules, train waiting jobs in cohorts, sweep up.  No Prefect server is needed.

    Start one for each GPU, on any number of machines.  Told to go, it saves who is unfinished for another worker.
    With --pool Prefect's server decides what it runs, and shows it.

    lora work --once

    lora work --device cuda:1 --grace 2m

    lora work --pool gpu --device cuda:1
    """
    if pool and (once or as_json):
        raise typer.BadParameter("--pool goes on for ever and reports to Prefect; leave out --once and --json")
    if pool and metrics_port is not None:
        raise typer.BadParameter("runs of a pool are in the figures of `lora metrics`; leave out --metrics-port")
    from flows.presence import watched

    factory = Factory.from_environment(memory=memory, grace=grace, device=device, metrics_port=metrics_port)
    leave = Leave(factory.settings.grace)
    if pool:
        raise typer.Exit(serve_pool(factory, leave, pool))
    set_up_logs(factory.settings)
    factory.set_up()
    with on_signals(leave, remark), watched(factory):
        while not leave.asked:
            rows = work_once(factory, leave, every, once, quiet=as_json)
            factory.pulse.rest()
            if once and not leave.asked:
                finish(rows, as_json)
                break
            if rows:
                show(rows, as_json)
            leave.idle(every)


def serve_pool(factory: Factory, leave: Leave, pool: str) -> int:
    """Be the worker of a Prefect work pool; its exit code.  Raises Unready, DeviceMissing."""
    from flows.pool import health_port, serve
    from lora_core.base_model import check_device

    if not os.environ.get("PREFECT_API_URL"):
        raise Unready("no Prefect server is named", "set PREFECT_API_URL, or leave out --pool to work without one")
    settings = factory.settings
    check_device(settings.device or "cpu")
    given = {"LORA_GRACE": f"{settings.grace:g}s", "LORA_DEVICE": settings.device}
    given |= {"LORA_MEMORY": str(int(settings.memory))} if settings.memory else {}
    ports = {"PREFECT_WORKER_WEBSERVER_PORT": health_port(settings.device)}
    return serve(pool, leave, {**ports, **os.environ, **given}, remark)


def work_once(factory: Factory, leave: Leave, every: float, once: bool, quiet: bool) -> list[dict[str, str]]:
    """Do what is due now; one row a user.  What is wrong with database or store is told, unless it is the only time."""
    from flows.due import sweep
    from flows.upkeep import keep_up

    try:
        tick(factory)
        rows = drain(factory, None, quiet, leave, partial(tick, factory))
        sweep(factory)
        for trouble in keep_up(factory):
            event("not kept up", level=logging.WARNING, reason=trouble)
        return rows
    except (RegistryError, LoraError, FlowError) as error:
        if once:
            raise
        event("look failed", level=logging.WARNING, reason=str(error), next_look=f"in {every:g} s")
        return []


def tick(factory: Factory) -> None:
    """Turn everybody who is due into jobs; who could not be is told."""
    from flows.due import fire_due

    for one in fire_due(factory):
        if one.result == "not queued":
            whose = Reference.parse(one.label)
            with suppress(NotFound), reading(factory.engine) as session:  # of a user who was forgotten just now
                tenant = queries.tenant_id(session, whose.tenant)
                user = queries.holder(session, tenant, whose.user, whose.adapter).user
                event("not queued", level=logging.WARNING, whose=(whose, user.opaque), reason=one.why)


def drain(
    factory: Factory,
    only: list[JobId] | None,
    quiet: bool,
    leave: Leave | None = None,
    tick: Callable[[], object] = tuple,
) -> list[dict[str, str]]:
    """Cohort after cohort until nobody waits, or until told to leave; one row a user."""
    from flows import report
    from flows.work import run_cohort

    rows: list[dict[str, str]] = []
    while (only is None or only) and not (leave and leave.asked):
        with progress_bar(quiet) as watch:
            cohort: Cohort | None = run_cohort(factory, only, watch, leave=leave, tick=tick)
        if cohort is None:
            break
        rows += report.rows(cohort)
        if only is not None:  # who was put off would be asked for again, and again be too large
            only = [job for job in only if job not in cohort.put_off]
    return rows


@contextmanager
def progress_bar(quiet: bool) -> "Iterator[Callable[[Pace], None]]":
    """A bar that says how far the cohort is."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=quiet, transient=True) as progress:
        bar = progress.add_task("training", total=None, words="")

        def watch(pace: "Pace") -> None:
            total = pace.finished + len(pace.training) + pace.waiting
            room = f"{pace.tokens / pace.room:.0%} of room used"
            words = f"{pace.finished}/{total} trained, step {pace.micro_steps}, {room}"
            progress.update(bar, completed=pace.finished, total=total, words=words)

        yield watch


def not_trained(factory: Factory, label: str, job: Enqueued) -> dict[str, str]:
    """A row for a job that no cohort here took: over before, or in other hands."""
    if job.unchanged:
        return {"user": label, "result": "unchanged", "version": str(job.number)}
    with reading(factory.engine) as session:
        tenant = queries.tenant_id(session, Reference.parse(label).tenant)
        now_is = queries.job(session, tenant, job.job_id)
    until = f" until {now_is.lease_until:%H:%M:%S} UTC" if now_is.lease_until else ""
    why = f"it is {now_is.state}, held by {now_is.worker or 'nobody'}{until}; see `lora status`"
    return {"user": label, "result": "not trained here", "why": why}


def show(rows: list[dict[str, str]], as_json: bool) -> None:
    """Everybody in a table, and below it why somebody's adapter did not become the latest."""
    shown = rows if as_json else [{key: text for key, text in row.items() if key != "why"} for row in rows]
    answer(shown, as_json, "nobody waits")
    for row in rows:
        if row["result"] not in GOOD and not as_json:
            say(f"{row['user']}: {row['result']}: {row['why']}")


def finish(rows: list[dict[str, str]], as_json: bool) -> None:
    """Show what became of everybody; exit code 1 when nobody, 4 when only some were trained and judged."""
    show(rows, as_json)
    done = [row["result"] in (*GOOD, "refused") for row in rows]
    if not all(done):
        raise typer.Exit(4 if any(done) else 1)
