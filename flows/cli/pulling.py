"""`lora pull`: bring one version, or very many, to this machine."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from flows.cli.fleet import All, Conditions
from flows.cli.printing import AsJson, Row, answer, answer_one, fail, in_words, remark, say, size
from flows.cli.typed import standard_input
from flows.errors import Unready
from registry.client import Client, Pulled
from registry.errors import NotFound
from registry.fleet import Where
from registry.names import LATEST

References = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="REFERENCE...", help="acme/alice, acme/alice:3, acme/alice@production, any number; a TENANT with --all."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(pull)


def pull(
    references: References = None,
    listed: Annotated[
        str | None, typer.Option("--list", metavar="FILE", help="A reference on each line; - reads them from stdin.")
    ] = None,
    all_: All = False,
    alias: Annotated[str, typer.Option("--alias", help="With --all: which alias of each adapter.")] = LATEST,
    where: Conditions = None,
    to: Annotated[Path | None, typer.Option("--to", help="Copy one version's files into this new folder too.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Hash cached copies again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Bring versions' files to this machine, verified; prints the folders, ready for PEFT or vLLM.

    Of many, one that fails stops no other; exit code 4 says that some did.

    lora pull acme/alice

    lora pull acme/alice@production --to ./adapters/alice

    lora pull acme --all --alias production --where "user=a*"

    lora pull --list references.txt
    """
    asked = references or []
    _check_together(asked, listed, all_, to, alias != LATEST or bool(where))
    if all_:
        outcomes = Client.from_environment().pull_all(asked[0], alias, Where.parse(where or []), verify)
        _report(outcomes, f"{asked[0]} at alias {alias}", as_json)
    elif len(asked) == 1 and listed is None:
        _pull_one(asked[0], to, verify, as_json)
    else:
        wanted = [*asked, *(_lines(listed) if listed is not None else ())]
        _report(Client.from_environment().pull_many(wanted, verify), str(listed), as_json)


def _pull_one(reference: str, to: Path | None, verify: bool, as_json: bool) -> None:
    folder = Client.from_environment().pull(reference, verify)
    if to:
        folder = _copied(folder, to)
    if as_json:
        answer_one({"folder": folder}, as_json)
    else:
        say(str(folder))


def _check_together(asked: list[str], listed: str | None, all_: bool, to: Path | None, chosen: bool) -> None:
    """What is asked for makes sense together."""
    if all_ and (len(asked) != 1 or listed is not None):
        raise typer.BadParameter("--all takes one tenant, and nothing else")
    if chosen and not all_:
        raise typer.BadParameter("--alias and --where go with --all; for one version write acme/alice@production")
    if not asked and listed is None:
        raise typer.BadParameter("give references, --list FILE, or a tenant and --all")
    if to and (all_ or listed is not None or len(asked) != 1):
        raise typer.BadParameter("--to takes one version; of many, each is in the folder that is printed")


def _report(outcomes: Iterator[Pulled], asked_for: str, as_json: bool) -> None:
    """Say what became of each as it comes, then of all; leaves with code 4 where some failed, 1 where all did."""
    start, rows, failed, cached, fetched = time.monotonic(), list[Row](), 0, 0, 0
    for done in _shown(outcomes):
        if done.error:
            failed += 1
            fail(f"{str(done.reference)[:200]}: {in_words(done.error)}", 1)
        elif not as_json:
            say(f"{done.reference}  {done.folder}")
        cached += done.folder is not None and not done.fetched
        fetched += done.fetched
        rows.append(_row(done))
    if not rows:
        raise NotFound("version to pull in", asked_for, "see `lora list TENANT` for those there are")
    if as_json:
        answer(rows, as_json, "")
    took = f"{size(fetched)} fetched in {time.monotonic() - start:.1f} s"
    remark(f"{len(rows) - failed} pulled, {cached} of them from the cache; {failed} failed; {took}")
    if failed:
        raise typer.Exit(1 if failed == len(rows) else 4)


def _row(done: Pulled) -> Row:
    facts = {"reference": str(done.reference), "number": done.number or None, "folder": done.folder}
    return {**facts, "fetched": done.fetched, "error": in_words(done.error) if done.error else None}


def _shown(outcomes: Iterable[Pulled]) -> Iterator[Pulled]:
    """The same, counted on a terminal's stderr while stdout goes elsewhere."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.completed} versions"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not _counts(console)) as progress:
        yield from progress.track(outcomes, description="")


def _counts(console: Console) -> bool:
    return console.is_terminal and not sys.stdout.isatty()  # else the lines themselves show how far it is


def _lines(file: str) -> list[str]:
    """The references that a file lists; empty lines and those with a # before them are nothing."""
    try:
        text = standard_input("name a file").read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except ValueError as error:  # no UTF-8, or a path with a null byte
        what = f"{ascii(file)[:80]} lists no references ({type(error).__name__})"
        raise Unready(what, "give a text file with one on each line") from None
    lines = (line.strip() for line in text.removeprefix("\ufeff").splitlines())  # a mark that some editors begin with
    return [line for line in lines if line and not line.startswith("#")]


def _copied(folder: Path, to: Path) -> Path:
    """A copy of a folder, put in place in one step: an engine that looks there finds all of it or nothing."""
    if os.path.lexists(to):
        raise Unready(f"{to} exists already", "give a new folder")
    above, aside = to.absolute().parent, None
    try:
        above.mkdir(parents=True, exist_ok=True)
        aside = tempfile.mkdtemp(dir=above, prefix=".pull-")
        return Path(shutil.copytree(folder, Path(aside, "new"))).rename(to)
    except OSError as error:
        why = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror or error
        raise Unready(f"{to} cannot be written ({why})", "give a new folder, or make room") from None
    finally:
        if aside:
            shutil.rmtree(aside, ignore_errors=True)
