"""Rows out of files: JSONL, JSON, CSV, TSV and Parquet, plain, gzip or zstd; a file, a folder or `s3://`.

Reading streams and is limited in every direction: a wrong, hostile or endless file costs bounded memory and is reported
by file and line.  A JSON array is the one format that is held whole, up to `json_bytes`.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from lora_core.data.compression import NAMES, Bounded, decompressed
from lora_core.data.sources import Source, find_sources
from lora_core.errors import DatasetRefused

csv.field_size_limit(1 << 24)


@dataclass(frozen=True)
class Limits:
    """How much a dataset may hold; bytes are counted after decompression."""

    row_bytes: int = 1 << 20
    file_bytes: int = 1 << 30
    json_bytes: int = 1 << 28
    rows: int = 1_000_000
    files: int = 1_000
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


def read_rows(source: str, limits: Limits | None = None, s3: Any = None) -> Rows:  # s3: a boto3 client
    """Every row of a file, a folder or `s3://bucket/key` or `s3://bucket/prefix/`.

    A row that cannot be read comes out as a RowProblem.  Raises DatasetRefused for a source that cannot be read at all.
    """
    limits = limits or Limits()
    count = 0
    for found in find_sources(source, limits.files, s3):
        for row in _read_source(found, limits):
            count += 1
            if count > limits.rows:
                raise DatasetRefused(source, f"has more than {limits.rows:,} rows", "split it by user")
            yield row


def _read_source(source: Source, limits: Limits) -> Rows:
    reader = READERS[source.format]
    with ExitStack() as stack:
        try:
            raw = stack.enter_context(source.open())
            stream = stack.enter_context(decompressed(raw, source.compression))
            yield from reader(source.name, Bounded(source.name, stream, limits.file_bytes), limits)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            why = f"is not whole {NAMES.get(source.compression, 'data')} ({error})"
            raise DatasetRefused(source.name, why, "compress it again") from None
        except OSError as error:
            raise DatasetRefused(source.name, f"cannot be read ({error.strerror or error})", "check the path") from None
        except Exception as error:
            if type(error).__module__.split(".")[0] not in ("zstandard", "pyarrow", "botocore"):
                raise
            why = f"is broken: {str(error).splitlines()[0]}"
            raise DatasetRefused(source.name, why, "write or compress it again") from None


def _jsonl(name: str, stream: Bounded, limits: Limits) -> Rows:
    for number, line in _lines(stream, limits.row_bytes):
        if line is None:
            yield RowProblem(name, number, "line", f"is longer than {limits.row_bytes:,} bytes", "shorten or split it")
        elif line.strip():
            yield _json_row(name, number, line, limits.depth)


def _lines(stream: Bounded, most: int) -> Iterator[tuple[int, bytes | None]]:
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


def _json_row(name: str, number: int, line: bytes, depth: int) -> RawRow | RowProblem:
    try:
        value = parse_json(line, depth)
    except ValueError as error:
        return RowProblem(name, number, "line", f"is not JSON: {error}", "write one JSON object a line")
    return _object(name, number, value)


def _object(name: str, number: int, value: object) -> RawRow | RowProblem:
    if not isinstance(value, dict):
        return RowProblem(name, number, "row", f"is a {type(value).__name__}, not an object", "write {...}")
    return RawRow(name, number, value)


def parse_json(data: bytes, depth: int) -> object:
    """Strict JSON of limited depth: no NaN, no key twice, valid UTF-8.  Raises ValueError in plain words."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8") from None
    if _deep(text, depth):
        raise ValueError(f"it is nested deeper than {depth}")
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos + 1}") from None


def _deep(text: str, most: int) -> bool:
    """Whether brackets outside strings nest deeper than `most`: asked before the parser, which recurses."""
    depth = 0
    quoted = escaped = False
    for character in text if text.count("[") + text.count("{") > most else "":
        if quoted:
            quoted = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            quoted = True
        elif character in "[{":
            depth += 1
            if depth > most:
                return True
        elif character in "]}":
            depth -= 1
    return False


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key[:40]!r} stands twice")
        found[key] = value
    return found


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _json(name: str, stream: Bounded, limits: Limits) -> Rows:
    data = _whole(name, stream, limits.json_bytes)
    try:
        value = parse_json(data, limits.depth)
    except ValueError as error:
        raise DatasetRefused(name, f"is not JSON: {error}", "mend it, or write JSON lines (.jsonl)") from None
    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        yield _object(name, number, row)


def _whole(name: str, stream: Bounded, most: int) -> bytes:
    pieces, size = [], 0
    while piece := stream.read(1 << 16):
        pieces.append(piece)
        size += len(piece)
        if size > most:
            raise DatasetRefused(name, f"has more than {most:,} bytes", "write a large file as .jsonl")
    return b"".join(pieces)


def _delimited(delimiter: str) -> "Callable[[str, Bounded, Limits], Rows]":
    def read(name: str, stream: Bounded, limits: Limits) -> Rows:
        text = _decoded(_lines(stream, limits.row_bytes), name)
        reader = csv.DictReader(text, delimiter=delimiter, restkey="...", strict=True)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield RowProblem(name, reader.line_num, "row", f"is not CSV: {error}", "mend its quotes")
                continue
            yield _csv_row(name, reader.line_num, row)

    return read


# Lists inside a cell come as JSON; in some columns always, in others where it is no plain text.
LISTS = {"messages": True, "conversations": True, "prompt": False, "chosen": False, "rejected": False}


def _csv_row(name: str, number: int, row: Mapping[str, object]) -> RawRow | RowProblem:
    if "..." in row or None in row.values():
        return RowProblem(
            name, number, "row", "has another number of cells than the heading", "quote cells that hold commas"
        )
    cells = {key: value for key, value in row.items() if key}
    for key, always in LISTS.items():
        if isinstance(cell := cells.get(key), str) and (always or cell.lstrip().startswith("[{")):
            try:
                cells[key] = parse_json(cell.encode(), 32)
            except ValueError as error:
                return RowProblem(name, number, key, f"is not JSON: {error}", "write the list as JSON")
    return RawRow(name, number, cells)


def _decoded(lines: Iterator[tuple[int, bytes | None]], name: str) -> Iterator[str]:
    for number, line in lines:
        try:
            if line is None:
                raise DatasetRefused(f"{name}:{number}", "is a longer line than is allowed", "split or shorten it")
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").replace("\0", "\ufffd") + "\n"
        except UnicodeDecodeError as error:
            where = f"{name}:{number}"
            raise DatasetRefused(where, f"byte {error.start + 1} is not UTF-8", "save it as UTF-8") from None


def _parquet(name: str, stream: Bounded, limits: Limits) -> Rows:
    import pyarrow.parquet as parquet  # an extra: only those who bring Parquet need it

    file = parquet.ParquetFile(io.BytesIO(_whole(name, stream, limits.json_bytes)))
    if sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)) > limits.file_bytes:
        raise DatasetRefused(name, f"holds more than {limits.file_bytes:,} bytes", "split it by user")
    number = 0
    for batch in file.iter_batches(batch_size=256):
        for row in batch.to_pylist():
            number += 1
            yield RawRow(name, number, {key: value for key, value in row.items() if value is not None})


READERS: Mapping[str, Callable[[str, Bounded, Limits], Rows]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".parquet": _parquet,
}
