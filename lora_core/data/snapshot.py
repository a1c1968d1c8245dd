"""A dataset as it was on one day: valid examples without duplicates, named by the digest of their content."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_core.data.examples import Example, canonical_line, parse_example
from lora_core.data.readers import Limits, RawRow, RowProblem, read_rows
from lora_core.errors import BadRow, DatasetRefused

SHOWN = 100  # problems kept in a report; the rest are counted


@dataclass(frozen=True)
class SkipPolicy:
    """How many bad rows a dataset may have before it is refused as a whole."""

    max_bad_share: float = 0.1


@dataclass(frozen=True)
class IngestReport:
    """What reading a dataset found."""

    rows: int
    kept: int
    duplicates: int
    bad: int
    problems: tuple[RowProblem, ...]  # the first SHOWN


@dataclass(frozen=True)
class Snapshot:
    """Examples in the order they were found; `digest` is the SHA-256 of `content`."""

    digest: str
    examples: tuple[Example, ...]

    @property
    def content(self) -> bytes:
        """Canonical JSON lines."""
        return _content(self.examples)


class TooManyBadRows(DatasetRefused):
    """More rows are wrong than the policy allows; the report says which."""

    def __init__(self, source: str, why: str, fix: str, report: IngestReport) -> None:
        super().__init__(source, why, fix)
        self.args = (source, why, fix, report)
        self.report = report

    def __str__(self) -> str:
        source, why, fix, report = self.args
        first = f"; the first: {report.problems[0]}" if report.problems else ""
        return f"{source}: {why}; {fix}{first}"


def take_snapshot(
    sources: Sequence[str],
    policy: SkipPolicy | None = None,
    limits: Limits | None = None,
    s3: Any = None,  # a boto3 client
) -> tuple[Snapshot, IngestReport]:
    """Read, check and deduplicate files into a snapshot.  Raises DatasetRefused when too much is wrong."""
    policy = policy or SkipPolicy()
    kept: dict[str, Example] = {}
    problems: list[RowProblem] = []
    rows = bad = 0
    for source in sources:
        for row in read_rows(source, limits, s3):
            rows += 1
            found = _example(row)
            if isinstance(found, RowProblem):
                bad += 1
                problems += [found] if len(problems) < SHOWN else []
            else:
                kept.setdefault(canonical_line(found), found)
    report = IngestReport(rows, len(kept), rows - bad - len(kept), bad, tuple(problems))
    _judge(", ".join(sources), report, policy)
    examples = tuple(kept.values())
    return Snapshot(_digest(_content(examples)), examples), report


def load_snapshot(content: bytes, digest: str) -> Snapshot:
    """A snapshot read back.  Raises DatasetRefused when the content is not what the digest says."""
    if _digest(content) != digest:
        raise DatasetRefused(f"snapshot {digest[:12]}", "its content has another digest", "add the data again")
    lines = content.decode().split("\n")[:-1]
    return Snapshot(digest, tuple(parse_example(json.loads(line)) for line in lines))


def _example(row: RawRow | RowProblem) -> Example | RowProblem:
    if isinstance(row, RowProblem):
        return row
    try:
        return parse_example(row.value)
    except BadRow as error:
        return RowProblem(row.file, row.line, error.field, error.why, error.fix)


def _judge(source: str, report: IngestReport, policy: SkipPolicy) -> None:
    if report.bad > policy.max_bad_share * report.rows:
        why = f"{report.bad} of {report.rows} rows are wrong, more than {policy.max_bad_share:.0%}"
        fix = "mend them (`lora data check` shows them), or allow more with LORA_MAX_BAD_SHARE"
        raise TooManyBadRows(source, why, fix, report)
    if not report.kept:
        raise TooManyBadRows(source, "holds no example", "add rows", report)


def _content(examples: Sequence[Example]) -> bytes:
    return "".join(canonical_line(example) + "\n" for example in examples).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
