"""`lora train`: the whole job without a Prefect server, on the same steps.  `lora work` goes on with them."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from flows.cli.printing import AsJson, answer, console, remark, say
from flows.factory import Factory, Wanted, add_data, pin_base, request_all
from flows.leaving import Leave
from flows.logs import set_up_logs
from registry import queries
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
        asked_for = request_all(session, [Wanted(one, pinned, settled) for one in wanted])
    jobs = {one.label: job for one, job in asked_for.items()}
    with stop_told(), at_work(factory):
        asked = [job.job_id for job in jobs.values() if not job.unchanged]
        rows = [row for trained in cohorts(factory, asked, quiet=as_json) for row in trained]
    for label in jobs.keys() - {row["user"] for row in rows}:
        rows.append(not_trained(factory, label, jobs[label]))
    finish(sorted(rows, key=lambda row: row["user"]), as_json)


def cohorts(
    factory: Factory,
    only: list[JobId] | None,
    quiet: bool,
    leave: Leave | None = None,
    tick: Callable[[], object] = tuple,
) -> Iterator[list[dict[str, str]]]:
    """Cohort after cohort until nobody waits, or until told to leave: of each, one row a user."""
    from flows import report
    from flows.work import run_cohort

    while (only is None or only) and not (leave and leave.asked):
        with progress_bar(quiet) as watch:
            cohort: Cohort | None = run_cohort(factory, only, watch, leave=leave, tick=tick)
        if cohort is None:
            return
        yield report.rows(cohort)
        if only is not None:  # who was put off would be asked for again, and again be too large
            only = [job for job in only if job not in cohort.put_off]


@contextmanager
def stop_told() -> Iterator[None]:
    """Whoever stops a training by Ctrl-C or SIGTERM has asked for it all the same, and is told so."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # as shells tell of it
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        remark(
            "stopped; whoever is not done waits in the queue: run it again, or take it back with `lora queue cancel`"
        )
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def progress_bar(quiet: bool) -> "Iterator[Callable[[Pace], None]]":
    """A bar that says how far the cohort is; where nobody looks it would leave an empty line each time."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as progress:
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
    exit_as(rows)


def exit_as(rows: list[dict[str, str]]) -> None:
    """Leave with exit code 1 when nobody, 4 when only some were trained and judged."""
    done = [row["result"] in (*GOOD, "refused") for row in rows]
    if not all(done):
        raise typer.Exit(4 if any(done) else 1)
