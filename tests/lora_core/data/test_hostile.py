"""Files that once cost gigabytes, minutes or a traceback, by what was wrong: each is told in words now."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_core.data.readers import Limits, RawRow, RowProblem, read_rows
from lora_core.data.snapshot import SkipPolicy, take_snapshot
from lora_core.errors import DatasetRefused


def repeated(count: int) -> pa.Array:
    """One text of 4 MiB, and a byte or less for each time that it is said again."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array(["x" * (1 << 22)]))


def table(*columns: pa.Array) -> bytes:
    """A file with columns that are all named `text`."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(columns, ["text"] * len(columns)), sink)
    return bytes(sink.getvalue())


REFUSED: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "a table of a terabyte": ("x.parquet", lambda: table(repeated(250_000)), "broken: it needs|more than"),
    "a row of a terabyte": (
        "x.parquet",
        lambda: table(pa.ListArray.from_arrays(pa.array([0, 250_000], pa.int32()), repeated(250_000))),
        "broken: it needs",
    ),
    "two columns of one name": ("x.parquet", lambda: table(pa.array(["a"]), pa.array(["b"])), "one name"),
    "a heading without end": ("x.csv", lambda: b",".join(b"c%d" % n for n in range(100_000)) + b"\nx" * 9, "columns"),
    "a quote that is never closed": (
        "x.csv",
        lambda: b'prompt,completion\n"' + b'a\n","' * 400_000,
        "row of more than",
    ),
    "two cells under one heading": ("x.csv", lambda: b"prompt,prompt\na,b\n", "two columns named"),
    "an array that breaks off": ("x.json", lambda: b"[" + b"{}," * 100, "not JSON"),
    "an array with nothing between commas": ("x.json", lambda: b"[{},,{}]", "no value"),
    "an array with something behind it": ("x.json", lambda: b"[{}] {}", "after its end"),
    "a document of quotes": ("x.json", lambda: b'["' + b'\\"' * 1_000_000, "not JSON"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_costs_too_much_is_refused(tmp_path: Path, kind: str) -> None:
    """Before it does."""
    name, made, why = REFUSED[kind]
    (tmp_path / name).write_bytes(made())

    with pytest.raises(DatasetRefused, match=why):
        list(read_rows(str(tmp_path / name), Limits(file_bytes=1 << 26)))


def test_an_arrays_objects_are_never_all_held(tmp_path: Path) -> None:
    """A row that is too long is told as one, and the next is read."""
    (tmp_path / "x.json").write_bytes(b'[{"text": "a"}, [' + b"{}," * 500_000 + b'{}], {"text": "b"}]')

    first, long, last = read_rows(str(tmp_path / "x.json"))

    assert isinstance(long, RowProblem)
    assert (long.line, "longer than" in long.why) == (2, True)
    assert [row.value for row in (first, last) if isinstance(row, RawRow)] == [{"text": "a"}, {"text": "b"}]


def test_a_nul_in_a_cell_is_told_and_not_replaced(tmp_path: Path) -> None:
    """As in every other format."""
    (tmp_path / "x.csv").write_bytes(b"text\na\0b\nc\n")

    snapshot, report = take_snapshot([str(tmp_path / "x.csv")], SkipPolicy(1.0))

    assert (len(snapshot.examples), "NUL" in str(report.problems[0])) == (1, True)


@pytest.mark.parametrize("known", [{}, {"completion": "a"}])
def test_a_row_of_very_many_unknown_keys_is_told_at_once(tmp_path: Path, known: dict[str, str]) -> None:
    """Looking for what each might have meant would take a minute a row."""
    row = {f"prxmpt{number}": "" for number in range(60_000)} | known
    (tmp_path / "x.jsonl").write_text((json.dumps(row) + "\n") * 3 + '{"text": "a"}\n')

    snapshot, report = take_snapshot([str(tmp_path / "x.jsonl")], SkipPolicy(1.0))

    assert (len(snapshot.examples), report.bad) == (1, 3)


def test_a_link_out_of_a_folder_is_refused(tmp_path: Path) -> None:
    """Whoever made the folder does not choose what else is read of this machine; a link inside it is fine."""
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n')
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "data" / "b.jsonl").symlink_to("a.jsonl")
    assert len(list(read_rows(str(tmp_path / "data")))) == 2
    (tmp_path / "data" / "c.jsonl").symlink_to("../secret.jsonl")

    with pytest.raises(DatasetRefused, match="leads out"):
        list(read_rows(str(tmp_path / "data")))


def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    """Nobody writes to it."""
    os.mkfifo(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')

    assert len(list(read_rows(str(tmp_path)))) == 1


def test_a_table_is_read_within_the_same_limits(tmp_path: Path) -> None:
    """Values that are no text are told by type, and empty cells are no cells."""
    rows = [{"text": "a", "n": 1.0}, {"text": None, "n": float("nan")}, {"text": b"b", "n": None}]
    for number, row in enumerate(rows):
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"{number}.parquet")
    pq.write_table(pa.table({"text": ["x" * 3000]}), tmp_path / "3.parquet")

    found = list(read_rows(str(tmp_path), Limits(row_bytes=2000)))

    values = [row.value for row in found if isinstance(row, RawRow)]
    assert values == [{"text": "a", "n": 1.0}, {}, {"text": {"bytes": "b'b'"}}]
    assert isinstance(found[3], RowProblem)
