"""Rows out of any file that a person brings, and a clear word about every one that is wrong."""

import contextlib
import csv
import gzip
import io
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_core.data.readers import Limits, RawRow, RowProblem, read_rows
from lora_core.data.snapshot import take_snapshot
from lora_core.errors import DatasetRefused
from registry.store import s3_client

ROWS = [{"prompt": f"q{n} é", "completion": f'a, {n}\n"x"'} for n in range(5)]


def jsonl(rows: list[dict[str, str]]) -> bytes:
    """One JSON object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def csv_bytes(rows: list[dict[str, str]], comma: str = ",") -> bytes:
    """A heading and a line a row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, tuple(rows[0]), delimiter=comma)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows: list[dict[str, str]]) -> bytes:
    """One row group."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


FILES: dict[str, Callable[[list[dict[str, str]]], bytes]] = {
    "a.jsonl": jsonl,
    "a.ndjson": jsonl,
    "a.json": lambda rows: json.dumps(rows).encode(),
    "a.csv": csv_bytes,
    "a.tsv": lambda rows: csv_bytes(rows, "\t"),
    "a.parquet": parquet,
}
COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, compression: str) -> None:
    """Plain and compressed, line ends inside quotes and letters beyond ASCII included."""
    path = tmp_path / (name + compression)
    path.write_bytes(COMPRESSED[compression](FILES[name](ROWS)))

    found = list(read_rows(str(path)))

    assert [row.value for row in found if isinstance(row, RawRow)] == ROWS


def test_a_folder_is_read_in_order_of_name_and_hidden_files_are_not(tmp_path: Path) -> None:
    """Exports come in parts."""
    (tmp_path / "sub").mkdir()
    for name, row in (("b.jsonl", ROWS[1]), ("a.csv", ROWS[0]), ("sub/c.jsonl", ROWS[2]), (".x.jsonl", ROWS[3])):
        data = csv_bytes([row]) if name.endswith("csv") else jsonl([row])
        (tmp_path / name).write_bytes(data)
    (tmp_path / "notes.md").write_text("not data")

    found = [row.value for row in read_rows(str(tmp_path)) if isinstance(row, RawRow)]

    assert found == ROWS[:3]


class Bucket:
    """What boto3 says of a folder, as if it lay in a bucket."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get_paginator(self, _: str) -> "Bucket":
        """Itself: one page holds all."""
        return self

    def paginate(self, Bucket: str, Prefix: str) -> list[dict[str, list[dict[str, str]]]]:
        """Every key."""
        files = [file for file in self.folder.rglob("*") if file.is_file()]
        return [{"Contents": [{"Key": Prefix + file.relative_to(self.folder).as_posix()} for file in files]}]

    def get_object(self, Bucket: str, Key: str) -> dict[str, io.BytesIO]:
        """One object."""
        return {"Body": io.BytesIO((self.folder / Key.removeprefix("bob/")).read_bytes())}


def test_a_folder_and_its_copy_in_a_bucket_are_read_alike(tmp_path: Path) -> None:
    """In one order, without what editors and systems leave behind: equal data has one digest wherever it lies."""
    for name, row in (("a/c.jsonl", ROWS[0]), ("a.jsonl", ROWS[1]), ("a-1/b.jsonl", ROWS[2]), ("._a.jsonl", ROWS[3]),
                      (".ipynb_checkpoints/a.jsonl", ROWS[3])):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jsonl([row]))

    here = [row.value for row in read_rows(str(tmp_path)) if isinstance(row, RawRow)]
    there = [row.value for row in read_rows("s3://x/bob/", s3=Bucket(tmp_path)) if isinstance(row, RawRow)]

    assert here == there == [ROWS[2], ROWS[1], ROWS[0]]


@pytest.fixture
def bucket(s3_url: str) -> tuple[str, Any]:
    """The URL of a new bucket, and a client that reaches it."""
    client = s3_client()
    client.create_bucket(Bucket=s3_url.removeprefix("s3://"))
    return s3_url, client


def test_s3_objects_and_prefixes_are_read(bucket: tuple[str, Any]) -> None:
    """From the same servers that adapters go to."""
    url, client = bucket
    name = url.removeprefix("s3://")
    client.put_object(Bucket=name, Key="bob/1.jsonl", Body=jsonl(ROWS[:2]))
    client.put_object(Bucket=name, Key="bob/2.csv.gz", Body=gzip.compress(csv_bytes(ROWS[2:])))

    assert [row.value for row in read_rows(f"{url}/bob/", s3=client) if isinstance(row, RawRow)] == ROWS
    assert len(list(read_rows(f"{url}/bob/1.jsonl", s3=client))) == 2
    with pytest.raises(DatasetRefused, match="NoSuchKey"):
        list(read_rows(f"{url}/bob/3.jsonl", s3=client))


def test_a_whole_bucket_is_read_whatever_else_is_in_it(bucket: tuple[str, Any]) -> None:
    """With and without the slash; a key is taken letter by letter."""
    url, client = bucket
    odd = "what?/#1.jsonl"
    for key, data in (("README.md", b"not data"), (odd, jsonl(ROWS))):
        client.put_object(Bucket=url.removeprefix("s3://"), Key=key, Body=data)

    for source in (url, f"{url}/", f"{url}/what?/", f"{url}/{odd}"):
        assert {row.file for row in read_rows(source, s3=client)} == {f"{url}/{odd}"}


def test_s3_without_a_client_is_refused() -> None:
    """Who calls decides how S3 is reached."""
    with pytest.raises(DatasetRefused, match="no client"):
        list(read_rows("s3://bucket/a.jsonl"))


BAD_LINES = {
    b'{"a": 1': "not JSON",
    b"[1, 2]": "not an object",
    b'"text"': "not an object",
    b'{"a": NaN}': "NaN",
    b'{"a": 1, "a": 2}': "stands twice",
    b'{"a": "\xff"}': "not UTF-8",
    b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}": "nested",
    b'{"a": "' + b"x" * (1 << 20) + b'"}': "longer than",
    b"{'a': 1}": "not JSON",
    b'{"a": 1} {"b": 2}': "not JSON",
    b'{"a": "\xed\xa0\x80"}': "not UTF-8",
    b'{"n": ' + b"9" * 5000 + b"}": "JSON",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_told_by_number_and_the_rest_is_read(tmp_path: Path, line: bytes) -> None:
    """The rows before and after it are good."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl(ROWS[:1]) + line + b"\n" + jsonl(ROWS[1:2]))

    good, bad, last = read_rows(str(path))

    assert isinstance(bad, RowProblem)
    assert (bad.line, BAD_LINES[line] in bad.why) == (2, True), bad
    assert isinstance(good, RawRow)
    assert isinstance(last, RawRow)
    assert last.line == 3


REFUSED = {
    "x.json": (b"[1, 2", "not JSON"),
    "y.json": (b"[" * 100_000, "nested"),
    "x.jsonl.gz": (b"not gzip at all", "gzip"),
    "y.jsonl.gz": (gzip.compress(jsonl(ROWS) * 100)[:-10], "gzip"),
    "x.jsonl.zst": (b"not zstd", "broken"),
    "y.jsonl.zst": (zstandard.compress(jsonl(ROWS) * 100)[:-10], "not whole zstd"),
    "z.jsonl.zst": (zstandard.compress(jsonl(ROWS)) + zstandard.compress(jsonl(ROWS))[:-1], "not whole zstd"),
    "x.parquet": (b"PAR1 no", "broken"),
    "x.csv": (b"prompt,completion\n\xff\xfe,1\n", "UTF-8"),
    "x.txt": (b"hello", "known format"),
    "x.bin.gz": (gzip.compress(b"hello"), "known format"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_broken_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """Whole, with what to do."""
    data, why = REFUSED[name]
    (tmp_path / name).write_bytes(data)

    with pytest.raises(DatasetRefused, match=why) as caught:
        list(read_rows(str(tmp_path / name)))

    assert name in str(caught.value)


@pytest.mark.parametrize("bomb", [gzip.compress, lambda data: zstandard.ZstdCompressor().compress(data)])
def test_a_decompression_bomb_ends_at_the_limit(tmp_path: Path, bomb: Callable[[bytes], bytes]) -> None:
    """A few kilobytes that would be many megabytes."""
    path = tmp_path / ("x.jsonl.gz" if bomb is gzip.compress else "x.jsonl.zst")
    path.write_bytes(bomb(b"\n" * (1 << 24)))

    with pytest.raises(DatasetRefused, match="once decompressed"):
        list(read_rows(str(path), Limits(file_bytes=1 << 20)))


def test_too_many_rows_or_files_are_refused(tmp_path: Path) -> None:
    """A mistaken path to a whole archive."""
    for number in range(4):
        (tmp_path / f"{number}.jsonl").write_bytes(jsonl(ROWS))

    with pytest.raises(DatasetRefused, match="12 rows|more than 12"):
        list(read_rows(str(tmp_path), Limits(rows=12)))
    with pytest.raises(DatasetRefused, match="more than 3 files"):
        list(read_rows(str(tmp_path), Limits(files=3)))


def test_frames_one_after_another_are_read(tmp_path: Path) -> None:
    """As `cat`, `pzstd` and log shippers write them, with frames between that hold no data."""
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"note"
    whole = zstandard.compress(jsonl(ROWS[:2])) + skippable + zstandard.compress(jsonl(ROWS[2:]))
    (tmp_path / "x.jsonl.zst").write_bytes(whole)

    assert [row.value for row in read_rows(str(tmp_path / "x.jsonl.zst")) if isinstance(row, RawRow)] == ROWS


def test_a_row_of_very_many_keys_is_told_at_once(tmp_path: Path) -> None:
    """It stays below the limit of a row, and would once have cost a minute."""
    keys = [f'"{number}": 1' for number in range(50_000)]
    (tmp_path / "x.jsonl").write_text("{" + ", ".join([*keys, keys[-1]]) + "}\n")
    before = time.monotonic()

    (problem,) = read_rows(str(tmp_path / "x.jsonl"))

    assert isinstance(problem, RowProblem)
    assert "stands twice" in problem.why
    assert time.monotonic() - before < 5


@pytest.mark.parametrize(
    "given_",
    ["", "nowhere.jsonl", "/dev/null", "s3://", "s3://[", "~nosuchuser/x.jsonl", pytest.param("x" * 300, id="long")],
)
def test_a_source_that_is_none_is_refused(given_: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Said at once, without a traceback."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")

    with pytest.raises(DatasetRefused):
        list(read_rows(given_, s3=s3_client()))


def test_pairs_come_in_cells_as_text_or_as_lists_of_turns(tmp_path: Path) -> None:
    """Only what begins like a list of turns is one."""
    turns = [{"role": "assistant", "content": "[yes]"}]
    (tmp_path / "x.csv").write_bytes(csv_bytes([{"prompt": "q", "chosen": json.dumps(turns), "rejected": "[no]"}]))

    (row,) = read_rows(str(tmp_path / "x.csv"))

    assert isinstance(row, RawRow)
    assert row.value == {"prompt": "q", "chosen": turns, "rejected": "[no]"}


def test_an_empty_cell_is_no_list(tmp_path: Path) -> None:
    """A table of rows of two kinds has columns for both."""
    turns = [{"role": "assistant", "content": "yes"}]
    rows = [{"messages": "", "prompt": "q", "completion": "a"}, {"messages": json.dumps(turns), "prompt": ""}]
    (tmp_path / "x.csv").write_bytes(csv_bytes(rows))

    snapshot, report = take_snapshot([str(tmp_path / "x.csv")])

    assert (len(snapshot.examples), report.bad) == (2, 0)


@pytest.mark.parametrize(
    ("name", "content"), [("x.csv", "prompt;completion\nq;a, b\n"), ("x.csv", "text|a\n"), ("x.tsv", "a,b\nq,a\n")]
)
def test_cells_apart_by_another_mark_are_told_once(tmp_path: Path, name: str, content: str) -> None:
    """As a spreadsheet writes them where the comma stands in numbers; not as hundreds of bad rows."""
    (tmp_path / name).write_text(content)

    with pytest.raises(DatasetRefused, match=r"separates; save it with commas as \.csv"):
        list(read_rows(str(tmp_path / name)))


@pytest.mark.parametrize("line", [b"a,b\n1\n", b"a,b\n1,2,3\n", b'a,b\n"1,2\n'])
def test_a_csv_row_of_the_wrong_shape_is_told(tmp_path: Path, line: bytes) -> None:
    """By line."""
    (tmp_path / "x.csv").write_bytes(line)

    (problem,) = read_rows(str(tmp_path / "x.csv"))

    assert isinstance(problem, RowProblem)


def test_numbers_that_are_none_stand_in_nobodys_way(tmp_path: Path) -> None:
    """A table's columns of scores and the like hold NaN and infinities, which JSON does not know."""
    odd = [math.nan, math.inf]
    table = pa.table(
        {"text": ["a", "b"], "score": odd, "scores": [odd, odd], "more": [{"deep": number} for number in odd]}
    )
    pq.write_table(table, tmp_path / "a.parquet")

    found = list(read_rows(str(tmp_path / "a.parquet")))

    assert [row.value["text"] for row in found if isinstance(row, RawRow)] == ["a", "b"]


def test_a_row_may_be_as_long_in_every_format(tmp_path: Path) -> None:
    """Counted as UTF-8, in which a letter beyond ASCII takes a half of what JSON's escapes do, or less."""
    rows = [{"text": "\u8a9e" * 300_000}]
    for name in FILES:
        path = tmp_path / name
        path.write_bytes(FILES[name](rows) if name != "a.json" else json.dumps(rows, ensure_ascii=False).encode())

        assert [row.value for row in read_rows(str(path)) if isinstance(row, RawRow)] == rows


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=400), st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.zst"])
)
def test_no_bytes_whatever_break_the_reader(tmp_path: Path, data: bytes, ending: str) -> None:
    """Either rows and problems, or a refusal: never another error."""
    path = tmp_path / f"x{ending}"
    path.write_bytes(data)

    with contextlib.suppress(DatasetRefused):
        take_snapshot([str(path)])
