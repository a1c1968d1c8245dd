"""`lora data`: look at users' files, and add them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from flows.cli.printing import AsJson, OwnReference, answer_one, say
from flows.factory import Factory, add_data, read_data
from lora_core.data.snapshot import IngestReport, TooManyBadRows
from registry.names import Reference

app = typer.Typer(no_args_is_help=True, help="Check and add users' datasets.")

Files = Annotated[
    list[str],
    typer.Argument(metavar="FILE...", help="JSONL, JSON, CSV, TSV, Parquet; .gz, .zst; a folder; s3://bucket/key"),
]
MaxBad = Annotated[
    float | None,
    typer.Option("--max-bad", min=0, max=1, help="Largest share of bad rows that is skipped; else LORA_MAX_BAD_SHARE."),
]


@app.command()
def check(files: Files, max_bad: MaxBad = None, as_json: AsJson = False) -> None:
    """Read files as `data add` would, and report bad rows, the first hundred one by one; nothing is stored.

    lora data check chats.jsonl more.csv.gz
    """
    with _refusal_told(as_json):
        snapshot, report = read_data(Factory.from_environment(), files, max_bad)
    _tell(snapshot.digest, report, as_json)


@app.command()
def add(reference: OwnReference, files: Files, max_bad: MaxBad = None, as_json: AsJson = False) -> None:
    """Snapshot a user's files into the store; `train` and schedules use the newest snapshot.

    Data are a user's: all adapters of theirs, whichever is named here, are trained on the newest from then on.

    lora data add acme/alice chats.jsonl

    lora data add acme/bob s3://exports/bob/
    """
    factory = Factory.from_environment()
    factory.set_up()
    with _refusal_told(as_json):
        digest, report = add_data(factory, Reference.parse_adapter(reference), files, max_bad)
    _tell(digest, report, as_json)


@contextmanager
def _refusal_told(as_json: bool) -> Iterator[None]:
    """A dataset with too many bad rows is reported as any other before it is refused: nowhere is it needed more."""
    try:
        yield
    except TooManyBadRows as refused:
        _tell(None, refused.report, as_json)
        raise


def _tell(digest: str | None, report: IngestReport, as_json: bool) -> None:
    if not as_json:
        for problem in report.problems:
            say(str(problem))
        if report.bad > len(report.problems):
            say(f"... and {report.bad - len(report.problems)} more")
    facts = {"digest": digest, "rows": report.rows, "examples": report.kept}
    problems = [str(problem) for problem in report.problems] if as_json else []
    more = {"problems": problems} if as_json else {}
    answer_one({**facts, "duplicates": report.duplicates, "bad rows": report.bad, **more}, as_json)
