"""What readers of files give out, and how much: rows and problems by file and line, lines of limited length."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lora_core.data.compression import Stream


@dataclass(frozen=True)
class Limits:
    """How much a dataset may hold; bytes are counted after decompression."""

    row_bytes: int = 1 << 20
    file_bytes: int = 1 << 30
    json_bytes: int = 1 << 26  # of a JSON array's text, which is held whole
    parquet_bytes: int = 1 << 28
    rows: int = 1_000_000
    files: int = 1_000
    columns: int = 1_000
    depth: int = 32


@dataclass(frozen=True)
class RawRow:
    """One row as it stands in its file; lines count from 1."""

    file: str
    line: int
    value: Mapping[str, object]


@dataclass(frozen=True)
class RowProblem:
    """What is wrong with one row, and how to mend it."""

    file: str
    line: int
    field: str
    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.field}: {self.why}; {self.fix}"


Rows = Iterator[RawRow | RowProblem]


def lines(stream: Stream, most: int) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines; None for one that is too long, which is skipped without being held."""
    rest, number, skipping = b"", 0, False
    while piece := stream.read(1 << 16):
        rest += piece
        *whole, rest = rest.split(b"\n")
        for line in whole:
            number += 1
            yield number, None if skipping or len(line) > most else line
            skipping = False
        if len(rest) > most:
            rest, skipping = b"", True
    if rest or skipping:
        yield number + 1, None if skipping else rest


def too_long(name: str, number: int, most: int) -> RowProblem:
    """What is said of a row that is longer than it may be."""
    return RowProblem(name, number, "line", f"is longer than {most:,} bytes", "shorten or split it")


def as_object(name: str, number: int, value: object) -> RawRow | RowProblem:
    """A row of JSON, which must be an object."""
    if not isinstance(value, dict):
        return RowProblem(name, number, "row", f"is a {type(value).__name__}, not an object", "write {...}")
    return RawRow(name, number, value)
