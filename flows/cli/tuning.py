"""`lora tune`: several ranks, rates and layers of one user in one pack; the best is published, or only shown."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.printing import AsJson, OwnReference, print_table, say, table
from flows.cli.training import GOOD, BaseOption, RecipeOption, SetOption, not_trained, progress_bar, stop_told
from flows.factory import Factory, Pinned, add_data, pin_base, read_data, request_training
from registry.names import Reference
from registry.orders import Enqueued
from registry.session import transaction

if TYPE_CHECKING:
    from lora_core.recipe import Recipe

Trials = list[dict[str, Any]]  # as manifests keep them


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(tune)


def tune(
    reference: OwnReference,
    data: Annotated[list[str] | None, typer.Option("--data", help="Files with this user's examples.")] = None,
    base: BaseOption = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show: nothing is stored or published.")] = False,
    as_json: AsJson = False,
) -> None:
    """Search for the rank, rate and layers that suit a user, and publish the best through the same gate.

    Without a `search` in the recipe, its own rank and rate are searched around.

    lora tune acme/alice --base ./base

    lora tune acme/alice --set search.rank=[4,8,16] --set search.learning_rate=[1e-4,2e-4,5e-4]

    lora tune acme/alice --data chats.jsonl --dry-run
    """
    from lora_core.halving import around
    from lora_core.recipe import load_recipe

    factory, wanted = Factory.from_environment(), Reference.parse_adapter(reference)
    factory.set_up()
    settled, pinned = around(load_recipe(recipe, set_ or [])), pin_base(factory, base)
    if dry_run:
        trials = _rehearsed(factory, wanted, pinned, settled, data, as_json)
        return _show(trials, {"user": wanted.label, "result": "not published"}, as_json)
    if data:
        add_data(factory, wanted, data)
    with transaction(factory.engine) as session:
        job = request_training(session, wanted, pinned, settled)
    trials, outcome = _published(factory, wanted, job, as_json)
    _show(trials, outcome, as_json)
    if outcome["result"] not in (*GOOD, "refused"):
        raise typer.Exit(1)
    return None


def _rehearsed(
    factory: Factory, wanted: Reference, pinned: Pinned, settled: "Recipe", data: list[str] | None, quiet: bool
) -> Trials:
    from flows.finished import trial_facts
    from flows.tune import newest_snapshot, rehearse

    snapshot = read_data(factory, data)[0] if data else newest_snapshot(factory, wanted)
    with progress_bar(quiet) as watch:
        candidate = rehearse(factory, wanted.label, pinned, settled, snapshot, watch)
    return [trial_facts(report) for report in candidate.trials]


def _published(factory: Factory, wanted: Reference, job: Enqueued, quiet: bool) -> tuple[Trials, dict[str, str]]:
    """The trials, and what became of the winner: as `lora train` tells it."""
    from flows import report
    from flows.finished import trial_facts
    from flows.presence import at_work
    from flows.work import run_cohort

    if job.unchanged:
        manifest = factory.client.pull_living(f"{wanted.label}:{job.number}") / "manifest.json"
        trials: Trials = json.loads(manifest.read_text(encoding="utf-8"))["search"]["trials"]
        return trials, not_trained(factory, wanted.label, job)
    with stop_told(), at_work(factory), progress_bar(quiet) as watch:
        cohort = run_cohort(factory, [job.job_id], watch)
    if cohort is None:
        return [], not_trained(factory, wanted.label, job)
    (row,) = report.rows(cohort)
    return [trial_facts(one) for candidate in cohort.candidates for one in candidate.trials], row


def _show(trials: Trials, outcome: dict[str, str], as_json: bool) -> None:
    from flows.tune import table_rows

    if as_json:
        sys.stdout.write(json.dumps({**outcome, "trials": trials}, indent=2) + "\n")
        return
    if trials:
        print_table(table(table_rows(trials)))
    facts = [f"version {outcome['version']}"] if outcome.get("version", "-") != "-" else []
    say(": ".join([f"{outcome['user']} {outcome['result']}", *facts, *([outcome["why"]] if "why" in outcome else [])]))
