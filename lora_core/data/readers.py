"""Rows out of files: JSONL, JSON, CSV, TSV and Parquet, plain, gzip or zstd; a file, a folder or `s3://`.

Reading streams and is limited in every direction: a wrong, hostile or endless file costs bounded memory and is reported
by file and line.  A JSON array is the one format whose text is held whole, up to `json_bytes`.
"""

import gzip
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from lora_core.data.compression import NAMES, Bounded, decompressed
from lora_core.data.delimited import delimited
from lora_core.data.parquet import read_parquet
from lora_core.data.rows import Limits, RawRow, RowProblem, Rows, as_object, lines, too_long
from lora_core.data.sources import Source, find_sources
from lora_core.data.strict_json import array_elements, decoded, parse_json
from lora_core.errors import DatasetRefused

__all__ = ["READERS", "Limits", "RawRow", "RowProblem", "read_rows"]


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
            if type(error).__module__.split(".")[0] not in ("zstandard", "botocore"):
                raise
            why = f"is broken: {str(error).splitlines()[0]}"
            raise DatasetRefused(source.name, why, "write or compress it again") from None


def _jsonl(name: str, stream: Bounded, limits: Limits) -> Rows:
    for number, line in lines(stream, limits.row_bytes):
        if line is None:
            yield too_long(name, number, limits.row_bytes)
        elif line.strip():
            yield _json_row(name, number, line, limits.depth)


def _json_row(name: str, number: int, line: bytes, depth: int) -> RawRow | RowProblem:
    try:
        value = parse_json(decoded(line), depth)
    except ValueError as error:
        return RowProblem(name, number, "line", f"is not JSON: {error}", "write one JSON object a line")
    return as_object(name, number, value)


def _json(name: str, stream: Bounded, limits: Limits) -> Rows:
    number = 1
    try:
        for number, element in enumerate(array_elements(_whole(name, stream, limits.json_bytes), limits.depth), 1):
            if len(element) > limits.row_bytes:
                yield too_long(name, number, limits.row_bytes)
            else:
                yield as_object(name, number, parse_json(element, limits.depth))
    except ValueError as error:
        why = f"is not JSON (row {number}): {error}"
        raise DatasetRefused(name, why, "mend it, or write JSON lines (.jsonl)") from None


def _whole(name: str, stream: Bounded, most: int) -> str:
    pieces, size = [], 0
    while piece := stream.read(1 << 16):
        pieces.append(piece)
        size += len(piece)
        if size > most:
            raise DatasetRefused(name, f"has more than {most:,} bytes", "write a large file as .jsonl")
    return decoded(b"".join(pieces))


READERS: Mapping[str, Callable[[str, Bounded, Limits], Rows]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": delimited(","),
    ".tsv": delimited("\t"),
    ".parquet": read_parquet,
}
