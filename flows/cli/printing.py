"""How commands answer: tables for people, JSON for programs, one line on stderr for what went wrong."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

# What people wrote is shown as they wrote it: rich would take [words] for its markup and :words: for pictures.
console = Console(markup=False, emoji=False)
_unbounded = Console(markup=False, emoji=False, width=1 << 20)
Row = Mapping[str, object]

AsJson = Annotated[bool, typer.Option("--json", help="Answer as JSON, for programs.")]
Limit = Annotated[int, typer.Option(min=1, max=10_000, help="Rows of a page.")]
Page = Annotated[int, typer.Option(min=1, max=1_000_000, help="Which page.")]
OwnReference = Annotated[
    str,
    typer.Argument(metavar="TENANT/USER[/ADAPTER]", help="Whose adapter, for example acme/alice or acme/alice/notes."),
]
VersionReference = Annotated[
    str,
    typer.Argument(metavar="REFERENCE", help="acme/alice, acme/alice/notes, acme/alice:3 or acme/alice@production."),
]


def fail(error: object, code: int) -> int:
    """Say what went wrong on stderr, in one line; gives the exit code back."""
    text = plain(f"error: {error}", keep="")
    _beside().print(text, style="red")
    return code


def in_words(error: Exception) -> str:
    """What went wrong, without the numbers of the operating system."""
    if not isinstance(error, OSError):
        return str(error)
    what = error.strerror or str(error)
    return f"{str(error.filename)[:200]}: {what}; check the path, its rights and the space" if error.filename else what


def plain(text: str, keep: str = "\n\t") -> str:
    """Text that cannot steer a terminal, whoever wrote it: control and invisible characters become escapes."""
    return "".join(one if one.isprintable() or one in keep else ascii(one)[1:-1] for one in text)


def say(text: str) -> None:
    """One line to a person."""
    console.print(plain(text), highlight=False, soft_wrap=True)


def remark(text: str) -> None:
    """One line on stderr, beside an answer that a program may be reading."""
    _beside().print(plain(text))


def _beside() -> Console:
    """Standard error as it is now."""
    return Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False)


def answer(rows: Sequence[Row], as_json: bool, empty: str, title: str | None = None) -> None:
    """Rows as a table, or as a JSON list."""
    if as_json:
        sys.stdout.write(json.dumps([dict(row) for row in rows], default=str, indent=2) + "\n")
    elif not rows:
        say(empty)
    else:
        print_table(table(rows, title))


def answer_one(row: Row, as_json: bool) -> None:
    """One thing's facts, a line each, or as a JSON object."""
    if as_json:
        sys.stdout.write(json.dumps(dict(row), default=str, indent=2) + "\n")
        return
    width = max(len(key) for key in row)
    for key, value in row.items():
        say(f"{key:<{width}}  {shown(value)}")


def print_table(made: Table) -> None:
    """A table, folded to the terminal's width; where none looks, each row is a line, for grep and the like."""
    folded = console.is_terminal or "COLUMNS" in os.environ
    (console if folded else _unbounded).print(made)


def table(rows: Sequence[Row], title: str | None = None) -> Table:
    """Rows as a Rich table; columns that look like numbers are right-aligned."""
    made = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, padding=0)
    for column in dict.fromkeys(key for row in rows for key in row):
        numbers = all(isinstance(row.get(column), int | float | None) for row in rows)
        made.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(shown(row.get(str(column.header))) for column in made.columns))
    return made


def shown(value: object) -> str:
    """A value as a person reads it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:#.4g}".removesuffix(".")
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S %Z")
    if isinstance(value, dict | list):
        return json.dumps(value, default=str)
    return plain(str(value))


def installed(name: str) -> str:
    """Which version of a distribution is installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def size(count: int) -> str:
    """Bytes as a person reads them."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
