"""`lora schedule`: when each user's adapter is trained again.  Kept in the registry; one tick asks who is due."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.printing import AsJson, Limit, OwnReference, Page, answer, fail, remark, say
from flows.cli.training import BaseOption, RecipeOption, SetOption
from flows.factory import Factory, now
from lora_core.errors import BaseModelError
from registry import queries, schedules
from registry.models import Schedule
from registry.names import Reference, check_plain
from registry.schedules import Filter, Terms
from registry.session import reading, transaction
from registry.timing import Quiet, Timing

if TYPE_CHECKING:
    from flows.wishes import BadLine, Wish

MOST_SHOWN = 100  # bad lines of a file; the rest are counted

app = typer.Typer(no_args_is_help=True, help="Set, list, pause and remove users' training schedules.")


@app.command("set")
def set_schedule(
    reference: OwnReference,
    cron: Annotated[str | None, typer.Option(help="Five cron fields, such as '0 3 * * *'.")] = None,
    every: Annotated[str | None, typer.Option(help="An interval, such as 90m, 6h or 1d.")] = None,
    on_data: Annotated[bool, typer.Option("--on-data", help="Whenever new data comes.")] = False,
    time_zone: Annotated[str | None, typer.Option(help="Of --cron and --quiet, such as Europe/Berlin.")] = None,
    quiet: Annotated[str | None, typer.Option(help="Start nothing in these hours, such as 22:00-06:30.")] = None,
    priority: Annotated[int, typer.Option(help="A step is worth an hour of waiting.")] = 0,
    min_examples: Annotated[int | None, typer.Option(help="New examples that it takes, or nothing is trained.")] = None,
    min_bytes: Annotated[str | None, typer.Option(help="The same in bytes, such as 1MiB; either is enough.")] = None,
    max_versions: Annotated[int | None, typer.Option(help="At most so many versions in any 24 hours.")] = None,
    base: BaseOption = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
) -> None:
    """Train a user's newest data again and again; nothing is trained when nothing changed.

    lora schedule set acme/alice --cron "0 3 * * *" --time-zone Europe/Berlin --base ./base

    lora schedule set acme/bob --on-data --min-examples 50 --quiet 08:00-18:00 --max-versions 2 --set rank=8
    """
    from flows.factory import pin_base
    from flows.wishes import parse_size
    from lora_core.recipe import load_recipe

    if (cron is not None) + (every is not None) + on_data != 1:
        raise typer.BadParameter("give either --cron or --every, or --on-data")
    if every is not None and time_zone is not None and quiet is None:
        raise typer.BadParameter("--time-zone says nothing about --every; leave it out, or give --quiet hours")
    timing = _timing(cron, every, "UTC" if time_zone is None else time_zone)
    size = None if min_bytes is None else parse_size(min_bytes)
    if on_data and min_examples is None and size is None:
        min_examples = 1
    hours = None if quiet is None else Quiet.parse(quiet)
    terms = Terms(hours, priority, min_examples, size, max_versions).check()
    factory = Factory.from_environment()
    factory.set_up()
    wanted, settled = Reference.parse_adapter(reference), load_recipe(recipe, set_ or [])
    pinned = pin_base(factory, base)
    with transaction(factory.engine) as session:
        holder = queries.ensure_adapter(session, wanted, now())
        body = settled.model_dump(mode="json")
        made = schedules.put(session, holder.tenant_id, holder, timing, pinned.name, body, now(), terms)
    say(f"{wanted.label} is next due {made.next_due_at:%Y-%m-%d %H:%M:%S} UTC")


def _timing(cron: str | None, every: str | None, time_zone: str) -> Timing:
    if cron is not None:
        return Timing.cron(cron, time_zone)
    return Timing.on_data(time_zone) if every is None else Timing.every(every, time_zone)


@app.command()
def load(
    tenant: Annotated[str, typer.Argument(help="Whose schedules.")],
    file: Annotated[Path, typer.Argument(help=".jsonl or .csv: user, cron or every or on_data, and so on.")],
    keep_good: Annotated[bool, typer.Option("--keep-good", help="Set the good lines, though others are bad.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the file and set nothing.")] = False,
    base: BaseOption = None,
) -> None:
    """Set many users' schedules from a file: all of them, or none while a line is bad.

    lora schedule load acme schedules.csv --dry-run

    A line is a JSON object, or a row of CSV under a header: `user`; `adapter` unless it is the default; one of `cron`,
    `every`, `on_data`; and where they matter `time_zone`, `quiet`, `priority`, `min_examples`, `min_bytes`,
    `max_versions`, `paused`, `base`, `recipe` (a file, or an object), `set` ("rank=8 epochs=2").
    """
    from flows.wishes import read_wishes

    factory = Factory.from_environment()
    factory.set_up()
    wishes, bad = read_wishes(file, check_plain("tenant", tenant))
    pinned, missing = _pinned(factory, wishes, base)
    wishes = [wish for wish in wishes if wish.base in pinned]
    bad = sorted([*bad, *missing], key=lambda one: one.line)
    for one in bad[:MOST_SHOWN]:
        fail(f"{file}:{one.line}: {one.field}: {one.why}; {one.fix}", 1)
    if len(bad) > MOST_SHOWN:
        fail(f"... and {len(bad) - MOST_SHOWN} more bad lines", 1)
    if not dry_run and wishes and (keep_good or not bad):
        put_all(factory, wishes, pinned)
    counts = f"{len(wishes)} good lines, {len(bad)} bad"
    say(f"{counts}: {'nothing set' if dry_run or (bad and not keep_good) else f'{len(wishes)} schedules set'}")
    if bad:
        raise typer.Exit(4 if keep_good and wishes and not dry_run else 1)


def _pinned(
    factory: Factory, wishes: "Sequence[Wish]", base: str | None
) -> "tuple[dict[str | None, str], list[BadLine]]":
    """The full name of each base that lines name, read once, and the lines whose base is not there.

    Raises BaseModelError, Unready for the base of those that name none.
    """
    from flows.factory import pin_base
    from flows.wishes import BadLine

    pinned, missing = dict[str | None, str](), dict[str, BaseModelError]()
    for name in {wish.base for wish in wishes}:
        try:
            pinned[name] = pin_base(factory, name or base).name
        except BaseModelError as error:
            if name is None:
                raise
            missing[name] = error
    lost = [(wish.line, *missing[wish.base].args) for wish in wishes if wish.base in missing]
    return pinned, [BadLine(line, "base", f"{name[:200]}: {why}", fix) for line, name, why, fix in lost]


def put_all(factory: Factory, wishes: "Sequence[Wish]", bases: Mapping[str | None, str]) -> None:
    """Every schedule in one transaction, in an order of its own: of two files of the same users at once one waits."""
    with transaction(factory.engine) as session:
        in_turn = sorted(wishes, key=lambda wish: wish.reference.label)
        owned = [(queries.ensure_adapter(session, wish.reference, now()), wish) for wish in in_turn]
        for holder, wish in sorted(owned, key=lambda one: one[0].adapter.id):
            body, name = wish.recipe.model_dump(mode="json"), bases[wish.base]
            schedules.put(session, holder.tenant_id, holder, wish.timing, name, body, now(), wish.terms)


@app.command("list")
def list_(
    tenant: Annotated[str | None, typer.Argument(help="One tenant; all of them when left out.")] = None,
    user: Annotated[str | None, typer.Option(help="One user, or a* for all whose names begin so.")] = None,
    paused: Annotated[bool | None, typer.Option("--paused/--active", help="Only those.")] = None,
    held: Annotated[bool, typer.Option("--held", help="Only those that something held back.")] = False,
    due_within: Annotated[str | None, typer.Option(help="Only those due in that time, such as 90m.")] = None,
    limit: Limit = 100,
    page: Page = 1,
    as_json: AsJson = False,
) -> None:
    """Every schedule, when it is due next, and why it made no job when it was due last.

    lora schedule list acme --held
    """
    before = None if due_within is None else Timing.every(due_within).after(now())
    wanted = Filter(user, paused, held, before, limit + 1, (page - 1) * limit)
    with reading(Factory.from_environment().engine) as session:
        id_ = queries.tenant_id(session, tenant) if tenant else None
        found = schedules.schedules(session, id_, wanted)
    rows = [_row(reference, one) for reference, one in found[:limit]]
    answer(rows, as_json, "no schedules; set one: lora schedule set TENANT/USER --every 1d")
    if len(found) > limit:
        remark(f"... and more; go on with --page {page + 1}")


def _row(reference: Reference, one: Schedule) -> dict[str, object]:
    asks = {"min_examples": one.min_examples, "min_bytes": one.min_bytes, "max_versions": one.max_versions}
    return {
        "adapter": reference.label,
        "timing": one.timing,
        "time zone": one.time_zone,
        "quiet": one.quiet,
        "priority": one.priority,
        "terms": ", ".join(f"{name} {value}" for name, value in asks.items() if value) or None,
        "next due": None if one.paused else one.next_due_at,
        "last fired": one.last_fired_at,
        "paused": one.paused,
        "held": one.held,
    }


@app.command()
def pause(
    reference: OwnReference,
    resume: Annotated[bool, typer.Option("--resume", help="Let it fire again.")] = False,
) -> None:
    """Stop a schedule from firing, or let it fire again.

    lora schedule pause acme/alice

    lora schedule pause acme/alice --resume
    """
    wanted = Reference.parse_adapter(reference)
    with transaction(Factory.from_environment().engine) as session:
        tenant = queries.tenant_id(session, wanted.tenant)
        holder = queries.holder(session, tenant, wanted.user, wanted.adapter)
        schedules.pause(session, tenant, holder, not resume, now())
    say(f"{wanted.label} is {'scheduled again' if resume else 'paused'}")


@app.command()
def remove(reference: OwnReference) -> None:
    """Take a schedule away; adapters and data stay.

    lora schedule remove acme/alice
    """
    wanted = Reference.parse_adapter(reference)
    with transaction(Factory.from_environment().engine) as session:
        tenant = queries.tenant_id(session, wanted.tenant)
        schedules.remove(session, tenant, queries.holder(session, tenant, wanted.user, wanted.adapter), now())
    say(f"{wanted.label} has no schedule any more")
