"""The demo: a small world of its own, then the factory's whole main job on it, as anybody's data would go through."""

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress, TextColumn, TimeElapsedColumn

from flows.cli.printing import console, print_table, say, size, table
from flows.demo.people import Person, write_people
from flows.demo.tiny_base import make_base
from flows.factory import Factory, Wanted, add_data, pin_base, request_all
from lora_core.recipe import Recipe, make_recipe
from registry import queries
from registry.names import Reference
from registry.orders import Enqueued
from registry.session import reading, transaction

PICTURE = "demo.png"


def recipe() -> Recipe:
    """What suits a base of half a million parameters: a larger rate and shorter rows than the defaults."""
    return make_recipe({
        "rank": 8, "alpha": 16, "learning_rate": 1e-2, "epochs": 8, "batch_size": 4, "row_tokens": 256,
        "max_length": 256, "patience": 3, "warmup": 0.1, "holdout.share": 0.2,
    })  # fmt: skip


def run(home: Path) -> None:
    """Everything from nothing in `home`; a second run finds that nothing changed and makes no new versions."""
    started = time.monotonic()
    factory = _own_factory(home)
    with _ticking("training the demo's base") as progress:
        base = make_base(home / "base", say=lambda line: progress.update(progress.task_ids[0], description=line))
    people = write_people(home / "people")
    say(f"base      {base}")
    _add_everybody(factory, people)
    jobs = _request_everybody(factory, people, base)
    fresh = [job for job in jobs.values() if not job.unchanged]
    say(f"jobs      {len(fresh)} to train, {len(jobs) - len(fresh)} unchanged")
    if fresh:
        _run_flow(fresh)
    _show(factory, people, base, anew=bool(fresh) or not (home / PICTURE).exists())
    say(f"done in {time.monotonic() - started:.0f} s; look at {home / PICTURE}, or try:")
    lora = as_typed(sys.argv[0])
    say(f"  LORA_HOME={home} {lora} history acme/ada")
    say(f'  LORA_HOME={home} {lora} chat acme/ada --compare -p "{people[0].sample_prompt}"')


def as_typed(program: str) -> str:
    """How the command that runs is typed here: after `make demo` it is in an environment that no shell knows of."""
    return program if Path(program).name == "lora" and not shutil.which("lora") else "lora"


def _own_factory(home: Path) -> Factory:
    """A factory on SQLite and a folder below `home`, and an ephemeral Prefect, whatever the environment says."""
    for name in [key for key in os.environ if key.startswith("LORA_") or key == "PREFECT_API_URL"]:
        del os.environ[name]
    os.environ |= {
        "LORA_HOME": str(home.absolute()),
        "LORA_SLOTS": "8",
        "LORA_DEVICE": "cpu",
        "PREFECT_HOME": str(home.absolute() / "prefect"),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
        "DO_NOT_TRACK": "1",
    }
    factory = Factory.from_environment()
    factory.set_up()
    return factory


def _ticking(what: str) -> Progress:
    columns = (TextColumn("[progress.description]{task.description}"), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True)
    progress.add_task(what, total=None)
    return progress


def _add_everybody(factory: Factory, people: Sequence[Person]) -> None:
    for person in people:
        _, report = add_data(factory, _reference(person), [str(person.file)])
        bad = f", {report.bad} bad rows skipped" if report.bad else ""
        say(f"data      {_reference(person).label:<12} {report.kept:>4} examples from {person.file.name}{bad}")
        for problem in report.problems:
            say(f"            {problem}")


def _request_everybody(factory: Factory, people: Sequence[Person], base: Path) -> dict[str, Enqueued]:
    pinned = pin_base(factory, str(base))
    with transaction(factory.engine) as session:
        asked = request_all(session, [Wanted(_reference(person), pinned, recipe()) for person in people])
    return {reference.label: job for reference, job in asked.items()}


def _run_flow(jobs: Sequence[Enqueued]) -> None:
    """All of them packed in one cohort, as a Prefect flow on a server of its own."""
    with _ticking("starting Prefect, then training everybody at once"):
        from flows.adapt import adapt_cohort  # imported late: only now is Prefect's environment set

        adapt_cohort([str(job.job_id) for job in jobs])


def _show(factory: Factory, people: Sequence[Person], base: Path, anew: bool) -> None:
    """What the registry says of everybody, from pulled files; then one user before and after."""
    print_table(table([_row(factory, person) for person in people]))
    for person in people:
        say(f"{_reference(person).label:<12} {person.habit}")
    _try_stock_peft(factory, people[0], base)
    from flows.talk import Talk

    os.environ["LORA_BASE"] = str(base)
    own, plain = Talk.of(_reference(people[0]).label).ask(people[0].sample_prompt, 48, compare=True)
    say(f"asked     {people[0].sample_prompt}")
    say(f"base      {plain!r}")
    say(f"{_reference(people[0]).label:<9} {own!r}   ({people[0].habit})")
    if anew:
        _draw(factory, people)


def _row(factory: Factory, person: Person) -> dict[str, object]:
    reference = _reference(person)
    with reading(factory.engine) as session:
        tenant = queries.tenant_id(session, reference.tenant)
        version = queries.version(session, tenant, reference)
        scores = queries.scores(session, tenant, version)
        _, base, _ = queries.lineage(session, tenant, version)
    before, after = scores["base"], scores["candidate"]
    return {
        "user": reference.label,
        "version": version.number,
        "trained": f"{version.parameters:,} ({version.parameters / base.parameters:.1%})",
        "size": size(version.files["adapter_model.safetensors"]["size"]),
        "loss": f"{before['loss']:.3f}→{after['loss']:.3f}",
        "gain": f"{before['loss'] - after['loss']:+.3f}",
        "exact": _change(before, after, "answer_exact", "{:.0%}"),
        "chrF": _change(before, after, "answer_chrf", "{:.0f}"),
    }


def _change(before: dict[str, float], after: dict[str, float], key: str, style: str) -> str:
    if key not in after:
        return "-"
    return f"{style.format(before[key])}→{style.format(after[key])}"


def _try_stock_peft(factory: Factory, person: Person, base: Path) -> None:
    """Load a pulled folder as any PEFT user would."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = factory.client.pull(_reference(person))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    trained = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    say(f"pulled    {folder}")
    say(f"PEFT      loaded it: {type(model).__name__} with {trained:,} adapter parameters")


def _draw(factory: Factory, people: Sequence[Person]) -> None:
    from flows.matrix import cross
    from flows.report import draw

    labels = [_reference(person).label for person in people]
    curves = {}
    for label in labels:
        manifest = json.loads((factory.client.pull(label) / "manifest.json").read_text(encoding="utf-8"))
        curves[label] = manifest["training"]["held_out"]
    draw(curves, cross(factory, labels), factory.settings.home_folder / PICTURE)


def _reference(person: Person) -> Reference:
    return Reference(person.tenant, person.user)
