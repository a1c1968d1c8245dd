"""`lora compare`: which method for this data, and what each costs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from flows.cli.printing import AsJson, answer, console, remark, say, size
from flows.cli.training import BaseOption, RecipeOption, SetOption
from flows.factory import Factory

if TYPE_CHECKING:
    from lora_core.compare import Compared


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(compare)


def compare(
    reference: Annotated[
        str | None, typer.Argument(metavar="[TENANT/USER]", help="Whose newest data; else --data, else the demo's.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option("--data", help="Compare on these files; nothing is stored.")] = None,
    base: BaseOption = None,
    recipe: RecipeOption = None,
    set_: SetOption = None,
    picture: Annotated[Path | None, typer.Option(help="Where the picture goes; else in LORA_HOME.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train one user by every method and by full fine-tuning, and show what each gives and costs.

    lora compare

    lora compare acme/alice --base ./base

    lora compare --data chats.jsonl --base ./base --set epochs=2
    """
    from flows.comparison import demo_task, draw, own_task
    from lora_core import compare as comparing
    from lora_core.recipe import load_recipe

    if not (reference or data) and (base or recipe or set_):
        raise typer.BadParameter("name a user or --data; alone, the command compares on the demo")
    if picture and picture.suffix not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(f"--picture {picture}: give a name that ends in .png, .svg or .pdf")
    factory = Factory.from_environment()
    columns = (TextColumn("[progress.description]{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=as_json or not console.is_terminal, transient=True) as progress:
        task = progress.add_task("reading", total=None)
        tell = lambda words: progress.update(task, description=words)  # noqa: E731  short
        if reference or data:
            factory.set_up()
            loaded, learner = own_task(factory, reference, data or [], base, load_recipe(recipe, set_ or []))
        else:
            loaded, learner = demo_task(factory, tell)
        before = comparing.bare(loaded, learner)
        missed: list[str] = []
        results = [*comparing.compare(loaded, learner, tell, lambda name, why: missed.append(f"{name}: {why}"))]
    rows = [_row(one, before.loss, as_json) for one in results]
    answer(rows, as_json, "", None if as_json else f"{learner.name}: the base alone loses {before.loss:.4f}")
    for line in missed:
        remark(f"not compared: {line}")
    path = draw(results, before.loss, picture or factory.settings.home_folder / "compare.png")
    if not as_json:
        for line in comparing.advice(results, before.loss):
            say(line)
        _show_examples()
        say(f"picture   {path}")


def _row(one: "Compared", base_loss: float, as_json: bool) -> dict[str, object]:
    """One method's figures; programs are told bytes and shares as numbers."""
    share, accuracy, peak, file = one.share, one.accuracy, one.peak_bytes, one.file_bytes
    words = {
        "accuracy": None if accuracy is None else f"{accuracy:.1%}", "share": f"{share:.2%}", "peak": size(peak),
        "file": size(file),
    }  # fmt: skip
    numbers = {"accuracy": accuracy, "share": share, "peak": peak, "file": file}
    row = {
        "method": one.method, "rate": one.rate, "loss": round(one.loss, 4), "gain": round(base_loss - one.loss, 4),
        "accuracy": None, "trained": one.parameters, "share": None, "peak": None, "seconds": round(one.seconds, 2),
        "file": None, "fit": one.fit,
    }  # fmt: skip
    return row | (numbers if as_json else words)


def _show_examples() -> None:
    """The textbook's examples, from real shapes."""
    from lora_core.worked_examples import gpt2, one_matrix, remarks

    rows = [
        {"example": one.what, "trained": one.trained, "of": one.of, "share": f"{one.share:.2%}",
         "file": size(one.file_bytes), "fit": one.fit}
        for one in (one_matrix(), gpt2())
    ]  # fmt: skip
    answer(rows, False, "")
    for line in remarks():
        say(line)
