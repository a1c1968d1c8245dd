"""Rows out of Parquet: read by a process of its own (`parquet_rows.py`), which may neither grow nor hang.

Of no other format does so much depend on what a file says of itself: a dictionary of one long text and a few bytes for
each row that repeats it are a file of a megabyte and a table of a terabyte.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from lora_core.data.compression import Bounded
from lora_core.data.rows import Limits, Rows, as_object, lines, too_long
from lora_core.data.strict_json import decoded, parse_json
from lora_core.errors import DatasetRefused

READER = Path(__file__).with_name("parquet_rows.py")
REFUSED = 3  # the exit code with which the reader says why in words


def read_parquet(name: str, stream: Bounded, limits: Limits) -> Rows:
    """Every row, as the reader writes it: one JSON object a line, within the limits of any such file."""
    if find_spec("pyarrow") is None:
        raise DatasetRefused(name, "is Parquet, which needs another package", "pip install 'lora-factory[data]'")
    with tempfile.TemporaryFile() as file:
        size = 0
        while piece := stream.read(1 << 16):
            size += file.write(piece)
            if size > limits.parquet_bytes:
                raise DatasetRefused(name, f"has more than {limits.parquet_bytes:,} bytes", "split it by user")
        file.seek(0)
        with _reading(name, file) as output:
            for number, line in lines(Bounded(name, output, limits.file_bytes), limits.row_bytes):
                if line is None:
                    yield too_long(name, number, limits.row_bytes)
                    continue
                try:
                    value = parse_json(decoded(line), limits.depth)
                except ValueError as error:
                    raise DatasetRefused(name, f"row {number:,} is no data: {error}", "write it as .jsonl") from None
                yield as_object(name, number, value)


@contextmanager
def _reading(name: str, file: IO[bytes]) -> Iterator[IO[bytes]]:
    """What the reader writes; how it ended is told where its output was taken to the end."""
    with tempfile.TemporaryFile() as words:
        command = [sys.executable, "-P", str(READER)]
        with subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, stderr=words) as reader:
            try:
                assert reader.stdout  # a pipe
                yield reader.stdout
                code = reader.wait()
            finally:
                reader.kill()
        if code:
            words.seek(0)
            said = words.read(300).decode(errors="replace").strip()
            why = said if code == REFUSED else f"broke its reader (exit code {code}): {said}".rstrip(": ")
            raise DatasetRefused(name, f"is broken: {why}", "write it again, or as .jsonl")
