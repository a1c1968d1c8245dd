"""`lora schedule`: when each user's adapter is trained again.  Kept in the registry; one tick asks who is due."""

from typing import Annotated

import typer

from flows.cli.printing import AsJson, OwnReference, answer, say
from flows.cli.training import BaseOption, RecipeOption, SetOption
from flows.factory import Factory, now
from registry import queries, schedules
from registry.names import Reference
from registry.schedules import Timing
from registry.session import reading, transaction

app = typer.Typer(no_args_is_help=True, help="Set, list, pause and remove users' training schedules.")


@app.command("set")
def set_schedule(
    reference: OwnReference,
    cron: Annotated[str | None, typer.Option(help="Five cron fields, such as '0 3 * * *'.")] = None,
    every: Annotated[str | None, typer.Option(help="An interval, such as 90m, 6h or 1d.")] = None,
    time_zone: Annotated[str, typer.Option("--time-zone", help="For --cron, such as Europe/Berlin.")] = "UTC",
    base: BaseOption = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
) -> None:
    """Train a user's newest data again and again; nothing is trained when nothing changed.

    lora schedule set acme/alice --cron "0 3 * * *" --time-zone Europe/Berlin --base ./base

    lora schedule set acme/bob --every 6h --set rank=8
    """
    from flows.factory import pin_base
    from lora_core.recipe import load_recipe

    if (cron is None) == (every is None):
        raise typer.BadParameter("give either --cron or --every")
    timing = Timing.cron(cron, time_zone) if cron is not None else Timing.every(str(every))
    factory = Factory.from_environment()
    factory.set_up()
    wanted, settled = Reference.parse_adapter(reference), load_recipe(recipe, set_ or [])
    pinned = pin_base(factory, base)
    with transaction(factory.engine) as session:
        holder = queries.ensure_adapter(session, wanted, now())
        body = settled.model_dump(mode="json")
        made = schedules.put(session, holder.tenant_id, holder, timing, pinned.name, body, now())
    say(f"{wanted.label} is next due {made.next_due_at:%Y-%m-%d %H:%M:%S} UTC")


@app.command("list")
def list_(
    tenant: Annotated[str | None, typer.Argument(help="One tenant; all of them when left out.")] = None,
    as_json: AsJson = False,
) -> None:
    """Every schedule, and when it is due next.

    lora schedule list acme
    """
    with reading(Factory.from_environment().engine) as session:
        id_ = queries.tenant_id(session, tenant) if tenant else None
        rows = [
            {
                "adapter": reference.label,
                "timing": one.timing,
                "time zone": one.time_zone,
                "next due": None if one.paused else one.next_due_at,
                "last fired": one.last_fired_at,
                "paused": one.paused,
            }
            for reference, one in schedules.schedules(session, id_)
        ]
    answer(rows, as_json, "no schedules; set one: lora schedule set TENANT/USER --every 1d")


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
