"""Parquet on stdin, JSON lines on stdout: run by path in a process of its own, under limits that it sets itself.

It imports nothing of this project: a file that takes it over has the rights of the process that reads it, no objects.
"""

import json
import math
import os
import resource
import sys
from pathlib import Path

os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # its own take a GiB of addresses at once; read when it is imported

import pyarrow as arrow
import pyarrow.parquet as parquet

MEMORY = 1 << 30  # bytes beside what the libraries have taken
SECONDS = 120  # of computing
ROWS = 64  # at a time
REFUSED = 3


def confine() -> None:
    """Take no more memory and time than a file of a user can need."""
    arrow.set_cpu_count(1)
    arrow.set_io_thread_count(1)
    statm = Path("/proc/self/statm")  # not on macOS, which does not limit memory either
    if statm.exists():
        most = int(statm.read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def write_rows() -> None:
    """Every row without its empty cells."""
    file = parquet.ParquetFile(open(0, "rb"))  # noqa: SIM115 (lives as long as the process)
    names = file.schema_arrow.names
    if len(set(names)) != len(names):
        raise ValueError("two columns have one name")
    for batch in file.iter_batches(batch_size=ROWS, use_threads=False):
        for row in batch.to_pylist():
            cells = {key: value for key, cell in row.items() if (value := _finite(cell)) is not None}
            sys.stdout.buffer.write(json.dumps(cells, default=_named, ensure_ascii=False).encode() + b"\n")


def _finite(value: object) -> object:
    """The same with nothing in place of numbers that are none, which JSON does not know."""
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _named(value: object) -> object:
    """What JSON does not know, such as bytes and moments: no text, and told as what it is."""
    return {type(value).__name__: repr(value)[:40]}


def main() -> int:
    """Write the rows, or say why not."""
    confine()
    try:
        write_rows()
        sys.stdout.flush()
    except MemoryError:  # also Arrow's own
        sys.stderr.write(f"it needs more than {MEMORY >> 20:,} MiB to be read")
        return REFUSED
    except Exception as error:  # whatever a hostile file brings a library to
        sys.stderr.write((str(error).splitlines() or [type(error).__name__])[0][:200])
        return REFUSED
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # Arrow's threads at times abort a process that ends with its work done (arrow#34314)
